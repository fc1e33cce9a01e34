// The few-token kernels for fp16.
#include "kernels/cuda/small_instances.cuh"

namespace ft::cuda::small {
const Functions kHalfFunctions = functions<__half>();
}  // namespace ft::cuda::small
