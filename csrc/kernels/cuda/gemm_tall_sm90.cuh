// The sm_90 GEMM kernel for token counts that the tiles of gemm_sm90.cuh do not divide well:
// output^T = epilogue(weight [n, k] * input [rows, k]^T).
//
// Features stand where wgmma wants multiples of 64 and tokens where it takes multiples of 8, so a
// tile is 128 features by as many tokens as fills the chip in whole rounds. K may be split over
// blocks as well; each then writes fp32 sums of its own, which the layer norm after it adds in a
// fixed order.
//
// Norm variants: a cluster of blocks holds all features of its tokens, adds the residual and takes
// the layer norm on the fp32 accumulators; the blocks exchange each row's mean and squared
// deviation through distributed shared memory.
//
// A producer thread keeps a ring of bulk tensor copies full; two consumer warpgroups take 64
// features of the tile each. Blocks are persistent: the ring fills up during an epilogue.
#pragma once

#include <cuda.h>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm_elements.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

namespace ft::cuda::sm90 {

// Mean and sum of squared deviations of some elements of a row.
struct Moments {
  float mean, squares;
};

// Of two sets of `count` elements each (Chan, Golub and LeVeque's update).
__device__ __forceinline__ Moments merged(Moments a, Moments b, float count) {
  const float apart = a.mean - b.mean;
  return {0.5f * (a.mean + b.mean), fmaf(apart * apart, 0.5f * count, a.squares + b.squares)};
}

__device__ __forceinline__ Moments from_lane(Moments m, int mask) {
  return {__shfl_xor_sync(0xFFFFFFFFu, m.mean, mask),
          __shfl_xor_sync(0xFFFFFFFFu, m.squares, mask)};
}

// Of kSets sets of `count` elements each.
template <int kSets, typename Get>
__device__ __forceinline__ Moments total(Get&& get, float count) {
  Moments each[kSets], whole{0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const float2 pair = get(i);
    each[i] = {pair.x, pair.y};
    whole.mean += pair.x;
    whole.squares += pair.y;
  }
  whole.mean *= 1.f / kSets;
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const float apart = each[i].mean - whole.mean;
    whole.squares = fmaf(apart * apart, count, whole.squares);
  }
  return whole;
}

template <typename T>
__device__ __forceinline__ float to_number(const void* vector, int i) {
  return static_cast<float>(__ldg(static_cast<const T*>(vector) + i));
}

