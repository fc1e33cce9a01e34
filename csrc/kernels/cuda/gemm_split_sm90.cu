// The sm_90 GEMM kernel for problems of few tiles: a cluster of blocks splits the K of one tile.
//
// Each block takes its part of K as in gemm_sm90.cuh, both consumer warpgroups on one tile. Then
// the blocks trade fp32 sums through distributed shared memory, thread to same thread, so that each
// has its part of the columns complete, adds its peers' in a fixed order, and finishes those
// columns alone. A tile a cluster, no persistence: the receive area is written once.
#include <cuda.h>

#include "kernels/cuda/gemm_epilogue_sm90.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

namespace ft::cuda::sm90 {
namespace {

// The trade of sums with the cluster's other blocks, by twos: part step - 1 of the receive area is
// for the block whose rank differs in the binary digits of `step`. Neighbouring threads write
// neighbouring 16 bytes.
template <typename Config>
struct Exchange {
  static constexpr int kSplits = Config::kSplits, kOwn = Config::kBoxColumns / 2;
  uint32_t received, arrived;
  const Consumer& me;

  __device__ __forceinline__ uint32_t quad_at(int step, int quad) const {
    return (step - 1) * Config::kPartBytes + quad / 4 * 8192 + me.warp * 2048 + quad % 4 * 512 +
           me.lane * 16;
  }

  // Keeps the sums of the block's own columns and sends each peer its.
  __device__ __forceinline__ void give(const float (&acc)[1][Config::kN / 2], float (&sum)[1][kOwn],
                                       int rank) const {
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      if (r != rank) continue;  // every register's place is known when compiling
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum[0][i] = acc[0][r * kOwn + i];
#pragma unroll
      for (int step = 1; step < kSplits; ++step) {
        const int peer = r ^ step;
        const uint32_t there = in_block(received, peer), there_arrived = in_block(arrived, peer);
#pragma unroll
        for (int quad = 0; quad < kOwn / 4; ++quad) {
          const float* x = &acc[0][peer * kOwn + quad * 4];
          store_remote(there + quad_at(step, quad), there_arrived, {x[0], x[1], x[2], x[3]});
        }
      }
    }
  }

  // Adds what the peers sent, in the order of steps.
  __device__ __forceinline__ void take(float (&sum)[1][kOwn]) const {
    barrier_wait_cluster(arrived, 0);
#pragma unroll
    for (int step = 1; step < kSplits; ++step)
#pragma unroll
      for (int quad = 0; quad < kOwn / 4; ++quad) {
        const float4 v = load_shared_four(received + quad_at(step, quad));
        float* const x = &sum[0][quad * 4];
        x[0] += v.x;
        x[1] += v.y;
        x[2] += v.z;
        x[3] += v.w;
      }
  }
};

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    split_k_kernel(const __grid_constant__ CUtensorMap input_map,
                   const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ CUtensorMap residual_map,
                   const __grid_constant__ CUtensorMap output_map, const GemmParameters p) {
  constexpr int kSplits = Config::kSplits, kStages = Config::kStages;
  constexpr int kColumns = Config::kBoxColumns, kGroups = kColumns / 8;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = same(shared_address(shared));
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const int rank = same(static_cast<int>(cluster_rank()));
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    ring.init(2, Config::kBarriers - 2 * kStages);
    for (int consumer = 0; consumer < 2; ++consumer)
      barrier_expect(ring.further(2 + consumer), (kSplits - 1) * Config::kPartBytes);
    prefetch_map(&input_map);
    prefetch_map(&weight_map);
    prefetch_map(&output_map);
  }
  cluster_sync();
  let_successor_start();

  const int tile = blockIdx.x / kSplits;
  const int row = tile / p.n_tiles * Config::kM, column = tile % p.n_tiles * Config::kN;
  const int begin = rank * p.k_blocks / kSplits, end = (rank + 1) * p.k_blocks / kSplits;

  if (warpgroup == 0) {
    give_registers<24>();
    const Pieces part{0, 1, 1, [&](int) { return begin; }, [&](int) { return end; }};
    produce(
        ring, part,
        [&](int, int block, int stage) {
          load_box(ring.stage(stage) + Config::kInputBytes, &weight_map, block * 64, column,
                   ring.full(stage));
        },
        [&](int, int block, int stage) {
          load_box(ring.stage(stage), &input_map, block * 64, row, ring.full(stage));
        });
  } else {
    take_registers<240>();
    const Consumer me = this_consumer();
    const uint32_t filled = ring.further(me.index), arrived = ring.further(2 + me.index);
    const int own_row = row + me.index * Config::kRows, own_column = column + rank * kColumns;
    uint32_t bias[kGroups] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (p.bias != nullptr && own_column + group * 8 < p.n)
        bias[group] = pair_at<T>(p.bias, own_column + group * 8 + (me.lane & 3) * 2);
    wait_for_predecessors();
    const Box<kColumns * 2> staging{base + Config::kStagingAt + me.index * Config::kChunkBytes};
    if (p.residual && me.leads()) {
      barrier_expect(filled, Config::kChunkBytes);
      load_box(staging.at, &residual_map, own_column, own_row, filled);
    }

    float acc[1][Config::kN / 2];
    Place<kStages> place;
    multiply<Config::kN, T>(
        acc, ring, place, end - begin, [&](int s) { return ring.stage(s) + me.index * 64 * 128; },
        [&](int s) { return ring.stage(s) + Config::kInputBytes; },
        [&](int s) {
          if (me.leads()) barrier_arrive(ring.empty(s));
        });
    finish(acc);

    float sum[1][kGroups * 4];
    const Exchange<Config> exchange{
        base + Config::kReceivedAt + me.index * (kSplits - 1) * Config::kPartBytes, arrived, me};
    exchange.give(acc, sum, rank);
    // The peers' sums last: they are on their way.
    add_bias<kGroups>(sum, 0, [&](int group) { return unpack2<T>(bias[group]); });
    if (p.residual) {
      barrier_wait(filled, 0);
      add_box<T>(sum, 0, staging, me);
    }
    exchange.take(sum);
    if (p.gelu) apply<kGroups>(sum, 0, [](float x) { return gelu<T>(x); });
    fill_box<T>(sum, 0, staging, me);
    async_proxy_fence();
    me.meet();
    if (me.leads()) {
      store_box(staging.at, &output_map, own_column, own_row);
      store_commit();
      store_wait_read<0>();
    }
  }
  // No cluster_sync: a block leaves when all that its peers send it has come.
}

}  // namespace

const void* split_kernel(int variant, bool bfloat16) {
  const auto pick = [&]<typename Config>(Config) -> const void* {
    return bfloat16 ? reinterpret_cast<const void*>(split_k_kernel<__nv_bfloat16, Config>)
                    : reinterpret_cast<const void*>(split_k_kernel<__half, Config>);
  };
  return variant == 0 ? pick(Together128x128Split2{}) : pick(Together128x128Split4{});
}

}  // namespace ft::cuda::sm90
