// The driver's encoder of tensor maps, which bulk tensor copies read.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace ft::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Found at run time: the library must load where there is no libcuda. Null: the driver has none.
inline EncodeTiled tensor_map_encoder() {
  static const EncodeTiled found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &result);
    const bool good = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
  }();
  return found;
}

}  // namespace ft::cuda
