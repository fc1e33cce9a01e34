// Attention with mma.sync (sm_75 and later), fp16 and bf16, head sizes that are multiples of 8.
//
// After FlashAttention-2 (Dao, 2023): one pass over the keys with a running maximum and sum in
// fp32, scores and probabilities only ever in registers.

#include "kernels/cuda/attention.cuh"

namespace ft::cuda {
namespace {

// Rows in shared memory are padded by 16 bytes: eight rows of a matrix then fall into distinct
// banks.
constexpr int kRowPad = 8;
// Of the streaming kernel's bias table.
constexpr int kBiasSpan = kMostBiasReach + kBiasMargin;

// Copies rows [0, count) of one head into shared memory, zeros for rows at or beyond `valid` and
// for columns at or beyond head_dim.
template <typename T, int kDim, int kThreads>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t row_stride, int count,
                                          int valid, int head_dim) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const bool inside = row < valid && column < head_dim;
    copy16(to + row * (kDim + kRowPad) + column, inside ? from + row * row_stride + column : from,
           inside);
  }
}

// The A fragments of this warp's 16 query rows.
template <typename T, int kDim>
__device__ __forceinline__ void load_query(uint32_t (&query)[kDim / 16][4], const T* rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    load_matrices(query[k], rows + lane % 16 * (kDim + kRowPad) + 16 * k + lane / 16 * 8);
  }
}

// scores[16 x 16] of this warp against 16 keys.
template <typename T, int kDim>
__device__ __forceinline__ void score16(float (&scores)[2][4],
                                        const uint32_t (&query)[kDim / 16][4], const T* keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t b[4];
    load_matrices(b,
                  keys + (lane % 8 + lane / 16 * 8) * (kDim + kRowPad) + 16 * k + lane / 8 % 2 * 8);
    mma<T>(scores[0], query[k], b[0], b[1]);
    mma<T>(scores[1], query[k], b[2], b[3]);
  }
}

// output[16 x kDim] += probabilities[16 x 16] values[16 x kDim]; kFinite: of the finite ones.
template <typename T, int kDim, bool kFinite = false>
__device__ __forceinline__ void add_values16(float (&output)[kDim / 8][4], const float (&p)[2][4],
                                             const T* values) {
  const int lane = threadIdx.x % 32;
  const uint32_t a[4] = {pack2<T>(p[0][0], p[0][1]), pack2<T>(p[0][2], p[0][3]),
                         pack2<T>(p[1][0], p[1][1]), pack2<T>(p[1][2], p[1][3])};
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t b[4];
    load_matrices_transposed(b, values + lane % 16 * (kDim + kRowPad) + 16 * d + lane / 16 * 8);
    if constexpr (kFinite) {
#pragma unroll
      for (uint32_t& pair : b) pair = finite_or_zero<T>(pair);
    }
    mma<T>(output[2 * d], a, b[0], b[1]);
    mma<T>(output[2 * d + 1], a, b[2], b[3]);
  }
}

// Divides by the sums and writes this warp's rows through its own part of shared memory, so that
// every row leaves in whole 16-byte pieces. Returns whether what this thread wrote was finite.
template <typename T, int kDim>
__device__ __forceinline__ bool write_rows(const float (&output)[kDim / 8][4], float sum0,
                                           float sum1, T* stage, T* to, int64_t row_stride,
                                           int rows, int head_dim) {
  const int lane = threadIdx.x % 32;
  // A sum of zero, where all scores are minus infinity, makes the row NaN.
  const float scale0 = 1.f / sum0, scale1 = 1.f / sum1;
  __syncwarp();
#pragma unroll
  for (int d = 0; d < kDim / 8; ++d) {
    T* at = stage + lane / 4 * (kDim + kRowPad) + 8 * d + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(at) = pack2<T>(output[d][0] * scale0, output[d][1] * scale0);
    *reinterpret_cast<uint32_t*>(at + 8 * (kDim + kRowPad)) =
        pack2<T>(output[d][2] * scale1, output[d][3] * scale1);
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
  uint32_t probe = 0;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (row < rows && column < head_dim) {
      const uint4 piece = *reinterpret_cast<const uint4*>(stage + row * (kDim + kRowPad) + column);
      *reinterpret_cast<uint4*>(to + row * row_stride + column) = piece;
      probe_finite<T>(probe, piece.x);
      probe_finite<T>(probe, piece.y);
      probe_finite<T>(probe, piece.z);
      probe_finite<T>(probe, piece.w);
    }
  }
  return probed_finite(probe);
}

