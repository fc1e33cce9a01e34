// Device code of the few-token encoder. Every kernel here is one link of a chain joined by
// programmatic dependent launch: it starts while its predecessors run, pulls its share of the
// weights into shared memory, and only then waits for the activations.
//
// A GEMM is cut three ways: rows of tokens, columns of the weight, and K over the blocks of a
// cluster, so that at 32 tokens all multiprocessors read weights at once. Each block sends its fp32
// partial sums of a row, by one bulk copy a block, to the block of the cluster that finishes the
// row, which adds them in rank order, so results do not change from run to run. Weights and inputs
// come by bulk tensor copies.
//
// Layer norm has no kernel of its own. The GEMM that ends a residual branch stores the raw sum x,
// x * gamma, and for each row and column tile mean and sum of squared deviations. Readers combine
// these (Chan, Golub and LeVeque 1979) and use
//   LN(x) W^T = rstd * ((x * gamma) W^T - mean * (W gamma)) + W beta
// where W gamma and W beta come out of two more rows of the same product, done before the wait.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/kernels.h"

#ifdef __CUDACC__
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#endif

namespace ft::cuda::small {

constexpr int kChunk = 64;  // columns of K a step holds: 128 bytes, one swizzled row
constexpr int kChunkBytes = 128;
constexpr int kTileAlign = 1024;  // eight rows: the period of the swizzle
constexpr int kMaxSplit = 8;      // largest portable cluster
constexpr int kMaxParts = 32;     // moments a row: one lane each
constexpr int kMaxStages = 16;

// The attention kernel: queries a block, keys a step, and threads.
constexpr int kAttentionRows = 64;
constexpr int kAttentionKeys = 64;
constexpr int kAttentionThreads = 256;

enum Kind {
  kNorm,       // LN(x) W^T + b, from input = x * gamma
  kNormGelu,   // gelu of the same
  kResidual,   // input W^T + b + LN(residual), and its moments
  kAttention,  // the same with input = attention(qkv)
  kKinds
};

// index, rows of tokens, columns, warpgroups along each, columns of one matrix instruction
#define FT_SMALL_TILES(X) \
  X(0, 64, 32, 1, 1, 32)  \
  X(1, 64, 48, 1, 1, 48)  \
  X(2, 64, 64, 1, 2, 32)  \
  X(3, 64, 96, 1, 2, 48)  \
  X(4, 64, 144, 1, 3, 48) \
  X(5, 64, 192, 1, 2, 48) \
  X(6, 128, 48, 2, 1, 48) \
  X(7, 128, 64, 2, 1, 32) \
  X(8, 128, 96, 2, 1, 48) \
  X(9, 128, 128, 2, 1, 32)

constexpr int kTiles = 10;

struct GemmParams {
  CUtensorMap weight_map;  // of weight, boxes of a chunk by a tile's columns
  CUtensorMap input_map;   // of input, boxes of a chunk by held_rows
  const void* input;       // [tokens, k]; kAttention: qkv [tokens, 3k]
  const void* weight;      // [n, k]
  const void* bias;        // [n]
  void* output;            // [tokens, n]
  void* scaled_output;     // [tokens, n], output * next_gamma
  const void* residual;    // [tokens, n]
  const float2* moments;   // [tokens, even(parts)] of input or residual; null: already normalised
  const void* gamma;       // [width]
  const void* beta;        // [width]
  const void* next_gamma;  // [n]
  float2* moments_out;     // [tokens, even(column tiles)]
  const int* cu_seqlens;   // [batch + 1]
  int tokens, n, k, batch;
  int parts, part_width, width;  // of moments
  int split, stages;
  int held_rows;     // of a tile's rows, those that are copied; what follows is never used
  int key_capacity;  // rows of K and V held in shared memory, a multiple of 32
  int longest;       // sequence that cu_seqlens may hold
  int head_dim;
  float eps, scale_log2;
  bool far_ahead;  // successors may start at once, else when this kernel has its inputs on the way
  const void* prefetch;  // the next kernel's weights, to be brought into L2; may be null
  unsigned prefetch_bytes;
};

struct AttentionParams {
  const void* qkv;        // [tokens, 3 * hidden]
  void* output;           // [tokens, hidden]
  const int* cu_seqlens;  // [batch + 1]
  int tokens, hidden, batch, key_capacity, longest, head_dim;
  float scale_log2;
};

struct NormParams {
  const void* input;      // [tokens, width]
  const float2* moments;  // [tokens, even(parts)]
  const void* gamma;
  const void* beta;
  void* output;  // [tokens, width]
  int tokens, parts, part_width, width;
  float eps;
};

__host__ __device__ constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Floats from one row of partial sums to the next: 8 or 24 mod 32 keeps stores off one bank.
__host__ __device__ constexpr int pitch(int columns) { return columns + 8; }

// Byte offsets in dynamic shared memory.
struct GemmLayout {
  int barrier, released, bounds, bias, gamma, beta, next_gamma, residual, moments, affine,
      affine_parts, sequences;
  int weight, input, keys, sums, total;

