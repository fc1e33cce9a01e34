// AVX-512 with vpdpbusd (VNNI).
#define FT_NAMESPACE avx512vnni
#define FT_LANES 16
#define FT_MR 8
#define FT_NV 3
#define FT_BF16_DOT 0
#define FT_INT8_DOT 2
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx512Vnni = avx512vnni::table("avx512_vnni", 7);

}  // namespace ft::cpu
