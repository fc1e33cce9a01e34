// Rows and weights to e4m3 where no kernel before them wrote them so.

#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/narrow.cuh"

namespace ft::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    narrow_rows_kernel(const T* input, int64_t vectors, NarrowRows narrow) {
  pdl_launch_dependents();
  pdl_wait();
  const NarrowWriter writer(narrow);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  for (int64_t begin = first; begin < vectors; begin += stride) {
    const int64_t v = begin + threadIdx.x;
    float x[8] = {};
    if (v < vectors) {
      Vec8<T> piece;
      piece.load(input + 8 * v);
      piece.add_to(x);
    }
    writer.write(8 * v, x, v < vectors);
  }
}

// 16 bytes a thread.
__global__ void __launch_bounds__(kThreads)
    narrow_order_kernel(const uint4* from, int64_t groups, uint4* to) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups;
       g += stride) {
    const uint4 x = from[g];
    to[g] = make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                       __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
  }
}

unsigned grid_for(int64_t work) {
  const int64_t wanted = (work + kThreads - 1) / kThreads, most = 64LL * device_sms();
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

}  // namespace

cudaError_t narrow_rows(const void* input, int rows, int width, DType dtype, NarrowRows narrow,
                        Launch launch) {
  if (rows < 0 || width <= 0 || width % 16 != 0 || narrow.rows == nullptr || narrow.step == nullptr)
    return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (rows == 0) return cudaSuccess;
    const int64_t vectors = static_cast<int64_t>(rows) * width / 8;
    return launch_kernel(narrow_rows_kernel<T>, grid_for(vectors), kThreads, 0, launch,
                         static_cast<const T*>(input), vectors, narrow);
  });
}

cudaError_t narrow_order(const void* weight, int64_t elements, void* output, Launch launch) {
  if (elements < 0 || elements % 16 != 0) return cudaErrorInvalidValue;
  if (elements == 0) return cudaSuccess;
  return launch_kernel(narrow_order_kernel, grid_for(elements / 16), kThreads, 0, launch,
                       static_cast<const uint4*>(weight), elements / 16,
                       static_cast<uint4*>(output));
}

}  // namespace ft::cuda
