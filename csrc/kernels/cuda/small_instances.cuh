// Every tile and kind of the few-token kernels for one type.
#pragma once

#include "kernels/cuda/small_kernels.cuh"

namespace ft::cuda::small {

template <typename T, int kKind>
void list_tiles(const void** to) {
#define FT_SMALL_ENTRY(index, rows, columns, groups_m, groups_n, step) \
  to[index] = reinterpret_cast<const void*>(                           \
      &small_gemm_kernel<T, kKind, rows, columns, groups_m, groups_n, step>);
  FT_SMALL_TILES(FT_SMALL_ENTRY)
#undef FT_SMALL_ENTRY
}

template <typename T>
Functions functions() {
  Functions f = {};
  list_tiles<T, kNorm>(f.gemm[kNorm]);
  list_tiles<T, kNormGelu>(f.gemm[kNormGelu]);
  list_tiles<T, kResidual>(f.gemm[kResidual]);
  list_tiles<T, kAttention>(f.gemm[kAttention]);
  f.attention = reinterpret_cast<const void*>(&small_attention_kernel<T>);
  f.norm = reinterpret_cast<const void*>(&small_norm_kernel<T>);
  return f;
}

}  // namespace ft::cuda::small
