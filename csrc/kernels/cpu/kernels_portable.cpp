// Any processor: 4 floats a vector, which every 64-bit one has.
#define FT_NAMESPACE portable
#define FT_LANES 4
#define FT_MR 4
#define FT_NV 2
#define FT_DEPTH 192
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kPortable = {
    .name = "portable",
    .layout = 1,
    .mr = portable::kMr,
    .nr = portable::kNr,
    .bf16_dot = false,
    .layer_bytes = portable::layer_bytes,
    .pack = portable::pack,
    .gemm_scratch = portable::gemm_scratch,
    .gemm = portable::gemm,
    .attention_scratch = portable::attention_scratch,
    .attention = portable::attention,
    .embed = portable::embed,
    .layer_norm = portable::layer_norm,
    .gelu = portable::gelu_rows,
    .convert = portable::convert,
};

}  // namespace ft::cpu
