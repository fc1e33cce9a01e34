#include "kernels/cuda/gemm_sm90.cuh"

namespace ft::cuda::sm90 {

namespace {

template <bool kButGelu>
const void* plain_kernel(int variant, bool bfloat16) {
  const auto pick = [&]<typename Config>(Config) -> const void* {
    return bfloat16 ? reinterpret_cast<const void*>(gemm_kernel<__nv_bfloat16, Config, kButGelu>)
                    : reinterpret_cast<const void*>(gemm_kernel<__half, Config, kButGelu>);
  };
  return with_plain_tile(variant, pick);
}

}  // namespace

const void* linear_kernel(int variant, bool bfloat16) {
  return plain_kernel<false>(variant, bfloat16);
}

const void* but_gelu_kernel(int variant, bool bfloat16) {
  return plain_kernel<true>(variant, bfloat16);
}

}  // namespace ft::cuda::sm90
