// AVX-512 with vdpbf16ps and AMX tiles of bfloat16 and of int8.
#define FT_NAMESPACE amx
#define FT_LANES 16
#define FT_MR 8
#define FT_NV 3
#define FT_BF16_DOT 2
#define FT_INT8_DOT 3
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kAmx = amx::table("amx", 5);

}  // namespace ft::cpu
