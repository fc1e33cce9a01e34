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
