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

#include "kernels/cuda/gemm_epilogue_sm90.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

namespace ft::cuda::sm90 {

template <typename T>
__device__ __forceinline__ float to_number(const void* vector, int i) {
  return static_cast<float>(__ldg(static_cast<const T*>(vector) + i));
}

// A consumer warpgroup's 64 features of a tile. A thread's accumulators are those of wgmma with
// features for rows: two features, eight apart, of two neighbouring tokens in each eight.
template <typename T, typename Config>
struct TallEpilogue {
  static constexpr int kTokens = Config::kTokens, kChunk = Config::kChunk;
  using Accumulators = float[1][kTokens / 2];

  const TallParameters& p;
  const CUtensorMap& output_map;
  uint32_t base;
  Consumer me;
  uint32_t tiles = 0;                    // so far
  int feature = 0, mine = 0, token = 0;  // the warpgroup's first, this thread's first
  float bias[2] = {};

  // Before the product.
  __device__ __forceinline__ void begin(int first_feature, int first_token) {
    feature = first_feature + me.index * 64;
    mine = feature + me.warp * 16 + me.lane / 4;
    token = first_token;
    bias[0] = bias[1] = 0.f;
    if (p.bias != nullptr && feature < p.n) {
      bias[0] = to_number<T>(p.bias, mine);
      bias[1] = to_number<T>(p.bias, mine + 8);
    }
  }

  __device__ __forceinline__ uint32_t staging() const {
    return base + Config::kStagingAt + me.index * Config::kChunkBytes;
  }
  // This lane's row of a turned store of 16 tokens by 16 features: a token, and 8 of its features.
  __device__ __forceinline__ uint32_t turned(int pair) const {
    return staging() + (pair * 16 + (me.lane >> 4) * 8 + (me.lane & 7)) * 128 +
           (((me.warp * 2 + (me.lane >> 3 & 1)) ^ (me.lane & 7)) << 4);
  }
  // x: the thread's eight elements of 16 tokens.
  __device__ __forceinline__ void put(int pair, const float* x) const {
    store_matrices_turned(turned(pair), pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                          pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  }
  __device__ __forceinline__ void send(int first_token) const {
    async_proxy_fence();
    me.meet();
    if (me.leads()) {
      store_box(staging(), &output_map, feature, first_token);
      store_commit();
    }
  }
};

// output = gelu(acc + bias), or this split's sums as they are.
template <typename T, typename Config>
struct TallPlainEpilogue : TallEpilogue<T, Config> {
  using Tile = TallEpilogue<T, Config>;
  using Tile::kChunk, Tile::kTokens, Tile::me, Tile::p, Tile::token;

  __device__ __forceinline__ void run(typename Tile::Accumulators& acc, int split) {
    if (p.partials != nullptr) {
      write_partials(acc, split);
      return;
    }
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
      if (me.leads()) store_wait_read<0>();
      me.meet();
#pragma unroll
      for (int pair = 0; pair < kChunk / 16; ++pair) {
        float* const x = &acc[0][(chunk * (kChunk / 16) + pair) * 8];
        const auto each = [&](auto&& f) {
#pragma unroll
          for (int i = 0; i < 8; ++i) x[i] = f(x[i] + this->bias[i >> 1 & 1]);
        };
        if (p.gelu) {
          each([](float y) { return gelu<T>(y); });
        } else {
          each([](float y) { return y; });
        }
        this->put(pair, x);
      }
      this->send(token + chunk * kChunk);
    }
  }

 private:
  __device__ __forceinline__ void write_partials(const typename Tile::Accumulators& acc,
                                                 int split) const {
    float* const out = p.partials + static_cast<size_t>(split) * p.rows * p.n + this->mine;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int row = token + 8 * j + 2 * (me.lane & 3);
      float* const to = out + static_cast<size_t>(row) * p.n;
      if (row < p.rows) {
        to[0] = acc[0][4 * j];
        to[8] = acc[0][4 * j + 2];
      }
      if (row + 1 < p.rows) {
        to[p.n] = acc[0][4 * j + 1];
        to[p.n + 8] = acc[0][4 * j + 3];
      }
    }
  }
};

// output = layer norm(acc + bias + residual) of tokens whose features lie across the cluster.
template <typename T, typename Config>
struct TallNormEpilogue : TallEpilogue<T, Config> {
  using Tile = TallEpilogue<T, Config>;
  using Tile::base, Tile::kTokens, Tile::me, Tile::p, Tile::tiles, Tile::mine;
  static constexpr int kCluster = Config::kCluster, kFeatures = Config::kFeatures;
  using Exchange = ClusterMoments<kCluster, kTokens>;

  const CUtensorMap& residual_map;
  uint32_t filled;   // the residual's barrier
  uint32_t arrived;  // the two of the exchange
  int rank;

  __device__ __forceinline__ void begin(int first_feature, int first_token) {
    Tile::begin(first_feature, first_token);
    if (me.leads()) {
      store_wait_read<0>();
      barrier_expect(filled, Config::kChunkBytes);
      load_box(this->staging(), &residual_map, this->feature, this->token, filled);
    }
  }

  __device__ __forceinline__ void run(typename Tile::Accumulators& acc, int) {
    const float gamma[2] = {to_number<T>(p.gamma, mine), to_number<T>(p.gamma, mine + 8)};
    const float beta[2] = {to_number<T>(p.beta, mine), to_number<T>(p.beta, mine + 8)};
    add_residual_and_bias(acc);
    me.meet();  // the residual's place takes the moments
    measure_warp(acc);
    named_barrier(3, 256);
    measure_tokens();
    named_barrier(3, 256);
#pragma unroll
    for (int pair = 0; pair < kTokens / 16; ++pair) {
      normalize(&acc[0][pair * 8], pair, gamma, beta);
      this->put(pair, &acc[0][pair * 8]);
    }
    this->send(this->token);
    ++tiles;
  }

