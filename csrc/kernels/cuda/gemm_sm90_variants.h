// Tile shapes of the sm_90 GEMM kernel, shared by the kernels' files and the dispatcher.
#pragma once

namespace ft::cuda::sm90 {

struct GemmParameters {
  const void* bias;   // [n] or null
  const void* gamma;  // [n], norm variants
  const void* beta;   // [n], norm variants
  int n;
  int k_blocks;       // k / 64, rounded up; the copies fill what is beyond with zeros
  int n_tiles;        // plain variants
  int cluster_tiles;  // tiles a whole cluster works on at a time
  float eps;
  bool gelu;
  bool residual;
};

template <int kM_, int kN_, int kStages_, int kBuffers_, int kCluster_, bool kNorm_>
struct GemmConfig {
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kBuffers = kBuffers_;  // chunks in shared memory per warpgroup
  static constexpr bool kNorm = kNorm_;
  static constexpr int kThreads = 384;
  static constexpr int kInputBytes = kM * 128;
  static constexpr int kWeightBytes = kN * 128;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  static constexpr int kChunks = kN / 64;  // the output leaves in boxes of 64 columns
  static constexpr int kChunkBytes = kM * 128;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStatsAt = kStagingAt + 2 * kBuffers * kChunkBytes;
  static constexpr int kStatsBytes = kNorm ? 2 * 2 * kCluster * kM * 8 : 0;
  static constexpr int kBarriersAt = kStatsAt + kStatsBytes;
  static constexpr int kBarriers = 2 * kStages + 2 * kBuffers + (kNorm ? 4 : 0);
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
  static_assert(kM % 64 == 0 && kN % 64 == 0 && kM <= 256 && kN <= 256);
  static_assert(kSharedBytes <= 232448, "more than a block of sm_90 can have");
};

// The variants that are compiled.
using Pingpong128x192 = GemmConfig<128, 192, 4, 2, 2, false>;
using Pingpong128x128 = GemmConfig<128, 128, 5, 2, 2, false>;
using Pingpong64x128 = GemmConfig<64, 128, 6, 2, 1, false>;
using Norm128x192 = GemmConfig<128, 192, 3, 2, 4, true>;
using Norm64x192 = GemmConfig<64, 192, 5, 3, 4, true>;
using Norm64x256 = GemmConfig<64, 256, 4, 2, 4, true>;

}  // namespace ft::cuda::sm90
