// Attention by fused multiply-adds, everything in fp32: for fp32 tensors, for head sizes that are
// no multiple of 8, and for GPUs before sm_75.

#include "kernels/cuda/attention.cuh"

namespace ft::cuda {
namespace {

constexpr int kRows = 64, kKeys = 32, kThreads = 256, kPad = 4;

// 16 x 16 threads; each owns 4 query rows and, of scores and output, the columns c with
// c % 16 == its column index.
template <typename T, int kDim, bool kBiased>
__global__ void __launch_bounds__(kThreads)
    plain_attention_kernel(const AttentionArguments arguments) {
  constexpr int kStride = kDim + kPad, kScoreStride = kKeys + kPad;
  extern __shared__ __align__(16) unsigned char shared[];
  float* queries = reinterpret_cast<float*>(shared);  // [kRows][kStride]
  float* block = queries + kRows * kStride;           // keys, then values: [kKeys][kStride]
  float* scores = block + kKeys * kStride;            // [kRows][kScoreStride]
  pdl_launch_dependents();
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  const int head_dim = arguments.head_dim;
  const int64_t hidden = static_cast<int64_t>(arguments.num_heads) * head_dim;
  if (tile.kv_len == 0) {
    return fill_tile<T>(tile, arguments.output, head, head_dim, static_cast<int>(hidden));
  }
  const T* qkv = static_cast<const T*>(arguments.qkv) + head * head_dim;
  auto load_rows = [&](float* to, const T* from, int count, int valid) {
    for (int i = threadIdx.x; i < count * kDim; i += kThreads) {
      const int row = i / kDim, column = i % kDim;
      to[row * kStride + column] =
          row < valid && column < head_dim ? to_float(from[row * (3 * hidden) + column]) : 0.f;
    }
  };
  load_rows(queries, qkv + tile.begin * (3 * hidden), kRows, tile.rows);

  const int column = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float output[4][kDim / 16] = {};
  float maximum[4], sum[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) maximum[r] = -INFINITY, sum[r] = 0.f;
  for (int first = 0; first < tile.kv_len; first += kKeys) {
    const T* from = qkv + (tile.kv_begin + first) * (3 * hidden) + hidden;
    const int left = tile.kv_len - first;
    __syncthreads();
    load_rows(block, from, kKeys, left);
    __syncthreads();
    float score[4][2] = {};
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
      float4 k[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        k[c] = *reinterpret_cast<const float4*>(block + (column + 16 * c) * kStride + d);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(queries + (row + r) * kStride + d);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          score[r][c] += q.x * k[c].x + q.y * k[c].y + q.z * k[c].z + q.w * k[c].w;
        }
      }
    }
    if constexpr (kBiased) {
      const int reach = arguments.bias_reach;
      const T* bias = static_cast<const T*>(arguments.bias) + reach +
                      head * (2 * static_cast<int64_t>(reach) + 1);
      const int distance = tile.kv_begin + first + column - (tile.begin + row);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = max(-reach, min(distance + 16 * c - r, reach));
          score[r][c] = fmaf(score[r][c], arguments.scale_log2, kLog2e * to_float(bias[at]));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (!kBiased) score[r][c] *= arguments.scale_log2;
        score[r][c] = column + 16 * c < left ? score[r][c] : -INFINITY;
        highest = fmaxf(highest, score[r][c]);
      }
      highest = lane_max<16>(highest);
      // As long as all scores are minus infinity nothing is to be shifted.
      const float shift = highest == -INFINITY ? 0.f : highest;
      const float shrink = exp2f(maximum[r] - shift);
      maximum[r] = highest;
      sum[r] *= shrink;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) output[r][d] *= shrink;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float p = exp2f(score[r][c] - shift);
        sum[r] += p;
        scores[(row + r) * kScoreStride + column + 16 * c] = p;
      }
    }
    __syncthreads();
    load_rows(block, from + hidden, kKeys, left);
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < kKeys; k += 4) {
      float4 p[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        p[r] = *reinterpret_cast<const float4*>(scores + (row + r) * kScoreStride + k);
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        const float* value = block + k * kStride + column + 16 * d;
        const float v0 = value[0], v1 = value[kStride], v2 = value[2 * kStride],
                    v3 = value[3 * kStride];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          output[r][d] += p[r].x * v0 + p[r].y * v1 + p[r].z * v2 + p[r].w * v3;
        }
      }
    }
  }
  T* to = static_cast<T*>(arguments.output) + tile.begin * hidden + head * head_dim;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    sum[r] = lane_sum<16>(sum[r]);
    if (row + r < tile.rows) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        const int at = column + 16 * d;
        if (at < head_dim) to[(row + r) * hidden + at] = from_float<T>(output[r][d] / sum[r]);
      }
    }
  }
}

template <typename T, int kDim>
cudaError_t launch_plain(const AttentionChoice& choice, const AttentionArguments& arguments,
                         Launch launch) {
  constexpr size_t kShared =
      sizeof(float) * ((kRows + kKeys) * (kDim + kPad) + kRows * (kKeys + kPad));
  return with_or_without_bias(arguments, [&]<bool kBiased>() {
    return launch_kernel(plain_attention_kernel<T, kDim, kBiased>,
                         static_cast<unsigned>(choice.bound) * arguments.num_heads, kThreads,
                         kShared, launch, arguments);
  });
}

template <typename T>
cudaError_t dispatch_plain(const AttentionChoice& choice, const AttentionArguments& arguments,
                           Launch launch) {
  switch (choice.padded_dim) {
    case 32:
      return launch_plain<T, 32>(choice, arguments, launch);
    case 64:
      return launch_plain<T, 64>(choice, arguments, launch);
    case 96:
      return launch_plain<T, 96>(choice, arguments, launch);
    case 128:
      return launch_plain<T, 128>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_plain(const AttentionChoice& choice, const AttentionArguments& arguments,
                            DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat32:
      return dispatch_plain<float>(choice, arguments, launch);
    case DType::kFloat16:
      return dispatch_plain<__half>(choice, arguments, launch);
    case DType::kBFloat16:
      return dispatch_plain<__nv_bfloat16>(choice, arguments, launch);
    case DType::kInt8:
    case DType::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace ft::cuda
