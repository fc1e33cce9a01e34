#include "kernels/cuda/gemm_tall_sm90.cuh"

namespace ft::cuda::sm90 {

const void* tall_bfloat16_kernel(int cluster, int index) {
  return tall_kernel_of<__nv_bfloat16>(cluster, index);
}

}  // namespace ft::cuda::sm90
