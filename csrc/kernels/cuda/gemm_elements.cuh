// Elements in pairs, and GELU, for the epilogues of the sm_90 GEMM kernels.
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

// Two neighbouring elements of a parameter vector.
template <typename T>
__device__ __forceinline__ uint32_t pair_at(const void* vector, int column) {
  return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(vector) + column));
}

// x * Phi(x), the exact (erf) form, as x / 2 * (1 + tanh(x * q(x^2))): q fits atanh(erf(x / sqrt
// 2)) / x so that GELU is off by at most 2.6e-5, and the tanh instruction adds at most 2.5e-4 |x|,
// under half a unit in fp16's last place. Half the instructions of an erfc by polynomial and
// exponential.
__device__ __forceinline__ float gelu(float x) {
  const float square = fminf(x * x, 30.f);  // the fit ends at 6, where tanh is 1
  const float q = fmaf(fmaf(-3.53065737e-4f, square, 3.70151996e-2f), square, 7.97497361e-1f);
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * q));
  const float half = 0.5f * x;
  return fmaf(half, t, half);
}

}  // namespace ft::cuda::sm90
