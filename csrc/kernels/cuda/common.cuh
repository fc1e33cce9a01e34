// What most CUDA kernels share: elements, reductions, launching.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reductions.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/sequences.cuh"

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

__device__ __forceinline__ int64_t load_int(const void* from, IntType type, int64_t index) {
  if (type == IntType::kInt64) return static_cast<const int64_t*>(from)[index];
  if (type == IntType::kInt32) return static_cast<const int32_t*>(from)[index];
  return static_cast<const uint8_t*>(from)[index];
}

#endif  // __CUDACC__

}  // namespace ft::cuda
