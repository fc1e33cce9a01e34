// LayerNorm(input + bias + residual): one read of each operand, one write, fp32 in between.

#include "kernels/cuda/layer_norm.cuh"

namespace ft::cuda {
namespace {

constexpr int kSplitThreads = 128;

// `input` is one T matrix, or `splits` fp32 ones to be summed in order.
template <typename T, typename Input, int kThreads, int kVecs>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads)
    residual_layer_norm_kernel(const Input* input,         // [splits, rows, hidden]
                               int splits, const T* bias,  // [hidden] or null
                               const T* residual,          // [rows, hidden] or null
                               const T* gamma, const T* beta, float eps, int rows, int hidden,
                               T* output, const int32_t* live_rows, NarrowRows narrow_rows) {
  pdl_launch_dependents();
  // Parameters do not depend on the kernel before: read them while it drains.
  const NarrowWriter narrow(narrow_rows);
  RowWeights<T, kThreads, kVecs> weights;
  weights.load(gamma, beta, hidden);
  float x[kVecs][8] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int column = row_column<kThreads>(v);
      Vec8<T> piece;
      if (column < hidden) piece.load(bias + column), piece.add_to(x[v]);
    }
  }
  pdl_wait();
  const int row = blockIdx.x * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  if (row >= rows) return;
  const int64_t begin = static_cast<int64_t>(row) * hidden;
  if (live_rows != nullptr && row >= *live_rows)
    return clear_row<T, kThreads, kVecs>(hidden, begin, output, narrow);
  const int64_t stride = static_cast<int64_t>(rows) * hidden;
  // All loads of a row are in flight before the first is used.
  Vec8<Input> first[kVecs];
  Vec8<T> other[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = row_column<kThreads>(v);
    first[v].clear();
    other[v].clear();
    if (column < hidden) {
      first[v].load(input + begin + column);
      if (residual != nullptr) other[v].load(residual + begin + column);
    }
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) first[v].add_to(x[v]), other[v].add_to(x[v]);
  // Likewise of several partial sums; they are added in order.
  constexpr int kBatch = kVecs == 1 ? 7 : 2;
  for (int split = 1; split < splits; split += kBatch) {
    Vec8<Input> next[kBatch][kVecs];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const int column = row_column<kThreads>(v);
        next[i][v].clear();
        if (split + i < splits && column < hidden)
          next[i][v].load(input + (split + i) * stride + begin + column);
      }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int v = 0; v < kVecs; ++v) next[i][v].add_to(x[v]);
  }
  normalize_row<T, kThreads, kVecs>(x, weights, hidden, eps, begin, output, narrow);
}

// Any hidden size: a block per row, one element at a time, the row read three times.
template <typename T, typename Input>
__global__ void __launch_bounds__(kBlockThreads)
    residual_layer_norm_any_kernel(const Input* input, int splits, const T* bias, const T* residual,
                                   const T* gamma, const T* beta, float eps, int rows, int hidden,
                                   T* output, const int32_t* live_rows) {
  __shared__ float scratch[2][kBlockThreads / 32];
  pdl_launch_dependents();
  pdl_wait();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * hidden;
  const int64_t stride = static_cast<int64_t>(rows) * hidden;
  if (live_rows != nullptr && static_cast<int>(blockIdx.x) >= *live_rows) {
    for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
      output[begin + column] = from_float<T>(0.f);
    }
    return;
  }
  auto element = [&](int column) {
    float x = bias == nullptr ? 0.f : to_float(bias[column]);
    for (int split = 0; split < splits; ++split) {
      x += to_float(input[split * stride + begin + column]);
    }
    return residual == nullptr ? x : x + to_float(residual[begin + column]);
  };
  float sum = 0.f, squares = 0.f;
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) sum += element(column);
  const float mean = block_sum<kBlockThreads / 32>(sum, scratch[0]) / static_cast<float>(hidden);
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
    const float x = element(column) - mean;
    squares += x * x;
  }
  const float variance =
      block_sum<kBlockThreads / 32>(squares, scratch[1]) / static_cast<float>(hidden);
  const float scale = rsqrtf(variance + eps);
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
    const float x = (element(column) - mean) * scale;
    output[begin + column] = from_float<T>(x * to_float(gamma[column]) + to_float(beta[column]));
  }
}

template <typename T, typename Input>
cudaError_t launch_residual_layer_norm(const Input* input, int splits, const void* bias_,
                                       const void* residual_, const void* gamma_, const void* beta_,
                                       float eps, int rows, int hidden, void* output_,
                                       const int32_t* live_rows, Launch launch,
                                       NarrowRows narrow = {}) {
  const auto* bias = static_cast<const T*>(bias_);
  const auto* residual = static_cast<const T*>(residual_);
  const auto* gamma = static_cast<const T*>(gamma_);
  const auto* beta = static_cast<const T*>(beta_);
  auto* output = static_cast<T*>(output_);
  if (!fits_row_shape(hidden)) {
    if (narrow.rows != nullptr) return cudaErrorInvalidValue;
    return launch_kernel(residual_layer_norm_any_kernel<T, Input>, rows, kBlockThreads, 0, launch,
                         input, splits, bias, residual, gamma, beta, eps, rows, hidden, output,
                         live_rows);
  }
  const auto launch_shape = [&]<int kThreads, int kVecs>() {
    const int per_block = rows_per_block(rows, kThreads);
    return launch_kernel(residual_layer_norm_kernel<T, Input, kThreads, kVecs>,
                         (rows + per_block - 1) / per_block, kThreads * per_block, 0, launch, input,
                         splits, bias, residual, gamma, beta, eps, rows, hidden, output, live_rows,
                         narrow);
  };
  // Many sums to wait for: a vector of each a thread, so that all of them are in flight.
  if (splits > 1 && hidden <= 8 * kSplitThreads)
    return launch_shape.template operator()<kSplitThreads, 1>();
  return dispatch_row_shape(hidden, launch_shape);
}

}  // namespace

cudaError_t residual_layer_norm(const void* input, const void* bias, const void* residual,
                                const void* gamma, const void* beta, float eps, int rows,
                                int hidden, DType dtype, void* output, const int32_t* live_rows,
                                Launch launch, NarrowRows narrow) {
  if (rows < 0 || hidden <= 0) return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (rows == 0) return cudaSuccess;
    return launch_residual_layer_norm<T>(static_cast<const T*>(input), 1, bias, residual, gamma,
                                         beta, eps, rows, hidden, output, live_rows, launch,
                                         narrow);
  });
}

bool narrow_norm_fits(int hidden) { return hidden % 16 == 0 && fits_row_shape(hidden); }

cudaError_t residual_layer_norm_partials(const float* partials, int splits, const void* bias,
                                         const void* residual, const void* gamma, const void* beta,
                                         float eps, int rows, int hidden, DType dtype, void* output,
                                         const int32_t* live_rows, Launch launch) {
  if (rows < 0 || hidden <= 0 || splits < 1) return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (rows == 0) return cudaSuccess;
    return launch_residual_layer_norm<T>(partials, splits, bias, residual, gamma, beta, eps, rows,
                                         hidden, output, live_rows, launch);
  });
}

}  // namespace ft::cuda