// Merges the rows of v with those of the lane at `mask`: each lane keeps one half of them.
template <int kHalf>
__device__ __forceinline__ void fold(Moments* v, int lane, int mask, float count) {
  const bool upper = (lane & mask) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Moments kept = upper ? v[i + kHalf] : v[i], given = upper ? v[i] : v[i + kHalf];
    v[i] = merged(kept, from_lane(given, mask), count);
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    tall_kernel(const __grid_constant__ CUtensorMap input_map,
                const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap residual_map,
                const __grid_constant__ CUtensorMap output_map, const TallParameters p) {
  constexpr int kCluster = Config::kCluster;
  constexpr bool kNorm = Config::kNorm;
  constexpr int kFeatures = Config::kFeatures, kTokens = Config::kTokens;
  constexpr int kStages = Config::kStages, kChunk = Config::kChunk;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const int rank = kNorm ? static_cast<int>(cluster_rank()) : 0;
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    ring.init(2, Config::kBarriers - 2 * kStages);
    prefetch_map(&input_map);
    prefetch_map(&weight_map);
    prefetch_map(&output_map);
  }
  if constexpr (kNorm) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  let_successor_start();

  // A piece of work: a tile's first feature and token, and its share of K in blocks of 64.
  const auto feature_of = [&](int item) {
    return (kNorm ? rank : item / p.splits % p.feature_tiles) * kFeatures;
  };
  const auto token_of = [&](int item) {
    return (kNorm ? item : item / p.splits / p.feature_tiles) * kTokens;
  };
  const auto first_block = [&](int item) { return item % p.splits * p.k_blocks / p.splits; };
  const auto end_block = [&](int item) { return (item % p.splits + 1) * p.k_blocks / p.splits; };

  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      const Pieces items{cluster, p.items, clusters, first_block, end_block};
      produce(
          ring, items,
          [&](int item, int block, int stage) {
            load_box(ring.stage(stage), &weight_map, block * 64, feature_of(item),
                     ring.full(stage));
          },
          [&](int item, int block, int stage) {
            load_box(ring.stage(stage) + Config::kWeightBytes, &input_map, block * 64,
                     token_of(item), ring.full(stage));
          });
    }
  } else {
    take_registers<240>();
    wait_for_predecessors();
    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const bool leader = thread == 0;
    const uint32_t staging = base + Config::kStagingAt + consumer * Config::kChunkBytes;
    // This lane's row of a turned 16 x 16 store: the token, and the piece of 8 features in it.
    const uint32_t turned = staging + ((lane >> 4) * 8 + (lane & 7)) * 128 +
                            (((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
    const uint32_t filled = ring.further(consumer);
    Place<kStages> place;
    uint32_t own = 0;  // tiles so far
    for (int item = cluster; item < p.items; item += clusters, ++own) {
      const int feature = feature_of(item) + consumer * 64;
      const int mine = feature + warp * 16 + lane / 4;  // and mine + 8
      float bias[2] = {};
      if (p.bias != nullptr && feature < p.n) {
        bias[0] = to_number<T>(p.bias, mine);
        bias[1] = to_number<T>(p.bias, mine + 8);
      }

      if constexpr (kNorm) {
        if (leader) {
          store_wait_read<0>();
          barrier_expect(filled, Config::kChunkBytes);
          load_box(staging, &residual_map, feature, token_of(item), filled);
        }
      }

      // ---- the product ----
      float product[1][kTokens / 2];
      float (&acc)[kTokens / 2] = product[0];
      const auto release = [&](int s) {
        if (leader) barrier_arrive(ring.empty(s));
      };
      const int last = multiply<kTokens, T>(
          product, ring, place, end_block(item) - first_block(item),
          [&](int s) { return ring.stage(s) + consumer * 64 * 128; },
          [&](int s) { return ring.stage(s) + Config::kWeightBytes; }, release);
      finish(product);
      release(last);

      // ---- the epilogue ----
      if (feature >= p.n) continue;
      const int token = token_of(item);
      if constexpr (kNorm) {
        // Residual and bias, then the moments of each row over this warp's 16 features.
        const float gamma[2] = {to_number<T>(p.gamma, mine), to_number<T>(p.gamma, mine + 8)};
        const float beta[2] = {to_number<T>(p.beta, mine), to_number<T>(p.beta, mine + 8)};
        barrier_wait(filled, own & 1);
#pragma unroll
        for (int pair = 0; pair < kTokens / 16; ++pair) {
          uint32_t r[4];
          load_matrices_turned(turned + pair * 16 * 128, r[0], r[1], r[2], r[3]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 v = unpack<T>(r[i]);
            acc[pair * 8 + i * 2] += v.x + bias[i & 1];
            acc[pair * 8 + i * 2 + 1] += v.y + bias[i & 1];
          }
        }
        // The residual's place takes the moments: [warps, tokens].
        named_barrier(1 + consumer, 128);
        const uint32_t moments = staging + warp * kTokens * 8;
#pragma unroll
        for (int group = 0; group < (kTokens + 31) / 32; ++group) {
          constexpr int kLast = kTokens % 32;
          const int values = kLast != 0 && group == kTokens / 32 ? 4 : 8;
          Moments v[8];
#pragma unroll
          for (int i = 0; i < values; ++i) {
            const float* x = &acc[(group * 4 + i / 2) * 4 + i % 2];
            const float apart = x[0] - x[2];
            v[i] = {0.5f * (x[0] + x[2]), 0.5f * apart * apart};
          }
          int kept = 0;
          if (values == 8) {
            fold<4>(v, lane, 16, 2.f);
            fold<2>(v, lane, 8, 4.f);
            fold<1>(v, lane, 4, 8.f);
            kept = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
          } else {
            fold<2>(v, lane, 16, 2.f);
            fold<1>(v, lane, 8, 4.f);
            v[0] = merged(v[0], from_lane(v[0], 4), 8.f);
            kept = (lane >> 4 & 1) * 2 + (lane >> 3 & 1);
          }
          const int row = group * 32 + kept / 2 * 8 + (lane & 3) * 2 + kept % 2;
          store_shared_pair(moments + row * 8, v[0].mean, v[0].squares);
        }
        named_barrier(3, 256);
        // A thread a row: of the block, to every block of the cluster, of the whole row.
        const int set = own & 1;  // a block may be one tile ahead of its peers, never two
        const uint32_t stats = base + Config::kStatsAt + set * Config::kStatsBytes;
        const uint32_t arrived = ring.further(2 + set);
        const int row = consumer * 128 + thread;
        if (row == 0) barrier_expect(arrived, Config::kStatsBytes);
        if (row < kTokens) {
          Moments whole = total<8>(
              [&](int w) {
                return load_shared_pair(base + Config::kStagingAt + w / 4 * Config::kChunkBytes +
                                        (w % 4 * kTokens + row) * 8);
              },
              16.f);
#pragma unroll
          for (int peer = 0; peer < kCluster; ++peer)
            store_remote(in_block(stats, peer) + (rank * kTokens + row) * 8,
                         in_block(arrived, peer), whole.mean, whole.squares);
          barrier_wait_cluster(arrived, own / 2 & 1);
          whole = total<kCluster>(
              [&](int b) { return load_shared_pair(stats + (b * kTokens + row) * 8); },
              static_cast<float>(kFeatures));
          store_shared_pair(base + Config::kRowsAt + row * 8, whole.mean,
                            rsqrtf(whole.squares * (1.f / (kFeatures * kCluster)) + p.eps));
        }
        named_barrier(3, 256);
#pragma unroll
        for (int pair = 0; pair < kTokens / 16; ++pair) {
          float* const x = &acc[pair * 8];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float4 rows = load_shared_four(base + Config::kRowsAt +
                                                 (pair * 16 + half * 8 + (lane & 3) * 2) * 8);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float* const y = x + half * 4 + i * 2;
              y[0] = fmaf((y[0] - rows.x) * rows.y, gamma[i], beta[i]);
              y[1] = fmaf((y[1] - rows.z) * rows.w, gamma[i], beta[i]);
            }
          }
          store_matrices_turned(turned + pair * 16 * 128, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                                pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
        }
        async_proxy_fence();
        named_barrier(1 + consumer, 128);
        if (leader) {
          store_box(staging, &output_map, feature, token);
          store_commit();
        }
      } else {
        if (p.partials != nullptr) {
          float* const out =
              p.partials + static_cast<size_t>(item % p.splits) * p.rows * p.n + mine;
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
              if (p.gelu) x[i] = gelu<T>(x[i]);
            }
            store_matrices_turned(turned + pair * 16 * 128, pack<T>(x[0], x[1]),
                                  pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
          }
          async_proxy_fence();
          named_barrier(1 + consumer, 128);
          if (leader) {
            store_box(staging, &output_map, feature, token + chunk * kChunk);
            store_commit();
          }
        }
      }
    }
    if (leader) store_wait_read<0>();
  }
  // No block may leave while another still writes into its shared memory.
  if constexpr (kNorm) cluster_sync();
}

template <typename T, int kCluster, int... kTokens>
const void* tall_kernel_of(int index) {
  static const void* const kernels[] = {
      reinterpret_cast<const void*>(tall_kernel<T, TallConfig<kTokens, kCluster>>)...};
  return kernels[index];
}

// The kernels of clusters of 1, 6 and 8.
template <typename T>
const void* tall_kernel_of(int cluster, int index) {
  return cluster == 1   ? tall_kernel_of<T, 1, FT_TALL_TOKENS>(index)
         : cluster == 6 ? tall_kernel_of<T, 6, FT_TALL_NORM_TOKENS>(index)
                        : tall_kernel_of<T, 8, FT_TALL_NORM_TOKENS>(index);
}

}  // namespace ft::cuda::sm90