// Whether values [low, low + length) are all finite, asked by the four lanes of a row together.
template <typename T, int kDim>
__device__ __forceinline__ bool finite_values(const T* values, int low, int length) {
  uint32_t probe = 0;
  for (int key = low; key < low + length; ++key) {
    const auto* row = reinterpret_cast<const uint32_t*>(values + key * (kDim + kRowPad));
    for (int i = threadIdx.x % 4; i < kDim / 2; i += 4) probe_finite<T>(probe, row[i]);
  }
  return quad_all(probed_finite(probe));
}

// Short sequences. A tile is at most kRows packed rows of whole sequences; each warp takes 16 of
// them and only the keys that their sequences reach, all scores in registers at once.
template <typename T, int kDim, int kRows, bool kBiased>
__global__ void __launch_bounds__(2 * kRows)
    packed_attention_kernel(const AttentionArguments arguments) {
  constexpr int kThreads = 2 * kRows, kSteps = kRows / 16;
  extern __shared__ __align__(16) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* keys = queries + kRows * (kDim + kRowPad);
  T* values = keys + kRows * (kDim + kRowPad);
  pdl_launch_dependents();
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  using Bias = BiasTable<kRows, kThreads>;
  const Bias bias{reinterpret_cast<float*>(values + kRows * (kDim + kRowPad)), kRows};
  typename Bias::template Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  const int head_dim = arguments.head_dim;
  const int64_t hidden = static_cast<int64_t>(arguments.num_heads) * head_dim;
  if (tile.kv_len == 0) {
    return fill_tile<T>(tile, arguments.output, head, head_dim, static_cast<int>(hidden));
  }
  const T* from =
      static_cast<const T*>(arguments.qkv) + tile.begin * (3 * hidden) + head * head_dim;
  const int padded = (tile.rows + 15) / 16 * 16;
  copy_rows<T, kDim, kThreads>(queries, from, 3 * hidden, padded, tile.rows, head_dim);
  copy_rows<T, kDim, kThreads>(keys, from + hidden, 3 * hidden, padded, tile.rows, head_dim);
  copy_commit();
  copy_rows<T, kDim, kThreads>(values, from + 2 * hidden, 3 * hidden, padded, tile.rows, head_dim);
  copy_commit();
  if constexpr (kBiased) bias.store(bias_loaded);

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const bool active = warp_row < tile.rows;
  const int row0 = warp_row + lane / 4, row1 = row0 + 8;
  // First and one-past-last key of each row; rows past the end have none.
  const uint32_t* bounds = plan_bounds(arguments.plan, arguments.bound) + tile.begin;
  const uint32_t bound0 = row0 < tile.rows ? bounds[row0] : 0;
  const uint32_t bound1 = row1 < tile.rows ? bounds[row1] : 0;
  const int low0 = bound0 & 0xffff, low1 = bound1 & 0xffff;
  const uint32_t length0 = (bound0 >> 16) - low0, length1 = (bound1 >> 16) - low1;
  // Bounds grow with the row: the first row has the least, the last valid one the largest.
  const int begin = __shfl_sync(0xffffffffu, low0, 0) & ~15;
  int end = max(bound0 >> 16, bound1 >> 16);
#pragma unroll
  for (int mask = 4; mask < 32; mask <<= 1) end = max(end, __shfl_xor_sync(0xffffffffu, end, mask));
  const int steps = (end - begin + 15) / 16;

  copy_wait<1>();
  __syncthreads();
  float scores[kSteps][2][4] = {};
  float max0 = -INFINITY, max1 = -INFINITY;
  if (active) {
    uint32_t query[kDim / 16][4];
    load_query<T, kDim>(query, queries + warp_row * (kDim + kRowPad));
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s < steps) {
        score16<T, kDim>(scores[s], query, keys + (begin + 16 * s) * (kDim + kRowPad));
        if constexpr (kBiased) {
          const float2* pairs = bias.pairs(begin + 16 * s - warp_row);
          add_bias(scores[s][0], pairs, 0, arguments.scale_log2);
          add_bias(scores[s][1], pairs, 1, arguments.scale_log2);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = begin + 16 * s + 8 * n + lane % 4 * 2 + i;
            if (static_cast<uint32_t>(key - low0) >= length0) scores[s][n][i] = -INFINITY;
            if (static_cast<uint32_t>(key - low1) >= length1) scores[s][n][2 + i] = -INFINITY;
            max0 = fmaxf(max0, scores[s][n][i]);
            max1 = fmaxf(max1, scores[s][n][2 + i]);
          }
        }
      }
    }
  }
  copy_wait<0>();
  __syncthreads();
  if (!active) return;
  max0 = quad_max(max0);
  max1 = quad_max(max1);
  const float scale = kBiased ? 1.f : arguments.scale_log2;
  // A row past the end has no key and no maximum, one of minus infinities neither.
  const float shift0 = max0 == -INFINITY ? 0.f : max0 * scale;
  const float shift1 = max1 == -INFINITY ? 0.f : max1 * scale;
  float sum0 = 0.f, sum1 = 0.f;
  float output[kDim / 8][4] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s < steps) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores[s][n][i] = power_of_two(scores[s][n][i] * scale - shift0);
          scores[s][n][2 + i] = power_of_two(scores[s][n][2 + i] * scale - shift1);
          sum0 += scores[s][n][i];
          sum1 += scores[s][n][2 + i];
        }
      }
      add_values16<T, kDim>(output, scores[s], values + (begin + 16 * s) * (kDim + kRowPad));
    }
  }
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  T* stage = queries + warp_row * (kDim + kRowPad);
  T* to = static_cast<T*>(arguments.output) + (tile.begin + warp_row) * hidden + head * head_dim;
  const bool finite =
      write_rows<T, kDim>(output, sum0, sum1, stage, to, hidden, tile.rows - warp_row, head_dim);
  if (__all_sync(0xffffffffu, finite)) return;
  // Rows whose own values are not finite become NaN, the others what they are alone.
  if (!finite_values<T, kDim>(values, low0, length0)) sum0 = NAN;
  if (!finite_values<T, kDim>(values, low1, length1)) sum1 = NAN;
