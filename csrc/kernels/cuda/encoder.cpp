#include "kernels/cuda/encoder.h"

#include <algorithm>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/runtime.h"

#ifdef FT_WITH_SM90
#include "kernels/cuda/small_encoder.h"
#endif

namespace ft::cuda {
namespace {

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

AttentionShape attention_shape(const EncoderShape& s) {
  return {s.batch, s.tokens,          s.max_seqlen, s.num_heads, s.hidden / s.num_heads,
          s.dtype, s.batch_invariant, s.bias_reach};
}

// Where each activation lives in the workspace. The intermediate of the feed-forward block takes
// the place of qkv and the attention's output, which are spent by then; embeddings that a
// projection waits for take it first.
struct Places {
  size_t attended, middle, scratch, plan, gemm, bytes;

  explicit Places(const EncoderShape& s) {
    const size_t row = static_cast<size_t>(size_of(s.dtype)) * static_cast<size_t>(s.tokens);
    const size_t qkv_bytes = rounded(row * 3 * s.hidden);
    const size_t hidden_bytes = rounded(row * s.hidden);
    attended = qkv_bytes;
    middle = std::max({qkv_bytes + hidden_bytes, rounded(row * s.intermediate),
                       s.projects ? rounded(row * s.embedding) : size_t{0}});
    scratch = middle + hidden_bytes;
    plan = scratch + hidden_bytes;
    gemm = plan + rounded(attention_plan_bytes(attention_shape(s)));
    bytes = gemm + gemm_workspace_bytes();
  }
};

// One layer's parameter of so many elements.
Operand at(const Stack& stack, int64_t layer, int64_t elements) {
  Operand one = stack.first;
  one.data =
      static_cast<const char*>(one.data) + layer % stack.layers * elements * size_of(one.dtype);
  return one;
}

#ifdef FT_WITH_SM90
SmallShape small_shape(const EncoderShape& s) {
  return {s.dtype,  s.tokens,       s.batch,     s.max_seqlen,
          s.hidden, s.intermediate, s.num_heads, s.layers};
}
#endif

constexpr int kAttentionWaits = 256;  // tokens from which attention is launched after the product

// Whether the few-token path takes this shape on the current device. It knows GELU alone, no
// relative bias, and parameters that lie one a layer behind each other.
bool takes_small_path([[maybe_unused]] const EncoderShape& s) {
#ifdef FT_WITH_SM90
  const DeviceProperties* device = nullptr;
  return s.few_tokens && !s.batch_invariant && s.one_per_layer && !s.projects &&
         s.activation == Activation::kGelu && s.bias_reach < 0 && s.dtype != DType::kFloat32 &&
         current_device(&device) == cudaSuccess &&
         small_encoder_supported(small_shape(s), device->all);
#else
  return false;
#endif
}

}  // namespace

size_t encoder_workspace_bytes(const EncoderShape& shape) {
#ifdef FT_WITH_SM90
  if (takes_small_path(shape)) return small_encoder_workspace(small_shape(shape));
#endif
  return Places(shape).bytes;
}

cudaError_t encoder(const EncoderShape& s, const EncoderInputs& inputs, const EncoderParameters& w,
                    void* workspace, void* output, cudaStream_t stream) {
  if (s.tokens == 0 || s.batch == 0) return cudaSuccess;
  // The first launch follows copies and kernels that are not ours, so it waits for them in full.
  const Launch first{stream, false};
  const Launch chained{stream, true};
  const auto embed = [&](void* to, Launch launch) {
    return embedding_layer_norm(
        inputs.input_ids, inputs.token_type_ids, inputs.id_type, inputs.position_ids,
        inputs.cu_seqlens, s.batch, s.tokens, s.embedding, w.word, s.vocab, w.position, s.positions,
        w.token_type, s.types, w.embedding_gamma, w.embedding_beta, s.eps, s.dtype, to, launch);
  };
#ifdef FT_WITH_SM90
  if (takes_small_path(s)) {
    const SmallWeights small{
        w.qkv_weight.first.data, w.qkv_bias.first.data,    w.out_weight.first.data,
        w.out_bias.first.data,   w.norm1_gamma.first.data, w.norm1_beta.first.data,
        w.up_weight.first.data,  w.up_bias.first.data,     w.down_weight.first.data,
        w.down_bias.first.data,  w.norm2_gamma.first.data, w.norm2_beta.first.data};
    if (const cudaError_t status = embed(output, first); status != cudaSuccess) return status;
    return small_encoder(small_shape(s), small, s.eps, inputs.cu_seqlens, output, workspace,
                         stream);
  }
#endif
  const Places places(s);
  char* const base = static_cast<char*>(workspace);
  void* const qkv = base;
  void* const up = base;
  void* const attended = base + places.attended;
  void* const middle = base + places.middle;
  void* const scratch = base + places.scratch;
  void* const plan = base + places.plan;
  void* const gemm_workspace = base + places.gemm;
  const int32_t* const live_rows = inputs.cu_seqlens + s.batch;
  const AttentionShape attention = attention_shape(s);
  // Blocks of attention that wait early cost a long product more than their head start is worth:
  // so measured from 384 tokens on; 128 and fewer stay as they were.
  const Launch attends = s.tokens < kAttentionWaits ? chained : first;

  cudaError_t status = attention_plan(attention, inputs.cu_seqlens, plan, first);
  const auto product = [&](const void* input, const Operand& weight, const void* bias,
                           const void* residual, void* to, int n, int k,
                           Activation activation = Activation::kNone) {
    return Gemm{{input, s.dtype}, weight,           bias, residual, to, s.tokens, n, k, activation,
                s.dtype,          s.batch_invariant};
  };
  const auto layer_product = [&](const void* input, const Stack& weight, const Stack& bias,
                                 const void* residual, void* to, int n, int k, int layer,
                                 Activation activation = Activation::kNone) {
    return product(input, at(weight, layer, int64_t{n} * k), at(bias, layer, n).data, residual, to,
                   n, k, activation);
  };
  const auto norm = [&](const Stack& gamma, const Stack& beta, int layer) {
    return GemmNorm{at(gamma, layer, s.hidden).data, at(beta, layer, s.hidden).data, s.eps,
                    live_rows};
  };
  void* const embedded = s.projects ? base : output;
  if (status == cudaSuccess) status = embed(embedded, chained);
  if (status == cudaSuccess && s.projects)
    status = linear(
        product(embedded, w.projection, w.projection_bias, nullptr, output, s.hidden, s.embedding),
        gemm_workspace, chained);
  for (int layer = 0; layer < s.layers && status == cudaSuccess; ++layer) {
    status = linear(layer_product(output, w.qkv_weight, w.qkv_bias, nullptr, qkv, 3 * s.hidden,
                                  s.hidden, layer),
                    gemm_workspace, chained);
    if (status == cudaSuccess)
      status = varlen_attention(attention, qkv, w.relative_bias, plan, attended, attends);
    if (status == cudaSuccess)
      status = linear_layer_norm(layer_product(attended, w.out_weight, w.out_bias, output, middle,
                                               s.hidden, s.hidden, layer),
                                 norm(w.norm1_gamma, w.norm1_beta, layer), scratch, gemm_workspace,
                                 chained);
    if (status == cudaSuccess)
      status = linear(layer_product(middle, w.up_weight, w.up_bias, nullptr, up, s.intermediate,
                                    s.hidden, layer, s.activation),
                      gemm_workspace, chained);
    if (status == cudaSuccess)
      status = linear_layer_norm(layer_product(up, w.down_weight, w.down_bias, middle, output,
                                               s.hidden, s.intermediate, layer),
                                 norm(w.norm2_gamma, w.norm2_beta, layer), scratch, gemm_workspace,
                                 chained);
  }
  return status;
}

}  // namespace ft::cuda
