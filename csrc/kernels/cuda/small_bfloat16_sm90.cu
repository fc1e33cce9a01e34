// The few-token kernels for bf16.
#include "kernels/cuda/small_instances.cuh"

namespace ft::cuda::small {
const Functions kBFloat16Functions = functions<__nv_bfloat16>();
}  // namespace ft::cuda::small
