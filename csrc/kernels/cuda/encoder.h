// The whole encoder over packed tokens: embeddings, then every layer, enqueued back to back.
#pragma once

#include <array>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "kernels/encoder_spec.h"

namespace ft::cuda {

// A product's weight in e4m3 beside that in 16 bits.
struct NarrowProduct {
  Stack weight;                                  // [n, k] in e4m3; without data there is none
  const float* scale = nullptr;                  // [layers or 1, n], what 1 of a sum is worth
  const float* step = nullptr;                   // [layers or 1], what 1 of an input is worth
  const std::vector<int64_t>* floats = nullptr;  // layers that do without
};

// A stack holds a parameter [n, k] or [n] for each layer, or one for all.
struct EncoderParameters {
  const void *word, *position, *token_type, *embedding_gamma, *embedding_beta;
  Operand projection;           // [hidden, embedding]; without data: the sizes are one
  const void* projection_bias;  // [hidden]
  Stack qkv_weight, qkv_bias;   // [3 * hidden, hidden], [3 * hidden]
  Stack out_weight, out_bias;   // [hidden, hidden]
  Stack norm1_gamma, norm1_beta;
  Stack up_weight, up_bias;      // [intermediate, hidden]
  Stack down_weight, down_bias;  // [hidden, intermediate]
  Stack norm2_gamma, norm2_beta;
  const void* relative_bias;  // [num_heads, 2 * bias_reach + 1], of every layer, or null
  std::array<NarrowProduct, kLayerProducts> narrow;
};

struct EncoderShape {
  int tokens = 0, batch = 0, max_seqlen = 0;
  int hidden = 0, embedding = 0, intermediate = 0, layers = 0, num_heads = 0;
  int vocab = 0, positions = 0, types = 0;
  Activation activation = Activation::kGelu;
  float eps = 1e-12f;
  DType dtype = DType::kFloat16;
  int bias_reach = -1;        // D of the relative bias, -1 where there is none
  bool one_per_layer = true;  // no parameter is shared by the layers
  bool projects = false;
  bool batch_invariant = false;  // a sequence's rows do not depend on the others, to the last bit
  bool few_tokens = true;        // a few tokens may take kernels of their own
  bool narrow = false;           // products have weights in e4m3 too
  bool narrow_pass = false;      // not every up product writes what follows it in e4m3 itself
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
                    const EncoderParameters& weights, void* workspace, void* output,
                    cudaStream_t stream);

}  // namespace ft::cuda
