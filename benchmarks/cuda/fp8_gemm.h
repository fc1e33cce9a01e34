// One product of e4m3 operands, as benchmarks/cuda/fp8_gemm.cu takes it; fp8_gemm.py has the same.
#pragma once

#include <cuda_runtime_api.h>

struct Product {
  const void *x, *w;   // e4m3 [rows, k], [n, k]
  const float* scale;  // [n]
  const void *bias, *residual, *gamma, *beta;
  void* out;
  void* narrow;  // norm tiles: e4m3 copy or null
  const float* out_scale;
  int rows, n, k, gelu, narrow_out;
};

// A plain tile. 0 where it was launched.
extern "C" int fp8_gemm(const Product* q, int variant, cudaStream_t stream);
