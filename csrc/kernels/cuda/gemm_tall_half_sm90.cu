#include "kernels/cuda/gemm_tall_sm90.cuh"

namespace ft::cuda::sm90 {

const void* tall_half_kernel(int index) { return tall_kernel_of<__half, FT_TALL_TOKENS>(index); }

}  // namespace ft::cuda::sm90
