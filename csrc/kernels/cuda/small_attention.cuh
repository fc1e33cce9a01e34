// Attention in the few-token chain, from shared memory: which sequence a row belongs to, and the
// context of 16 query rows and one head a warp.
#pragma once

#include "kernels/cuda/small_instructions.cuh"

namespace ft::cuda::small {

// Brings cu_seqlens to shared memory and says whether it is valid, to the whole block.
__device__ __forceinline__ bool load_sequences(int* sequences, const int* cu_seqlens, int batch,
                                               int tokens, int longest) {
  int valid = 1;
  for (int i = threadIdx.x; i <= batch; i += blockDim.x) {
    sequences[i] = cu_seqlens[i];
    if (i < batch) valid &= step_valid(cu_seqlens, i, tokens, longest);
  }
  return __syncthreads_and(valid) != 0;
}

// The sequence bounds of rows [token0, token0 + rows), as tokens; padding rows get (0, 0), and all
// rows (-1, -1) where cu_seqlens is not valid.
__device__ __forceinline__ void find_bounds(const int* sequences, int batch, bool valid, int token0,
                                            int rows, int2* bounds) {
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int token = token0 + row;
    int low = 0, high = batch;  // sequences[low] <= token < sequences[high]
    if (!valid || token >= sequences[batch]) {
      bounds[row] = valid ? make_int2(0, 0) : make_int2(-1, -1);
      continue;
    }
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (sequences[middle] <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    bounds[row] = make_int2(sequences[low], sequences[high]);
  }
}

// First and one past the last token whose keys rows [0, rows) need.
__device__ __forceinline__ int2 key_range(const int2* bounds, const int* sequences, int batch,
                                          bool valid, int token0, int rows, int capacity) {
  const int used = valid ? min(rows, sequences[batch] - token0) : 0;
  if (used <= 0) return make_int2(0, 0);
  const int first = bounds[0].x;
  return make_int2(first, min(bounds[used - 1].y, first + capacity));
}

// One pass of 16 query rows over the keys in [low, high), online softmax over kKeys at a time:
// context and, per lane, sums. A row sees the keys within its limits. `masked`: some row does not
// see a block's keys all. kAlone: values of keys beyond low and high are taken for zeros, else they
// only meet probabilities of zero, which infinities turn into NaN.
template <typename T, int kHeadDim, int kKeys, bool kAlone, typename Masked>
__device__ __forceinline__ void attend_keys(float (&context)[kHeadDim / 8][4], float (&sum)[2],
                                            const uint32_t (&q)[kHeadDim / 16][4], uint32_t keys,
                                            uint32_t values, int unit0, const int2 (&limit)[2],
                                            int low, int high, Masked masked, float scale_log2) {
  const int lane = threadIdx.x % 32;
  float maximum[2] = {-INFINITY, -INFINITY};
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    context[j][0] = context[j][1] = context[j][2] = context[j][3] = 0.f;
  }
  for (int block = low & ~(kKeys - 1); block < high; block += kKeys) {
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        uint32_t b[4];
        load_matrices(keys + swizzled(block + pair * 16 + lane % 8 + lane / 16 * 8,
                                      unit0 + k * 2 + lane / 8 % 2),
                      b[0], b[1], b[2], b[3]);
        mma<T>(score[2 * pair], q[k], b[0], b[1]);
        mma<T>(score[2 * pair + 1], q[k], b[2], b[3]);
      }
    }
    if (masked(block)) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = block + j * 8 + lane % 4 * 2 + e % 2;
          if (key < limit[e / 2].x || key >= limit[e / 2].y) score[j][e] = -INFINITY;
        }
      }
    }
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = maximum[i];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        top = fmaxf(top, fmaxf(score[j][2 * i], score[j][2 * i + 1]));
      }
      top = quad_max(top);
      const float finite_top = top == -INFINITY ? 0.f : top, base = finite_top * scale_log2;
      // Exactly one where the maximum stays, so that blocks a row does not see leave no trace.
      scale[i] = power_of_two((maximum[i] - finite_top) * scale_log2);
      maximum[i] = top;
      sum[i] *= scale[i];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[j][2 * i + e];
          s = power_of_two(fmaf(s, scale_log2, -base));
          sum[i] += s;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) context[j][e] *= scale[e / 2];
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t p[4] = {pack2<T>(score[2 * k][0], score[2 * k][1]),
                             pack2<T>(score[2 * k][2], score[2 * k][3]),
                             pack2<T>(score[2 * k + 1][0], score[2 * k + 1][1]),
                             pack2<T>(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t b[4];
        load_matrices_turned(
            values + swizzled(block + k * 16 + lane % 16, unit0 + d * 2 + lane / 16), b[0], b[1],
            b[2], b[3]);
        if constexpr (kAlone) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = block + k * 16 + i % 2 * 8 + lane % 4 * 2;
            if (key < low || key >= high) b[i] &= 0xffff0000u;
            if (key + 1 < low || key + 1 >= high) b[i] &= 0x0000ffffu;
          }
        }
        mma<T>(context[2 * d], p, b[0], b[1]);
        mma<T>(context[2 * d + 1], p, b[2], b[3]);
      }
    }
  }
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
}

