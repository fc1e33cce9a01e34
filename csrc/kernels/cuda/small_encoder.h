// The encoder stack for few tokens on Hopper: four chained kernels a layer, no host
// synchronisation.
#pragma once

#include <cstddef>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/small_plan.h"

namespace ft::cuda {

// Stacked over layers, row-major, 16-byte aligned. L layers, H hidden, I intermediate.
struct SmallWeights {
  const void* qkv_weight;   // [L,3H,H]
  const void* qkv_bias;     // [L,3H]
  const void* out_weight;   // [L,H,H]
  const void* out_bias;     // [L,H]
  const void* ln1_gamma;    // [L,H]
  const void* ln1_beta;     // [L,H]
  const void* up_weight;    // [L,I,H]
  const void* up_bias;      // [L,I]
  const void* down_weight;  // [L,H,I]
  const void* down_bias;    // [L,H]
  const void* ln2_gamma;    // [L,H]
  const void* ln2_beta;     // [L,H]
};

// True when small_encoder is the way to run this shape on this device: compute capability 9.0, and
// a plan (small_plan.h).
bool small_encoder_supported(const SmallShape& shape, const cudaDeviceProp& device);

// Bytes of workspace small_encoder needs, a multiple of 256.
size_t small_encoder_workspace(const SmallShape& shape);

// hidden [tokens,H] holds the embedded and normalised input and receives the last layer's output.
// workspace is 256-byte aligned, its content is neither read before being written nor kept.
// Launches only: capturable, reentrant, no state outside hidden and workspace.
cudaError_t small_encoder(const SmallShape& shape, const SmallWeights& weights, float eps,
                          const int* cu_seqlens,  // [batch+1]
                          void* hidden, void* workspace, cudaStream_t stream);

// The same with a plan chosen by the caller, for tuning.
cudaError_t small_encoder_planned(const SmallShape& shape, const SmallPlan& plan,
                                  const SmallWeights& weights, float eps, const int* cu_seqlens,
                                  void* hidden, void* workspace, cudaStream_t stream);

}  // namespace ft::cuda
