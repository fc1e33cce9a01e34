// Elements in pairs for the epilogues of the sm_90 GEMM kernels.
//
// The order of an e4m3 matrix: a lane's neighbours in two groups of eight columns become neighbours
// in memory. Of each 16 columns, place 4q + {0, 1, 2, 3} holds {2q, 2q + 1, 8 + 2q, 8 + 2q + 1}.
// The weight that reads it has its columns in the same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace ft::cuda::sm90 {

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Four as e4m3, the first lowest; what is too large becomes the largest.
__device__ __forceinline__ uint32_t pack_e4m3(float x, float y, float z, float w) {
  uint32_t four;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(four)
      : "f"(x), "f"(y), "f"(z), "f"(w));
  return four;
}

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
