// The sm_90 GEMM kernel for token counts that the tiles of gemm_sm90.cuh do not divide well:
// output^T = epilogue(weight [n, k] * input [rows, k]^T).
//
// Features stand where wgmma wants multiples of 64 and tokens where it takes multiples of 8, so a
// tile is 128 features by as many tokens as fills the chip in whole rounds. K may be split over
// blocks as well; each then writes fp32 sums of its own, which the layer norm after it adds in a
// fixed order.
//
// A producer thread keeps a ring of bulk tensor copies full; two consumer warpgroups take 64
// features of the tile each. Blocks are persistent: the ring fills up during an epilogue.
#pragma once

#include <cuda.h>

#include "kernels/cuda/gemm_elements.cuh"
#include "kernels/cuda/gemm_ptx.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"
#include "kernels/cuda/gemm_wgmma.cuh"

namespace ft::cuda::sm90 {

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    tall_kernel(const __grid_constant__ CUtensorMap input_map,
                const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap output_map, const TallParameters p) {
  constexpr int kFeatures = Config::kFeatures, kTokens = Config::kTokens;
  constexpr int kStages = Config::kStages, kChunk = Config::kChunk;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const auto full = [&](int s) { return base + Config::kBarriersAt + 8 * s; };
  const auto empty = [&](int s) { return base + Config::kBarriersAt + 8 * (kStages + s); };
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), 1);
      barrier_init(empty(s), 2);
    }
    barrier_init_fence();
    prefetch_map(&input_map);
    prefetch_map(&weight_map);
    prefetch_map(&output_map);
  }
  __syncthreads();
  let_successor_start();

  // A piece of work: a tile's first feature and token, and its share of K in blocks of 64.
  const auto feature_of = [&](int item) { return item / p.splits % p.feature_tiles * kFeatures; };
  const auto token_of = [&](int item) { return item / p.splits / p.feature_tiles * kTokens; };
  const auto first_block = [&](int item) { return item % p.splits * p.k_blocks / p.splits; };
  const auto end_block = [&](int item) { return (item % p.splits + 1) * p.k_blocks / p.splits; };

  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      const auto load_weight = [&](int item, int block, int stage) {
        load_box(base + stage * Config::kStageBytes, &weight_map, block * 64, feature_of(item),
                 full(stage));
      };
      // Weights need no predecessor: fetch the first ring of them before waiting.
      const int first = blockIdx.x;
      const int early = min(kStages, end_block(first) - first_block(first));
      for (int s = 0; s < early; ++s) {
        barrier_expect(full(s), Config::kStageBytes);
        load_weight(first, first_block(first) + s, s);
      }
      wait_for_predecessors();
      int stage = 0;
      uint32_t phase = 0;
      int ahead = early;
      for (int item = first; item < p.items; item += gridDim.x) {
        const int end = end_block(item);
        for (int block = first_block(item); block < end; ++block) {
          if (ahead > 0) {
            --ahead;
          } else {
            barrier_wait(empty(stage), phase ^ 1);
            barrier_expect(full(stage), Config::kStageBytes);
            load_weight(item, block, stage);
          }
          load_box(base + stage * Config::kStageBytes + Config::kWeightBytes, &input_map,
                   block * 64, token_of(item), full(stage));
          if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    return;
  }

  take_registers<240>();
  wait_for_predecessors();
  const int consumer = warpgroup - 1;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const bool leader = thread == 0;
  const uint32_t staging = base + Config::kStagingAt + consumer * Config::kChunkBytes;
  // This lane's row of a turned 16 x 16 store: the token, and the piece of 8 features in it.
  const uint32_t turned = staging + ((lane >> 4) * 8 + (lane & 7)) * 128 +
                          (((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
  int stage = 0;
  uint32_t phase = 0;
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const int feature = feature_of(item) + consumer * 64;
    const int own = feature + warp * 16 + lane / 4;  // and own + 8
    float bias[2] = {};
    if (p.bias != nullptr && feature < p.n) {
      bias[0] = static_cast<float>(static_cast<const T*>(p.bias)[own]);
      bias[1] = static_cast<float>(static_cast<const T*>(p.bias)[own + 8]);
    }

    // ---- the product ----
    float acc[kTokens / 2];
    const int begin = first_block(item), end = end_block(item);
    int previous = 0;
    for (int block = begin; block < end; ++block) {
      barrier_wait(full(stage), phase);
      const uint64_t a = operand(base + stage * Config::kStageBytes + consumer * 64 * 128);
      const uint64_t b = operand(base + stage * Config::kStageBytes + Config::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        Wgmma<kTokens, T>::run(acc, a + step * 2, b + step * 2, (block - begin) | step);
      wgmma_commit();
      if (block > begin) {
        wgmma_wait<1>();
        if (leader) barrier_arrive(empty(previous));
      }
      previous = stage;
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
    wgmma_wait<0>();
    if (leader) barrier_arrive(empty(previous));
    // The compiler does not know that the products end here: no use of acc may move above.
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");

    // ---- the epilogue ----
    if (feature >= p.n) continue;
    const int token = token_of(item);
    if (p.partials != nullptr) {
      float* const out = p.partials + static_cast<size_t>(item % p.splits) * p.rows * p.n + own;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const int row = token + 8 * j + 2 * (lane & 3);
        float* const to = out + static_cast<size_t>(row) * p.n;
        if (row < p.rows) {
          to[0] = acc[4 * j];
          to[8] = acc[4 * j + 2];
        }
        if (row + 1 < p.rows) {
          to[p.n] = acc[4 * j + 1];
          to[p.n + 8] = acc[4 * j + 3];
        }
      }
      continue;
    }
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
      if (leader) store_wait_read<0>();
      named_barrier(1 + consumer, 128);
#pragma unroll
      for (int pair = 0; pair < kChunk / 16; ++pair) {
        float* const x = &acc[(chunk * (kChunk / 16) + pair) * 8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          x[i] += bias[i >> 1 & 1];
          if (p.gelu) x[i] = gelu(x[i]);
        }
        store_matrices_turned(turned + pair * 16 * 128, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                              pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
      }
      async_proxy_fence();
      named_barrier(1 + consumer, 128);
      if (leader) {
        store_box(staging, &output_map, feature, token + chunk * kChunk);
        store_commit();
      }
    }
  }
  if (leader) store_wait_read<0>();
}

template <typename T, int... kTokens>
const void* tall_kernel_of(int index) {
  static const void* const kernels[] = {
      reinterpret_cast<const void*>(tall_kernel<T, TallConfig<kTokens>>)...};
  return kernels[index];
}

}  // namespace ft::cuda::sm90
