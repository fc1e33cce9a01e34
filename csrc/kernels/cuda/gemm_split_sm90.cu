// The sm_90 GEMM kernel for problems of few tiles: a cluster of blocks splits the K of one tile.
//
// Each block takes its part of K as in gemm_sm90.cuh, both consumer warpgroups on one tile. Then
// the blocks trade fp32 sums through distributed shared memory, thread to same thread, so that each
// has its part of the columns complete, adds its peers' in a fixed order, and finishes those
// columns alone. A tile a cluster, no persistence: the receive area is written once.
#include <cuda.h>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm_elements.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

namespace ft::cuda::sm90 {
namespace {

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    split_k_kernel(const __grid_constant__ CUtensorMap input_map,
                   const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ CUtensorMap residual_map,
                   const __grid_constant__ CUtensorMap output_map, const GemmParameters p) {
  constexpr int kSplits = Config::kSplits, kStages = Config::kStages;
  constexpr int kColumns = Config::kBoxColumns, kOwn = kColumns / 2;  // sums a thread keeps
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const auto filled = [&](int consumer) { return ring.further(consumer); };
  const auto arrived = [&](int consumer) { return ring.further(2 + consumer); };
  const int rank = static_cast<int>(cluster_rank());
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    ring.init(2, Config::kBarriers - 2 * kStages);
    for (int consumer = 0; consumer < 2; ++consumer)
      barrier_expect(arrived(consumer), (kSplits - 1) * Config::kPartBytes);
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
    if (threadIdx.x == 0) {
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
    }
  } else {
    take_registers<240>();
    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const bool leader = thread == 0;
    const int own_row = row + consumer * Config::kRows, own_column = column + rank * kColumns;
    uint32_t bias[kColumns / 8] = {};
#pragma unroll
    for (int group = 0; group < kColumns / 8; ++group)
      if (p.bias != nullptr && own_column + group * 8 < p.n)
        bias[group] = pair_at<T>(p.bias, own_column + group * 8 + (lane & 3) * 2);
    wait_for_predecessors();
    const uint32_t staging = base + Config::kStagingAt + consumer * Config::kChunkBytes;
    // Where this lane's row of a stmatrix or ldmatrix of 16 x 16 elements lies there.
    const auto matrix_at = [&](int pair) {
      const int swizzle = kColumns == 64 ? lane & 7 : lane >> 1 & 3;
      return staging + (warp * 16 + (lane & 15)) * kColumns * 2 +
             (((pair * 2 + (lane >> 4)) ^ swizzle) << 4);
    };
    if (p.residual && leader) {
      barrier_expect(filled(consumer), Config::kChunkBytes);
      load_box(staging, &residual_map, own_column, own_row, filled(consumer));
    }

    // ---- the product ----
    float acc[1][Config::kN / 2];
    Place<kStages> place;
    multiply<Config::kN, T>(
        acc, ring, place, end - begin, [&](int s) { return ring.stage(s) + consumer * 64 * 128; },
        [&](int s) { return ring.stage(s) + Config::kInputBytes; },
        [&](int s) {
          if (leader) barrier_arrive(ring.empty(s));
        });
    finish(acc);

    // ---- the exchange ----
    // By twos: part step - 1 of the receive area is for the block whose rank differs in the binary
    // digits of `step`. Neighbouring threads write neighbouring 16 bytes.
    const uint32_t received =
        base + Config::kReceivedAt + consumer * (kSplits - 1) * Config::kPartBytes;
    const auto quad_at = [&](int step, int quad) {
      return (step - 1) * Config::kPartBytes + quad / 4 * 8192 + warp * 2048 + quad % 4 * 512 +
             lane * 16;
    };
    float sum[kOwn];
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      if (r != rank) continue;  // every register's place is known when compiling
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum[i] = acc[0][r * kOwn + i];
#pragma unroll
      for (int step = 1; step < kSplits; ++step) {
        const int peer = r ^ step;
        const uint32_t there = in_block(received, peer),
                       there_arrived = in_block(arrived(consumer), peer);
#pragma unroll
        for (int quad = 0; quad < kOwn / 4; ++quad) {
          const float* x = &acc[0][peer * kOwn + quad * 4];
          store_remote(there + quad_at(step, quad), there_arrived, {x[0], x[1], x[2], x[3]});
        }
      }
    }

    // ---- the epilogue, the peers' sums last: they are on their way ----
#pragma unroll
    for (int group = 0; group < kColumns / 8; ++group) {
      const float2 b = unpack<T>(bias[group]);
      float* const x = &sum[group * 4];
      x[0] += b.x;
      x[1] += b.y;
      x[2] += b.x;
      x[3] += b.y;
    }
    if (p.residual) {
      barrier_wait(filled(consumer), 0);
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        uint32_t r[4];
        load_matrices(matrix_at(pair), r[0], r[1], r[2], r[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack<T>(r[i]);
          sum[pair * 8 + i * 2] += v.x;
          sum[pair * 8 + i * 2 + 1] += v.y;
        }
      }
    }
    barrier_wait_cluster(arrived(consumer), 0);
#pragma unroll
    for (int step = 1; step < kSplits; ++step)
#pragma unroll
      for (int quad = 0; quad < kOwn / 4; ++quad) {
        const float4 v = load_shared_four(received + quad_at(step, quad));
        float* const x = &sum[quad * 4];
        x[0] += v.x;
        x[1] += v.y;
        x[2] += v.z;
        x[3] += v.w;
      }
    if (p.gelu) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum[i] = gelu<T>(sum[i]);
    }
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      const float* x = &sum[pair * 8];
      store_matrices(matrix_at(pair), pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                     pack<T>(x[6], x[7]));
    }
    async_proxy_fence();
    named_barrier(1 + consumer, 128);
    if (leader) {
      store_box(staging, &output_map, own_column, own_row);
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
