// Sums, maxima and scans over lanes, warps and blocks.
//
// The order in which a reduction joins its lanes is part of it: another order is another rounding.
#pragma once

#include <cstdint>

namespace ft::cuda {

#ifdef __CUDACC__

// The sum over each group of kLanes neighbouring lanes, in every one of them; distant lanes first.
template <int kLanes, typename Value>
__device__ __forceinline__ Value lane_sum(Value x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask >>= 1) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  }
  return x;
}

// Of the four lanes that share a row of a matrix product's accumulators; neighbours first.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ bool quad_all(bool x) {
  int all = x;
  all &= __shfl_xor_sync(0xffffffffu, all, 1);
  return (all & __shfl_xor_sync(0xffffffffu, all, 2)) != 0;
}

// Sum over all threads of the block, whose warps number kWarps; `scratch` holds kWarps floats and
// may be used again only after another barrier.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = lane_sum<32>(x);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += scratch[i];
  }
  return x;
}

// Inclusive sum over the threads of a block of kThreads; all of them get the block's total too.
// `scratch` holds an int a warp and may be used again at once.
template <int kThreads>
__device__ __forceinline__ int block_scan(int x, int* scratch, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int below = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += below;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = x;
  __syncthreads();
  int before = 0, all = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    before += i < warp ? scratch[i] : 0;
    all += scratch[i];
  }
  *total = all;
  return x + before;
}

#endif  // __CUDACC__

}  // namespace ft::cuda