  __host__ __device__ GemmLayout(int kind, int tile_rows, int tile_columns, const GemmParams& p) {
    const int chunks = (p.k / kChunk + p.split - 1) / p.split;
    const int rows = tile_rows < p.tokens ? tile_rows : p.tokens;
    const int share = (rows + p.split - 1) / p.split;  // most rows a block finishes
    const bool ends_branch = kind == kResidual || kind == kAttention;
    const int vector = 2 * (ends_branch ? tile_columns : chunks * kChunk);
    barrier = 0;  // sums, affine parts, weights, then an input's stages
    released = barrier + 8 * (3 + kMaxStages);
    bounds = 256;
    bias = bounds + (kind == kAttention ? tile_rows * 8 : 0);
    gamma = bias + 2 * tile_columns;
    beta = gamma + vector;
    next_gamma = beta + vector;
    residual = next_gamma + (ends_branch ? vector : 0);
    moments = residual + (ends_branch ? share * tile_columns * 2 : 0);
    affine = moments + share * round_up(p.parts, 2) * 8;
    affine_parts = affine + (ends_branch ? 0 : 2 * tile_columns * 4);
    sequences = affine_parts + (ends_branch ? 0 : p.split * 2 * tile_columns * 4);
    weight = round_up(sequences + (kind == kAttention ? 4 * (p.batch + 1) : 0), kTileAlign);
    input = weight + chunks * tile_columns * kChunkBytes;
    // A product reads whole tiles, past what is held of the last one.
    keys = input + (p.stages * p.held_rows + tile_rows - p.held_rows) * kChunkBytes;
    sums = keys + (kind == kAttention ? 2 * chunks * p.key_capacity * kChunkBytes : 0);
    // What other blocks finish leaves from where weights and inputs were.
    const int sent = weight + (p.split > 1 ? rows * pitch(tile_columns) * 4 : 0);
    if (sums < sent) sums = sent;
    total = sums + p.split * share * pitch(tile_columns) * 4;
  }
};

#ifdef __CUDACC__

// ---- instructions ------------------------------------------------------------------------------

using namespace sm90;

// As barrier_wait; with that one's branches in assembly the compiler makes more of these kernels.
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier, int parity = 0) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Copies 16 bytes past L1, which may hold what an earlier kernel of the chain read; zeros if
// !valid.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrix2(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#define FT_ACC4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FT_WGMMA_32(type)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type      \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, " \
               "%14, %15}, %16, %17, 1, 1, 1, 0, 0;"                            \
               : FT_ACC4(0), FT_ACC4(1), FT_ACC4(2), FT_ACC4(3)                 \
               : "l"(a), "l"(b))
#define FT_WGMMA_48(type)                                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
               "%16, %17, %18, %19, %20, %21, %22, %23}, %24, %25, 1, 1, 1, 0, 0;"        \
               : FT_ACC4(0), FT_ACC4(1), FT_ACC4(2), FT_ACC4(3), FT_ACC4(4), FT_ACC4(5)   \
               : "l"(a), "l"(b))

// d += A [64,16] B [kColumns,16]^T by a warpgroup, asynchronously.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_tile(float (*d)[4], uint64_t a, uint64_t b) {
  static_assert(kColumns == 32 || kColumns == 48);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kColumns == 32) FT_WGMMA_32("f16");
    if constexpr (kColumns == 48) FT_WGMMA_48("f16");
  } else {
    if constexpr (kColumns == 32) FT_WGMMA_32("bf16");
    if constexpr (kColumns == 48) FT_WGMMA_48("bf16");
  }
}
#undef FT_ACC4
#undef FT_WGMMA_32
#undef FT_WGMMA_48

// Relaxed: what blocks send each other is ordered by counted barriers, and a release would wait for
// every outstanding load.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Shared memory of this block to that of another one of the cluster, counted by its barrier: a
// thread's own counted stores leave one by one, eight bytes a cycle.
__device__ __forceinline__ void copy_to_rank(uint32_t remote, uint32_t from, int bytes,
                                             uint32_t remote_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote),
      "r"(from), "r"(bytes), "r"(remote_barrier)
      : "memory");
}

