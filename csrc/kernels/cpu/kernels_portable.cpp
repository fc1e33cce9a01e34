// Any processor: 4 floats a vector, which every 64-bit one has.
#define FT_NAMESPACE portable
#define FT_LANES 4
#define FT_MR 3
#define FT_NV 2
#define FT_BF16_DOT 0
#define FT_INT8_DOT 0
#include "kernels/cpu/impl.h"

namespace ft::cpu {

const Kernels kPortable = portable::table("portable", 1);

}  // namespace ft::cpu
