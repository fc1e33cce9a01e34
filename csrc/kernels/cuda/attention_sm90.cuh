// What the kernels of attention with wgmma and bulk tensor copies (sm_90a) share: tiles in shared
// memory, products, exponentials, rows on their way out.
//
// After FlashAttention-2 and -3 (Dao 2023; Shah et al. 2024).
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/narrow.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {

// Of many tiles of sequences over 64, without a bias: blocks stay, and take tiles in turn.
cudaError_t attention_teams_sm90(const CUtensorMap& map, const AttentionArguments& arguments,
                                 DType dtype, int tile_rows, Launch launch);

namespace attention {

using namespace sm90;

constexpr int kGroupRows = 64;
constexpr int kKeys = 64;

template <int kDim>
struct Layout {
  // A tile is 64 rows of up to 64 columns: one row is one swizzle line of 64 or 128 bytes.
  static constexpr int kColumns = kDim < 64 ? kDim : 64;
  static constexpr int kHalves = kDim / kColumns;
  static constexpr int kLine = 2 * kColumns;
  static constexpr int kHalfBytes = 64 * kLine;
  static constexpr int kTileBytes = kHalves * kHalfBytes;
};

template <int kDim>
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* map, int column, int row,
                                          uint32_t barrier) {
#pragma unroll
  for (int half = 0; half < Layout<kDim>::kHalves; ++half) {
    load_box(to + half * Layout<kDim>::kHalfBytes, map, column + 64 * half, row, barrier);
  }
}

// Matrix descriptor of a tile: rows of `kLine` bytes, swizzled over their whole length, groups of 8
// rows apart. It serves keys (contiguous along the product's inner dimension) and, with the
// transposed flag, values. Offsets into the tile are added to the low word.
template <int kLine>
__device__ __forceinline__ uint64_t descriptor(uint32_t tile, int offset) {
  constexpr uint64_t kSwizzle = kLine == 128 ? 1 : 2;
  constexpr uint64_t kHigh = (kSwizzle << 30 | 8 * kLine / 16) << 32;
  return kHigh | ((tile >> 4) + (1u << 16) + static_cast<uint32_t>(offset >> 4));
}

#define FT_ACC4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])

// c[64 x 64] (+)= a[64 x 16] b[16 x 64], both in shared memory, b as rows of its columns.
#define FT_WGMMA_KEYS(type)                                                                       \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
      "%32, %33, p, 1, 1, 0, 0;\n}\n"                                                             \
      : FT_ACC4(c, 0), FT_ACC4(c, 1), FT_ACC4(c, 2), FT_ACC4(c, 3), FT_ACC4(c, 4), FT_ACC4(c, 5), \
        FT_ACC4(c, 6), FT_ACC4(c, 7)                                                              \
      : "l"(a), "l"(b), "r"(accumulate))

// The same with a in registers.
#define FT_WGMMA_KEYS_REGISTERS(type)                                                             \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                               \
      : FT_ACC4(c, 0), FT_ACC4(c, 1), FT_ACC4(c, 2), FT_ACC4(c, 3), FT_ACC4(c, 4), FT_ACC4(c, 5), \
        FT_ACC4(c, 6), FT_ACC4(c, 7)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// The same of 32 keys.
#define FT_WGMMA_FEW_KEYS(type)                                                   \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"                               \
      : FT_ACC4(c, 0), FT_ACC4(c, 1), FT_ACC4(c, 2), FT_ACC4(c, 3)                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// c[64 x 64] (+)= a[64 x 16] b[16 x 64], a in registers, b as its rows.
#define FT_WGMMA_VALUES_64(type)                                                                  \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                                               \
      : FT_ACC4(c, 0), FT_ACC4(c, 1), FT_ACC4(c, 2), FT_ACC4(c, 3), FT_ACC4(c, 4), FT_ACC4(c, 5), \
        FT_ACC4(c, 6), FT_ACC4(c, 7)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// c[64 x 32] (+)= a[64 x 16] b[16 x 32]
#define FT_WGMMA_VALUES_32(type)                                                  \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
      "{%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}\n"                               \
      : FT_ACC4(c, 0), FT_ACC4(c, 1), FT_ACC4(c, 2), FT_ACC4(c, 3)                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

template <typename T>
__device__ __forceinline__ void multiply_keys(float (&c)[8][4], uint64_t a, uint64_t b,
                                              int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FT_WGMMA_KEYS("f16");
  } else {
    FT_WGMMA_KEYS("bf16");
  }
}

