// AVX-512 with vdpbf16ps and vpdpbusd.
#define FT_NAMESPACE avx512bf16
#define FT_LANES 16
#define FT_MR 8
#define FT_NV 3
#define FT_BF16_DOT 1
#define FT_INT8_DOT 2
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx512Bf16 = avx512bf16::table("avx512_bf16", 4);

}  // namespace ft::cpu