// The sum over each group of kLanes neighbouring lanes, in every one of them.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return __half22float2(*reinterpret_cast<__half2*>(&v));
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __half2 v = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v));
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
};

// Byte offset of 16-byte unit `unit` of a 128-byte row; the exclusive or spreads the eight rows a
// matrix load touches over all banks.
__device__ __forceinline__ int swizzled(int row, int unit) {
  return row * kChunkBytes + ((unit ^ (row & 7)) << 4);
}

// ---- pieces ------------------------------------------------------------------------------------

// (mean, 1 / deviation) of a row of `width` columns from the moments of its column tiles, by kLanes
// neighbouring threads together.
template <int kLanes>
__device__ __forceinline__ float2 combine_moments(const float2* moments, int parts, int part_width,
                                                  int width, float eps) {
  constexpr int kEach = kMaxParts / kLanes;
  float2 part[kEach];
  float count[kEach], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = i * kLanes + threadIdx.x % kLanes;
    part[i] = j < parts ? moments[j] : make_float2(0.f, 0.f);
    count[i] = j < parts ? min(part_width, width - j * part_width) : 0;
    sum += count[i] * part[i].x;
  }
  const float inverse_width = 1.f / width;
  const float mean = lane_sum<kLanes>(sum) * inverse_width;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float d = part[i].x - mean;
    squares += part[i].y + count[i] * d * d;
  }
  return make_float2(mean, rsqrtf(lane_sum<kLanes>(squares) * inverse_width + eps));
}

// Scale and shift of eight neighbouring columns.
template <typename T>
struct Affine8 {
  float2 scale[4], shift[4];

  __device__ __forceinline__ Affine8(const void* gamma, const void* beta) {
    const uint4 g = *static_cast<const uint4*>(gamma), b = *static_cast<const uint4*>(beta);
    const uint32_t gs[4] = {g.x, g.y, g.z, g.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = Pair<T>::unpack(gs[i]);
      shift[i] = Pair<T>::unpack(bs[i]);
    }
  }

  // x = (x - mean) * rstd * gamma + beta
  __device__ __forceinline__ uint4 operator()(uint4 x, float2 moments) const {
    uint32_t v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = Pair<T>::unpack(v[i]);
      v[i] = Pair<T>::pack((value.x - moments.x) * moments.y * scale[i].x + shift[i].x,
                           (value.y - moments.x) * moments.y * scale[i].y + shift[i].y);
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }
};

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

// Copies rows [0, valid) of a tile's 64-column chunk. What lies in the other rows is never used:
// neither rows of tokens nor columns of a product depend on their neighbours.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* from, int stride, int valid) {
  constexpr int kStep = kThreads / 8;
  static_assert(kStep % 8 == 0);
  const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
  to += swizzled(row, unit);
  from += static_cast<size_t>(row) * stride + unit * 8;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    if (row + i * kStep < valid) copy16(to + i * kStep * kChunkBytes, from, true);
    from += static_cast<size_t>(kStep) * stride;
  }
}

