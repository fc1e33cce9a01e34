// AVX-512 F, BW, DQ and VL.
#define FT_NAMESPACE avx512
#define FT_LANES 16
#define FT_MR 8
#define FT_NV 3
#define FT_DEPTH 192
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx512 = {
    .name = "avx512",
    .layout = 3,
    .mr = avx512::kMr,
    .nr = avx512::kNr,
    .bf16_dot = false,
    .layer_bytes = avx512::layer_bytes,
    .pack = avx512::pack,
    .gemm_scratch = avx512::gemm_scratch,
    .gemm = avx512::gemm,
    .attention_scratch = avx512::attention_scratch,
    .attention = avx512::attention,
    .embed = avx512::embed,
    .layer_norm = avx512::layer_norm,
    .gelu = avx512::gelu_rows,
    .convert = avx512::convert,
};

}  // namespace ft::cpu
