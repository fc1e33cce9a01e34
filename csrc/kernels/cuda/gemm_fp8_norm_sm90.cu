#include "kernels/cuda/gemm_sm90.cuh"

namespace ft::cuda::sm90 {

// The tiles of norm_kernel over e4m3 operands, with ScaledConfig's shared memory: float16 output,
// and an e4m3 copy where GemmParameters::narrow is given.
const void* fp8_norm_kernel(int variant) {
  const auto pick = [&]<typename Plain>(Plain) {
    return reinterpret_cast<const void*>(
        gemm_kernel<__half, ScaledConfig<Plain>, false, __nv_fp8_e4m3>);
  };
  return with_norm_tile(variant, pick);
}

}  // namespace ft::cuda::sm90