// Copies `valid` rows and fills up to `rows` with zeros.
template <typename T>
__device__ __forceinline__ void copy_rows(uint32_t to, const T* from, size_t stride, int rows,
                                          int valid) {
  const int step = blockDim.x / 8;
  const int unit = threadIdx.x % 8;
#pragma unroll 2
  for (int row = threadIdx.x / 8; row < rows; row += step) {
    const bool in = row < valid;
    copy16(to + swizzled(row, unit), from + (in ? row * stride : 0) + unit * 8, in);
  }
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
        multiply<T>(score[2 * pair], q[k], b[0], b[1]);
        multiply<T>(score[2 * pair + 1], q[k], b[2], b[3]);
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
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
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
      const uint32_t p[4] = {Pair<T>::pack(score[2 * k][0], score[2 * k][1]),
                             Pair<T>::pack(score[2 * k][2], score[2 * k][3]),
                             Pair<T>::pack(score[2 * k + 1][0], score[2 * k + 1][1]),
                             Pair<T>::pack(score[2 * k + 1][2], score[2 * k + 1][3])};
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
        multiply<T>(context[2 * d], p, b[0], b[1]);
        multiply<T>(context[2 * d + 1], p, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
  }
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
          padding ? 0 : Pair<T>::pack(context[j][2 * i] * inverse, context[j][2 * i + 1] * inverse);
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

// ---- kernels -----------------------------------------------------------------------------------

// Grid (split, column tiles, row tiles), clusters of `split`.
template <typename T, int kKind, int kRows, int kColumns, int kGroupsM, int kGroupsN, int kStep>
__global__ void __launch_bounds__(128 * kGroupsM * kGroupsN)
    small_gemm_kernel(const __grid_constant__ GemmParams p) {
  constexpr int kThreads = 128 * kGroupsM * kGroupsN;
  constexpr int kGroupColumns = kColumns / kGroupsN;
  constexpr int kPitch = pitch(kColumns);
  constexpr bool kEndsBranch = kKind == kResidual || kKind == kAttention;
  static_assert(kRows == 64 * kGroupsM && kGroupColumns % kStep == 0);

  extern __shared__ __align__(1024) unsigned char shared[];
  const GemmLayout at(kKind, kRows, kColumns, p);
  const uint32_t base = sm90::shared_address(shared);

  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int rank = blockIdx.x, column0 = blockIdx.y * kColumns, token0 = blockIdx.z * kRows;
  const int chunk0 = rank * (p.k / kChunk) / p.split;
  const int chunks = (rank + 1) * (p.k / kChunk) / p.split - chunk0;
  const int columns = min(kColumns, p.n - column0), rows = min(kRows, p.tokens - token0);
  const int share = (rows + p.split - 1) / p.split;
  const int first = rank * share, end = min(first + share, rows);  // rows this block finishes
  const int group_row = warp / 4 / kGroupsN * 64,
            group_column = warp / 4 % kGroupsN * kGroupColumns;
  const int warp_row = group_row + warp % 4 * 16;

  const uint32_t sums_sent = base + at.barrier, affine_sent = sums_sent + 8;
  const uint32_t weights_here = affine_sent + 8, inputs_here = weights_here + 8;
  const int stride = p.held_rows * kChunkBytes;  // of the input's stages

  if (p.far_ahead) let_successor_start();

  // ---- what no predecessor writes ----
  if (tid == 0) {
    prefetch_map(&p.weight_map);
    if (kKind != kAttention) prefetch_map(&p.input_map);
    for (int i = 0; i < 3 + p.stages; ++i) barrier_init(sums_sent + 8 * i, 1);
    for (int i = 0; i < p.stages; ++i) {
      asm volatile("st.shared.u32 [%0], 0;" ::"r"(base + at.released + 4 * i) : "memory");
    }
    barrier_init_fence();
    barrier_expect(weights_here, chunks * kColumns * kChunkBytes);
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      load_box(base + at.weight + c * kColumns * kChunkBytes, &p.weight_map, (chunk0 + c) * kChunk,
               column0, weights_here);
    }
    if (p.split > 1) {
      barrier_expect(sums_sent, (p.split - 1) * max(end - first, 0) * kPitch * 4);
      if (!kEndsBranch && p.moments != nullptr) {
        barrier_expect(affine_sent, p.split * 2 * kColumns * 4);
      }
    }
  }
  if (tid == 32 && p.prefetch != nullptr) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned size = round_up((p.prefetch_bytes + blocks - 1) / blocks, 128);
    if (block * size < p.prefetch_bytes) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                       static_cast<const unsigned char*>(p.prefetch) + block * size),
                   "r"(min(size, p.prefetch_bytes - block * size))
                   : "memory");
    }
  }
  for (int v = tid; v < columns / 8; v += kThreads) {
    copy16(base + at.bias + v * 16, static_cast<const T*>(p.bias) + column0 + v * 8, true);
    if constexpr (kEndsBranch) {
      copy16(base + at.next_gamma + v * 16, static_cast<const T*>(p.next_gamma) + column0 + v * 8,
             true);
    }
  }
  if (p.moments != nullptr) {
    const int offset = kEndsBranch ? column0 : chunk0 * kChunk;
    const int width = kEndsBranch ? columns : chunks * kChunk;
    for (int v = tid; v < width / 8; v += kThreads) {
      copy16(base + at.gamma + v * 16, static_cast<const T*>(p.gamma) + offset + v * 8, true);
      copy16(base + at.beta + v * 16, static_cast<const T*>(p.beta) + offset + v * 8, true);
    }
  }
  commit();
  __syncthreads();
  if (p.split > 1) cluster_arrive();  // a block must be running before others write to it

  uint32_t sums_of[2];  // where this thread's two rows go: what this block finishes, to its place
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    sums_of[half] = base + (group_column + lane % 4 * 2) * 4 +
                    (row >= first && row < end ? at.sums + (rank * share + row - first) * kPitch * 4
                                               : at.weight + row * kPitch * 4);
  }

  int2* const bounds = reinterpret_cast<int2*>(shared + at.bounds);
  int2 range = make_int2(0, 0);
  if constexpr (kKind == kAttention) {
    int* const sequences = reinterpret_cast<int*>(shared + at.sequences);
    const bool valid = load_sequences(sequences, p.cu_seqlens, p.batch, p.tokens, p.longest);
    find_bounds(sequences, p.batch, valid, token0, kRows, bounds);
    __syncthreads();
    range = key_range(bounds, sequences, p.batch, valid, token0, kRows, p.key_capacity);
  }
  float* const affine = reinterpret_cast<float*>(shared + at.affine);  // W gamma, W beta + bias
  if constexpr (kEndsBranch) {
    if (p.split > 1) cluster_wait();
  } else {
    wait_copies<0>();
    __syncthreads();
    wait_for_bytes(weights_here, 0);
    if (p.split > 1) cluster_wait();
    for (int tile = warp; p.moments != nullptr && tile < kColumns / 8; tile += kThreads / 32) {
      float sum[4] = {};
#pragma unroll 1
      for (int k = 0; k < chunks * 2; ++k) {  // 32 columns of K
        uint32_t b[4];
        load_matrices(base + at.weight + k / 2 * kColumns * kChunkBytes +
                          swizzled(tile * 8 + lane % 8, k % 2 * 4 + lane / 8),
                      b[0], b[1], b[2], b[3]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Row 0 of the fragment is gamma, row 1 beta.
          uint32_t a[4] = {0, 0, 0, 0};
          if (lane < 8) {
            const unsigned char* const from =
                shared + (lane < 4 ? at.gamma : at.beta) + (k * 32 + half * 16 + lane % 4 * 2) * 2;
            a[0] = *reinterpret_cast<const uint32_t*>(from);
            a[2] = *reinterpret_cast<const uint32_t*>(from + 16);
          }
          multiply<T>(sum, a, b[2 * half], b[2 * half + 1]);
        }
      }
      if (lane < 8) {
        const uint32_t to = base + at.affine_parts +
                            ((rank * 2 + lane / 4) * kColumns + tile * 8 + lane % 4 * 2) * 4;
        if (p.split == 1) store_shared_pair(to, sum[0], sum[1]);
        for (int s = 0; p.split > 1 && s < p.split; ++s) {
          store_remote(in_block(to, s), in_block(affine_sent, s), sum[0], sum[1]);
        }
      }
    }
    if (p.split == 1) {
      __syncthreads();
    } else if (p.moments != nullptr) {
      wait_for_bytes(affine_sent, 0);
    }
    const float* const parts = reinterpret_cast<const float*>(shared + at.affine_parts);
    for (int i = tid; i < 2 * kColumns; i += kThreads) {
      float sum = i < kColumns ? 0.f
                               : static_cast<float>(*reinterpret_cast<const T*>(
                                     shared + at.bias + (i - kColumns) * 2));
      if (p.moments != nullptr) {
        for (int s = 0; s < p.split; ++s) sum += parts[s * 2 * kColumns + i];
      }
      affine[i] = sum;
    }
  }

  // ---- what predecessors write ----
  wait_for_predecessors();

  const auto request = [&](int chunk, int stage) {
    const uint32_t barrier = inputs_here + 8 * stage;
    barrier_expect(barrier, stride);
    load_box(base + at.input + stage * stride, &p.input_map, (chunk0 + chunk) * kChunk, token0,
             barrier);
  };
  if (kKind != kAttention && tid == 0) {
#pragma unroll 1
    for (int s = 0; s < min(p.stages, chunks); ++s) request(s, s);
  }
  const int count = range.y - range.x, key_stride = p.key_capacity * kChunkBytes;
  const uint32_t keys = base + at.keys, values = keys + chunks * key_stride;
  if constexpr (kKind == kAttention) {
    const T* const input = static_cast<const T*>(p.input) + chunk0 * kChunk;
    const T* const queries = input + static_cast<size_t>(token0) * 3 * p.k;
    const T* const all_keys = input + static_cast<size_t>(range.x) * 3 * p.k + p.k;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      copy_tile<T, kRows, kThreads>(base + at.input + c * stride, queries + c * kChunk, 3 * p.k,
                                    rows);
      copy_rows<T>(keys + c * key_stride, all_keys + c * kChunk, 3 * p.k, round_up(count, 32),
                   count);
      copy_rows<T>(values + c * key_stride, all_keys + p.k + c * kChunk, 3 * p.k,
                   round_up(count, 32), count);
    }
  }
  const int moments_stride = round_up(p.parts, 2);
  if (p.moments != nullptr && end > first) {
    const float2* const from = p.moments + static_cast<size_t>(token0 + first) * moments_stride;
    for (int v = tid; v < (end - first) * moments_stride / 2; v += kThreads) {
      copy16(base + at.moments + v * 16, from + v * 2, true);
    }
  }
  if constexpr (kEndsBranch) {
    const T* const from =
        static_cast<const T*>(p.residual) + static_cast<size_t>(token0) * p.n + column0;
    for (int v = tid; v < (end - first) * (kColumns / 8); v += kThreads) {
      const int row = v / (kColumns / 8), unit = v % (kColumns / 8);
      if (unit * 8 < columns) {
        copy16(base + at.residual + v * 16,
               from + static_cast<size_t>(first + row) * p.n + unit * 8, true);
      }
    }
  }
  commit();
  if (!p.far_ahead) let_successor_start();
  if constexpr (kKind == kAttention) {
    wait_copies<0>();
    __syncthreads();
    attend_all<T, 32>(base + at.input, stride, keys, values, key_stride, rows, chunks, p.head_dim,
                      bounds, range, p.scale_log2);
    async_proxy_fence();
    __syncthreads();
  }

  float product[kGroupColumns / 8][4] = {};
  if (kEndsBranch) wait_for_bytes(weights_here, 0);
