// Elements in pairs and words for the epilogues of the sm_90 GEMM kernels; the order of those in
// e4m3 is that of narrow.cuh.
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.cuh"

namespace ft::cuda::sm90 {

// Of the four words of each of a quad's lanes: word i of lane q and word q of lane i change places.
__device__ __forceinline__ void turn_quad(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & mask) != 0) continue;
      const uint32_t given = upper ? w[i] : w[i + mask];
      const uint32_t taken = __shfl_xor_sync(0xFFFFFFFFu, given, mask);
      w[i] = upper ? taken : w[i];
      w[i + mask] = upper ? w[i + mask] : taken;
    }
  }
}

// Two neighbouring elements of a parameter vector.
template <typename T>
__device__ __forceinline__ uint32_t pair_at(const void* vector, int column) {
  return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(vector) + column));
}

}  // namespace ft::cuda::sm90
