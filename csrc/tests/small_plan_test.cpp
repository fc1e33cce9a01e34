// The few-token encoder's plans, on the host alone: which shapes it takes, that whatever it chooses
// can be run, and that every kernel that is compiled is one that some plan asks for.
#include "kernels/cuda/small_plan.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace {

using ft::DType;
using ft::cuda::kMostFewTokens;
using ft::cuda::small_plan;
using ft::cuda::small_plan_fits;
using ft::cuda::SmallGemmPlan;
using ft::cuda::SmallPlan;
using ft::cuda::SmallShape;
using ft::cuda::small::GemmLayout;
using ft::cuda::small::GemmSizes;
using namespace ft::cuda::small;

constexpr int kH100 = 132;
// GPUs of compute capability 9.0 have 78 (H20), 114 (H100 PCIe) or 132; a slice of one has fewer.
constexpr int kMultiprocessors[] = {16, 60, 78, 114, kH100};

void require(bool condition, const char* what, const SmallShape& s) {
  if (condition) return;
  std::printf("FAILED %s: %d tokens, %d sequences of at most %d, hidden %d, %d heads, %d\n", what,
              s.tokens, s.batch, s.max_seqlen, s.hidden, s.heads, s.intermediate);
  std::exit(1);
}

SmallShape shape(int tokens, int hidden = 768, int intermediate = 3072, int head_dim = 64) {
  return {DType::kFloat16, tokens, 1, tokens, hidden, intermediate, hidden / head_dim, 12};
}

bool same(const SmallGemmPlan& a, const SmallGemmPlan& b) {
  return a.tile == b.tile && a.split == b.split && a.stages == b.stages;
}

bool same(const SmallPlan& a, const SmallPlan& b) {
  return same(a.qkv, b.qkv) && same(a.out, b.out) && same(a.up, b.up) && same(a.down, b.down) &&
         a.far_ahead == b.far_ahead && a.prefetch == b.prefetch;
}

// Everything has its place: in this order, aligned for bulk copies, within a block's memory.
void check_layout(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  const Tile& tile = kTiles[plan.tile];
  const GemmSizes sizes = gemm_sizes(s, kind, plan, n, k);
  const GemmLayout at(kind, tile.rows, tile.columns, sizes);
  const int places[] = {at.barrier,      at.released,   at.bounds,   at.bias,    at.gamma,
                        at.beta,         at.next_gamma, at.residual, at.moments, at.affine,
                        at.affine_parts, at.sequences,  at.weight,   at.input,   at.keys,
                        at.sums,         at.total};
  for (int i = 0; i + 1 < static_cast<int>(sizeof(places) / sizeof(int)); ++i) {
    require(places[i] <= places[i + 1], "the order of a layout", s);
  }
  require(at.released + 4 * sizes.stages <= at.bounds, "the room for barriers", s);
  require(at.weight % kTileAlign == 0 && at.input % kTileAlign == 0 && at.keys % kTileAlign == 0,
          "the alignment of swizzled tiles", s);
  for (const int place : {at.bias, at.gamma, at.beta, at.next_gamma, at.residual, at.moments,
                          at.affine, at.affine_parts, at.sums}) {
    require(place % 16 == 0, "the alignment of copies", s);
  }
  require(at.total <= kMostSharedBytes, "the size of shared memory", s);
}

void every_plan_can_be_run() {
  bool used[kKinds][kTileCount] = {};
  for (const int multiprocessors : kMultiprocessors) {
    for (int hidden = 64; hidden <= 832; hidden += 64) {
      for (const int head_dim : {32, 64}) {
        for (const int intermediate : {64, 320, 2 * hidden, 4 * hidden, 4096, 8192}) {
          for (const int tokens : {0, 1, 15, 16, 31, 32, 33, 48, 64, 65, 96, 97}) {
            for (const int batch : {1, 1024}) {
              SmallShape s = shape(tokens, hidden, intermediate, head_dim);
              s.batch = batch;
              SmallPlan plan = {};
              const bool found = small_plan(s, multiprocessors, &plan);
              const bool estimated = tokens <= 64 && hidden <= 768;
              const bool measured = tokens <= 96 && hidden == 768 && intermediate == 3072;
              require(found == (estimated || measured), "whether there is a plan", s);
              if (!found) continue;
              require(small_plan_fits(s, plan), "that a plan fits", s);
              check_layout(s, kNorm, plan.qkv, 3 * hidden, hidden);
              check_layout(s, kAttention, plan.out, hidden, hidden);
              check_layout(s, kNormGelu, plan.up, intermediate, hidden);
              check_layout(s, kResidual, plan.down, hidden, intermediate);
              used[kNorm][plan.qkv.tile] = true;
              used[kAttention][plan.out.tile] = true;
              used[kNormGelu][plan.up.tile] = true;
              used[kResidual][plan.down.tile] = true;
            }
          }
        }
      }
    }
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int tile = 0; tile < kTileCount; ++tile) {
      if (used[kind][tile] == kTiles[tile].serves[kind]) continue;
      std::printf("FAILED kind %d in tile %d: compiled but not asked for\n", kind, tile);
      std::exit(1);
    }
  }
}

void other_shapes_are_refused() {
  SmallShape wrong[] = {shape(kMostFewTokens + 1),
                        shape(-1),
                        shape(32, 800),
                        shape(32, 768, 3000),
                        shape(32, 768, 0),
                        shape(32, 768, 3072, 128),
                        shape(65, 384, 1536),
                        shape(32, 1024, 4096),
                        shape(32),
                        shape(32),
                        shape(32)};
  wrong[8].dtype = DType::kFloat32;
  wrong[9].batch = 1025;
  wrong[10].heads = 0;
  for (const SmallShape& s : wrong) {
    SmallPlan plan = {};
    require(!small_plan(s, kH100, &plan), "a shape that is not served", s);
  }
  // A plan of the caller's own is looked at too.
  SmallPlan plan = {};
  require(small_plan(shape(32), kH100, &plan), "a plan", shape(32));
  for (const SmallGemmPlan& cut :
       {SmallGemmPlan{-1, 1, 12}, SmallGemmPlan{kTileCount, 1, 12}, SmallGemmPlan{0, 0, 12},
        SmallGemmPlan{0, kMaxSplit + 1, 2}, SmallGemmPlan{0, 1, 1}, SmallGemmPlan{3, 4, 3}}) {
    SmallPlan other = plan;
    other.qkv = cut;
    require(!small_plan_fits(shape(32), other), "a cut that no kernel has", shape(32));
  }
}

void multiprocessors_count() {
  // A measured plan stays; an estimate follows the chip.
  SmallPlan one = {}, other = {};
  for (int tokens = 1; tokens <= kMostFewTokens; ++tokens) {
    require(small_plan(shape(tokens), kH100, &one) && small_plan(shape(tokens), 78, &other) &&
                same(one, other),
            "a measured plan", shape(tokens));
  }
  const SmallShape s = shape(64, 768, 2048);
  require(small_plan(s, kH100, &one) && small_plan(s, 60, &other) && !same(one, other),
          "a plan for fewer multiprocessors", s);
}

}  // namespace

int main() {
  every_plan_can_be_run();
  other_shapes_are_refused();
  multiprocessors_count();
  std::printf("small_plan_test: all passed\n");
  return 0;
}
