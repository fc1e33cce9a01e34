// The few-token encoder's products: every kernel of its chain but the last. Each is a link joined
// to the next by programmatic dependent launch: it starts while its predecessors run, pulls its
// share of the weights into shared memory, and only then waits for the activations.
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

#include <cstdint>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm_wgmma.cuh"
#include "kernels/cuda/row_moments.cuh"
#include "kernels/cuda/small_attention.cuh"
#include "kernels/cuda/small_kernels.h"

namespace ft::cuda::small {

// One block's part of a product, step by step in the order of the kernel below.
template <typename T, int kKind, int kTile>
struct ProductBlock {
  static constexpr int kRows = kTiles[kTile].rows, kColumns = kTiles[kTile].columns;
  static constexpr int kGroupsM = kTiles[kTile].groups_m, kGroupsN = kTiles[kTile].groups_n;
  static constexpr int kStep = kTiles[kTile].step, kThreads = kTiles[kTile].threads();
  static constexpr int kGroupColumns = kColumns / kGroupsN;
  static constexpr int kPitch = pitch(kColumns);
  static constexpr bool kEndsBranch = ends_branch(kKind);
  static_assert(kRows == 64 * kGroupsM && kGroupColumns % kStep == 0);

  const GemmParams& p;
  unsigned char* const shared;
  const GemmLayout at{kKind, kRows, kColumns, p};
  const uint32_t base = sm90::shared_address(shared);

  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int rank = blockIdx.x, column0 = blockIdx.y * kColumns, token0 = blockIdx.z * kRows;
  const int chunk0 = rank * (p.k / kChunk) / p.split;
  const int chunks = (rank + 1) * (p.k / kChunk) / p.split - chunk0;
  const int columns = min(kColumns, p.n - column0), rows = min(kRows, p.tokens - token0);
  const int share = (rows + p.split - 1) / p.split;
  const int first = rank * share, end = min(first + share, rows);  // rows this block finishes
  const int group_row = warp / 4 / kGroupsN * 64;
  const int group_column = warp / 4 % kGroupsN * kGroupColumns;
  const int warp_row = group_row + warp % 4 * 16;

  const uint32_t sums_sent = base + at.barrier, affine_sent = sums_sent + 8;
  const uint32_t weights_here = affine_sent + 8, inputs_here = weights_here + 8;
  const int stride = p.held_rows * kChunkBytes;  // of the input's stages

  // Asks for the weights and counts what will arrive; one thread.
  __device__ __forceinline__ void request_weights() const {
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

  // Brings this block's part of the next kernel's weights into L2; one thread.
  __device__ __forceinline__ void prefetch_next() const {
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

  // Bias, gamma and beta of the columns, or of the chunks of K, that this block takes.
  __device__ __forceinline__ void copy_parameters() const {
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
  }

  // The rows' sequences, and the first and one past the last token whose keys they need.
  __device__ __forceinline__ int2 find_keys(int2* bounds) const {
    int* const sequences = reinterpret_cast<int*>(shared + at.sequences);
    const bool valid = load_sequences(sequences, p.cu_seqlens, p.batch, p.tokens, p.longest);
    find_bounds(sequences, p.batch, valid, token0, kRows, bounds);
    __syncthreads();
    return key_range(bounds, sequences, p.batch, valid, token0, kRows, p.key_capacity);
  }

  // W gamma, then W beta + bias, of this block's columns.
  __device__ __forceinline__ float* affine() const {
    return reinterpret_cast<float*>(shared + at.affine);
  }

  // Makes them, each block of the cluster from its chunks of K.
  __device__ __forceinline__ void fold_norm() const {
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
          mma<T>(sum, a, b[2 * half], b[2 * half + 1]);
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
      affine()[i] = sum;
    }
  }

  // Asks for one chunk of the input.
  __device__ __forceinline__ void request_input(int chunk, int stage) const {
    const uint32_t barrier = inputs_here + 8 * stage;
    barrier_expect(barrier, stride);
    load_box(base + at.input + stage * stride, &p.input_map, (chunk0 + chunk) * kChunk, token0,
             barrier);
  }

  // Queries to the input's place, and the keys and values of `range`.
  __device__ __forceinline__ void copy_attended(int2 range) const {
    const int count = range.y - range.x, key_stride = p.key_capacity * kChunkBytes;
    const uint32_t keys = base + at.keys, values = keys + chunks * key_stride;
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

  // The context takes the queries' place.
  __device__ __forceinline__ void attend_rows(const int2* bounds, int2 range) const {
    const int key_stride = p.key_capacity * kChunkBytes;
    const uint32_t keys = base + at.keys, values = keys + chunks * key_stride;
    attend_all<T, 32>(base + at.input, stride, keys, values, key_stride, rows, chunks, p.head_dim,
                      bounds, range, p.scale_log2);
  }

  // Moments and residual of the rows that this block finishes.
  __device__ __forceinline__ void copy_rows_to_finish() const {
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
  }

  // A matrix instruction's accumulators behind each other: four each eight columns.
  using Sums = float[kGroupColumns / kStep][kStep / 2];

  // Adds this block's share of K, chunk by chunk as the input arrives.
  __device__ __forceinline__ void multiply_chunks(Sums& product) const {
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
          Wgmma<kStep, T>::run(product[j], a + k * 2, b + k * 2 + j * kStep * kChunkBytes / 16, 1);
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
          request_input(next, free);
        }
      }
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
  }

