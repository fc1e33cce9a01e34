// The few-token encoder's last layer norm. All others have no kernel of their own
// (small_product.cuh).
#pragma once

#include <cstdint>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/row_moments.cuh"
#include "kernels/cuda/small_kernels.h"

namespace ft::cuda::small {

// Scale and shift of eight neighbouring columns.
template <typename T>
struct Affine8 {
  float2 scale[4], shift[4];

  __device__ __forceinline__ Affine8(const void* gamma, const void* beta) {
    const uint4 g = *static_cast<const uint4*>(gamma), b = *static_cast<const uint4*>(beta);
    const uint32_t gs[4] = {g.x, g.y, g.z, g.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = unpack2<T>(gs[i]);
      shift[i] = unpack2<T>(bs[i]);
    }
  }

  // x = (x - mean) * rstd * gamma + beta
  __device__ __forceinline__ uint4 operator()(uint4 x, float2 moments) const {
    uint32_t v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = unpack2<T>(v[i]);
      v[i] = pack2<T>((value.x - moments.x) * moments.y * scale[i].x + shift[i].x,
                      (value.y - moments.x) * moments.y * scale[i].y + shift[i].y);
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }
};

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    small_norm_kernel(const __grid_constant__ NormParams p) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * kNormRows + threadIdx.x / 32;
  sm90::let_successor_start();
  sm90::wait_for_predecessors();
  if (token >= p.tokens) return;
  const float2* const moments = p.moments + static_cast<size_t>(token) * round_up(p.parts, 2);
  const float2 norm = row_norm<32, kMaxParts>([&](int part) { return __ldcg(moments + part); },
                                              p.parts, p.part_width, p.width, p.eps);
  const T* const input = static_cast<const T*>(p.input) + static_cast<size_t>(token) * p.width;
  T* const output = static_cast<T*>(p.output) + static_cast<size_t>(token) * p.width;
  for (int column = lane * 8; column < p.width; column += 256) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(input + column));
    const Affine8<T> affine(static_cast<const T*>(p.gamma) + column,
                            static_cast<const T*>(p.beta) + column);
    *reinterpret_cast<uint4*>(output + column) = affine(v, norm);
  }
}

}  // namespace ft::cuda::small
