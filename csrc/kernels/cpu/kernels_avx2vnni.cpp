// AVX2 with vpdpbusd of 32 bytes (AVX-VNNI).
#define FT_NAMESPACE avx2vnni
#define FT_LANES 8
#define FT_MR 6
#define FT_NV 2
#define FT_BF16_DOT 0
#define FT_INT8_DOT 2
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAvx2Vnni = avx2vnni::table("avx2_vnni", 6);

}  // namespace ft::cpu
