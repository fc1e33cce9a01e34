// GEMM kernels for sm_90 (wgmma, bulk tensor copies, clusters), fp16 and bf16.
#pragma once

#include "kernels/cuda/gemm.h"

namespace ft::cuda {

// Number of compiled variants; 0 when the library was built without sm_90.
int gemm_sm90_variants();

// Short name of a variant, such as "pingpong 128x192 2x1".
const char* gemm_sm90_name(int variant);

// Whether `variant` does the layer norm itself; otherwise a kernel of its own has to follow.
bool gemm_sm90_norms(int variant);

// Whether `variant` can run this problem on the current device (alignment, sizes, epilogue, chip).
bool gemm_sm90_supports(int variant, const Gemm& gemm, const GemmNorm* norm);

// The variant expected to be fastest, or -1 when none serves or cuBLASLt is expected to be faster.
int gemm_sm90_choose(const Gemm& gemm, const GemmNorm* norm);

// Enqueues `variant`.
cudaError_t gemm_sm90(int variant, const Gemm& gemm, const GemmNorm* norm, Launch launch);

}  // namespace ft::cuda
