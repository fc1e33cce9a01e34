#include "kernels/cuda/small_plan.h"

#include <algorithm>

namespace ft::cuda {

namespace small {

namespace {

// Keys that a tile of `rows` queries can need: its own rows and the rest of the sequences at its
// ends.
int key_capacity(const SmallShape& s, int rows) {
  const int longest = std::clamp(s.max_seqlen, 1, std::max(s.tokens, 1));
  return round_up(std::min(s.tokens, rows + 2 * (longest - 1)), 32);
}

}  // namespace

GemmSizes gemm_sizes(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  GemmSizes sizes = {};
  sizes.tokens = s.tokens;
  sizes.n = n;
  sizes.k = k;
  sizes.batch = s.batch;
  sizes.width = s.hidden;
  sizes.parts = kMaxParts;
  sizes.split = plan.split;
  sizes.stages = std::min(plan.stages, ceil_div(k / kChunk, plan.split));
  sizes.held_rows = std::min(kTiles[plan.tile].rows, round_up(s.tokens, 16));
  if (kind == kAttention) {
    sizes.key_capacity = key_capacity(s, kTiles[plan.tile].rows);
    sizes.longest = s.max_seqlen;
    sizes.head_dim = s.hidden / s.heads;
  }
  return sizes;
}

}  // namespace small

namespace {

using small::ceil_div;
using small::kAttention;
using small::kChunk;
using small::kChunkBytes;
using small::Kind;
using small::kMaxParts;
using small::kMaxSplit;
using small::kMaxStages;
using small::kMostSharedBytes;
using small::kNorm;
using small::kNormGelu;
using small::kResidual;
using small::kTileCount;
using small::kTiles;
using small::Tile;

constexpr int kMaxBatch = 1024;
// Up to here an estimate's plans are ahead of larger kernels, beyond only measured ones.
constexpr int kEstimatedTokens = 64;
constexpr int kEstimatedHidden = 768;

struct Product {
  Kind kind;
  int n, k;
};

Product qkv_of(const SmallShape& s) { return {kNorm, 3 * s.hidden, s.hidden}; }
Product out_of(const SmallShape& s) { return {kAttention, s.hidden, s.hidden}; }
Product up_of(const SmallShape& s) { return {kNormGelu, s.intermediate, s.hidden}; }
Product down_of(const SmallShape& s) { return {kResidual, s.hidden, s.intermediate}; }

int shared_bytes(const SmallShape& s, const Product& product, const SmallGemmPlan& plan) {
  const Tile& tile = kTiles[plan.tile];
  const small::GemmSizes sizes = small::gemm_sizes(s, product.kind, plan, product.n, product.k);
  return small::GemmLayout(product.kind, tile.rows, tile.columns, sizes).total;
}

bool fits(const SmallShape& s, const Product& product, const SmallGemmPlan& plan) {
  if (plan.tile < 0 || plan.tile >= kTileCount || !kTiles[plan.tile].serves[product.kind] ||
      plan.split < 1 || plan.split > kMaxSplit || plan.split > product.k / kChunk) {
    return false;
  }
  const int chunks = ceil_div(product.k / kChunk, plan.split);
  const bool all = plan.stages >= chunks;
  if (std::min(plan.stages, chunks) > kMaxStages || (!all && plan.stages < 2)) return false;
  if (product.kind == kAttention && !all) return false;
  if (small::ends_branch(product.kind) &&
      ceil_div(product.n, kTiles[plan.tile].columns) > kMaxParts) {
    return false;
  }
  return shared_bytes(s, product, plan) <= kMostSharedBytes;
}

// Nanoseconds a plan should take beyond its launch: bytes through L2 and into the busiest
// multiprocessor, matrix instructions, and the exchange of partial sums. Rates are an H200's.
double estimate(const SmallShape& s, int multiprocessors, const Product& product,
                const SmallGemmPlan& plan) {
  const Tile& tile = kTiles[plan.tile];
  const int steps = ceil_div(product.k / kChunk, plan.split), rows = std::min(tile.rows, s.tokens);
  const int blocks = ceil_div(s.tokens, tile.rows) * ceil_div(product.n, tile.columns) * plan.split;
  const int turns = ceil_div(blocks, multiprocessors);
  const double bytes = double(rows) * steps * kChunkBytes;
  // The weights of a first turn are there already.
  double time = std::max(turns * bytes / 90, blocks * bytes / 5000) +
                (turns - 1) * double(tile.columns) * steps * kChunkBytes / 90;
  time += turns * steps * tile.rows * tile.columns / 180.0;
  if (plan.split > 1) time += 300 + turns * rows * tile.columns * 4.0 / 20;
  time += turns * double(rows) * tile.columns / plan.split / tile.threads() * 40;
  if (product.kind == kAttention) {
    const int keys = small::gemm_sizes(s, kAttention, plan, product.n, product.k).key_capacity;
    time += turns * (steps * keys * 256.0 / 90);
  }
  if (shared_bytes(s, product, plan) > kMostSharedBytes / 2) {
    time += 1000;  // leaves no room for the successor's weights
  }
  return time;
}

bool choose(const SmallShape& s, int multiprocessors, const Product& product, SmallGemmPlan* best) {
  bool found = false;
  double least = 0;
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (kTiles[tile].rows > kEstimatedTokens) continue;
    for (int split = 1; split <= std::min(kMaxSplit, product.k / kChunk); ++split) {
      const int steps = ceil_div(product.k / kChunk, split);
      for (int stages = std::min(steps, 6); stages >= 2 || stages == steps; --stages) {
        const SmallGemmPlan plan = {tile, split, stages};
        if (fits(s, product, plan)) {
          const double time = estimate(s, multiprocessors, product, plan);
          if (!found || time < least) {
            *best = plan;
            least = time;
            found = true;
          }
        }
        if (stages == 1) break;
      }
    }
  }
  return found;
}

bool served(const SmallShape& s) {
  if (s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) return false;
  if (s.heads < 1 || s.hidden % kChunk != 0 || s.intermediate % kChunk != 0) return false;
  if (s.hidden < 1 || s.intermediate < 1 || s.layers < 0) return false;
  if (s.hidden != 32 * s.heads && s.hidden != 64 * s.heads) return false;
  return s.tokens >= 0 && s.tokens <= kMostFewTokens && s.batch >= 0 && s.batch <= kMaxBatch;
}

// The fastest plans found on an H200 by timing whole stacks of that many tokens; fewer tokens take
// them too, and other shapes an estimate.
struct Measured {
  int hidden, intermediate, tokens;
  SmallPlan plan;
};
constexpr Measured kMeasured[] = {
    {768, 3072, 32, {{0, 4, 3}, {3, 8, 2}, {0, 3, 4}, {3, 8, 6}, false, true}},
    {768, 3072, 64, {{0, 3, 3}, {3, 8, 2}, {2, 2, 6}, {1, 8, 6}, false, true}},
    {768, 3072, 96, {{4, 3, 4}, {3, 6, 2}, {5, 3, 3}, {5, 8, 3}, false, true}},
    {384, 1536, 32, {{2, 3, 2}, {1, 6, 1}, {3, 4, 2}, {1, 6, 4}, false, false}},
    {384, 1536, 64, {{2, 4, 2}, {0, 6, 1}, {0, 4, 2}, {0, 4, 6}, false, true}},
};

}  // namespace

bool small_plan_fits(const SmallShape& s, const SmallPlan& plan) {
  return served(s) && fits(s, qkv_of(s), plan.qkv) && fits(s, out_of(s), plan.out) &&
         fits(s, up_of(s), plan.up) && fits(s, down_of(s), plan.down);
}

bool small_plan(const SmallShape& s, int multiprocessors, SmallPlan* plan) {
  for (const Measured& m : kMeasured) {
    if (s.hidden == m.hidden && s.intermediate == m.intermediate && s.tokens <= m.tokens &&
        small_plan_fits(s, m.plan)) {
      *plan = m.plan;
      return true;
    }
  }
  if (!served(s) || s.tokens > kEstimatedTokens || s.hidden > kEstimatedHidden) return false;
  plan->far_ahead = true;
  plan->prefetch = false;
  return choose(s, multiprocessors, qkv_of(s), &plan->qkv) &&
         choose(s, multiprocessors, out_of(s), &plan->out) &&
         choose(s, multiprocessors, up_of(s), &plan->up) &&
         choose(s, multiprocessors, down_of(s), &plan->down);
}

}  // namespace ft::cuda
