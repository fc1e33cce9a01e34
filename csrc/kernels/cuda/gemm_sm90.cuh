// The sm_90 GEMM kernel: output = epilogue(input [rows, k] * weight [n, k]^T).
//
// A block is one producer thread and two or three consumer warpgroups. The producer keeps a ring of
// kStages x (kM x 64 of input, kN x 64 of weight) filled by bulk tensor copies; the consumers take
// whole tiles in turn ("ping-pong"), so that while one runs its epilogue the other keeps the tensor
// cores busy, or halves of a tile together, for problems of one tile a block. Blocks are
// persistent: tile after tile without a pause in the ring.
//
// Clusters. Plain variants: kCluster blocks stacked along the rows share each weight tile by
// multicast. Norm variants: the cluster's blocks stand side by side over the full width n =
// kCluster * kN, share each input tile by multicast, and exchange row means and variances through
// distributed shared memory, so that the layer norm happens on fp32 accumulators in the epilogue.
//
// Programmatic dependent launch: barriers, tensor maps and the first weight tiles are fetched
// before the wait for the preceding kernel; weights are never written by a kernel of the same
// chain.
//
// Design after CUTLASS's "warp-specialized ping-pong" schedule (github.com/NVIDIA/cutlass,
// include/cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp), written anew.
#pragma once

#include <cuda.h>

#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"
#include "kernels/cuda/gemm_tile_sm90.cuh"

namespace ft::cuda::sm90 {

// kButGelu: activates by what is no GELU. A kernel of its own, because a longer one took 2 to 6 %
// more time with GELU and without any.
// In: of the operands, T or e4m3, whose columns have scales; Out: of the output, T or e4m3.
template <typename T, typename Config, bool kButGelu = false, typename In = T, typename Out = T>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap input_map,
                const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ CUtensorMap residual_map,
                const __grid_constant__ CUtensorMap output_map, const GemmParameters p) {
  constexpr int kM = Config::kM, kN = Config::kN, kStages = Config::kStages;
  constexpr int kCluster = Config::kCluster, kRows = Config::kRows;
  constexpr bool kNorm = Config::kNorm, kTogether = Config::kTogether;
  constexpr int kBlockK = 128 / sizeof(In);
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = same(shared_address(shared));
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const int rank = kCluster == 1 ? 0 : same(static_cast<int>(cluster_rank()));
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    // Warpgroups that read a stage free it.
    ring.init(kCluster * (kTogether ? 2 : 1), Config::kBarriers - 2 * kStages);
    prefetch_map(&input_map);
    prefetch_map(&weight_map);
    prefetch_map(&output_map);
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  let_successor_start();

  // First row and column of a cluster tile, for this block.
  const auto place_of = [&](int tile) { return p.upwards ? p.cluster_tiles - 1 - tile : tile; };
  const auto row_of = [&](int tile) {
    return kNorm ? place_of(tile) * kM : (place_of(tile) / p.n_tiles * kCluster + rank) * kM;
  };
  const auto column_of = [&](int tile) {
    return kNorm ? rank * kN : place_of(tile) % p.n_tiles * kN;
  };

  if (warpgroup == 0) {
    give_registers<24>();
    constexpr uint16_t kEveryone = (1u << kCluster) - 1;
    const auto load_weight = [&](int tile, int block, int stage) {
      const uint32_t to = ring.stage(stage) + Config::kInputBytes;
      if constexpr (kNorm || kCluster == 1) {
        load_box(to, &weight_map, block * kBlockK, column_of(tile), ring.full(stage));
      } else {
        load_box_multicast(to + rank * (Config::kWeightBytes / kCluster), &weight_map,
                           block * kBlockK, column_of(tile) + rank * (kN / kCluster),
                           ring.full(stage), kEveryone);
      }
    };
    const auto load_input = [&](int tile, int block, int stage) {
      const uint32_t to = ring.stage(stage);
      if constexpr (kNorm) {
        if (rank < Config::kSharers)
          load_box_multicast(to + rank * (Config::kInputBytes / Config::kSharers), &input_map,
                             block * kBlockK, row_of(tile) + rank * (kM / Config::kSharers),
                             ring.full(stage), kEveryone);
      } else {
        load_box(to, &input_map, block * kBlockK, row_of(tile), ring.full(stage));
      }
    };
    const Pieces tiles{cluster, p.cluster_tiles, clusters, [](int) { return 0; },
                       [&](int) { return p.k_blocks; }};
    produce(ring, tiles, load_weight, load_input);
  } else {
    take_registers<Config::kRegisters>();
    wait_for_predecessors();
    const Consumer me = this_consumer();
    EpilogueOf<T, Config, kButGelu, In, Out> epilogue{
        {p, residual_map, output_map, ring, me, rank}};
    float acc[kRows / 64][kN / 2];
    uint32_t position = 0;  // in the ring, counted without wrapping
    int turn = 0;
    // Products run strictly in turn: barriers tell odd fills of a stage from even ones, no more, so
    // no warpgroup may look at the ring before the one ahead of it is through with its part.
    constexpr int kConsumers = Config::kConsumers, kTurns = 1 + kConsumers;
    const auto after = [](int index) { return index + 1 == kConsumers ? 0 : index + 1; };
    const int my_turn = kTurns + me.index, next_turn = kTurns + after(me.index);
    if (!kTogether && me.index == kConsumers - 1) named_barrier_arrive(next_turn, 256);
    for (int tile = cluster; tile < p.cluster_tiles; tile += clusters, turn = after(turn)) {
      if (!kTogether && turn != me.index) {
        position += p.k_blocks;
        continue;
      }
      epilogue.begin(row_of(tile) + (kTogether ? me.index * kRows : 0), column_of(tile));
      Place<kStages> place{static_cast<int>(position % kStages), position / kStages & 1};
      const auto release = [&](int s) {
        if (me.thread < kCluster) barrier_arrive_remote(in_block(ring.empty(s), me.thread));
      };
      if constexpr (!kTogether) named_barrier(my_turn, 256);
      const int last = multiply<kN, In>(
          acc, ring, place, p.k_blocks,
          [&](int s) { return ring.stage(s) + (kTogether ? me.index * kRows * 128 : 0); },
          [&](int s) { return ring.stage(s) + Config::kInputBytes; }, release);
      if constexpr (!kTogether) named_barrier_arrive(next_turn, 256);
      finish(acc);
      release(last);
      position += p.k_blocks;
      epilogue.run(acc);
    }
    if (me.leads()) store_wait_read<0>();
  }
  // No block may leave while another still writes into its shared memory or arrives at its
  // barriers.
  if constexpr (kCluster > 1) cluster_sync();
}

}  // namespace ft::cuda::sm90
