// The whole encoder over packed tokens: embeddings, then every layer, enqueued back to back.
#pragma once

#include "kernels/cuda/kernels.h"

namespace ft::cuda {

// Weights of all layers stacked: [layers, n, k] and [layers, n].
struct EncoderWeights {
  const void *word, *position, *token_type, *embedding_gamma, *embedding_beta;
  const void *qkv_weight, *qkv_bias;     // [layers, 3 * hidden, hidden], [layers, 3 * hidden]
  const void *out_weight, *out_bias;     // [layers, hidden, hidden]
  const void *norm1_gamma, *norm1_beta;  // [layers, hidden]
  const void *up_weight, *up_bias;       // [layers, intermediate, hidden]
  const void *down_weight, *down_bias;   // [layers, hidden, intermediate]
  const void *norm2_gamma, *norm2_beta;
};

struct EncoderShape {
  int tokens = 0, batch = 0, max_seqlen = 0;
  int hidden = 0, intermediate = 0, layers = 0, num_heads = 0;
  int vocab = 0, positions = 0, types = 0;
  float eps = 1e-12f;
  DType dtype = DType::kFloat16;
};

struct EncoderInputs {
  const void* input_ids = nullptr;       // [tokens]
  const void* token_type_ids = nullptr;  // [tokens]
  IntType id_type = IntType::kInt64;
  const int32_t* position_ids = nullptr;  // [tokens] or null
  const int32_t* cu_seqlens = nullptr;    // [batch + 1]
};

// Bytes of scratch memory one forward pass uses; 256-byte aligned.
size_t encoder_workspace_bytes(const EncoderShape& shape);

// Enqueues the forward pass. `output` [tokens, hidden] also holds activations in between.
cudaError_t encoder(const EncoderShape& shape, const EncoderInputs& inputs,
                    const EncoderWeights& weights, void* workspace, void* output,
                    cudaStream_t stream);

}  // namespace ft::cuda