// Attention of 16 query rows and one head, by one warp; the context replaces the queries in shared
// memory. Rows without a sequence become zeros; where a sequence's scores are all minus infinity or
// cu_seqlens is not valid, NaN.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void attend(uint32_t queries, uint32_t keys, uint32_t values, int row0,
                                       int unit0,  // of the head in the 128-byte rows
                                       const int2* bounds, int key0, int key_end,
                                       float scale_log2) {
  constexpr int kNever = 0x7fffffff;
  const int lane = threadIdx.x % 32;
  const int2 own = bounds[row0 + lane % 16];
  const bool any = own.y > own.x;
  const int begin = any ? own.x - key0 : kNever, end = any ? min(own.y, key_end) - key0 : 0;
  const int low = __reduce_min_sync(0xffffffffu, begin);
  const int high = __reduce_max_sync(0xffffffffu, end);
  // Blocks in [low_all, high_all) are seen by every row and need no mask.
  const int low_all = __reduce_max_sync(0xffffffffu, begin);
  const int high_all = __reduce_min_sync(0xffffffffu, end);

  uint32_t q[kHeadDim / 16][4];
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    load_matrices(queries + swizzled(row0 + lane % 16, unit0 + k * 2 + lane / 16), q[k][0], q[k][1],
                  q[k][2], q[k][3]);
  }
  int2 limit[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    limit[i] = bounds[row0 + lane / 4 + 8 * i];
    limit[i].x -= key0;
    limit[i].y -= key0;
  }
  float context[kHeadDim / 8][4], sum[2];
  attend_keys<T, kHeadDim, kKeys, false>(
      context, sum, q, keys, values, unit0, limit, low, high,
      [&](int block) { return block < low_all || block + kKeys > high_all; }, scale_log2);
  uint32_t words[2][kHeadDim / 8], probe = 0;
  const auto divide = [&](int i) {
    // Padding has neither keys nor a sum.
    const bool padding = limit[i].x == -key0 && limit[i].y == -key0;
    const float inverse = 1.f / sum[i];
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      words[i][j] =
          padding ? 0 : pack2<T>(context[j][2 * i] * inverse, context[j][2 * i + 1] * inverse);
    }
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    divide(i);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) probe_finite<T>(probe, words[i][j]);
  }
  if (__any_sync(0xffffffffu, !probed_finite(probe))) [[unlikely]] {
    // Again, one sequence at a time.
    for (int first = low; first < high;) {
      const int last = __reduce_max_sync(0xffffffffu, begin == first ? end : 0);
      int2 alone[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        alone[i] = limit[i].x == first ? limit[i] : make_int2(0, 0);
      }
      attend_keys<T, kHeadDim, kKeys, true>(
          context, sum, q, keys, values, unit0, alone, first, last, [](int) { return true; },
          scale_log2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (alone[i].y > alone[i].x) divide(i);
      }
      first = last;
    }
  }
  __syncwarp();  // every lane has read the queries that the context replaces
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + lane / 4 + 8 * i;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      asm volatile(
          "st.shared.b32 [%0], %1;" ::"r"(queries + swizzled(row, unit0 + j) + lane % 4 * 4),
          "r"(words[i][j])
          : "memory");
    }
  }
}

// Attention of `rows` queries over the heads of `chunks` chunks, kKeys keys at a time; units of
// work go round the warps.
template <typename T, int kKeys>
__device__ __forceinline__ void attend_all(uint32_t queries, int query_stride, uint32_t keys,
                                           uint32_t values, int key_stride, int rows, int chunks,
                                           int head_dim, const int2* bounds, int2 range,
                                           float scale_log2) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int heads = chunks * kChunk / head_dim, tiles = (rows + 15) / 16;
  for (int unit = warp; unit < heads * tiles; unit += warps) {
    const int row0 = unit % tiles * 16, head = unit / tiles;
    const int chunk = head * head_dim / kChunk;
    const uint32_t q = queries + chunk * query_stride;
    const uint32_t k = keys + chunk * key_stride, v = values + chunk * key_stride;
    if (head_dim == 64) {
      attend<T, 64, kKeys>(q, k, v, row0, 0, bounds, range.x, range.y, scale_log2);
    } else {
      attend<T, 32, kKeys>(q, k, v, row0, head % 2 * 4, bounds, range.x, range.y, scale_log2);
    }
  }
}

}  // namespace ft::cuda::small
