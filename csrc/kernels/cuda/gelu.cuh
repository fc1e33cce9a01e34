// GELU on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/gelu.h"

namespace ft::cuda {

// Horner's rule from coefficient `kAt` down.
template <typename Gelu, int kAt>
__device__ __forceinline__ float gelu_polynomial(float p, float y) {
  constexpr float kCoefficient = Gelu::kCoefficients[kAt];
  p = fmaf(p, y, kCoefficient);
  if constexpr (kAt > 0) {
    return gelu_polynomial<Gelu, kAt - 1>(p, y);
  } else {
    return p;
  }
}

// x Phi(x) for a result of type T (kernels/gelu.h): 8 instructions for float16, 10 for bfloat16, 12
// for float32. NaN and infinities become NaN.
template <typename T>
__device__ __forceinline__ float gelu(float x) {
  using Gelu =
      std::conditional_t<std::is_same_v<T, float>, GeluFloat32,
                         std::conditional_t<std::is_same_v<T, __half>, GeluFloat16, GeluBFloat16>>;
  constexpr int kLast = sizeof(Gelu::kCoefficients) / sizeof(float) - 1;
  constexpr float kLeading = Gelu::kCoefficients[kLast];
  const float y = fabsf(x), p = gelu_polynomial<Gelu, kLast - 1>(kLeading, y);
  float q;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(q) : "f"(p));
  return fmaf(-y, q, fmaxf(x, 0.f));
}

}  // namespace ft::cuda
