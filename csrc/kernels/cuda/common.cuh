// What the CUDA kernels share: 16-byte loads, conversions, reductions, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/runtime.h"

namespace ft::cuda {

// Compute capability as 10 * major + minor of the current device, or 0 when there is none.
inline int device_arch() {
  const DeviceProperties* device = nullptr;
  return current_device(&device) == cudaSuccess ? 10 * device->major + device->minor : 0;
}

// Multiprocessors of the current device.
inline int device_sms() {
  const DeviceProperties* device = nullptr;
  return current_device(&device) == cudaSuccess ? device->multiprocessors : 1;
}

// cudaErrorNotSupported for bf16 before sm_80, whose arithmetic is emulated or absent.
inline cudaError_t check_dtype(DType dtype) {
  return dtype == DType::kBFloat16 && device_arch() < 80 ? cudaErrorNotSupported : cudaSuccess;
}

// Launches with programmatic stream serialization where asked for and possible. Dynamic shared
// memory above 48 KB is allowed on the first launch of each kernel on each device.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                          const Launch& launch, Arguments&&... arguments) {
  if (shared > 48 * 1024) {
    cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  cudaLaunchAttribute attribute{};
  if (launch.pdl && device_arch() >= 90) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

#ifdef __CUDACC__

// Lets the next kernel of the stream begin once every block has come this far.
__device__ __forceinline__ void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before this one in the stream are done and their writes visible.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

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

// Two values packed into the 32 bits that the tensor cores want.
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

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Sum over all threads of the block, whose warps number kWarps; `scratch` holds kWarps floats and
// may be used again only after another barrier.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += scratch[i];
  }
  return x;
}

__device__ __forceinline__ int64_t load_int(const void* from, IntType type, int64_t index) {
  if (type == IntType::kInt64) return static_cast<const int64_t*>(from)[index];
  if (type == IntType::kInt32) return static_cast<const int32_t*>(from)[index];
  return static_cast<const uint8_t*>(from)[index];
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