template <typename T>
__device__ __forceinline__ void multiply_keys(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b,
                                              int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FT_WGMMA_KEYS_REGISTERS("f16");
  } else {
    FT_WGMMA_KEYS_REGISTERS("bf16");
  }
}

template <typename T>
__device__ __forceinline__ void multiply_few_keys(float (&c)[8][4], const uint32_t (&a)[4],
                                                  uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FT_WGMMA_FEW_KEYS("f16");
  } else {
    FT_WGMMA_FEW_KEYS("bf16");
  }
}

template <typename T>
__device__ __forceinline__ void multiply_values(float (&c)[8][4], const uint32_t (&a)[4],
                                                uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FT_WGMMA_VALUES_64("f16");
  } else {
    FT_WGMMA_VALUES_64("bf16");
  }
}

template <typename T>
__device__ __forceinline__ void multiply_values(float (&c)[4][4], const uint32_t (&a)[4],
                                                uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FT_WGMMA_VALUES_32("f16");
  } else {
    FT_WGMMA_VALUES_32("bf16");
  }
}

#undef FT_WGMMA_KEYS
#undef FT_WGMMA_KEYS_REGISTERS
#undef FT_WGMMA_FEW_KEYS
#undef FT_WGMMA_VALUES_64
#undef FT_WGMMA_VALUES_32
#undef FT_ACC4

// Byte offset of 16-byte piece `piece` of row `row` in a swizzled tile.
template <int kLine>
__device__ __forceinline__ int swizzled(int row, int piece) {
  const int turn = kLine == 128 ? row & 7 : row >> 1 & 3;
  return row * kLine + ((piece ^ turn) << 4);
}

// scores = queries keys^T of one tile each.
template <typename T, int kDim>
__device__ __forceinline__ void issue_scores(float (&scores)[8][4], uint32_t query_tile,
                                             uint32_t key_tile) {
  using L = Layout<kDim>;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int at = k / 4 * L::kHalfBytes + k % 4 * 32;
    multiply_keys<T>(scores, descriptor<L::kLine>(query_tile, at),
                     descriptor<L::kLine>(key_tile, at), k > 0);
  }
  wgmma_commit();
}

// output (+)= probabilities values, over the first `keys` keys of the tile rounded up to 16.
template <typename T, int kDim>
__device__ __forceinline__ void issue_values(
    float (&output)[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][4],
    const uint32_t (&probabilities)[4][4], uint32_t value_tile, int keys, bool accumulate) {
  using L = Layout<kDim>;
  auto step = [&](int k) {
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) {
      multiply_values<T>(output[h], probabilities[k],
                         descriptor<L::kLine>(value_tile, h * L::kHalfBytes + 16 * k * L::kLine),
                         accumulate || k > 0);
    }
  };
  wgmma_fence();
  if (keys > kKeys - 16) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) step(k);
  } else {
#pragma unroll
    for (int k = 0; k < kKeys / 16 - 1; ++k) {
      if (16 * k < keys) step(k);
    }
  }
  wgmma_commit();
}

// Value rows past the end belong to other sequences or to nobody. Their probabilities are zero, but
// zero times a stray infinity is not: clears those that share the last 16 rows that are multiplied.
// Each warpgroup does it for itself.
template <int kDim>
__device__ __forceinline__ void clear_values(uint32_t value_tile, int keys, int barrier) {
  using L = Layout<kDim>;
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x % 128; i < (16 - keys % 16) * kPieces; i += 128) {
    const int row = keys + i / kPieces, piece = i % kPieces;
    const uint32_t at = value_tile + piece / 8 * L::kHalfBytes + swizzled<L::kLine>(row, piece % 8);
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
  async_proxy_fence();
  named_barrier(barrier, 128);
}

// exp2(scores * scale - shift) in place, added to the rows' sums, of one group of eight keys.
__device__ __forceinline__ void exponentials(float (&scores)[4], float scale, float shift0,
                                             float shift1, float& sum0, float& sum1) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scores[i] = power_of_two(scores[i] * scale - shift0);
    scores[2 + i] = power_of_two(scores[2 + i] * scale - shift1);
    sum0 += scores[i];
    sum1 += scores[2 + i];
  }
}

// Accumulators of one product as the left operand of the next.
template <typename T>
__device__ __forceinline__ void pack_probabilities(uint32_t (&probabilities)[4][4],
                                                   const float (&scores)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    probabilities[n / 2][n % 2 * 2] = pack2<T>(scores[n][0], scores[n][1]);
    probabilities[n / 2][n % 2 * 2 + 1] = pack2<T>(scores[n][2], scores[n][3]);
  }
}