  // Where the partial sums of this thread's two rows go: of rows that this block finishes to their
  // place, of others to where weights and inputs were.
  __device__ __forceinline__ void find_places(uint32_t (&sums_of)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + half * 8 + lane / 4;
      sums_of[half] =
          base + (group_column + lane % 4 * 2) * 4 +
          (row >= first && row < end ? at.sums + (rank * share + row - first) * kPitch * 4
                                     : at.weight + row * kPitch * 4);
    }
  }

  // Stores them there, and sends each row's to the block that finishes it.
  __device__ __forceinline__ void send_sums(const Sums& product,
                                            const uint32_t (&sums_of)[2]) const {
    if (p.split > 1) __syncthreads();  // weights and inputs are overwritten
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (warp_row + half * 8 + lane / 4 < rows) {
#pragma unroll
        for (int j = 0; j < kGroupColumns / 8; ++j) {
          const float* const four = &product[j * 8 / kStep][j * 8 % kStep / 2];
          store_shared_pair(sums_of[half] + j * 32, four[2 * half], four[2 * half + 1]);
        }
      }
    }
    copy_wait<0>();
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
  }

  // Adds the parts of the rows that this block finishes, and writes them.
  __device__ __forceinline__ void finish_rows() const {
    const int moments_stride = round_up(p.parts, 2);
    // Four columns a lane.
    constexpr int kLanes = kColumns <= 32 ? 8 : kColumns <= 64 ? 16 : 32;
    constexpr int kWidth = 4 * kLanes, kSteps = (kColumns + kWidth - 1) / kWidth;
    const int row_lane = tid % kLanes;
    const auto norm_of = [&](int row) {
      if (p.moments == nullptr) return make_float2(0.f, 1.f);
      const float2* const from = reinterpret_cast<const float2*>(shared + at.moments) +
                                 (min(row, first + share - 1) - first) * moments_stride;
      return row_norm<kLanes, kMaxParts>([&](int part) { return from[part]; }, p.parts,
                                         p.part_width, p.width, p.eps);
    };
    constexpr int kPass = kThreads / kLanes;
    float2 norm = norm_of(first + tid / kLanes);
    float2 next_norm = share > kPass ? norm_of(first + kPass + tid / kLanes) : norm;
    if (p.split > 1 && end > first) wait_for_bytes(sums_sent, 0);
    if (p.split > 1) cluster_arrive();  // what others sent has arrived
    const float* const sums = reinterpret_cast<const float*>(shared + at.sums);
#pragma unroll 1
    for (int row0 = first; row0 < end; row0 += kPass) {
      const int row = row0 + tid / kLanes;
      if (row0 == first + kPass) norm = next_norm;
      if (row0 > first + kPass) norm = norm_of(row);
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
            const float2 low = unpack2<T>(v.x), high = unpack2<T>(v.y);
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
          *reinterpret_cast<uint2*>(static_cast<T*>(p.scaled_output) + at_output) = make_uint2(
              pack2<T>(x[0] * next.x, x[1] * next.y), pack2<T>(x[2] * next.z, x[3] * next.w));
        } else {
          const float4 c = *reinterpret_cast<const float4*>(affine() + column);
          const float4 d = *reinterpret_cast<const float4*>(affine() + kColumns + column);
          x[0] = norm.y * (x[0] - norm.x * c.x) + d.x;
          x[1] = norm.y * (x[1] - norm.x * c.y) + d.y;
          x[2] = norm.y * (x[2] - norm.x * c.z) + d.z;
          x[3] = norm.y * (x[3] - norm.x * c.w) + d.w;
        }
        if constexpr (kKind == kNormGelu) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = gelu<T>(x[e]);
        }
        const uint2 packed = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
        *reinterpret_cast<uint2*>(static_cast<T*>(p.output) + at_output) = packed;
        if constexpr (kEndsBranch) {  // moments of what readers will see
          const float2 low = unpack2<T>(packed.x), high = unpack2<T>(packed.y);
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
          float2* const to =
              p.moments_out + static_cast<size_t>(token0 + row) * stride + blockIdx.y;
          to[0] = make_float2(pivot + shift, fmaxf(squares - total * shift, 0.f));
          // Rows are copied in units of two.
          if (blockIdx.y == gridDim.y - 1 && blockIdx.y % 2 == 0) to[1] = make_float2(0.f, 0.f);
        }
      }
    }
  }
};

