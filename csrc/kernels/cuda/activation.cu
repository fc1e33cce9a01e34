// activation(input + bias) + residual where no GEMM epilogue took it: one read of each, one write.

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/layer_norm.cuh"

namespace ft::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_activation_kernel(const T* input, const T* bias, const T* residual, Activation activation,
                           int64_t vectors, int width, T* output, const int32_t* live_rows) {
  pdl_launch_dependents();
  pdl_wait();
  const int per_row = width / 8;
  if (live_rows != nullptr) {
    vectors = min(vectors, static_cast<int64_t>(*live_rows) * per_row);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < vectors;
       v += stride) {
    float x[8] = {};
    Vec8<T> piece;
    piece.load(input + 8 * v);
    piece.add_to(x);
    if (bias != nullptr) piece.load(bias + 8 * (v % per_row)), piece.add_to(x);
    activate<T>(activation, [&](auto&& f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = f(x[i]);
    });
    if (residual != nullptr) piece.load(residual + 8 * v), piece.add_to(x);
    Vec8<T>::store(output + 8 * v, x);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_activation_any_kernel(const T* input, const T* bias, const T* residual,
                               Activation activation, int64_t elements, int width, T* output,
                               const int32_t* live_rows) {
  pdl_launch_dependents();
  pdl_wait();
  if (live_rows != nullptr) {
    elements = min(elements, static_cast<int64_t>(*live_rows) * width);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements;
       i += stride) {
    const float shift = bias == nullptr ? 0.f : to_float(bias[i % width]);
    const float addend = residual == nullptr ? 0.f : to_float(residual[i]);
    float x = to_float(input[i]) + shift;
    activate<T>(activation, [&](auto&& f) { x = f(x); });
    output[i] = from_float<T>(x + addend);
  }
}

}  // namespace

cudaError_t bias_activation(const void* input_, const void* bias_, const void* residual_,
                            Activation activation, int rows, int width, DType dtype, void* output_,
                            const int32_t* live_rows, Launch launch) {
  if (rows < 0 || width <= 0 || activation == Activation::kNone) return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (rows == 0) return cudaSuccess;
    const auto* input = static_cast<const T*>(input_);
    const auto* bias = static_cast<const T*>(bias_);
    const auto* residual = static_cast<const T*>(residual_);
    auto* output = static_cast<T*>(output_);
    const bool vector = width % 8 == 0;
    const int64_t work = static_cast<int64_t>(rows) * width / (vector ? 8 : 1);
    // Enough blocks to fill the chip a few times over; the rest is a stride loop.
    const int64_t wanted = (work + kThreads - 1) / kThreads;
    const int64_t most = 64LL * device_sms();
    const auto grid = static_cast<unsigned>(wanted < most ? wanted : most);
    return launch_kernel(vector ? bias_activation_kernel<T> : bias_activation_any_kernel<T>, grid,
                         kThreads, 0, launch, input, bias, residual, activation, work, width,
                         output, live_rows);
  });
}

}  // namespace ft::cuda
