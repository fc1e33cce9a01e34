// cuBLASLt, opened at first use, so that the library loads where torch has no CUDA.
#pragma once

#include <cublasLt.h>

namespace ft::cuda {

// The functions this project calls.
struct CublasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescInit_internal) desc_init = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutInit_internal) layout_init = nullptr;
  decltype(&cublasLtMatmulPreferenceInit_internal) preference_init = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) algo_check = nullptr;
  decltype(&cublasLtGetVersion) version = nullptr;
};

// The library, or null with the words of set_failure. FT_HANDLER_CUBLASLT names another file.
const CublasLt* cublaslt();

// The handle of the current device, made at its first use and kept; null with words on failure.
cublasLtHandle_t cublaslt_handle();

}  // namespace ft::cuda