// Grid (split, column tiles, row tiles), clusters of `split`.
template <typename T, int kKind, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads())
    small_gemm_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using Block = ProductBlock<T, kKind, kTile>;
  const Block block{p, shared};
  if (p.far_ahead) let_successor_start();

  // ---- what no predecessor writes ----
  if (block.tid == 0) block.request_weights();
  if (block.tid == 32 && p.prefetch != nullptr) block.prefetch_next();
  block.copy_parameters();
  copy_commit();
  __syncthreads();
  if (p.split > 1) cluster_arrive();  // a block must be running before others write to it
  uint32_t sums_of[2];
  block.find_places(sums_of);
  int2* const bounds = reinterpret_cast<int2*>(shared + block.at.bounds);
  int2 range = make_int2(0, 0);
  if constexpr (kKind == kAttention) range = block.find_keys(bounds);
  if constexpr (Block::kEndsBranch) {
    if (p.split > 1) cluster_wait();
  } else {
    copy_wait<0>();
    __syncthreads();
    wait_for_bytes(block.weights_here, 0);
    if (p.split > 1) cluster_wait();
    block.fold_norm();
  }

  // ---- what predecessors write ----
  wait_for_predecessors();
  if (kKind != kAttention && block.tid == 0) {
#pragma unroll 1
    for (int s = 0; s < min(p.stages, block.chunks); ++s) block.request_input(s, s);
  }
  if constexpr (kKind == kAttention) block.copy_attended(range);
  block.copy_rows_to_finish();
  copy_commit();
  if (!p.far_ahead) let_successor_start();
  if constexpr (kKind == kAttention) {
    copy_wait<0>();
    __syncthreads();
    block.attend_rows(bounds, range);
    async_proxy_fence();
    __syncthreads();
  }
  typename Block::Sums product = {};
  if (Block::kEndsBranch) wait_for_bytes(block.weights_here, 0);
  block.multiply_chunks(product);
  block.send_sums(product, sums_of);
  block.finish_rows();
  if (p.split > 1) cluster_wait();  // shared memory is read until then
}

}  // namespace ft::cuda::small
