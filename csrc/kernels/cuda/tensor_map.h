// The driver's encoder of tensor maps, which bulk tensor copies read.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "kernels/cuda/kernels.h"

namespace ft::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Found at run time: the library must load where there is no libcuda. Null: the driver has none, or
// could not be asked, and the next call asks again.
inline EncodeTiled tensor_map_encoder() {
  static std::atomic<EncodeTiled> known{nullptr};
  EncodeTiled encode = known.load(std::memory_order_relaxed);
  if (encode != nullptr) return encode;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                              12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();  // the next caller must not take it for its own
    return nullptr;
  }
  encode = reinterpret_cast<EncodeTiled>(entry);
  known.store(encode, std::memory_order_relaxed);
  return encode;
}

// The map of a row-major matrix of 16-bit or 8-bit elements, in boxes of 64 or 128 bytes a row that
// lie swizzled over their whole width. CUDA_ERROR_NOT_SUPPORTED: the driver has no encoder.
inline CUresult encode_tensor_map(CUtensorMap* map, DType dtype, const void* matrix, int rows,
                                  int columns, int box_rows, int box_columns,
                                  CUtensorMapL2promotion promotion) {
  const EncodeTiled encode = tensor_map_encoder();
  if (encode == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const auto width = static_cast<cuuint64_t>(size_of(dtype));
  const cuuint64_t strides[1] = {width * sizes[0]};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map,
                dtype == DType::kE4M3      ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE,
                width * box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace ft::cuda
