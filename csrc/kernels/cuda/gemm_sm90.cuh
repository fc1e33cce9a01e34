// The sm_90 GEMM kernel: output = epilogue(input [rows, k] * weight [n, k]^T).
//
// A block is one producer thread and two consumer warpgroups. The producer keeps a ring of
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

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm_elements.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

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
  constexpr int kCluster = Config::kCluster, kChunks = Config::kChunks;
  constexpr int kBuffers = Config::kBuffers, kRows = Config::kRows, kParts = kRows / 64;
  constexpr bool kNorm = Config::kNorm, kTogether = Config::kTogether;
  constexpr int kBlockK = 128 / sizeof(In);
  constexpr bool kScaled = sizeof(In) == 1, kNarrow = sizeof(Out) == 1;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const Ring<kStages, Config::kStageBytes> ring{base, base + Config::kBarriersAt};
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
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
  const auto row_of = [&](int tile) {
    return kNorm ? tile * kM : (tile / p.n_tiles * kCluster + rank) * kM;
  };
  const auto column_of = [&](int tile) { return kNorm ? rank * kN : tile % p.n_tiles * kN; };

  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
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
    }
  } else {
    take_registers<240>();
    wait_for_predecessors();
    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const bool leader = thread == 0;
    const uint32_t staging = base + Config::kStagingAt + consumer * kBuffers * Config::kChunkBytes;
    const auto filled = [&](int buffer) { return ring.further(consumer * kBuffers + buffer); };
    // Where this lane's row of a stmatrix or ldmatrix of 16 x 16 elements lies in a chunk.
    const int matrix_row = warp * 16 + (lane & 15);
    const auto matrix_at = [&](int buffer, int part, int pair) {
      return staging + buffer * Config::kChunkBytes + (part * 64 + matrix_row) * 128 +
             (((pair * 2 + (lane >> 4)) ^ (lane & 7)) << 4);
    };
    const float units = kNarrow ? 1.f / __ldg(p.out_scale) : 1.f;  // of the output's in a 1
    float acc[kParts][kN / 2];
    uint32_t chunk_count = 0;  // chunks this warpgroup has passed through its buffers
    uint32_t own = 0;          // tiles of this warpgroup so far
    uint32_t position = 0;     // in the ring, counted without wrapping
    int turn = 0;
    // Products run strictly in turn: barriers tell odd fills of a stage from even ones, no more, so
    // neither warpgroup may look at the ring before the other is through with its part.
    const int my_turn = 3 + consumer, other_turn = 4 - consumer;
    if (!kTogether && consumer == 1) named_barrier_arrive(other_turn, 256);
    for (int tile = cluster; tile < p.cluster_tiles; tile += clusters, turn ^= 1) {
      if (!kTogether && turn != consumer) {
        position += p.k_blocks;
        continue;
      }
      const int row = row_of(tile) + (kTogether ? consumer * kRows : 0), column = column_of(tile);
      // Vectors come from far away: asked for before the product, put down after it.
      uint32_t vectors[Config::kVectors] = {};
      if (thread < kN / 2 && (kNorm || column + 2 * thread < p.n)) {
        if (p.bias != nullptr) vectors[0] = pair_at<T>(p.bias, column + 2 * thread);
        if constexpr (kNorm) {
          vectors[1] = pair_at<T>(p.gamma, column + 2 * thread);
          vectors[2] = pair_at<T>(p.beta, column + 2 * thread);
        }
      }
      float2 scales{};
      if constexpr (kScaled) {
        if (thread < kN / 2 && column + 2 * thread < p.n)
          scales = __ldg(reinterpret_cast<const float2*>(p.scale + column + 2 * thread));
      }
      const auto load_residual = [&](int chunk, int buffer) {
        barrier_expect(filled(buffer), Config::kChunkBytes);
        load_box(staging + buffer * Config::kChunkBytes, &residual_map, column + chunk * 64, row,
                 filled(buffer));
      };
      if (p.residual && leader) {
        store_wait_read<0>();
        for (int chunk = 0; chunk < min(kBuffers, kChunks); ++chunk)
          load_residual(chunk, (chunk_count + chunk) % kBuffers);
      }

      // ---- the product ----
      Place<kStages> place{static_cast<int>(position % kStages), position / kStages & 1};
      const auto release = [&](int s) {
        if (thread < kCluster) {
          barrier_arrive_remote(in_block(ring.empty(s), thread));
        }
      };
      if constexpr (!kTogether) named_barrier(my_turn, 256);
      const int last = multiply<kN, In>(
          acc, ring, place, p.k_blocks,
          [&](int s) { return ring.stage(s) + (kTogether ? consumer * Config::kChunkBytes : 0); },
          [&](int s) { return ring.stage(s) + Config::kInputBytes; }, release);
      if constexpr (!kTogether) named_barrier_arrive(other_turn, 256);
      finish(acc);
      release(last);
      position += p.k_blocks;

      // ---- the epilogue ----
      const uint32_t vectors_at = base + Config::kVectorsAt + consumer * Config::kVectors * kN * 2;
      if (thread < kN / 2) {
#pragma unroll
        for (int v = 0; v < Config::kVectors; ++v)
          store_shared(vectors_at + v * kN * 2 + thread * 4, vectors[v]);
        if constexpr (kScaled)
          store_shared_pair(base + Config::kScalesAt + consumer * kN * 4 + thread * 8, scales.x,
                            scales.y);
      }
      named_barrier(1 + consumer, 128);
      // A vector's elements for this lane's columns of an 8-column group.
      const auto vector_at = [&](int v, int chunk, int group) {
        return unpack<T>(
            load_shared(vectors_at + v * kN * 2 + chunk * 128 + group * 16 + (lane & 3) * 4));
      };
      const auto add_bias = [&](int chunk) {
#pragma unroll
        for (int group = 0; group < 8; ++group) {
          const float2 b = vector_at(0, chunk, group);
          float2 s{};
          if constexpr (kScaled)
            s = load_shared_pair(base + Config::kScalesAt + consumer * kN * 4 + chunk * 256 +
                                 group * 32 + (lane & 3) * 8);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            float* x = &acc[part][(chunk * 8 + group) * 4];
            x[0] = kScaled ? fmaf(x[0], s.x, b.x) : x[0] + b.x;
            x[1] = kScaled ? fmaf(x[1], s.y, b.y) : x[1] + b.y;
            x[2] = kScaled ? fmaf(x[2], s.x, b.x) : x[2] + b.x;
            x[3] = kScaled ? fmaf(x[3], s.y, b.y) : x[3] + b.y;
          }
        }
      };
      const auto add_residual = [&](int chunk, int buffer) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            uint32_t r[4];
            load_matrices(matrix_at(buffer, part, pair), r[0], r[1], r[2], r[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 v = unpack<T>(r[i]);
              acc[part][(chunk * 8 + pair * 2) * 4 + i * 2] += v.x;
              acc[part][(chunk * 8 + pair * 2) * 4 + i * 2 + 1] += v.y;
            }
          }
      };
      const auto write_chunk = [&](int chunk, int buffer) {
        if constexpr (kNarrow) {
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int unit = 0; unit < 4; unit += 2) {
              const int swizzled = (unit + (lane >> 4)) ^ (lane >> 1 & 3);
              const float* x = &acc[part][(chunk * 4 + unit) * 8];
              store_matrices(staging + buffer * Config::kChunkBytes +
                                 (part * 64 + matrix_row) * 64 + (swizzled << 4),
                             pack_e4m3(x[0], x[1], x[4], x[5]), pack_e4m3(x[2], x[3], x[6], x[7]),
                             pack_e4m3(x[8], x[9], x[12], x[13]),
                             pack_e4m3(x[10], x[11], x[14], x[15]));
            }
        } else {
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
              const float* x = &acc[part][(chunk * 8 + pair * 2) * 4];
              store_matrices(matrix_at(buffer, part, pair), pack<T>(x[0], x[1]),
                             pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
            }
        }
      };

      if constexpr (!kNorm) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk, ++chunk_count) {
          const int buffer = chunk_count % kBuffers;
          add_bias(chunk);
          if (p.residual) {
            barrier_wait(filled(buffer), chunk_count / kBuffers & 1);
            add_residual(chunk, buffer);
          } else {
            if (leader) store_wait_read<kBuffers - 1>();
            named_barrier(1 + consumer, 128);
          }
          if constexpr (kButGelu) {
            activate_but_gelu(p.activation, [&](auto&& f) {
#pragma unroll
              for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int i = 0; i < 32; ++i)
                  acc[part][chunk * 32 + i] = f(acc[part][chunk * 32 + i]);
            });
          } else if (p.gelu) {
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
              for (int i = 0; i < 32; ++i)
                acc[part][chunk * 32 + i] = gelu<T>(acc[part][chunk * 32 + i]);
          }
          if constexpr (kNarrow) {
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
              for (int i = 0; i < 32; ++i) acc[part][chunk * 32 + i] *= units;
          }
          write_chunk(chunk, buffer);
          async_proxy_fence();
          named_barrier(1 + consumer, 128);
          if (leader) {
            store_box(staging + buffer * Config::kChunkBytes, &output_map, column + chunk * 64,
                      row);
            store_commit();
            if (p.residual && chunk + kBuffers < kChunks) {
              store_wait_read<0>();
              load_residual(chunk + kBuffers, buffer);
            }
          }
        }
      } else {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk, ++chunk_count) {
          const int buffer = chunk_count % kBuffers;
          add_bias(chunk);
          if (p.residual) {
            barrier_wait(filled(buffer), chunk_count / kBuffers & 1);
            add_residual(chunk, buffer);
            if (chunk + kBuffers < kChunks) {
              named_barrier(1 + consumer, 128);
              if (leader) load_residual(chunk + kBuffers, buffer);
            }
          }
        }
        // Mean and centred sum of squares of each of this thread's rows over the block's columns,
        // then of the whole row from the cluster's (Chan, Golub and LeVeque's pairwise update).
        float mean[kParts][2], squares[kParts][2];
        const auto over_quad = [](float v) {
          v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
          return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
        };
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float sum = 0.f, sum2 = 0.f;
#pragma unroll
            for (int i = half * 2; i < kN / 2; i += 4) sum += acc[part][i] + acc[part][i + 1];
            const float m = over_quad(sum) * (1.f / kN);