 private:
  __device__ __forceinline__ void add_residual_and_bias(typename Tile::Accumulators& acc) const {
    barrier_wait(filled, tiles & 1);
#pragma unroll
    for (int pair = 0; pair < kTokens / 16; ++pair) {
      uint32_t r[4];
      load_matrices_turned(this->turned(pair), r[0], r[1], r[2], r[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack2<T>(r[i]);
        acc[0][pair * 8 + i * 2] += v.x + this->bias[i & 1];
        acc[0][pair * 8 + i * 2 + 1] += v.y + this->bias[i & 1];
      }
    }
  }

  // Of each token over this warp's 16 features, into the staging area: [warps, tokens].
  __device__ __forceinline__ void measure_warp(const typename Tile::Accumulators& acc) const {
    const int lane = me.lane;
    const uint32_t moments = this->staging() + me.warp * kTokens * 8;
#pragma unroll
    for (int group = 0; group < (kTokens + 31) / 32; ++group) {
      constexpr int kLast = kTokens % 32;
      const int values = kLast != 0 && group == kTokens / 32 ? 4 : 8;
      Moments v[8];
#pragma unroll
      for (int i = 0; i < values; ++i) {
        const float* const x = &acc[0][(group * 4 + i / 2) * 4 + i % 2];
        v[i] = moments_of(x[0], x[2]);
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
  }

  // A thread a token: of the block, to every block of the cluster, of the whole row.
  __device__ __forceinline__ void measure_tokens() const {
    const int set = tiles & 1;
    const Exchange exchange{base + Config::kStatsAt + set * Exchange::kBytes, arrived + 8 * set,
                            rank};
    const int row = me.index * 128 + me.thread;
    if (row == 0) exchange.expect();
    if (row >= kTokens) return;
    const Moments own = total<8>(
        [&](int warp) {
          return load_shared_pair(base + Config::kStagingAt + warp / 4 * Config::kChunkBytes +
                                  (warp % 4 * kTokens + row) * 8);
        },
        16.f);
#pragma unroll
    for (int block = 0; block < kCluster; ++block) exchange.peer(block).give(row, own);
    exchange.wait(tiles / 2 & 1);
    const Moments whole = exchange.whole(row, kFeatures);
    store_shared_pair(base + Config::kRowsAt + row * 8, whole.mean,
                      rsqrtf(whole.squares * (1.f / (kFeatures * kCluster)) + p.eps));
  }

  // x: the thread's eight elements of 16 tokens.
  __device__ __forceinline__ void normalize(float* x, int pair, const float (&gamma)[2],
                                            const float (&beta)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 rows =
          load_shared_four(base + Config::kRowsAt + (pair * 16 + half * 8 + (me.lane & 3) * 2) * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const y = x + half * 4 + i * 2;
        y[0] = fmaf((y[0] - rows.x) * rows.y, gamma[i], beta[i]);
        y[1] = fmaf((y[1] - rows.z) * rows.w, gamma[i], beta[i]);
      }
    }
  }
};

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    tall_kernel(const __grid_constant__ CUtensorMap input_map,
                const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap residual_map,
                const __grid_constant__ CUtensorMap output_map, const TallParameters p) {
  constexpr int kCluster = Config::kCluster;
  constexpr bool kNorm = Config::kNorm;
  constexpr int kFeatures = Config::kFeatures, kTokens = Config::kTokens;
  constexpr int kStages = Config::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = same(shared_address(shared));
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const int rank = kNorm ? same(static_cast<int>(cluster_rank())) : 0;
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
    const Pieces items{cluster, p.items, clusters, first_block, end_block};
    produce(
        ring, items,
        [&](int item, int block, int stage) {
          load_box(ring.stage(stage), &weight_map, block * 64, feature_of(item), ring.full(stage));
        },
        [&](int item, int block, int stage) {
          load_box(ring.stage(stage) + Config::kWeightBytes, &input_map, block * 64, token_of(item),
                   ring.full(stage));
        });
  } else {
    take_registers<240>();
    wait_for_predecessors();
    const Consumer me = this_consumer();
    auto epilogue = [&] {
      const TallEpilogue<T, Config> tile{p, output_map, base, me};
      if constexpr (kNorm) {
        return TallNormEpilogue<T, Config>{tile, residual_map, ring.further(me.index),
                                           ring.further(2), rank};
      } else {
        return TallPlainEpilogue<T, Config>{tile};
      }
    }();
    Place<kStages> place;
    for (int item = cluster; item < p.items; item += clusters) {
      epilogue.begin(feature_of(item), token_of(item));
      float acc[1][kTokens / 2];
      const auto release = [&](int s) {
        if (me.leads()) barrier_arrive(ring.empty(s));
      };
      const int last = multiply<kTokens, T>(
          acc, ring, place, end_block(item) - first_block(item),
          [&](int s) { return ring.stage(s) + me.index * 64 * 128; },
          [&](int s) { return ring.stage(s) + Config::kWeightBytes; }, release);
      finish(acc);
      release(last);
      if (epilogue.feature < p.n) epilogue.run(acc, item % p.splits);
    }
    if (me.leads()) store_wait_read<0>();
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