#pragma unroll 1
  for (int c = 0, stage = 0, parity = 0; c < chunks; ++c) {
    if (kKind != kAttention) wait_for_bytes(inputs_here + 8 * stage, parity);
    const uint64_t a = operand(base + at.input + stage * stride + group_row * kChunkBytes);
    const uint64_t b = operand(base + at.weight + (c * kColumns + group_column) * kChunkBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kGroupColumns / kStep; ++j) {
        multiply_tile<T, kStep>(product + j * (kStep / 8), a + k * 2,
                                b + k * 2 + j * kStep * kChunkBytes / 16);
      }
    }
    wgmma_commit();
    const int next = c - 1 + p.stages;  // into the stage that chunk c - 1 leaves
    if (kKind != kAttention && c > 0 && next < chunks) {
      wgmma_wait<1>();
      // The last warp done with a stage asks for its next contents.
      const int free = stage == 0 ? p.stages - 1 : stage - 1;
      if (lane == 0 &&
          count_up(base + at.released + 4 * free) % (kThreads / 32) == kThreads / 32 - 1) {
        request(next, free);
      }
    }
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
  wgmma_wait<0>();

  // ---- each row's partial sums to the block that finishes it ----
  if (p.split > 1) __syncthreads();  // weights and inputs are overwritten
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp_row + half * 8 + lane / 4 < rows) {
#pragma unroll
      for (int j = 0; j < kGroupColumns / 8; ++j) {
        store_shared_pair(sums_of[half] + j * 32, product[j][2 * half], product[j][2 * half + 1]);
      }
    }
  }
  wait_copies<0>();
  if (p.split > 1) async_proxy_fence();
  __syncthreads();
  if (tid < p.split && tid != rank) {
    const int count = min(share, rows - tid * share);
    if (count > 0) {
      copy_to_rank(in_block(base + at.sums + rank * share * kPitch * 4, tid),
                   base + at.weight + tid * share * kPitch * 4, count * kPitch * 4,
                   in_block(sums_sent, tid));
    }
  }

  // Four columns a lane.
  constexpr int kLanes = kColumns <= 32 ? 8 : kColumns <= 64 ? 16 : 32;
  constexpr int kWidth = 4 * kLanes, kSteps = (kColumns + kWidth - 1) / kWidth;
  const int row_lane = tid % kLanes;
  const auto row_norm = [&](int row) {
    if (p.moments == nullptr) return make_float2(0.f, 1.f);
    const float2* const from = reinterpret_cast<const float2*>(shared + at.moments) +
                               (min(row, first + share - 1) - first) * moments_stride;
    return combine_moments<kLanes>(from, p.parts, p.part_width, p.width, p.eps);
  };
  constexpr int kPass = kThreads / kLanes;
  float2 norm = row_norm(first + tid / kLanes);
  float2 next_norm = share > kPass ? row_norm(first + kPass + tid / kLanes) : norm;
  if (p.split > 1 && end > first) wait_for_bytes(sums_sent, 0);
  if (p.split > 1) cluster_arrive();  // what others sent has arrived
  const float* const sums = reinterpret_cast<const float*>(shared + at.sums);
