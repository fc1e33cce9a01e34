// A C interface to the CUDA kernels, so that kernels_bench.py can load them with ctypes and compare
// them with torch without the torch binding.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -DFT_WITH_SM90 -Icsrc -shared -Xcompiler -fPIC
//        -gencode=arch=compute_90a,code=sm_90a benchmarks/cuda/kernels_api.cu
//        csrc/kernels/cuda/{attention*,layer_norm,embedding,activation,padding,pooling}.cu
//        csrc/kernels/cuda/runtime.cpp -o libkernels.so

#include "kernels/cuda/kernels.h"

using namespace ft::cuda;
using ft::Activation;
using ft::DType;

#define FT_API extern "C" __attribute__((visibility("default")))

namespace {
AttentionShape shape_of(int batch, int tokens, int max_seqlen, int heads, int head_dim, int dtype) {
  return {batch, tokens, max_seqlen, heads, head_dim, static_cast<DType>(dtype)};
}
Launch launch_on(void* stream, int pdl) { return {static_cast<cudaStream_t>(stream), pdl != 0}; }
}  // namespace

FT_API size_t ft_attention_plan_bytes(int batch, int tokens, int max_seqlen, int heads,
                                      int head_dim, int dtype) {
  return attention_plan_bytes(shape_of(batch, tokens, max_seqlen, heads, head_dim, dtype));
}

FT_API int ft_attention_plan(int batch, int tokens, int max_seqlen, int heads, int head_dim,
                             int dtype, const int32_t* cu_seqlens, void* plan, void* stream,
                             int pdl) {
  return attention_plan(shape_of(batch, tokens, max_seqlen, heads, head_dim, dtype), cu_seqlens,
                        plan, launch_on(stream, pdl));
}

FT_API int ft_varlen_attention(int batch, int tokens, int max_seqlen, int heads, int head_dim,
                               int dtype, const void* qkv, void* plan, void* output, void* stream,
                               int pdl) {
  return varlen_attention(shape_of(batch, tokens, max_seqlen, heads, head_dim, dtype), qkv, nullptr,
                          plan, output, launch_on(stream, pdl));
}

FT_API int ft_residual_layer_norm(const void* input, const void* bias, const void* residual,
                                  const void* gamma, const void* beta, float eps, int rows,
                                  int hidden, int dtype, void* output, void* stream, int pdl) {
  return residual_layer_norm(input, bias, residual, gamma, beta, eps, rows, hidden,
                             static_cast<DType>(dtype), output, nullptr, launch_on(stream, pdl));
}

FT_API int ft_embedding_layer_norm(const void* ids, const void* types, int id_type,
                                   const int32_t* positions, const int32_t* cu_seqlens, int batch,
                                   int tokens, int hidden, const void* word, int vocab,
                                   const void* position, int position_rows, const void* token_type,
                                   int type_rows, const void* gamma, const void* beta, float eps,
                                   int dtype, void* output, void* stream, int pdl) {
  return embedding_layer_norm(ids, types, static_cast<IntType>(id_type), positions, cu_seqlens,
                              batch, tokens, hidden, word, vocab, position, position_rows,
                              token_type, type_rows, gamma, beta, eps, static_cast<DType>(dtype),
                              output, launch_on(stream, pdl));
}

FT_API int ft_bias_gelu(const void* input, const void* bias, int rows, int width, int dtype,
                        void* output, void* stream, int pdl) {
  return bias_activation(input, bias, nullptr, Activation::kGelu, rows, width,
                         static_cast<DType>(dtype), output, nullptr, launch_on(stream, pdl));
}