#pragma unroll
  for (int d = 0; d < kDim / 8; ++d) {
    output[d][0] = output[d][1] = output[d][2] = output[d][3] = 0.f;
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s < steps) {
      add_values16<T, kDim, true>(output, scores[s], values + (begin + 16 * s) * (kDim + kRowPad));
    }
  }
  write_rows<T, kDim>(output, sum0, sum1, stage, to, hidden, tile.rows - warp_row, head_dim);
}

// Any length: kRows query rows stay, blocks of kKeys keys and values stream through two buffers.
template <typename T, int kDim, int kRows, int kKeys, bool kBiased>
__global__ void __launch_bounds__(2 * kRows)
    stream_attention_kernel(const AttentionArguments arguments) {
  constexpr int kThreads = 2 * kRows, kSteps = kKeys / 16, kBuffer = kKeys * (kDim + kRowPad);
  extern __shared__ __align__(16) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* keys = queries + kRows * (kDim + kRowPad);
  T* values = keys + 2 * kBuffer;
  pdl_launch_dependents();
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  using Bias = BiasTable<kBiasSpan, kThreads>;
  const Bias bias{reinterpret_cast<float*>(values + 2 * kBuffer), arguments.bias_span};
  typename Bias::template Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  const int head_dim = arguments.head_dim;
  const int64_t hidden = static_cast<int64_t>(arguments.num_heads) * head_dim;
  if (tile.kv_len == 0) {
    return fill_tile<T>(tile, arguments.output, head, head_dim, static_cast<int>(hidden));
  }
  const T* qkv = static_cast<const T*>(arguments.qkv) + head * head_dim;
  const T* key_rows = qkv + tile.kv_begin * (3 * hidden) + hidden;
  copy_rows<T, kDim, kThreads>(queries, qkv + tile.begin * (3 * hidden), 3 * hidden, kRows,
                               tile.rows, head_dim);
  auto load_block = [&](int block) {
    const int first = block * kKeys;
    if (first < tile.kv_len) {
      const T* from = key_rows + first * (3 * hidden);
      T* to = keys + block % 2 * kBuffer;
      copy_rows<T, kDim, kThreads>(to, from, 3 * hidden, kKeys, tile.kv_len - first, head_dim);
      copy_rows<T, kDim, kThreads>(to + 2 * kBuffer, from + hidden, 3 * hidden, kKeys,
                                   tile.kv_len - first, head_dim);
    }
    copy_commit();
  };
  load_block(0);
  if constexpr (kBiased) bias.store(bias_loaded);

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const bool active = warp_row < tile.rows;
  const float scale = arguments.scale_log2;
  uint32_t query[kDim / 16][4];
  float output[kDim / 8][4] = {};
  float max0 = -INFINITY, max1 = -INFINITY, sum0 = 0.f, sum1 = 0.f;
  const int blocks = (tile.kv_len + kKeys - 1) / kKeys;
  for (int block = 0; block < blocks; ++block) {
    load_block(block + 1);
    copy_wait<1>();
    __syncthreads();
    if (active) {
      if (block == 0) load_query<T, kDim>(query, queries + warp_row * (kDim + kRowPad));
      const T* block_keys = keys + block % 2 * kBuffer;
      const T* block_values = block_keys + 2 * kBuffer;
      const int left = tile.kv_len - block * kKeys;
      float scores[kSteps][2][4] = {};
      // With a bias maxima are of powers of two, without one they are of the products.
      float factor = scale, constant = 0.f;
      float new0 = max0, new1 = max1;
      const float2* pairs = nullptr;
      if constexpr (kBiased) {
        const int distance = tile.kv_begin + block * kKeys - (tile.begin + warp_row);
        new0 = new1 = -INFINITY;
        if (!bias.is_constant(distance, kKeys, &constant)) {
          pairs = bias.pairs(distance);
          factor = 1.f;
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (16 * s < left) {
          score16<T, kDim>(scores[s], query, block_keys + 16 * s * (kDim + kRowPad));
          if (kBiased && pairs != nullptr) {
            add_bias(scores[s][0], pairs, 2 * s, scale);
            add_bias(scores[s][1], pairs, 2 * s + 1, scale);
          }
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (16 * s + 8 * n + lane % 4 * 2 + i >= left) {
                scores[s][n][i] = scores[s][n][2 + i] = -INFINITY;
              }
              new0 = fmaxf(new0, scores[s][n][i]);
              new1 = fmaxf(new1, scores[s][n][2 + i]);
            }
          }
        }
      }
      new0 = quad_max(new0);
      new1 = quad_max(new1);
      if constexpr (kBiased) {
        new0 = fmaxf(max0, fmaf(new0, factor, constant));
        new1 = fmaxf(max1, fmaf(new1, factor, constant));
      }
      // As long as all scores are minus infinity nothing is to be shifted.
      const float unit = kBiased ? 1.f : scale;
      float shift0 = new0 == -INFINITY ? 0.f : new0 * unit;
      float shift1 = new1 == -INFINITY ? 0.f : new1 * unit;
      const float shrink0 = power_of_two(max0 * unit - shift0);
      const float shrink1 = power_of_two(max1 * unit - shift1);
      if constexpr (kBiased) shift0 -= constant, shift1 -= constant;
      max0 = new0, max1 = new1;
      sum0 *= shrink0, sum1 *= shrink1;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        output[d][0] *= shrink0, output[d][1] *= shrink0;
        output[d][2] *= shrink1, output[d][3] *= shrink1;
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (16 * s < left) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              scores[s][n][i] = power_of_two(scores[s][n][i] * factor - shift0);
              scores[s][n][2 + i] = power_of_two(scores[s][n][2 + i] * factor - shift1);
              sum0 += scores[s][n][i];
              sum1 += scores[s][n][2 + i];
            }
          }
          add_values16<T, kDim>(output, scores[s], block_values + 16 * s * (kDim + kRowPad));
        }
      }
    }
    __syncthreads();
  }
  if (!active) return;
  T* to = static_cast<T*>(arguments.output) + (tile.begin + warp_row) * hidden + head * head_dim;
  write_rows<T, kDim>(output, quad_sum(sum0), quad_sum(sum1), queries + warp_row * (kDim + kRowPad),
                      to, hidden, tile.rows - warp_row, head_dim);
}

