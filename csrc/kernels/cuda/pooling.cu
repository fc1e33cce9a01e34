// A row a sequence: the mean or the largest element of each column over the sequence's rows.
//
// A block takes 8 pieces of columns and 32 of the sequence's rows at a time. In which order a
// column's elements come together is decided by the sequence's length alone, so a row does not
// depend on the batch, to the last bit.

#include "kernels/cuda/layer_norm.cuh"

namespace ft::cuda {
namespace {

constexpr int kPieces = 8, kRowLanes = 32, kThreads = kPieces * kRowLanes;
constexpr int kBlocksEach = 8;  // a multiprocessor: every block checks all of cu_seqlens, once

// `kWide` neighbouring elements of a row.
template <typename T, int kWide>
__device__ __forceinline__ void load_piece(const T* from, float (&x)[kWide]) {
  if constexpr (kWide == 1) {
    x[0] = to_float(*from);
  } else {
#pragma unroll
    for (float& one : x) one = 0.f;
    Vec8<T> piece;
    piece.load(from);
    piece.add_to(x);
  }
}

template <bool kMean>
__device__ __forceinline__ float joined(float a, float b) {
  if constexpr (kMean) return a + b;
  return b > a || b != b ? b : a;  // NaN stays
}

template <typename T, int kWide, bool kMean>
__global__ void __launch_bounds__(kThreads)
    segment_pool_kernel(const T* input, const int32_t* cu_seqlens, int batch, int tokens,
                        int hidden, float* output) {
  __shared__ float parts[kThreads / 32][kPieces * kWide];
  const bool valid = steps_valid<kThreads>(cu_seqlens, batch, tokens, tokens);
  const int piece = threadIdx.x % kPieces, lane = threadIdx.x / kPieces;
  const int chunks = (hidden + kPieces * kWide - 1) / (kPieces * kWide);
  const int64_t items = static_cast<int64_t>(batch) * chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sequence = item / chunks;
    const int column = (static_cast<int>(item % chunks) * kPieces + piece) * kWide;
    const int begin = valid ? cu_seqlens[sequence] : 0;
    const int length = valid ? cu_seqlens[sequence + 1] - begin : 0;
    float sum[kWide];
#pragma unroll
    for (float& one : sum) one = kMean ? 0.f : -INFINITY;
    if (column < hidden) {
      const T* from = input + static_cast<int64_t>(begin) * hidden + column;
#pragma unroll 4
      for (int row = lane; row < length; row += kRowLanes) {
        float x[kWide];
        load_piece<T>(from + static_cast<int64_t>(row) * hidden, x);
#pragma unroll
        for (int i = 0; i < kWide; ++i) sum[i] = joined<kMean>(sum[i], x[i]);
      }
    }
    // A warp holds four of the rows.
#pragma unroll
    for (int mask = kPieces; mask < 32; mask <<= 1) {
#pragma unroll
      for (float& one : sum) one = joined<kMean>(one, __shfl_xor_sync(0xffffffffu, one, mask));
    }
    if (threadIdx.x % 32 < kPieces) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) parts[threadIdx.x / 32][piece * kWide + i] = sum[i];
    }
    __syncthreads();
    const int mine = static_cast<int>(item % chunks) * kPieces * kWide + threadIdx.x;
    if (threadIdx.x < kPieces * kWide && mine < hidden) {
      float all = parts[0][threadIdx.x];
#pragma unroll
      for (int w = 1; w < kThreads / 32; ++w) all = joined<kMean>(all, parts[w][threadIdx.x]);
      if (kMean) all /= static_cast<float>(max(length, 1));
      output[sequence * hidden + mine] = !valid ? NAN : length == 0 ? 0.f : all;
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t segment_pool(const void* input, const int32_t* cu_seqlens, int batch, int tokens,
                         int hidden, Pooling how, DType dtype, float* output, Launch launch) {
  if (batch < 0 || tokens < 0 || hidden < 0) return cudaErrorInvalidValue;
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (batch == 0 || hidden == 0) return cudaSuccess;
    const auto launch_as = [&]<int kWide, bool kMean>() {
      const int64_t chunks = (hidden + kPieces * kWide - 1) / (kPieces * kWide);
      const int64_t items = batch * chunks, most = kBlocksEach * device_sms();
      return launch_kernel(segment_pool_kernel<T, kWide, kMean>,
                           static_cast<unsigned>(items < most ? items : most), kThreads, 0, launch,
                           static_cast<const T*>(input), cu_seqlens, batch, tokens, hidden, output);
    };
    if (hidden % 8 == 0) {
      return how == Pooling::kMean ? launch_as.template operator()<8, true>()
                                   : launch_as.template operator()<8, false>();
    }
    return how == Pooling::kMean ? launch_as.template operator()<1, true>()
                                 : launch_as.template operator()<1, false>();
  });
}

}  // namespace ft::cuda
