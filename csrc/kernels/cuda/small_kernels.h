// The few-token kernels as their launcher sees them: parameters, and the table of functions.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/small_layout.h"

namespace ft::cuda::small {

struct GemmMaps {
  CUtensorMap weight_map;  // of weight, boxes of a chunk by a tile's columns
  CUtensorMap input_map;   // of input, boxes of a chunk by held_rows
};

struct GemmTensors {
  const void* input;       // [tokens, k]; kAttention: qkv [tokens, 3k]
  const void* weight;      // [n, k]
  const void* bias;        // [n]
  void* output;            // [tokens, n]
  void* scaled_output;     // [tokens, n], output * next_gamma
  const void* residual;    // [tokens, n]
  const float2* moments;   // [tokens, even(parts)] of input or residual; null: already normalised
  const void* gamma;       // [width]
  const void* beta;        // [width]
  const void* next_gamma;  // [n]
  float2* moments_out;     // [tokens, even(column tiles)]
  const int* cu_seqlens;   // [batch + 1]
};

struct GemmParams : GemmMaps, GemmTensors, GemmSizes {
  float eps, scale_log2;
  bool far_ahead;  // successors may start at once, else when this kernel has its inputs on the way
  const void* prefetch;  // the next kernel's weights, to be brought into L2; may be null
  unsigned prefetch_bytes;
};

struct NormParams {
  const void* input;      // [tokens, width]
  const float2* moments;  // [tokens, even(parts)]
  const void* gamma;
  const void* beta;
  void* output;  // [tokens, width]
  int tokens, parts, part_width, width;
  float eps;
};

constexpr int kNormThreads = 128;
constexpr int kNormRows = kNormThreads / 32;  // a warp each

// The kernels of one type; null where a tile does not serve a kind.
struct Functions {
  const void* gemm[kKinds][kTileCount];
  const void* norm;
};
extern const Functions kHalfFunctions;
extern const Functions kBFloat16Functions;

}  // namespace ft::cuda::small