#pragma unroll 1
  for (int row0 = first; row0 < end; row0 += kPass) {
    const int row = row0 + tid / kLanes;
    if (row0 == first + kPass) norm = next_norm;
    if (row0 > first + kPass) norm = row_norm(row);
    float value[kSteps][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = step * kWidth + row_lane * 4;
      if (row >= end || column >= columns) continue;
      const float* const from = sums + (row - first) * kPitch + column;
      float* const x = value[step];
#pragma unroll
      for (int s0 = 0; s0 < kMaxSplit; s0 += 4) {
        if (s0 >= p.split) break;
        float4 part[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          part[s] = s0 + s < p.split
                        ? *reinterpret_cast<const float4*>(from + (s0 + s) * share * kPitch)
                        : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        x[0] += (part[0].x + part[1].x) + (part[2].x + part[3].x);
        x[1] += (part[0].y + part[1].y) + (part[2].y + part[3].y);
        x[2] += (part[0].z + part[1].z) + (part[2].z + part[3].z);
        x[3] += (part[0].w + part[1].w) + (part[2].w + part[3].w);
      }
      const size_t at_output = static_cast<size_t>(token0 + row) * p.n + column0 + column;
      if constexpr (kEndsBranch) {
        const auto four = [&](int offset) {
          const uint2 v = *reinterpret_cast<const uint2*>(shared + offset);
          const float2 low = Pair<T>::unpack(v.x), high = Pair<T>::unpack(v.y);
          return make_float4(low.x, low.y, high.x, high.y);
        };
        const float4 bias = four(at.bias + column * 2);
        const float4 next = four(at.next_gamma + column * 2);
        float4 r = four(at.residual + ((row - first) * kColumns + column) * 2);
        if (p.moments != nullptr) {
          const float4 g = four(at.gamma + column * 2), b = four(at.beta + column * 2);
          r.x = (r.x - norm.x) * norm.y * g.x + b.x;
          r.y = (r.y - norm.x) * norm.y * g.y + b.y;
          r.z = (r.z - norm.x) * norm.y * g.z + b.z;
          r.w = (r.w - norm.x) * norm.y * g.w + b.w;
        }
        x[0] += bias.x + r.x;
        x[1] += bias.y + r.y;
        x[2] += bias.z + r.z;
        x[3] += bias.w + r.w;
        *reinterpret_cast<uint2*>(static_cast<T*>(p.scaled_output) + at_output) =
            make_uint2(Pair<T>::pack(x[0] * next.x, x[1] * next.y),
                       Pair<T>::pack(x[2] * next.z, x[3] * next.w));
      } else {
        const float4 c = *reinterpret_cast<const float4*>(affine + column);
        const float4 d = *reinterpret_cast<const float4*>(affine + kColumns + column);
        x[0] = norm.y * (x[0] - norm.x * c.x) + d.x;
        x[1] = norm.y * (x[1] - norm.x * c.y) + d.y;
        x[2] = norm.y * (x[2] - norm.x * c.z) + d.z;
        x[3] = norm.y * (x[3] - norm.x * c.w) + d.w;
      }
      if constexpr (kKind == kNormGelu) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = gelu<T>(x[e]);
      }
      const uint2 packed = make_uint2(Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]));
      *reinterpret_cast<uint2*>(static_cast<T*>(p.output) + at_output) = packed;
      if constexpr (kEndsBranch) {  // moments of what readers will see
        const float2 low = Pair<T>::unpack(packed.x), high = Pair<T>::unpack(packed.y);
        x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
      }
    }
    if constexpr (kEndsBranch) {
      // About the row's first value, so that both sums can be taken at once.
      const float pivot = __shfl_sync(0xffffffffu, value[0][0], 0, kLanes);
      float total = 0.f, squares = 0.f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (row >= end || step * kWidth + row_lane * 4 >= columns) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float d = value[step][e] - pivot;
          total += d;
          squares += d * d;
        }
      }
      total = lane_sum<kLanes>(total);
      squares = lane_sum<kLanes>(squares);
      const float shift = total / columns;
      if (row_lane == 0 && row < end) {
        const int stride = round_up(gridDim.y, 2);
        float2* const to = p.moments_out + static_cast<size_t>(token0 + row) * stride + blockIdx.y;
        to[0] = make_float2(pivot + shift, fmaxf(squares - total * shift, 0.f));
        // Rows are copied in units of two.
        if (blockIdx.y == gridDim.y - 1 && blockIdx.y % 2 == 0) to[1] = make_float2(0.f, 0.f);
      }
    }
  }
  if (p.split > 1) cluster_wait();  // shared memory is read until then
}

