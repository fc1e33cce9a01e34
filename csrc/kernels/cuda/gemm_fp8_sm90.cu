#include "kernels/cuda/gemm_sm90.cuh"

namespace ft::cuda::sm90 {

// The tiles of linear_kernel over e4m3 operands, with ScaledConfig's shared memory. narrow_output:
// of an e4m3 output, else float16.
const void* fp8_kernel(int variant, bool narrow_output) {
  if (variant == kTrio)
    return reinterpret_cast<const void*>(
        gemm_kernel<__half, ScaledConfig<Trio128x128>, false, __nv_fp8_e4m3, __nv_fp8_e4m3>);
  const auto pick = [&]<typename Plain>(Plain) -> const void* {
    using Config = ScaledConfig<Plain>;
    using Narrow = __nv_fp8_e4m3;
    return narrow_output
               ? reinterpret_cast<const void*>(gemm_kernel<__half, Config, false, Narrow, Narrow>)
               : reinterpret_cast<const void*>(gemm_kernel<__half, Config, false, Narrow>);
  };
  return with_plain_tile(variant, pick);
}

}  // namespace ft::cuda::sm90