template <typename T, int kDim, bool kBiased>
cudaError_t launch_tile(const AttentionChoice& choice, const AttentionArguments& arguments,
                        Launch launch) {
  constexpr size_t kRowBytes = (kDim + kRowPad) * sizeof(T);
  const auto grid = static_cast<unsigned>(choice.bound) * arguments.num_heads;
  const bool wide = choice.tile_rows == 128;
  const auto shared_bytes = [&]<typename Table>(size_t rows) {
    return rows * kRowBytes + (kBiased ? Table::kBytes : 0);
  };
  if (choice.kernel == AttentionKernel::kPacked) {
    if constexpr (kDim <= 64) {
      if (wide) {
        return launch_kernel(packed_attention_kernel<T, kDim, 128, kBiased>, grid, 256,
                             shared_bytes.template operator()<BiasTable<128, 256>>(3 * 128), launch,
                             arguments);
      }
    }
    return launch_kernel(packed_attention_kernel<T, kDim, 64, kBiased>, grid, 128,
                         shared_bytes.template operator()<BiasTable<64, 128>>(3 * 64), launch,
                         arguments);
  }
  // Larger heads take fewer keys a block, so that both buffers fit the 64 KB of sm_75.
  if constexpr (kDim <= 64) {
    return launch_kernel(stream_attention_kernel<T, kDim, 128, 64, kBiased>, grid, 256,
                         shared_bytes.template operator()<BiasTable<kBiasSpan, 256>>(128 + 4 * 64),
                         launch, arguments);
  } else {
    return launch_kernel(stream_attention_kernel<T, kDim, 64, 32, kBiased>, grid, 128,
                         shared_bytes.template operator()<BiasTable<kBiasSpan, 128>>(64 + 4 * 32),
                         launch, arguments);
  }
}

template <typename T, int kDim>
cudaError_t dispatch_tile(const AttentionChoice& choice, const AttentionArguments& arguments,
                          Launch launch) {
  return with_or_without_bias(arguments, [&]<bool kBiased>() {
    return launch_tile<T, kDim, kBiased>(choice, arguments, launch);
  });
}

template <typename T>
cudaError_t dispatch_dim(const AttentionChoice& choice, const AttentionArguments& arguments,
                         Launch launch) {
  switch (choice.padded_dim) {
    case 32:
      return dispatch_tile<T, 32>(choice, arguments, launch);
    case 64:
      return dispatch_tile<T, 64>(choice, arguments, launch);
    case 96:
      return dispatch_tile<T, 96>(choice, arguments, launch);
    case 128:
      return dispatch_tile<T, 128>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_mma(const AttentionChoice& choice, const AttentionArguments& arguments,
                          DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat16:
      return dispatch_dim<__half>(choice, arguments, launch);
    case DType::kBFloat16:
      return dispatch_dim<__nv_bfloat16>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ft::cuda
