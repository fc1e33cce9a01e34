// Attention with wgmma and bulk tensor copies (sm_90a), fp16 and bf16, head sizes 32, 64 and 128.
//
// After FlashAttention-2 and -3 (Dao 2023; Shah et al. 2024). A block takes 128 query rows of one
// head, 64 per warpgroup, and reads the keys and values of the sequence in blocks of 64, most often
// all requested at the start: 6 blocks fit beside the queries and two thread blocks fit a
// multiprocessor, so up to 384 keys need no refill. Four resident warpgroups in different phases
// keep the tensor cores and the exponentials busy; within one, the values' product of a block and
// the scores of the next are in flight together.

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/narrow.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {
namespace {

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

// Shared memory of a block of `kGroups` warpgroups: queries, the rings of keys and of values,
// barriers, the bias. One warpgroup is for sequences of at most 128.
template <int kDim, int kGroups, bool kBiased>
struct Blocks : Layout<kDim> {
  using Layout<kDim>::kTileBytes;
  using Bias = BiasTable<(kGroups == 1 ? 128 : kMostBiasReach) + kBiasMargin, 128 * kGroups>;
  static constexpr int kStages = kGroups == 1 ? 2 : kDim == 32 ? 8 : kBiased ? 5 : 6;
  // Thread blocks on a multiprocessor: four warpgroups share its registers, two of the largest
  // heads.
  static constexpr int kResident = (kDim == 128 ? 2 : 4) / kGroups;
  static constexpr int kKeysAt = kGroups * kTileBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kBiasAt = kBarriersAt + 256;
  static constexpr int kSharedBytes = kBiasAt + (kBiased ? Bias::kBytes : 0);
  static_assert((2 * kStages + 1) * 8 + kStages * 4 <= 256);
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
template <typename T, int kDim, bool kAccumulate>
__device__ __forceinline__ void issue_values(
    float (&output)[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][4],
    const uint32_t (&probabilities)[4][4], uint32_t value_tile, int keys) {
  using L = Layout<kDim>;
  auto step = [&](int k) {
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) {
      multiply_values<T>(output[h], probabilities[k],
                         descriptor<L::kLine>(value_tile, h * L::kHalfBytes + 16 * k * L::kLine),
                         kAccumulate || k > 0);
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
template <int kDim>
__device__ __forceinline__ void clear_values(uint32_t value_tile, int keys, int threads) {
  using L = Layout<kDim>;
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < (16 - keys % 16) * kPieces; i += threads) {
    const int row = keys + i / kPieces, piece = i % kPieces;
    const uint32_t at = value_tile + piece / 8 * L::kHalfBytes + swizzled<L::kLine>(row, piece % 8);
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  named_barrier(1, threads);
}

// exp2(scores * scale - shift) in place, added to the rows' sums.
__device__ __forceinline__ void exponentials(float (&scores)[8][4], float scale, float shift0,
                                             float shift1, float& sum0, float& sum1) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores[n][i] = power_of_two(scores[n][i] * scale - shift0);
      scores[n][2 + i] = power_of_two(scores[n][2 + i] * scale - shift1);
      sum0 += scores[n][i];
      sum1 += scores[n][2 + i];
    }
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

// This thread's part of its two rows, divided by their sums.
template <int kDim>
using RowWords = uint32_t[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][2];

template <typename T, int kDim>
__device__ __forceinline__ void divide_rows(
    RowWords<kDim>& words,
    const float (&output)[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][4], float sum0,
    float sum1) {
  using L = Layout<kDim>;
  const float scale0 = __fdividef(1.f, sum0), scale1 = __fdividef(1.f, sum1);
#pragma unroll
  for (int h = 0; h < L::kHalves; ++h) {
#pragma unroll
    for (int n = 0; n < L::kColumns / 8; ++n) {
      words[h][n][0] = pack2<T>(output[h][n][0] * scale0, output[h][n][1] * scale0);
      words[h][n][1] = pack2<T>(output[h][n][2] * scale1, output[h][n][3] * scale1);
    }
  }
}

// Copies a warp's 16 rows, `rows` of them, from its own query rows to memory in pieces of 16 bytes.
template <int kDim, int kPieces>
__device__ __forceinline__ void copy_rows(const unsigned char* query_tile, unsigned char* to,
                                          int64_t row_bytes, int rows) {
  using L = Layout<kDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  __syncwarp();
  constexpr int kRowsAtOnce = 32 / kPieces;
  const int piece = lane % kPieces;
  int r = lane / kPieces;
  to += r * row_bytes + 16 * piece;
#pragma unroll
  for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    if (r < rows) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(
          query_tile + piece / 8 * L::kHalfBytes + swizzled<L::kLine>(16 * warp + r, piece % 8));
    }
    r += kRowsAtOnce;
    to += kRowsAtOnce * row_bytes;
  }
}

// Writes this warp's 16 rows, `rows` of them, through its own query rows, so that rows leave in
// whole 16-byte pieces.
template <typename T, int kDim>
__device__ __forceinline__ void write_rows(const RowWords<kDim>& words, unsigned char* query_tile,
                                           T* to, int64_t row_stride, int rows) {
  using L = Layout<kDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int row = 16 * warp + lane / 4;
#pragma unroll
  for (int h = 0; h < L::kHalves; ++h) {
#pragma unroll
    for (int n = 0; n < L::kColumns / 8; ++n) {
      unsigned char* at = query_tile + h * L::kHalfBytes + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(at + swizzled<L::kLine>(row, n)) = words[h][n][0];
      *reinterpret_cast<uint32_t*>(at + swizzled<L::kLine>(row + 8, n)) = words[h][n][1];
    }
  }
  copy_rows<kDim, kDim / 8>(query_tile, reinterpret_cast<unsigned char*>(to), 2 * row_stride, rows);
}

// The same in e4m3, divided by the rows' sums: a thread's columns of two groups of eight are
// neighbours there.
template <int kDim>
__device__ __forceinline__ void write_narrow_rows(
    const float (&output)[Layout<kDim>::kHalves][Layout<kDim>::kColumns / 8][4], float sum0,
    float sum1, unsigned char* query_tile, const NarrowRows& narrow, int64_t at, int row_bytes,
    int rows) {
  using L = Layout<kDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int row = 16 * warp + lane / 4;
  const float step = *narrow.step;
  const float scale0 = __fdividef(1.f, sum0 * step), scale1 = __fdividef(1.f, sum1 * step);
#pragma unroll
  for (int h = 0; h < L::kHalves; ++h) {
#pragma unroll
    for (int n = 0; n < L::kColumns / 8; n += 2) {
      const float (&x)[4] = output[h][n], (&y)[4] = output[h][n + 1];
      const int piece = (h * L::kColumns + n * 8) / 16;
      unsigned char* to = query_tile + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(to + swizzled<L::kLine>(row, piece)) =
          pack_e4m3(x[0] * scale0, x[1] * scale0, y[0] * scale0, y[1] * scale0);
      *reinterpret_cast<uint32_t*>(to + swizzled<L::kLine>(row + 8, piece)) =
          pack_e4m3(x[2] * scale1, x[3] * scale1, y[2] * scale1, y[3] * scale1);
    }
  }
  copy_rows<kDim, kDim / 16>(query_tile, static_cast<unsigned char*>(narrow.rows) + at, row_bytes,
                             rows);
}

// Fills a head's columns of a tile without keys, of the output or of its copy in e4m3.
template <typename T>
__device__ __forceinline__ void fill_either(const AttentionTile& tile,
                                            const AttentionArguments& arguments, int head,
                                            int head_dim, int hidden) {
  constexpr uint8_t kNan = 0x7f;
  if (arguments.narrow.rows != nullptr)
    return fill_tile<uint8_t>(tile, arguments.narrow.rows, kNan, head, head_dim, hidden);
  fill_tile<T>(tile, arguments.output, head, head_dim, hidden);
}

// Puts zeros in place of infinities and NaNs in the first `rows` rows of a packed tile's values;
// returns which rows had any, a bit each. `flags` is a word per warp.
template <typename T, int kDim>
__device__ __forceinline__ uint64_t make_finite(unsigned char* value_tile, uint32_t* flags,
                                                int rows) {
  using L = Layout<kDim>;
  static_assert(L::kHalves == 1);
  // Two threads a row, so that a warp's votes are 16 rows.
  const int row = threadIdx.x / 2;
  bool spoilt = false;
  for (int piece = threadIdx.x % 2; row < rows && piece < kDim / 8; piece += 2) {
    auto* words = reinterpret_cast<uint32_t*>(value_tile + swizzled<L::kLine>(row, piece));
    for (int i = 0; i < 4; ++i) {
      const uint32_t finite = finite_or_zero<T>(words[i]);
      spoilt |= finite != words[i];
      words[i] = finite;
    }
  }
  const uint32_t votes = __ballot_sync(0xffffffffu, spoilt);
  if (threadIdx.x % 32 == 0) flags[threadIdx.x / 32] = votes | votes >> 1;  // even bits
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t found = 0;
  for (int r = 0; r < 64; ++r) {
    found |= static_cast<uint64_t>(flags[r / 16] >> r % 16 * 2 & 1) << r;
  }
  return found;
}

template <typename T, int kDim, int kGroups, bool kBiased>
__global__ void __launch_bounds__(128 * kGroups, Blocks<kDim, kGroups, kBiased>::kResident)
    sm90_attention_kernel(const __grid_constant__ CUtensorMap map,
                          const AttentionArguments arguments) {
  using L = Blocks<kDim, kGroups, kBiased>;
  // Swizzled copies and wgmma want 1,024-byte alignment, which the start of shared memory has.
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = sm90::shared_address(shared);
  const uint32_t query_full = base + L::kBarriersAt;
  const uint32_t key_full = query_full + 8, value_full = key_full + 8 * L::kStages;
  const uint32_t released = value_full + 8 * L::kStages;
  const uint32_t key_tiles = base + L::kKeysAt, value_tiles = base + L::kValuesAt;

  pdl_launch_dependents();
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    for (int i = 0; i < 2 * L::kStages + 1; ++i) barrier_init(query_full + 8 * i, 1);
    for (int i = 0; i < L::kStages; ++i) {
      asm volatile("st.shared.u32 [%0], 0;" ::"r"(released + 4 * i) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  const typename L::Bias bias{reinterpret_cast<float*>(shared + L::kBiasAt), arguments.bias_span};
  typename L::Bias::template Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  const int hidden = arguments.num_heads * kDim;
  if (tile.kv_len == 0) {
    return fill_either<T>(tile, arguments, head, kDim, hidden);
  }
  if constexpr (kBiased) bias.store(bias_loaded);
  __syncthreads();

  const int blocks = (tile.kv_len + kKeys - 1) / kKeys;
  auto request = [&](int block, uint32_t barriers, uint32_t tiles, int column) {
    const int stage = block % L::kStages;
    const uint32_t barrier = barriers + 8 * stage;
    barrier_expect(barrier, L::kTileBytes);
    copy_tile<kDim>(tiles + stage * L::kTileBytes, &map, column + head * kDim,
                    tile.kv_begin + block * kKeys, barrier);
  };
  const int active_groups = kGroups == 2 && tile.rows > kGroupRows ? 2 : 1;
  if (threadIdx.x == 0) {
    barrier_expect(query_full, active_groups * L::kTileBytes);
    copy_tile<kDim>(base, &map, head * kDim, tile.begin, query_full);
    if (active_groups == 2) {
      copy_tile<kDim>(base + L::kTileBytes, &map, head * kDim, tile.begin + kGroupRows, query_full);
    }
    for (int block = 0; block < min(blocks, L::kStages); ++block) {
      request(block, key_full, key_tiles, hidden);
      request(block, value_full, value_tiles, 2 * hidden);
    }
  }
  const int group = kGroups == 1 ? 0 : threadIdx.x / 128;
  if (group >= active_groups) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  unsigned char* query_tile = shared + group * L::kTileBytes;
  uint32_t query[kDim / 16][4];
  barrier_wait(query_full, 0);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    load_matrices(query[k], query_tile + k / 4 * L::kHalfBytes +
                                swizzled<L::kLine>(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
  }

  float scores[8][4];
  float output[L::kHalves][L::kColumns / 8][4] = {};
  uint32_t probabilities[4][4];
  // Rows past the tile's end may be a neighbour's: they never ask for rescaling, which 16 rows
  // share.
  const int row = group * kGroupRows + 16 * warp + lane / 4;
  float max0 = row < tile.rows ? -INFINITY : INFINITY;
  float max1 = row + 8 < tile.rows ? -INFINITY : INFINITY;
  float sum0 = 0.f, sum1 = 0.f;
  const float scale = arguments.scale_log2;
  auto start_scores = [&](int stage, int parity) {
    barrier_wait(key_full + 8 * stage, parity);
    const uint32_t key_tile = key_tiles + stage * L::kTileBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply_keys<T>(scores, query[k],
                       descriptor<L::kLine>(key_tile, k / 4 * L::kHalfBytes + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  auto start_values = [&](int stage, int keys) {
    const uint32_t value_tile = value_tiles + stage * L::kTileBytes;
    if (keys % 16 != 0) clear_values<kDim>(value_tile, keys, 128 * active_groups);
    issue_values<T, kDim, true>(output, probabilities, value_tile, keys);
  };
  // Scores to exponentials. A shift that is too small by up to 2^8 serves as well as the maximum,
  // so that rescaling is rare; returns whether it is due, by how much in shrink. With a bias maxima
  // are of powers of two, without one they are of the products.
  const float unit = kBiased ? 1.f : scale;
  float shift0 = 0.f, shift1 = 0.f, shrink0 = 1.f, shrink1 = 1.f;
  auto soften = [&](int block) {
    const int keys = min(tile.kv_len - block * kKeys, kKeys);
    float factor = scale, constant = 0.f;
    if constexpr (kBiased) {
      const int distance =
          tile.kv_begin + block * kKeys - (tile.begin + group * kGroupRows + 16 * warp);
      if (!bias.is_constant(distance, kKeys, &constant)) {
        const float2* pairs = bias.pairs(distance);
#pragma unroll
        for (int n = 0; n < 8; ++n) add_bias(scores[n], pairs, n, scale);
        factor = 1.f;
      }
    }
    if (keys < kKeys) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * n + lane % 4 * 2 + i >= keys) scores[n][i] = scores[n][2 + i] = -INFINITY;
        }
      }
    }
    float new0 = kBiased ? -INFINITY : max0, new1 = kBiased ? -INFINITY : max1;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      new0 = fmaxf(new0, fmaxf(scores[n][0], scores[n][1]));
      new1 = fmaxf(new1, fmaxf(scores[n][2], scores[n][3]));
    }
    new0 = quad_max(new0);
    new1 = quad_max(new1);
    if constexpr (kBiased) {
      new0 = fmaxf(max0, fmaf(new0, factor, constant));
      new1 = fmaxf(max1, fmaf(new1, factor, constant));
    }
    const bool grown = (new0 - max0) * unit > 8.f || (new1 - max1) * unit > 8.f;
    const bool rescale = __any_sync(0xffffffffu, grown);
    if (rescale) {
      // As long as all scores are minus infinity nothing is to be shifted.
      shift0 = new0 == -INFINITY ? 0.f : new0 * unit;
      shift1 = new1 == -INFINITY ? 0.f : new1 * unit;
      shrink0 = power_of_two(max0 * unit - shift0);
      shrink1 = power_of_two(max1 * unit - shift1);
      max0 = new0, max1 = new1;
      sum0 *= shrink0, sum1 *= shrink1;
    }
    exponentials(scores, factor, shift0 - constant, shift1 - constant, sum0, sum1);
    return rescale;
  };
  auto rescale_output = [&] {
#pragma unroll
    for (int h = 0; h < L::kHalves; ++h) {
#pragma unroll
      for (int n = 0; n < L::kColumns / 8; ++n) {
        output[h][n][0] *= shrink0, output[h][n][1] *= shrink0;
        output[h][n][2] *= shrink1, output[h][n][3] *= shrink1;
      }
    }
  };

  start_scores(0, 0);
  wgmma_wait<0>();
  soften(0);
  pack_probabilities<T>(probabilities, scores);
  barrier_wait(value_full, 0);
  // The scores of a block and the values' product of the one before are in flight together; the
  // exponentials overlap the latter.
  int stage = 0, parity = 0;  // of the values that are next
  for (int block = 1; block < blocks; ++block) {
    const bool wrap = stage == L::kStages - 1;
    const int key_stage = wrap ? 0 : stage + 1, key_parity = parity ^ (wrap ? 1 : 0);
    start_scores(key_stage, key_parity);
    start_values(stage, kKeys);
    wgmma_wait<1>();
    const bool rescale = soften(block);
    // This block's values are wanted next. Waiting for them here also keeps the compiler from
    // moving the wait below above the exponentials: it schedules freely only within a basic block.
    barrier_wait(value_full + 8 * key_stage, key_parity);
    wgmma_wait<0>();
    if (block - 1 + L::kStages < blocks && lane == 0) {
      // The last warp done with a stage asks for its next contents.
      const uint32_t all = 4 * active_groups;
      if (count_up(released + 4 * stage) % all == all - 1) {
        request(block - 1 + L::kStages, key_full, key_tiles, hidden);
        request(block - 1 + L::kStages, value_full, value_tiles, 2 * hidden);
      }
    }
    if (rescale) rescale_output();
    pack_probabilities<T>(probabilities, scores);
    stage = key_stage, parity = key_parity;
  }
  start_values(stage, tile.kv_len - (blocks - 1) * kKeys);
  wgmma_wait<0>();
  // All warps of the group have read their queries: the rows may be written over.
  named_barrier(2 + group, 128);
  const int first = group * kGroupRows + 16 * warp;
  const int64_t at = static_cast<int64_t>(tile.begin + first) * hidden + head * kDim;
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  if (arguments.narrow.rows != nullptr)
    return write_narrow_rows<kDim>(output, sum0, sum1, query_tile, arguments.narrow, at, hidden,
                                   tile.rows - first);
  RowWords<kDim> words;
  divide_rows<T, kDim>(words, output, sum0, sum1);
  write_rows<T, kDim>(words, query_tile, static_cast<T*>(arguments.output) + at, hidden,
                      tile.rows - first);
}

// Queries, keys, values, two barriers, a flag a warp.
template <int kDim>
constexpr int kPackedBytes = 3 * Layout<kDim>::kTileBytes + 32;
using PackedBias = BiasTable<64, 128>;

// Sequences of at most 64: whole ones, several to a tile of 64 rows, a warpgroup per tile and head.
template <typename T, int kDim, bool kBiased>
__global__ void __launch_bounds__(128, 6)
    sm90_packed_attention_kernel(const __grid_constant__ CUtensorMap map,
                                 const AttentionArguments arguments) {
  using L = Layout<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t query_tile = sm90::shared_address(shared);
  const uint32_t key_tile = query_tile + L::kTileBytes, value_tile = key_tile + L::kTileBytes;
  const uint32_t scores_ready = value_tile + L::kTileBytes, values_ready = scores_ready + 8;
  pdl_launch_dependents();
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    barrier_init(scores_ready, 1);
    barrier_init(values_ready, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  const int hidden = arguments.num_heads * kDim;
  const PackedBias bias{reinterpret_cast<float*>(shared + kPackedBytes<kDim>), 64};
  PackedBias::Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  if (tile.kv_len == 0) {
    return fill_either<T>(tile, arguments, head, kDim, hidden);
  }
  if (threadIdx.x == 0) {
    barrier_expect(scores_ready, 2 * L::kTileBytes);
    copy_tile<kDim>(query_tile, &map, head * kDim, tile.begin, scores_ready);
    copy_tile<kDim>(key_tile, &map, hidden + head * kDim, tile.begin, scores_ready);
    barrier_expect(values_ready, L::kTileBytes);
    copy_tile<kDim>(value_tile, &map, 2 * hidden + head * kDim, tile.begin, values_ready);
  }
  // One bit per key of the tile: which this thread's two rows see. Rows past the end see none.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = 16 * warp + lane / 4;
  const uint32_t* bounds = plan_bounds(arguments.plan, arguments.bound) + tile.begin;
  auto own_keys = [&](int r) -> uint64_t {
    const uint32_t bound = r < tile.rows ? bounds[r] : 0;
    const uint32_t low = bound & 0xffff, length = (bound >> 16) - low;
    return length == 0 ? 0 : ~0ull >> (64 - length) << low;
  };
  // Bit 8 n + i is this thread's column i of group n.
  const uint64_t visible0 = own_keys(row) >> (lane % 4 * 2);
  const uint64_t visible1 = own_keys(row + 8) >> (lane % 4 * 2);
  if constexpr (kBiased) bias.store(bias_loaded);
  __syncthreads();

  float scores[8][4];
  barrier_wait(scores_ready, 0);
  wgmma_fence();
  issue_scores<T, kDim>(scores, query_tile, key_tile);
  wgmma_wait<0>();
  if constexpr (kBiased) {
    const float2* pairs = bias.pairs(-16 * warp);
#pragma unroll
    for (int n = 0; n < 8; ++n) add_bias(scores[n], pairs, n, arguments.scale_log2);
  }
  float max0 = -INFINITY, max1 = -INFINITY;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const auto word0 = static_cast<uint32_t>(visible0 >> (n / 4 * 32));
    const auto word1 = static_cast<uint32_t>(visible1 >> (n / 4 * 32));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((word0 & 1u << (n % 4 * 8 + i)) == 0) scores[n][i] = -INFINITY;
      if ((word1 & 1u << (n % 4 * 8 + i)) == 0) scores[n][2 + i] = -INFINITY;
      max0 = fmaxf(max0, scores[n][i]);
      max1 = fmaxf(max1, scores[n][2 + i]);
    }
  }
  max0 = quad_max(max0);
  max1 = quad_max(max1);
  const float scale = kBiased ? 1.f : arguments.scale_log2;
  float sum0 = 0.f, sum1 = 0.f;
  uint32_t probabilities[4][4];
  exponentials(scores, scale, max0 == -INFINITY ? 0.f : max0 * scale,
               max1 == -INFINITY ? 0.f : max1 * scale, sum0, sum1);
  pack_probabilities<T>(probabilities, scores);
  float output[L::kHalves][L::kColumns / 8][4];
  barrier_wait(values_ready, 0);
  if (tile.rows % 16 != 0) clear_values<kDim>(value_tile, tile.rows, 128);
  issue_values<T, kDim, false>(output, probabilities, value_tile, tile.rows);
  wgmma_wait<0>();
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  RowWords<kDim> words;
  divide_rows<T, kDim>(words, output, sum0, sum1);
  uint32_t probe0 = 0, probe1 = 0;
#pragma unroll
  for (int n = 0; n < L::kColumns / 8; ++n) {
    probe_finite<T>(probe0, words[0][n][0]);
    probe_finite<T>(probe1, words[0][n][1]);
  }
  const bool finite = (row >= tile.rows || probed_finite(probe0)) &&
                      (row + 8 >= tile.rows || probed_finite(probe1));
  // From here on all warps have read their queries: the rows may be written over.
  if (!__syncthreads_and(finite)) [[unlikely]] {
    // Rows whose own values are not finite become NaN, the others what they are alone.
    const uint64_t spoilt = make_finite<T, kDim>(
        shared + 2 * L::kTileBytes, reinterpret_cast<uint32_t*>(shared + 3 * L::kTileBytes + 16),
        tile.rows);
    if ((own_keys(row) & spoilt) != 0) sum0 = NAN;
    if ((own_keys(row + 8) & spoilt) != 0) sum1 = NAN;
    issue_values<T, kDim, false>(output, probabilities, value_tile, tile.rows);
    wgmma_wait<0>();
    divide_rows<T, kDim>(words, output, sum0, sum1);
  }
  const int64_t at = static_cast<int64_t>(tile.begin + 16 * warp) * hidden + head * kDim;
  if (arguments.narrow.rows != nullptr)
    return write_narrow_rows<kDim>(output, sum0, sum1, shared, arguments.narrow, at, hidden,
                                   tile.rows - 16 * warp);
  write_rows<T, kDim>(words, shared, static_cast<T*>(arguments.output) + at, hidden,
                      tile.rows - 16 * warp);
}

template <typename T, int kDim>
cudaError_t launch_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                        Launch launch) {
  using L = Layout<kDim>;
  CUtensorMap map;
  const CUresult result =
      encode_tensor_map(&map, std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16,
                        arguments.qkv, arguments.tokens, 3 * arguments.num_heads * kDim, 64,
                        L::kColumns, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  if (result == CUDA_ERROR_NOT_SUPPORTED) return cudaErrorNotSupported;
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>(choice.bound) * arguments.num_heads;
  return with_or_without_bias(arguments, [&]<bool kBiased>() {
    if constexpr (kDim <= 64) {
      if (choice.kernel == AttentionKernel::kPackedSm90) {
        return launch_kernel(sm90_packed_attention_kernel<T, kDim, kBiased>, grid, 128,
                             kPackedBytes<kDim> + (kBiased ? PackedBias::kBytes : 0), launch, map,
                             arguments);
      }
      if (choice.tile_rows == kGroupRows) {
        return launch_kernel(sm90_attention_kernel<T, kDim, 1, kBiased>, grid, 128,
                             Blocks<kDim, 1, kBiased>::kSharedBytes, launch, map, arguments);
      }
    }
    return launch_kernel(sm90_attention_kernel<T, kDim, 2, kBiased>, grid, 256,
                         Blocks<kDim, 2, kBiased>::kSharedBytes, launch, map, arguments);
  });
}

template <typename T>
cudaError_t dispatch_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                          Launch launch) {
  switch (arguments.head_dim) {
    case 32:
      return launch_sm90<T, 32>(choice, arguments, launch);
    case 64:
      return launch_sm90<T, 64>(choice, arguments, launch);
    case 128:
      return launch_sm90<T, 128>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                           DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat16:
      return dispatch_sm90<__half>(choice, arguments, launch);
    case DType::kBFloat16:
      return dispatch_sm90<__nv_bfloat16>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ft::cuda