#pragma unroll
            for (int i = half * 2; i < kN / 2; i += 4) {
              const float x = acc[part][i] - m, y = acc[part][i + 1] - m;
              sum2 = fmaf(x, x, fmaf(y, y, sum2));
            }
            mean[part][half] = m;
            squares[part][half] = over_quad(sum2);
          }
        const int set = own & 1;  // a block may be one tile ahead of its peers, never two
        const uint32_t stats =
            base + Config::kStatsAt + (consumer * 2 + set) * kCluster * kRows * 8;
        const uint32_t arrived = ring.further(2 * kBuffers + consumer * 2 + set);
        if (leader) barrier_expect(arrived, kCluster * kRows * 8);
#pragma unroll
        for (int peer = lane & 3; peer < kCluster; peer += 4) {
          const uint32_t there = in_block(stats, peer), there_arrived = in_block(arrived, peer);
#pragma unroll
          for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int r = part * 64 + warp * 16 + half * 8 + lane / 4;
              store_remote(there + (rank * kRows + r) * 8, there_arrived, mean[part][half],
                           squares[part][half]);
            }
        }
        barrier_wait_cluster(arrived, own / 2 & 1);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = part * 64 + warp * 16 + half * 8 + lane / 4;
            const float2* from = reinterpret_cast<const float2*>(shared + (stats - base)) + r;
            float2 each[kCluster];
            float m = 0.f, m2 = 0.f;
