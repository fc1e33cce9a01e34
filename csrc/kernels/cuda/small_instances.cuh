// Every kernel of the few-token encoder for one type.
#pragma once

#include <utility>

#include "kernels/cuda/small_norm.cuh"
#include "kernels/cuda/small_product.cuh"

namespace ft::cuda::small {

template <typename T, int kKind, int kTile>
const void* gemm_function() {
  if constexpr (kTiles[kTile].serves[kKind]) {
    return reinterpret_cast<const void*>(&small_gemm_kernel<T, kKind, kTile>);
  } else {
    return nullptr;
  }
}

template <typename T>
Functions functions() {
  Functions f = {};
  const auto list_kind = [&]<int kKind, int... kTile>(std::integer_sequence<int, kTile...>) {
    ((f.gemm[kKind][kTile] = gemm_function<T, kKind, kTile>()), ...);
  };
  const auto list_kinds = [&]<int... kKind>(std::integer_sequence<int, kKind...>) {
    (list_kind.template operator()<kKind>(std::make_integer_sequence<int, kTileCount>{}), ...);
  };
  list_kinds(std::make_integer_sequence<int, kKinds>{});
  f.norm = reinterpret_cast<const void*>(&small_norm_kernel<T>);
  return f;
}

}  // namespace ft::cuda::small
