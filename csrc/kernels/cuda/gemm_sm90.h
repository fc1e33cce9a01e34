// GEMM kernels for sm_90 (wgmma, bulk tensor copies, clusters), fp16, bf16 and e4m3.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/gemm.h"

namespace ft::cuda {

// One way to compute a product. Tall tiles (gemm_tall_sm90.cuh) are named by into how many parts K
// is split and in how many rounds of one tile a multiprocessor the product is done; the tokens of a
// tile follow from that and from the rows of each call.
struct Sm90Plan {
  int variant = -1;
  int splits = 1;
  int rounds = 0;
};

// The time of a plan is estimated as a sum: what a thing costs, in microseconds, by how much of it
// there is. The costs are a card's own (gemm_costs.h); the same structs hold how much there is.
struct TileCost {
  float fixed;   // once
  float round;   // a tile for every cluster that the chip runs at a time
  float tokens;  // 100 tokens of a tall tile, each round
  float block;   // 64 of K, each round; of a tall tile, by thousands of cycles that they take
  float heavy;   // the same by hundreds of GFLOP, at most 1.28: clocks fall under load
  float gelu;    // a round of an activation; of a tall tile, by hundreds of tokens
};

// What a layer norm and the sums of a split K cost where the product leaves them to another kernel.
struct AfterCost {
  float tile;           // after plain tiles
  float split;          // after tiles whose K a cluster splits
  float tall;           // after tall tiles, by the part of the chip that they keep busy
  float element, more;  // millions of elements, and those beyond four
  float partial;        // millions of partial sums
};

// cuBLASLt's first guess and the passes over memory after it. In a chain its kernels neither start
// early nor let the next one do so, so it is dearer than it is alone.
struct LibraryCost {
  float fixed;
  float gflop, more;  // GFLOP, and those beyond 15
  float element;      // millions of elements of the output
};

struct Sm90Amounts {
  int tile = -1;  // index into a card's tiles; none where the kernel does not run here
  TileCost product{};
  AfterCost after{};
};

struct LibraryAmounts {
  int kind;  // index into a card's kinds of cuBLASLt's products
  LibraryCost product;
};

// "ping-pong 128x192", "together 128x128 / 2" (parts of K, in a cluster), "tall x2" (rounds),
// "tall x1 / 4" (parts of K, in memory), "tall norm 6 x1".
std::string gemm_sm90_name(Sm90Plan plan);

// The plan of that name; variant -1 when this build has none.
Sm90Plan gemm_sm90_named(const std::string& name);

// Whether the current device runs these kernels: an sm_90, unless FT_HANDLER_SM90_GEMM in the
// environment at first use says no.
bool gemm_sm90_enabled();

// Whether the plan can run this problem on the current device (alignment, sizes, epilogue, chip).
bool gemm_sm90_supports(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm);

// Every plan for this problem, the one expected to be fastest first.
std::vector<Sm90Plan> gemm_sm90_plans(const Gemm& gemm, const GemmNorm* norm);

// What the plan's estimate is made of; for measurements that the costs are fitted to.
Sm90Amounts gemm_sm90_amounts(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm);
LibraryAmounts gemm_library_amounts(const Gemm& gemm, const GemmNorm* norm);

// The plan expected to be fastest; variant -1 when none serves or cuBLASLt is expected to be
// faster. `sure`: no kernel was left out because a question about it failed, as where memory is
// full.
Sm90Plan gemm_sm90_choose(const Gemm& gemm, const GemmNorm* norm, bool* sure);

// The plan expected to be fastest of those that sum in the same order, whatever the rows; variant
// -1 when none serves.
Sm90Plan gemm_sm90_invariant(const Gemm& gemm);

// Enqueues the product and, where norm is given, the layer norm, in the product's epilogue or as a
// kernel of its own. `scratch` [rows, n] and `workspace` as in gemm.h.
cudaError_t gemm_sm90(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm, void* scratch,
                      void* workspace, Launch launch);

}  // namespace ft::cuda