// Grid (hidden / 64, tiles of kAttentionRows queries).
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    small_attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kRows = kAttentionRows;
  extern __shared__ __align__(1024) unsigned char shared[];
  int2* const bounds = reinterpret_cast<int2*>(shared);
  int* const sequences = reinterpret_cast<int*>(shared + kRows * 8);
  const uint32_t queries =
      sm90::shared_address(shared) + round_up(kRows * 8 + 4 * (p.batch + 1), kChunkBytes);
  const uint32_t keys = queries + kRows * kChunkBytes;
  const uint32_t values = keys + p.key_capacity * kChunkBytes;
  const int token0 = blockIdx.y * kRows, rows = min(kRows, p.tokens - token0);
  const size_t stride = 3 * p.hidden;

  let_successor_start();
  const bool valid = load_sequences(sequences, p.cu_seqlens, p.batch, p.tokens, p.longest);
  find_bounds(sequences, p.batch, valid, token0, kRows, bounds);
  __syncthreads();
  const int2 range = key_range(bounds, sequences, p.batch, valid, token0, kRows, p.key_capacity);
  const int count = range.y - range.x;
  const T* const qkv = static_cast<const T*>(p.qkv) + blockIdx.x * kChunk;

  wait_for_predecessors();
  copy_tile<T, kRows, kAttentionThreads>(queries, qkv + token0 * stride, 3 * p.hidden, rows);
  const int filled = round_up(count, kAttentionKeys);
  copy_rows<T>(keys, qkv + range.x * stride + p.hidden, stride, filled, count);
  copy_rows<T>(values, qkv + range.x * stride + 2 * p.hidden, stride, filled, count);
  commit();
  wait_copies<0>();
  __syncthreads();
  attend_all<T, kAttentionKeys>(queries, 0, keys, values, 0, rows, 1, p.head_dim, bounds, range,
                                p.scale_log2);
  __syncthreads();
  const unsigned char* const context = shared + (queries - sm90::shared_address(shared));
  for (int v = threadIdx.x; v < rows * 8; v += blockDim.x) {
    const int row = v / 8, unit = v % 8;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.output) +
                              static_cast<size_t>(token0 + row) * p.hidden + blockIdx.x * kChunk +
                              unit * 8) =
        *reinterpret_cast<const uint4*>(context + swizzled(row, unit));
  }
}

