// Tile shapes of the sm_90 GEMM kernel, shared by the kernels' files and the dispatcher.
#pragma once

#include <bit>

#include "kernels/types.h"

namespace ft::cuda::sm90 {

struct GemmParameters {
  const void* bias;   // [n] or null
  const void* gamma;  // [n], norm variants
  const void* beta;   // [n], norm variants
  int n;
  int k_blocks;       // of 128 bytes of k; the copies fill what is beyond with zeros
  int n_tiles;        // plain variants
  int cluster_tiles;  // tiles a whole cluster works on at a time
  float eps;
  bool upwards;  // the last rows first
  bool gelu;
  bool residual;
  Activation activation;  // of kernels that know all but GELU
  // Of e4m3 operands, in device memory and aligned to 16 bytes but for out_scale.
  const float* scale;      // [n], what a unit of a column's sums is worth
  const float* out_scale;  // [1], what a unit of the e4m3 output or copy is worth, or null
  // Norm variants: [rows, n], an e4m3 copy of the output in the order of narrow.cuh, or null
  void* narrow;
  int rows;
};

struct TallParameters {
  const void* bias;   // [n] or null
  const void* gamma;  // [n], norm variants
  const void* beta;   // [n], norm variants
  float eps;
  float* partials;  // [splits, rows, n] or null: take the sums as they are, without bias
  int rows;
  int n;  // a multiple of 64
  int k_blocks;
  int feature_tiles;
  int splits;  // of K, at most k_blocks
  int items;   // tiles * splits
  bool gelu;
};

// kTogether: both consumer warpgroups share a tile, half the rows each, which halves the latency of
// a lone tile; otherwise they take tiles in turn, which hides epilogues, of three warpgroups those
// that take twice as long as a product. kRowBytes: of a chunk of the output on its way out.
template <int kM_, int kN_, int kStages_, int kBuffers_, int kCluster_, bool kTogether_,
          bool kNorm_, int kConsumers_ = 2, int kRowBytes_ = 128>
struct GemmConfig {
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kBuffers = kBuffers_;  // chunks in shared memory per warpgroup
  static constexpr bool kTogether = kTogether_, kNorm = kNorm_;
  static constexpr int kRows = kTogether ? kM / 2 : kM;  // of a warpgroup's part of the tile
  static constexpr int kConsumers = kConsumers_, kThreads = 128 * (kConsumers + 1);
  static constexpr int kRegisters = kConsumers == 2 ? 240 : 160;  // of a consumer's thread
  static constexpr int kInputBytes = kM * 128;
  static constexpr int kWeightBytes = kN * 128;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  static constexpr int kChunks = kN / 64;  // the output leaves in boxes of 64 columns
  static constexpr int kChunkBytes = kRows * kRowBytes_;
  static constexpr int kBoxColumns = 64, kSplits = 1;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStatsAt = kStagingAt + kConsumers * kBuffers * kChunkBytes;
  static constexpr int kStatsBytes = kNorm ? kConsumers * 2 * kCluster * kRows * 8 : 0;
  static constexpr int kVectorsAt = kStatsAt + kStatsBytes;  // bias, and gamma and beta
  static constexpr int kVectors = kNorm ? 3 : 1;
  static constexpr int kBarriersAt = kVectorsAt + kConsumers * kVectors * kN * 2;
  static constexpr int kBarriers = 2 * kStages + kConsumers * (kBuffers + (kNorm ? 2 : 0));
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
  // Blocks that fetch a part of a shared tile: parts are whole groups of 8 rows, so of a cluster of
  // six only four do.
  static constexpr int kSharers = std::bit_floor(static_cast<unsigned>(kCluster));
  static_assert((kNorm ? kM : kN) % (8 * kSharers) == 0);
  static_assert(kRows % 64 == 0 && kN % 64 == 0 && kM <= 256 && kN <= 256);
  static_assert(kSharedBytes <= 232448, "more than a block of sm_90 can have");
};

// The same for 8-bit operands, whose columns have scales.
template <typename Plain>
struct ScaledConfig : Plain {
  static constexpr int kScalesAt = (Plain::kSharedBytes + 15) / 16 * 16;
  static constexpr int kSharedBytes = kScalesAt + Plain::kConsumers * Plain::kN * 4;
  static_assert(kSharedBytes <= 232448);
};

// A cluster of kSplits blocks shares a tile of 128 x 128: each takes its part of K and finishes its
// part of the columns, 64 rows a warpgroup.
template <int kSplits_>
struct SplitConfig {
  static constexpr int kM = 128, kN = 128, kStages = 5, kThreads = 384;
  static constexpr int kSplits = kSplits_, kCluster = kSplits, kSharers = 1;
  static constexpr bool kNorm = false;
  static constexpr int kRows = 64;
  static constexpr int kBoxColumns = kN / kSplits;
  static constexpr int kInputBytes = kM * 128;
  static constexpr int kStageBytes = kInputBytes + kN * 128;
  static constexpr int kChunkBytes = kRows * kBoxColumns * 2;
  static constexpr int kPartBytes = kRows * kBoxColumns * 4;  // sums from one block
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kReceivedAt = kStagingAt + 2 * kChunkBytes;
  static constexpr int kBarriersAt = kReceivedAt + 2 * (kSplits - 1) * kPartBytes;
  static constexpr int kBarriers = 2 * kStages + 4;
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
  static_assert(kBoxColumns == 64 || kBoxColumns == 32);  // the swizzles that the kernel knows
  static_assert(kSharedBytes <= 232448);
};

// The variants that are compiled, out of many that were measured (docs/kernels.md).
using PingPong128x192 = GemmConfig<128, 192, 4, 2, 2, false, false>;
using PingPong128x192Alone = GemmConfig<128, 192, 4, 2, 1, false, false>;
using PingPong128x128 = GemmConfig<128, 128, 5, 2, 2, false, false>;
using PingPong64x128 = GemmConfig<64, 128, 6, 2, 1, false, false>;
using Together128x128 = GemmConfig<128, 128, 6, 2, 1, true, false>;
// Of e4m3 outputs alone, whose epilogue takes longer than their product; kTrio: its place among the
// plain tiles.
using Trio128x128 = GemmConfig<128, 128, 5, 2, 2, false, false, 3, 64>;
constexpr int kTrio = 5;
using Together128x128Split2 = SplitConfig<2>;
using Together128x128Split4 = SplitConfig<4>;
using NormPingPong128x192 = GemmConfig<128, 192, 4, 1, 4, false, true>;
using NormPingPong64x192 = GemmConfig<64, 192, 5, 3, 4, false, true>;
using NormPingPong64x128 = GemmConfig<64, 128, 8, 1, 6, false, true>;
using NormPingPong64x256 = GemmConfig<64, 256, 4, 2, 4, false, true>;
using NormPingPong128x128 = GemmConfig<128, 128, 5, 1, 8, false, true>;
using NormTrio64x192 = GemmConfig<64, 192, 5, 2, 4, false, true, 3>;

// call(tile) of the plain tile that a variant is, in the order that every list of them has; of all
// but kTrio.
template <typename Call>
auto with_plain_tile(int variant, const Call& call) {
  switch (variant) {
    case 0:
      return call(PingPong128x192{});
    case 1:
      return call(PingPong128x192Alone{});
    case 2:
      return call(PingPong128x128{});
    case 3:
      return call(PingPong64x128{});
    default:
      return call(Together128x128{});
  }
}

// The same of the tiles with a layer norm.
template <typename Call>
auto with_norm_tile(int variant, const Call& call) {
  switch (variant) {
    case 0:
      return call(NormPingPong128x192{});
    case 1:
      return call(NormPingPong64x192{});
    case 2:
      return call(NormPingPong64x128{});
    case 3:
      return call(NormPingPong64x256{});
    case 4:
      return call(NormPingPong128x128{});
    default:
      return call(NormTrio64x192{});
  }
}

// Tokens of an output box: the whole tile where that leaves four stages, else an even part of it.
constexpr int tall_chunk(int tokens) {
  int parts = 1;
  while (tokens % (parts * 16) != 0 || 4 * (128 + tokens) * 128 + 2 * tokens / parts * 128 > 232192)
    ++parts;
  return tokens / parts;
}

// 128 features by kTokens, 64 features for each consumer warpgroup. kCluster > 1: that many blocks
// hold the whole width of kTokens rows and take their layer norm.
template <int kTokens_, int kCluster_ = 1>
struct TallConfig {
  static constexpr int kFeatures = 128, kTokens = kTokens_, kCluster = kCluster_, kThreads = 384;
  static constexpr bool kNorm = kCluster > 1;
  static constexpr int kChunk = kNorm ? kTokens : tall_chunk(kTokens);
  static constexpr int kChunkBytes = kChunk * 128;
  static constexpr int kWeightBytes = kFeatures * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokens * 128;
  static constexpr int kStatsBytes = kNorm ? kCluster * kTokens * 8 : 0;  // two such sets
  static constexpr int kRowsBytes = kNorm ? kTokens * 8 : 0;
  static constexpr int kStages =
      (232192 - 2 * kChunkBytes - 2 * kStatsBytes - kRowsBytes) / kStageBytes;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStatsAt = kStagingAt + 2 * kChunkBytes;
  static constexpr int kRowsAt = kStatsAt + 2 * kStatsBytes;  // mean and scale of each row
  static constexpr int kBarriersAt = kRowsAt + kRowsBytes;
  static constexpr int kBarriers = 2 * kStages + (kNorm ? 4 : 0);
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
  static_assert(kStages >= 3 && kChunk % 16 == 0 && kSharedBytes <= 232448);
};

// Tokens of the tall tiles that are compiled.
#define FT_TALL_NORM_TOKENS 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208
#define FT_TALL_TOKENS 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256

}  // namespace ft::cuda::sm90
