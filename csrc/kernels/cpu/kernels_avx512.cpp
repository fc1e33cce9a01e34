// AVX-512 F, BW, DQ and VL.
#define FT_NAMESPACE avx512
#define FT_LANES 16
#define FT_MR 8
#define FT_NV 3
#define FT_BF16_DOT 0
#define FT_INT8_DOT 1
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx512 = avx512::table("avx512", 3);

}  // namespace ft::cpu