#pragma unroll
            for (int peer = 0; peer < kCluster; ++peer) {
              each[peer] = from[peer * kRows];
              m += each[peer].x;
              m2 += each[peer].y;
            }
            m *= 1.f / kCluster;
#pragma unroll
            for (int peer = 0; peer < kCluster; ++peer)
              m2 = fmaf(kN * (each[peer].x - m), each[peer].x - m, m2);
            mean[part][half] = m;
            squares[part][half] = rsqrtf(m2 * (1.f / (kN * kCluster)) + p.eps);
          }
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
          for (int group = 0; group < 8; ++group) {
            const float2 gamma = vector_at(1, chunk, group), beta = vector_at(2, chunk, group);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float* x = &acc[part][(chunk * 8 + group) * 4 + half * 2];
                x[0] = fmaf((x[0] - mean[part][half]) * squares[part][half], gamma.x, beta.x);
                x[1] = fmaf((x[1] - mean[part][half]) * squares[part][half], gamma.y, beta.y);
              }
          }
          // Chunks leave in the ring's order, starting where the residual's chunks will start next.
          const int buffer = (chunk_count + chunk) % kBuffers;
          if (!p.residual || chunk >= kBuffers) {
            if (leader) store_wait_read<kBuffers - 1>();
            named_barrier(1 + consumer, 128);
          }
          write_chunk(chunk, buffer);
          async_proxy_fence();
          named_barrier(1 + consumer, 128);
          if (leader) {
            store_box(staging + buffer * Config::kChunkBytes, &output_map, column + chunk * 64,
                      row);
            store_commit();
          }
        }
        ++own;
      }
    }
    if (leader) store_wait_read<0>();
  }
  // No block may leave while another still writes into its shared memory or arrives at its
  // barriers.
  if constexpr (kCluster > 1) cluster_sync();
}

}  // namespace ft::cuda::sm90
