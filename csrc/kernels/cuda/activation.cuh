// Activations on the device.
#pragma once

#include <cfloat>
#include <type_traits>

#include "kernels/cuda/elements.cuh"
#include "kernels/gelu.h"
#include "kernels/types.h"

namespace ft::cuda {

// Horner's rule from coefficient `kAt` down to `kEnd`.
template <typename Gelu, int kAt, int kEnd = 0>
__device__ __forceinline__ float gelu_polynomial(float p, float y) {
  constexpr float kCoefficient = Gelu::kCoefficients[kAt];
  p = fmaf(p, y, kCoefficient);
  if constexpr (kAt > kEnd) {
    return gelu_polynomial<Gelu, kAt - 1, kEnd>(p, y);
  } else {
    return p;
  }
}

// x Phi(x) for a result of type T (kernels/gelu.h): 9 instructions for float16, 11 for bfloat16, 13
// for float32. Plus infinity stays; minus infinity becomes NaN, as in torch, and NaN stays NaN.
template <typename T>
__device__ __forceinline__ float gelu(float x) {
  using Gelu =
      std::conditional_t<std::is_same_v<T, float>, GeluFloat32,
                         std::conditional_t<std::is_same_v<T, __half>, GeluFloat16, GeluBFloat16>>;
  constexpr int kLast = sizeof(Gelu::kCoefficients) / sizeof(float) - 1;
  constexpr float kLeading = Gelu::kCoefficients[kLast];
  const float y = fabsf(x), p = gelu_polynomial<Gelu, kLast - 1>(kLeading, y);
  const float tail = power_of_two(p);  // Phi(-|x|)
  return x * (x < 0.f ? tail : 1.f - tail);
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To base 2.
__device__ __forceinline__ float logarithm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// GELU in steps of an e4m3 tensor, float16's polynomial: max(x, 0) - |x| Phi(-|x|), where the steps
// are a factor of the power of two. Plus infinity becomes NaN here: e4m3 has none.
class GeluInSteps {
 public:
  __device__ __forceinline__ explicit GeluInSteps(float step)
      : inverse_(reciprocal(step)), constant_(kConstant + logarithm(inverse_)) {}

  __device__ __forceinline__ float operator()(float x) const {
    constexpr int kLast = sizeof(GeluFloat16::kCoefficients) / sizeof(float) - 1;
    constexpr float kLeading = GeluFloat16::kCoefficients[kLast];
    const float y = fabsf(x), p = gelu_polynomial<GeluFloat16, kLast - 1, 1>(kLeading, y);
    return fmaf(-y, power_of_two(fmaf(p, y, constant_)), fmaxf(x * inverse_, 0.f));
  }

 private:
  static constexpr float kConstant = GeluFloat16::kCoefficients[0];
  float inverse_, constant_;
};

// x / (1 + 2^(x (linear + cubic x^2))). Nothing is subtracted from nearly its own value: both tails
// keep their digits. Infinities as above, where `cubic` is not zero.
__device__ __forceinline__ float gated(float x, float linear, float cubic) {
  return x * reciprocal(1.f + power_of_two(x * fmaf(cubic * x, x, linear)));
}

// Calls each(f) with f(x) of an activation other than GELU. The branch is the same for all threads
// and stands outside of each's loop.
template <typename Each>
__device__ __forceinline__ void activate_but_gelu(Activation activation, Each&& each) {
  if (activation == Activation::kRelu) {
    each([](float x) { return x < 0.f ? 0.f : x; });  // NaN stays
  } else {
    const bool tanh = activation == Activation::kGeluTanh;
    const float linear = tanh ? -kGeluTanhLinear : -1.4426950408889634f;
    const float cubic = tanh ? -kGeluTanhCubic : -FLT_MIN;  // zero times an infinity were NaN
    each([=](float x) { return gated(x, linear, cubic); });
  }
}

// The same of any activation, for a result of type T.
template <typename T, typename Each>
__device__ __forceinline__ void activate(Activation activation, Each&& each) {
  if (activation == Activation::kGelu) {
    each([](float x) { return gelu<T>(x); });
  } else {
    activate_but_gelu(activation, each);
  }
}

}  // namespace ft::cuda
