// One row's layer norm from registers, shared by the residual and the embedding kernels.
#pragma once

#include "kernels/cuda/narrow.cuh"

namespace ft::cuda {

// Rows of at most 32 * 8 * kWarpVecs elements take one warp each, longer ones a block.
constexpr int kWarpVecs = 4;
constexpr int kBlockThreads = 256;
constexpr int kBlockVecs = 4;

// Which elements of a row this thread holds: vector v covers columns [column(v), column(v) + 8).
template <int kThreads>
__device__ __forceinline__ int row_column(int v) {
  return 8 * (static_cast<int>(threadIdx.x) % kThreads + v * kThreads);
}

template <typename T, int kThreads, int kVecs>
struct RowWeights {
  Vec8<T> gamma[kVecs], beta[kVecs];
  __device__ __forceinline__ void load(const T* gamma_row, const T* beta_row, int hidden) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int column = row_column<kThreads>(v);
      if (column < hidden) {
        gamma[v].load(gamma_row + column);
        beta[v].load(beta_row + column);
      }
    }
  }
};

// The row that begins at element `begin` of the output, and its copy. Mean, then the sum of squared
// deviations: both from registers, so the second pass costs no
// traffic and does not cancel.
template <typename T, int kThreads, int kVecs>
__device__ __forceinline__ void normalize_row(float (&x)[kVecs][8],
                                              const RowWeights<T, kThreads, kVecs>& weights,
                                              int hidden, float eps, int64_t begin, T* output,
                                              const NarrowWriter& narrow) {
  __shared__ float scratch[2][kThreads / 32];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[v][i];  // columns beyond hidden hold zeros
  }
  const float mean = block_sum<kThreads / 32>(sum, scratch[0]) / static_cast<float>(hidden);
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (row_column<kThreads>(v) < hidden) {
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += (x[v][i] - mean) * (x[v][i] - mean);
    }
  }
  const float variance = block_sum<kThreads / 32>(squares, scratch[1]) / static_cast<float>(hidden);
  const float scale = rsqrtf(variance + eps);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = row_column<kThreads>(v);
    float y[8] = {};
    if (column < hidden) {
      float gamma[8] = {};
      weights.gamma[v].add_to(gamma);
      weights.beta[v].add_to(y);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += (x[v][i] - mean) * scale * gamma[i];
      Vec8<T>::store(output + begin + column, y);
    }
    narrow.write(begin + column, y, column < hidden);
  }
}

// Zeros, in the place of a row of padding.
template <typename T, int kThreads, int kVecs>
__device__ __forceinline__ void clear_row(int hidden, int64_t begin, T* output,
                                          const NarrowWriter& narrow) {
  const float zeros[8] = {};
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = row_column<kThreads>(v);
    if (column >= hidden) continue;
    Vec8<T>::store(output + begin + column, zeros);
    if (narrow.rows != nullptr) *reinterpret_cast<uint2*>(narrow.rows + begin + column) = {};
  }
}

// Calls body.template operator()<kThreads, kVecs>() for the smallest shape that holds `hidden`, or
// returns cudaErrorInvalidValue where none does.
template <typename Body>
cudaError_t dispatch_row_shape(int hidden, Body&& body) {
  const int warp_vecs = (hidden + 255) / 256;
  switch (warp_vecs) {
    case 1:
      return body.template operator()<32, 1>();
    case 2:
      return body.template operator()<32, 2>();
    case 3:
      return body.template operator()<32, 3>();
    case 4:
      return body.template operator()<32, 4>();
    default:
      break;
  }
  switch ((hidden + 8 * kBlockThreads - 1) / (8 * kBlockThreads)) {
    case 1:
      return body.template operator()<kBlockThreads, 1>();
    case 2:
      return body.template operator()<kBlockThreads, 2>();
    case 3:
    case 4:
      return body.template operator()<kBlockThreads, 4>();
    default:
      return cudaErrorInvalidValue;
  }
}

inline bool fits_row_shape(int hidden) {
  return hidden % 8 == 0 && hidden <= 8 * kBlockThreads * kBlockVecs;
}

// Rows per block when a warp serves a row: single warps spread few rows over the chip.
inline int rows_per_block(int rows, int threads_per_row) {
  if (threads_per_row > 32) return 1;
  return rows >= 8 * device_sms() ? 4 : 1;
}

// Calls body.template operator()<T>() for the dtype.
template <typename Body>
cudaError_t dispatch_dtype(DType dtype, Body&& body) {
  if (cudaError_t status = check_dtype(dtype); status != cudaSuccess) return status;
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat16:
      return body.template operator()<__half>();
    case DType::kBFloat16:
      return body.template operator()<__nv_bfloat16>();
    case DType::kInt8:
    case DType::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace ft::cuda