// This thread's words of its two rows, of `kColumns` columns a group of four threads each.
template <int kDim, int kColumns>
using RowWords = uint32_t[2][kDim / kColumns];

template <int kDim>
using RowSums = float[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][4];

template <int kDim>
__device__ __forceinline__ void scale_rows(RowSums<kDim>& output, float scale0, float scale1) {
#pragma unroll
  for (auto& half : output) {
#pragma unroll
    for (float (&group)[4] : half) {
      group[0] *= scale0, group[1] *= scale0;
      group[2] *= scale1, group[3] *= scale1;
    }
  }
}

// The rows divided by their sums.
template <typename T, int kDim>
__device__ __forceinline__ void divide_rows(RowWords<kDim, 8>& words, const RowSums<kDim>& output,
                                            float sum0, float sum1) {
  const float scale0 = __fdividef(1.f, sum0), scale1 = __fdividef(1.f, sum1);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const float (&x)[4] = output[i / 8][i % 8];
    words[0][i] = pack2<T>(x[0] * scale0, x[1] * scale0);
    words[1][i] = pack2<T>(x[2] * scale1, x[3] * scale1);
  }
}

// The same in e4m3: a thread's columns of two groups of eight are neighbours there.
template <int kDim>
__device__ __forceinline__ void divide_narrow_rows(RowWords<kDim, 16>& words,
                                                   const RowSums<kDim>& output, float sum0,
                                                   float sum1, float step) {
  const float scale0 = __fdividef(1.f, sum0 * step), scale1 = __fdividef(1.f, sum1 * step);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const float (&x)[4] = output[i / 4][i % 4 * 2], (&y)[4] = output[i / 4][i % 4 * 2 + 1];
    words[0][i] = pack_e4m3(x[0] * scale0, x[1] * scale0, y[0] * scale0, y[1] * scale0);
    words[1][i] = pack_e4m3(x[2] * scale1, x[3] * scale1, y[2] * scale1, y[3] * scale1);
  }
}

// Four words of each thread of a quad, turned: thread q gets the quad's words q.
__device__ __forceinline__ uint4 turn_quad(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const auto trade = [](uint32_t& low, uint32_t& high, int mask) {
    const bool second = (threadIdx.x & mask) != 0;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? low : high, mask);
    (second ? low : high) = other;
  };
  trade(a, b, 1);
  trade(c, d, 1);
  trade(a, c, 2);
  trade(b, d, 2);
  return make_uint4(a, b, c, d);
}

// Writes a warp's 16 rows, of them those from `first` to `last` - 1, in pieces of 16 bytes: word i
// of the four threads that hold a row is its piece i. `to`: the first row.
template <int kWords>
__device__ __forceinline__ void write_rows(const uint32_t (&words)[2][kWords], void* to,
                                           int64_t row_bytes, int first, int last) {
  const auto word = [&](int i) { return words[i / kWords][i % kWords]; };
#pragma unroll
  for (int i = 0; i < 2 * kWords; i += 4) {
    const uint4 piece = turn_quad(word(i), word(i + 1), word(i + 2), word(i + 3));
    const int at = i + threadIdx.x % 4;
    const int row = threadIdx.x % 32 / 4 + at / kWords * 8;
    if (first <= row && row < last) {
      reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + row * row_bytes)[at % kWords] =
          piece;
    }
  }
}

// The rows in e4m3, divided by their sums. `at`: the first row's place in the output.
template <int kDim>
__device__ __forceinline__ void write_narrow_rows(const RowSums<kDim>& output, float sum0,
                                                  float sum1, const NarrowRows& narrow, int64_t at,
                                                  int row_bytes, int first, int last) {
  RowWords<kDim, 16> words;
  divide_narrow_rows<kDim>(words, output, sum0, sum1, *narrow.step);
  write_rows(words, static_cast<unsigned char*>(narrow.rows) + at, row_bytes, first, last);
}

// Fills a head's columns of a tile without keys, of the output or of its copy in e4m3.
template <typename T>
__device__ __forceinline__ void fill_either(const AttentionTile& tile,
                                            const AttentionArguments& arguments, int head,
                                            int head_dim, int hidden, int thread, int threads) {
  constexpr uint8_t kNan = 0x7f;
  if (arguments.narrow.rows != nullptr)
    return fill_tile<uint8_t>(tile, arguments.narrow.rows, kNan, head, head_dim, hidden, thread,
                              threads);
  fill_tile<T>(tile, arguments.output, from_float<T>(NAN), head, head_dim, hidden, thread, threads);
}

}  // namespace attention
}  // namespace ft::cuda
