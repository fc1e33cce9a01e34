// AVX2, FMA and F16C.
#define FT_NAMESPACE avx2
#define FT_LANES 8
#define FT_MR 6
#define FT_NV 2
#define FT_BF16_DOT 0
#define FT_INT8_DOT 1
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx2 = avx2::table("avx2", 2);

}  // namespace ft::cpu
