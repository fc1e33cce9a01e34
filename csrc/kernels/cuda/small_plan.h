// How the few-token encoder cuts its products for a shape, and which shapes it takes. Host
// arithmetic without CUDA headers.
#pragma once

#include "kernels/cuda/small_layout.h"
#include "kernels/types.h"

namespace ft::cuda {

// Most tokens that the few-token encoder takes: the chain of whole-chip GEMMs is ahead beyond.
constexpr int kMostFewTokens = 96;

// Host-side capacities; the lengths themselves are read from cu_seqlens on the device.
struct SmallShape {
  DType dtype;  // kFloat16 or kBFloat16
  int tokens;   // rows of the packed tensors; rows at cu_seqlens[batch] and beyond are padding
  int batch;
  int max_seqlen;
  int hidden;
  int intermediate;
  int heads;
  int layers;

  bool operator==(const SmallShape&) const = default;
};

// How one GEMM [tokens,K] x [N,K]^T is cut: an index into small::kTiles, the number of blocks of a
// cluster that share K, and the 64-wide steps of input kept in shared memory.
struct SmallGemmPlan {
  int tile;
  int split;
  int stages;
};

struct SmallPlan {
  SmallGemmPlan qkv, out, up, down;
  bool far_ahead;  // kernels may start several links ahead to fetch weights, else one
  bool prefetch;   // each kernel brings the next one's weights into L2
};

// The plan for a shape on a GPU of so many multiprocessors; false when the chain is not the way to
// run it: another head size than 32 or 64, widths not multiples of 64, too long for shared memory,
// or more tokens or a larger hidden size than it was measured ahead of larger kernels with.
bool small_plan(const SmallShape& shape, int multiprocessors, SmallPlan* plan);

// Whether the kernels can run a shape by this plan.
bool small_plan_fits(const SmallShape& shape, const SmallPlan& plan);

namespace small {

// The numbers of the GEMM [tokens, k] x [n, k]^T that such a plan cuts. Of moments it knows the
// most parts that there can be, until the launcher says how many their producer made.
GemmSizes gemm_sizes(const SmallShape& shape, Kind kind, const SmallGemmPlan& plan, int n, int k);

}  // namespace small

}  // namespace ft::cuda
