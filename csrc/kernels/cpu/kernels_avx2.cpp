// AVX2, FMA and F16C.
#define FT_NAMESPACE avx2
#define FT_LANES 8
#define FT_MR 6
#define FT_NV 2
#define FT_DEPTH 192
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx2 = {
    .name = "avx2",
    .layout = 2,
    .mr = avx2::kMr,
    .nr = avx2::kNr,
    .bf16_dot = false,
    .layer_bytes = avx2::layer_bytes,
    .pack = avx2::pack,
    .gemm_scratch = avx2::gemm_scratch,
    .gemm = avx2::gemm,
    .attention_scratch = avx2::attention_scratch,
    .attention = avx2::attention,
    .embed = avx2::embed,
    .layer_norm = avx2::layer_norm,
    .gelu = avx2::gelu_rows,
    .convert = avx2::convert,
};

}  // namespace ft::cpu
