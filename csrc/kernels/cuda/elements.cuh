// Elements on the device: one number, the pairs that tensor cores and registers take, and pieces of
// eight, of every type to fp32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ft::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values packed into the 32 bits that the tensor cores want, the first lowest.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float x, float y) {
  __half2 both = __floats2half2_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float x, float y) {
  __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t both) {
  return __half22float2(*reinterpret_cast<__half2*>(&both));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t both) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&both));
}

// Four numbers in e4m3, the first lowest; what is too large becomes the largest, 448, and NaN stays
// NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float x, float y, float z, float w) {
  uint32_t four = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(four)
      : "f"(x), "f"(y), "f"(z), "f"(w));
#endif
  return four;
}

// 2^x to within 2^-22 of itself; what is not a normal number becomes zero.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Eight elements in their memory format, 16-byte aligned.
template <typename T>
struct Vec8 {
  uint4 bits;
  __device__ __forceinline__ void load(const T* from) {
    bits = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ void clear() { bits = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void add_to(float (&x)[8]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = unpack2<T>(words[i]);
      x[2 * i] += both.x;
      x[2 * i + 1] += both.y;
    }
  }
  __device__ __forceinline__ static void store(T* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                                               pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  }
};

template <>
struct Vec8<float> {
  float4 low, high;
  __device__ __forceinline__ void load(const float* from) {
    low = reinterpret_cast<const float4*>(from)[0];
    high = reinterpret_cast<const float4*>(from)[1];
  }
  __device__ __forceinline__ void clear() { low = high = make_float4(0.f, 0.f, 0.f, 0.f); }
  __device__ __forceinline__ void add_to(float (&x)[8]) const {
    x[0] += low.x, x[1] += low.y, x[2] += low.z, x[3] += low.w;
    x[4] += high.x, x[5] += high.y, x[6] += high.z, x[7] += high.w;
  }
  __device__ __forceinline__ static void store(float* to, const float (&x)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
};

#endif  // __CUDACC__

}  // namespace ft::cuda
