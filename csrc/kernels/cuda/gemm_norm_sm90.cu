#include "kernels/cuda/gemm_sm90.cuh"

namespace ft::cuda::sm90 {

const void* norm_kernel(int variant, bool bfloat16) {
  const auto pick = [&]<typename Config>(Config) -> const void* {
    return bfloat16 ? reinterpret_cast<const void*>(gemm_kernel<__nv_bfloat16, Config>)
                    : reinterpret_cast<const void*>(gemm_kernel<__half, Config>);
  };
  return with_norm_tile(variant, pick);
}

}  // namespace ft::cuda::sm90