// A warp a row, four rows a block.
template <typename T>
__global__ void __launch_bounds__(128) small_norm_kernel(const __grid_constant__ NormParams p) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * 4 + threadIdx.x / 32;
  let_successor_start();
  wait_for_predecessors();
  if (token >= p.tokens) return;
  float2 part = make_float2(0.f, 0.f);
  if (lane < p.parts) {
    part = __ldcg(p.moments + static_cast<size_t>(token) * round_up(p.parts, 2) + lane);
  }
  const float count = lane < p.parts ? min(p.part_width, p.width - lane * p.part_width) : 0;
  const float mean = lane_sum<32>(count * part.x) / p.width;
  const float d = part.x - mean;
  const float squares = lane_sum<32>(part.y + count * d * d);
  const float2 norm = make_float2(mean, rsqrtf(squares / p.width + p.eps));
  const T* const input = static_cast<const T*>(p.input) + static_cast<size_t>(token) * p.width;
  T* const output = static_cast<T*>(p.output) + static_cast<size_t>(token) * p.width;
  for (int column = lane * 8; column < p.width; column += 256) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(input + column));
    const Affine8<T> affine(static_cast<const T*>(p.gamma) + column,
                            static_cast<const T*>(p.beta) + column);
    *reinterpret_cast<uint4*>(output + column) = affine(v, norm);
  }
}

#endif  // __CUDACC__

// The kernels of one type, for the launcher in small_encoder_sm90.cu.
struct Functions {
  const void* gemm[kKinds][kTiles];
  const void* attention;
  const void* norm;
};
extern const Functions kHalfFunctions;
extern const Functions kBFloat16Functions;

}  // namespace ft::cuda::small
