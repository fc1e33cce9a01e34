#include "kernels/cuda/gemm_tall_sm90.cuh"

namespace ft::cuda::sm90 {

const void* tall_half_kernel(int cluster, int index) {
  return tall_kernel_of<__half>(cluster, index);
}

}  // namespace ft::cuda::sm90
