// What kernels ask of cu_seqlens: it lies in device memory, where the host does not look at it.
#pragma once

#include <cstdint>

namespace ft::cuda {

#ifdef __CUDACC__

// Whether cu_seqlens ascends from 0 to at most `tokens` in steps of at most `longest`, asked of one
// of its steps: unsigned numbers leave out what is negative or overflows.
__device__ __forceinline__ bool step_valid(const int32_t* cu_seqlens, int i, int tokens,
                                           int longest) {
  const auto from = static_cast<uint32_t>(cu_seqlens[i]);
  const auto to = static_cast<uint32_t>(cu_seqlens[i + 1]);
  return to <= static_cast<uint32_t>(tokens) && to - from <= static_cast<uint32_t>(longest) &&
         (i > 0 || from == 0);
}

// The same of all its steps, asked by a whole block of kThreads together.
template <int kThreads>
__device__ __forceinline__ bool steps_valid(const int32_t* cu_seqlens, int batch, int tokens,
                                            int longest) {
  int valid = 1;
  for (int i = threadIdx.x; i < batch; i += kThreads) {
    valid &= step_valid(cu_seqlens, i, tokens, longest);
  }
  return __syncthreads_and(valid) != 0;
}

// The sequence that holds packed row `row`: how many of cu_seqlens[1..batch] are <= row. All 32
// lanes take part and get the answer; each step looks at 32 boundaries.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens, int batch, int row) {
  const int lane = threadIdx.x % 32;
  int low = 0, count = batch;
  while (count > 0) {
    const int step = (count + 31) / 32;
    const int probe = low + (lane + 1) * step - 1;
    const bool below = probe < low + count && cu_seqlens[probe + 1] <= row;
    const int whole = __popc(__ballot_sync(0xffffffffu, below));
    const int end = low + count;
    low += whole * step;
    count = step == 1 ? 0 : min(step, end - low);
  }
  return low;
}

#endif  // __CUDACC__

}  // namespace ft::cuda
