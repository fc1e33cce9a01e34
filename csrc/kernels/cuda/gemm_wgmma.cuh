// wgmma m64nNk16 (k32 of 8-bit elements) with fp32 accumulators, both operands in shared memory, K
// contiguous in each.
//
// Inline assembly wants every register spelled out, so the widths are made by macros, eight
// registers at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace ft::cuda::sm90 {

// acc += a * b^T, or acc = a * b^T where `accumulate` is 0. acc[4 * j + i]: row lane / 4 (+ 8 for
// i >= 2) of the warp's 16, column 8 * j + 2 * (lane % 4) + i % 2.
template <int kN, typename T>
struct Wgmma;

#define FT_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FT_NAMES_16 \
  FT_NAMES_8        \
  ", "              \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define FT_NAMES_24 \
  FT_NAMES_16       \
  ", "              \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define FT_NAMES_32 \
  FT_NAMES_24       \
  ", "              \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FT_NAMES_40 \
  FT_NAMES_32       \
  ", "              \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FT_NAMES_48 \
  FT_NAMES_40       \
  ", "              \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define FT_NAMES_56 \
  FT_NAMES_48       \
  ", "              \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define FT_NAMES_64 \
  FT_NAMES_56       \
  ", "              \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define FT_NAMES_72 \
  FT_NAMES_64       \
  ", "              \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define FT_NAMES_80 \
  FT_NAMES_72       \
  ", "              \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define FT_NAMES_88 \
  FT_NAMES_80       \
  ", "              \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define FT_NAMES_96 \
  FT_NAMES_88       \
  ", "              \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define FT_NAMES_104 \
  FT_NAMES_96        \
  ", "               \
  "%96, %97, %98, %99, %100, %101, %102, %103"
#define FT_NAMES_112 \
  FT_NAMES_104       \
  ", "               \
  "%104, %105, %106, %107, %108, %109, %110, %111"
#define FT_NAMES_120 \
  FT_NAMES_112       \
  ", "               \
  "%112, %113, %114, %115, %116, %117, %118, %119"
#define FT_NAMES_128 \
  FT_NAMES_120       \
  ", "               \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define FT_OPERANDS(i)                                                                  \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define FT_OPERANDS_8 FT_OPERANDS(0)
#define FT_OPERANDS_16 FT_OPERANDS_8, FT_OPERANDS(8)
#define FT_OPERANDS_24 FT_OPERANDS_16, FT_OPERANDS(16)
#define FT_OPERANDS_32 FT_OPERANDS_24, FT_OPERANDS(24)
#define FT_OPERANDS_40 FT_OPERANDS_32, FT_OPERANDS(32)
#define FT_OPERANDS_48 FT_OPERANDS_40, FT_OPERANDS(40)
#define FT_OPERANDS_56 FT_OPERANDS_48, FT_OPERANDS(48)
#define FT_OPERANDS_64 FT_OPERANDS_56, FT_OPERANDS(56)
#define FT_OPERANDS_72 FT_OPERANDS_64, FT_OPERANDS(64)
#define FT_OPERANDS_80 FT_OPERANDS_72, FT_OPERANDS(72)
#define FT_OPERANDS_88 FT_OPERANDS_80, FT_OPERANDS(80)
#define FT_OPERANDS_96 FT_OPERANDS_88, FT_OPERANDS(88)
#define FT_OPERANDS_104 FT_OPERANDS_96, FT_OPERANDS(96)
#define FT_OPERANDS_112 FT_OPERANDS_104, FT_OPERANDS(104)
#define FT_OPERANDS_120 FT_OPERANDS_112, FT_OPERANDS(112)
#define FT_OPERANDS_128 FT_OPERANDS_120, FT_OPERANDS(120)

#define FT_WGMMA(n, type, registers, a_name, b_name, flag_name, depth, turns)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag_name                                   \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n depth ".f32." type "." type          \
               " {" FT_NAMES_##registers "}, %" #a_name ", %" #b_name ", p, 1, 1" turns ";\n}\n" \
               : FT_OPERANDS_##registers                                                         \
               : "l"(a), "l"(b), "r"(accumulate))

// n / 2 accumulators a thread; the operands that follow them are numbered from there.
#define FT_WGMMA_WIDTH(n, registers, next, after)                                               \
  template <typename T>                                                                         \
  struct Wgmma<n, T> {                                                                          \
    static __device__ __forceinline__ void run(float (&acc)[registers], uint64_t a, uint64_t b, \
                                               int accumulate) {                                \
      if constexpr (std::is_same_v<T, __half>) {                                                \
        FT_WGMMA(n, "f16", registers, registers, next, after, "k16", ", 0, 0");                 \
      } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {                                  \
        FT_WGMMA(n, "e4m3", registers, registers, next, after, "k32", "");                      \
      } else {                                                                                  \
        FT_WGMMA(n, "bf16", registers, registers, next, after, "k16", ", 0, 0");                \
      }                                                                                         \
    }                                                                                           \
  };

FT_WGMMA_WIDTH(32, 16, 17, 18)
FT_WGMMA_WIDTH(48, 24, 25, 26)
FT_WGMMA_WIDTH(64, 32, 33, 34)
FT_WGMMA_WIDTH(80, 40, 41, 42)
FT_WGMMA_WIDTH(96, 48, 49, 50)
FT_WGMMA_WIDTH(112, 56, 57, 58)
FT_WGMMA_WIDTH(128, 64, 65, 66)
FT_WGMMA_WIDTH(144, 72, 73, 74)
FT_WGMMA_WIDTH(160, 80, 81, 82)
FT_WGMMA_WIDTH(176, 88, 89, 90)
FT_WGMMA_WIDTH(192, 96, 97, 98)
FT_WGMMA_WIDTH(208, 104, 105, 106)
FT_WGMMA_WIDTH(224, 112, 113, 114)
FT_WGMMA_WIDTH(240, 120, 121, 122)
FT_WGMMA_WIDTH(256, 128, 129, 130)

#undef FT_WGMMA_WIDTH
#undef FT_WGMMA
#undef FT_OPERANDS
#undef FT_NAMES_8
#undef FT_OPERANDS_8
#undef FT_NAMES_16
#undef FT_OPERANDS_16
#undef FT_NAMES_24
#undef FT_OPERANDS_24
#undef FT_NAMES_32
#undef FT_OPERANDS_32
#undef FT_NAMES_40
#undef FT_OPERANDS_40
#undef FT_NAMES_48
#undef FT_OPERANDS_48
#undef FT_NAMES_56
#undef FT_OPERANDS_56
#undef FT_NAMES_64
#undef FT_OPERANDS_64
#undef FT_NAMES_72
#undef FT_OPERANDS_72
#undef FT_NAMES_80
#undef FT_OPERANDS_80
#undef FT_NAMES_88
#undef FT_OPERANDS_88
#undef FT_NAMES_96
#undef FT_OPERANDS_96
#undef FT_NAMES_104
#undef FT_OPERANDS_104
#undef FT_NAMES_112
#undef FT_OPERANDS_112
#undef FT_NAMES_120
#undef FT_OPERANDS_120
#undef FT_NAMES_128
#undef FT_OPERANDS_128

}  // namespace ft::cuda::sm90
