#include "kernels/cuda/gemm_sm90.cuh"

namespace ft::cuda::sm90 {

// The tiles of linear_kernel over e4m3 operands, with ScaledConfig's shared memory. narrow_output:
// of an e4m3 output, else float16.
const void* fp8_kernel(int variant, bool narrow_output) {
  const auto pick = [&]<typename Plain>(Plain) -> const void* {
    using Config = ScaledConfig<Plain>;
    using Narrow = __nv_fp8_e4m3;
    return narrow_output
               ? reinterpret_cast<const void*>(gemm_kernel<__half, Config, false, Narrow, Narrow>)
               : reinterpret_cast<const void*>(gemm_kernel<__half, Config, false, Narrow>);
  };
  switch (variant) {
    case 0:
      return pick(PingPong128x192{});
    case 1:
      return pick(PingPong128x192Alone{});
    case 2:
      return pick(PingPong128x128{});
    case 3:
      return pick(PingPong64x128{});
    default:
      return pick(Together128x128{});
  }
}

}  // namespace ft::cuda::sm90
