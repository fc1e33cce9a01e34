// Attention with wgmma and bulk tensor copies (sm_90a), fp16 and bf16, head sizes 32, 64 and 128.
//
// After FlashAttention-2 and -3 (Dao 2023; Shah et al. 2024). One block stays on each
// multiprocessor. Its warpgroups form teams of one or two, 64 query rows of one head a warpgroup,
// and each team has a warp that fetches for it: queries, and keys and values in blocks of 64
// through a ring of bulk tensor copies, which runs on into the team's next tile while the last one
// is finished. Tiles are taken from a queue, longest first. Four warpgroups in different phases
// keep the tensor cores and the exponentials busy; within one, the values' product of a block and
// the scores of the next are in flight together.

#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/narrow.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {
namespace {

using namespace sm90;

constexpr int kGroupRows = 64;
constexpr int kKeys = 64;
// Above this, the sum of a thread's exponentials of a row in a block of keys, a block's scores ask
// for another shift: half precision ends at 2^16.
constexpr float kMostSum = 4096.f;
// And above this one they are left to be taken once more.
constexpr float kHugeSum = 1e30f;

enum class Softened { kAsBefore, kShifted, kNot };

template <int kDim>
struct Layout {
  // A tile is 64 rows of up to 64 columns: one row is one swizzle line of 64 or 128 bytes.
  static constexpr int kColumns = kDim < 64 ? kDim : 64;
  static constexpr int kHalves = kDim / kColumns;
  static constexpr int kLine = 2 * kColumns;
  static constexpr int kHalfBytes = 64 * kLine;
  static constexpr int kTileBytes = kHalves * kHalfBytes;
};

// A block of teams of `kGroups` warpgroups, and a warpgroup whose warps fetch for them. One
// warpgroup a team is for sequences of at most 128.
template <int kDim, int kWarpgroups, bool kBiased>
struct Teams : Layout<kDim> {
  using Layout<kDim>::kTileBytes;
  static constexpr int kGroups = kWarpgroups;
  static constexpr int kTeamThreads = 128 * kGroups;
  using Bias = BiasTable<(kGroups == 1 ? 128 : kMostBiasReach) + kBiasMargin, kTeamThreads>;
  static constexpr int kTeams = (kDim == 128 ? 2 : 4) / kGroups;
  // Of a block of so many teams, at most kTeams.
  static constexpr int threads(int teams) { return teams * kTeamThreads + 128; }
  static constexpr int kThreads = threads(kTeams);
  // Registers a thread that computes and one that fetches: together what the launch allots.
  static constexpr int kRegisters = kDim == 128 ? 240 : 112;
  static constexpr int kFetchRegisters = kDim == 128 ? 24 : 32;
  static constexpr int kStages = kGroups == 1 ? 2
                                 : kDim == 32 ? 8
                                 : kDim == 64 ? (kBiased ? 4 : 5)
                                              : 4;
  // A team's memory: queries of two tiles, keys, values; then barriers and the tiles; then its
  // bias.
  static constexpr int kKeysAt = 2 * kGroups * kTileBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kBiasAt = kBarriersAt + 1024;
  // Swizzled tiles begin at multiples of 1,024 bytes.
  static constexpr int kTeamBytes = kBiasAt + (kBiased ? (Bias::kBytes + 1023) / 1024 * 1024 : 0);
  static_assert((3 * kStages + 6) * 8 <= 448);
  static_assert(kTeams * kTeamBytes <= 227 * 1024);
};

// Addresses of a team's shared memory.
template <typename Blocks>
struct TeamMemory {
  uint32_t tiles, barriers;
  __device__ __forceinline__ TeamMemory(uint32_t base, int team)
      : tiles(base + team * Blocks::kTeamBytes), barriers(tiles + Blocks::kBarriersAt) {}
  // The team's tile, and the next.
  __device__ __forceinline__ uint32_t work(uint32_t turn) const {
    return barriers + 448 + 32 * turn;
  }
  // Of each four threads of a warpgroup, what is known of their two rows.
  __device__ __forceinline__ uint32_t rows() const { return barriers + 512; }
  // Of the tiles at even and at odd turns.
  __device__ __forceinline__ uint32_t work_full(int turn) const { return barriers + 24 * turn; }
  __device__ __forceinline__ uint32_t query_full(int turn) const {
    return barriers + 24 * turn + 8;
  }
  __device__ __forceinline__ uint32_t query_free(int turn) const {
    return barriers + 24 * turn + 16;
  }
  __device__ __forceinline__ uint32_t key_full(int stage) const {
    return barriers + 48 + 8 * stage;
  }
  __device__ __forceinline__ uint32_t value_full(int stage) const {
    return key_full(Blocks::kStages + stage);
  }
  __device__ __forceinline__ uint32_t released(int stage) const {
    return key_full(2 * Blocks::kStages + stage);
  }
  __device__ __forceinline__ uint32_t queries(int turn, int group) const {
    return tiles + (turn * Blocks::kGroups + group) * Blocks::kTileBytes;
  }
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return tiles + Blocks::kKeysAt + stage * Blocks::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const {
    return tiles + Blocks::kValuesAt + stage * Blocks::kTileBytes;
  }
};

// A place in the ring, and in which of its rounds.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t round = 0;
  __device__ __forceinline__ Place ahead(int places) const {
    const uint32_t to = stage + places;
    return {static_cast<int>(to % kStages), (round + to / kStages) % 2};
  }
  // At most a round ahead.
  __device__ __forceinline__ Place next(int places = 1) const {
    const int to = stage + places;
    const bool wrap = to >= kStages;
    return {wrap ? to - kStages : to, round ^ (wrap ? 1u : 0u)};
  }
};

// The 64 rows of a warpgroup: rows `first` to `last` - 1 of them are the tile's.
struct GroupRows {
  int begin, first, last;
};

// Whether two warpgroups take blocks of keys in turn, for rows that are one's.
template <int kGroups>
__device__ __forceinline__ bool shares(const AttentionTile& tile) {
  return kGroups == 2 && tile.rows <= kGroupRows && tile.kv_len > kKeys;
}

// Rows of a tile that do not fill a warpgroup's 64 stand at the beginning of its first warp in even
// heads and so that they end in its last one in odd heads: warps without rows, which have less to
// do, then are not always the same.
__device__ __forceinline__ GroupRows group_rows(const AttentionTile& tile, int group, int head) {
  const int rows = min(tile.rows - group * kGroupRows, kGroupRows);
  const int first = head % 2 == 0 ? 0 : (kGroupRows - rows) / 16 * 16;
  return {tile.begin + group * kGroupRows - first, first, first + rows};
}

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

// Fetches for a team, one thread: takes tiles off the queue and leaves each beside its queries'
// barrier, one without rows after the last.
template <typename Blocks, int kDim, int kGroups>
__device__ __forceinline__ void fetch_tiles(const CUtensorMap* map,
                                            const AttentionArguments& arguments,
                                            const TeamMemory<Blocks>& memory, uint32_t fetchers,
                                            uint32_t index, AttentionTile tile) {
  const int heads = arguments.num_heads, hidden = heads * kDim;
  const uint32_t total = arguments.bound * heads;
  Place<Blocks::kStages> place;
  Place<2> turn;
  for (bool first = true;; first = false, turn = turn.next()) {
    const int head = index % heads;
    // The second tile is everyone's own too, the shorter the longer the first was.
    uint32_t next = 2 * fetchers - 1 - index;
    if (!first && tile.rows > 0) next = 2 * fetchers + atomicAdd(&arguments.queue->taken, 1u);
    barrier_wait(memory.query_free(turn.stage), turn.round ^ 1);
    const uint32_t work = memory.work(turn.stage), query_full = memory.query_full(turn.stage);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(work), "r"(tile.begin),
                 "r"(tile.rows), "r"(tile.kv_begin), "r"(tile.kv_len)
                 : "memory");
    store_shared(work + 16, head);
    barrier_arrive(memory.work_full(turn.stage));
    if (tile.rows == 0) break;
    if (tile.kv_len == 0) barrier_arrive(query_full);
    const int groups = tile.kv_len == 0 ? 0 : kGroups == 2 && tile.rows > kGroupRows ? 2 : 1;
    if (groups > 0) barrier_expect(query_full, groups * Blocks::kTileBytes);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      copy_tile<kDim>(memory.queries(turn.stage, group), map, head * kDim,
                      group_rows(tile, group, head).begin, query_full);
    }
#pragma unroll 1
    for (int key = 0; key < tile.kv_len; key += kKeys) {
      const int row = tile.kv_begin + key;
      barrier_wait(memory.released(place.stage), place.round ^ 1);
      barrier_expect(memory.key_full(place.stage), Blocks::kTileBytes);
      copy_tile<kDim>(memory.keys(place.stage), map, hidden + head * kDim, row,
                      memory.key_full(place.stage));
      barrier_expect(memory.value_full(place.stage), Blocks::kTileBytes);
      copy_tile<kDim>(memory.values(place.stage), map, 2 * hidden + head * kDim, row,
                      memory.value_full(place.stage));
      place = place.next();
    }
    index = next;
    tile = index < total ? arguments.plan[index / heads] : AttentionTile{};
  }
  // The last to find the queue empty leaves it as it was.
  if (atomicInc(&arguments.queue->done, fetchers - 1) == fetchers - 1) arguments.queue->taken = 0;
}

// What is the same in all threads of a warp, in a register that they share.
__device__ __forceinline__ int same(int x) { return __reduce_max_sync(0xffffffffu, x); }

// The tile that was fetched for this team.
__device__ __forceinline__ AttentionTile fetched_tile(uint32_t work, int* head) {
  AttentionTile tile;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile.begin), "=r"(tile.rows), "=r"(tile.kv_begin), "=r"(tile.kv_len)
               : "r"(work)
               : "memory");
  *head = same(static_cast<int>(load_shared(work + 16)));
  return {same(tile.begin), same(tile.rows), same(tile.kv_begin), same(tile.kv_len)};
}

// A warpgroup's part of all of its team's tiles.
template <typename T, int kDim, int kGroups, bool kBiased>
__device__ __forceinline__ void attend(const AttentionArguments& arguments,
                                       const TeamMemory<Teams<kDim, kGroups, kBiased>>& memory,
                                       int team, int group, int warp, float* bias_values) {
  using L = Teams<kDim, kGroups, kBiased>;
  const int lane = threadIdx.x % 32;
  const int hidden = arguments.num_heads * kDim;
  const typename L::Bias bias{bias_values, arguments.bias_span};
  const float scale = arguments.scale_log2;
  const auto arrive = [&](uint32_t barrier, int arrivals) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier, arrivals);
  };
  // Reads the tile again, so that less of it takes registers meanwhile.
  const auto write = [&](uint32_t work, const RowSums<kDim>& output, float sum0, float sum1) {
    int head;
    const AttentionTile tile = fetched_tile(work, &head);
    const GroupRows rows = group_rows(tile, shares<kGroups>(tile) ? 0 : group, head);
    const int first = rows.first - 16 * warp, end = rows.last - 16 * warp;
    const int64_t at = static_cast<int64_t>(rows.begin + 16 * warp) * hidden + head * kDim;
    if (arguments.narrow.rows != nullptr) {
      write_narrow_rows<kDim>(output, sum0, sum1, arguments.narrow, at, hidden, first, end);
    } else {
      RowWords<kDim, 8> words;
      divide_rows<T, kDim>(words, output, sum0, sum1);
      write_rows(words, static_cast<T*>(arguments.output) + at, 2 * hidden, first, end);
    }
  };
  Place<L::kStages> place;
  Place<2> turn;
  for (;; turn = turn.next()) {
    barrier_wait(memory.work_full(turn.stage), turn.round);
    int head;
    const AttentionTile tile = fetched_tile(memory.work(turn.stage), &head);
    if (tile.rows == 0) return;
    if (tile.kv_len == 0) {
      arrive(memory.query_free(turn.stage), 1);
      fill_either<T>(tile, arguments, head, kDim, hidden, threadIdx.x % L::kTeamThreads,
                     L::kTeamThreads);
      continue;
    }
    const int blocks = (tile.kv_len + kKeys - 1) / kKeys;
    if constexpr (kBiased) {
      const int thread = threadIdx.x % L::kTeamThreads;
      const auto loaded = bias.template load<T>(arguments, head, thread);
      named_barrier(1 + team, L::kTeamThreads);
      bias.store(loaded, thread);
      named_barrier(1 + team, L::kTeamThreads);
    }
    const bool shared = shares<kGroups>(tile);
    const int own_group = shared ? 0 : group, step = shared ? 2 : 1;
    const int first_block = shared ? group : 0;
    const Place<L::kStages> end = place.ahead(blocks);
    const auto release = [&](const Place<L::kStages>& at) {
      arrive(memory.released(at.stage), step);
    };
    place = place.next(first_block);
    const int last_block = blocks - 1 - ((blocks - 1 - first_block) & (step - 1));

    float scores[8][4];
    float output[L::kHalves][L::kColumns / 8][4];
    uint32_t probabilities[4][4];
    // Rows that are not the tile's may be a neighbour's: they never ask for rescaling, which 16
    // rows share. A warp of such rows alone has no exponentials to take.
    const GroupRows rows = group_rows(tile, own_group, head);
    const int row = 16 * warp + lane / 4;
    const bool live = 16 * warp < rows.last && 16 * warp + 16 > rows.first;
    // What the exponents are shifted by, in powers of two: a maximum of earlier blocks.
    float top0 = rows.first <= row && row < rows.last ? -INFINITY : INFINITY;
    float top1 = rows.first <= row + 8 && row + 8 < rows.last ? -INFINITY : INFINITY;
    float sum0 = 0.f, sum1 = 0.f;
    auto start_scores = [&](const Place<L::kStages>& at) {
      barrier_wait(memory.key_full(at.stage), at.round);
      const uint32_t key_tile = memory.keys(at.stage);
      wgmma_fence();
      issue_scores<T, kDim>(scores, memory.queries(turn.stage, own_group), key_tile);
    };
    // Scores to exponentials, of the last block of keys those alone that there are, in steps of 16.
    float factor, constant;
    [[maybe_unused]] const float2* pairs;
    auto find_bias = [&](int block) {
      factor = scale, constant = 0.f, pairs = nullptr;
      if constexpr (kBiased) {
        const int distance = tile.kv_begin + block * kKeys - (rows.begin + 16 * warp);
        if (!bias.is_constant(distance, kKeys, &constant)) {
          pairs = bias.pairs(distance);
          factor = 1.f;
        }
      }
    };
    auto visit = [&]<bool kLast>(int keys, auto&& each) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (kLast && n % 2 == 0 && 8 * n >= keys) break;
        each(n);
      }
    };
    auto complete = [&]<bool kLast>(int keys) {
      if constexpr (kBiased) {
        if (pairs != nullptr) {
          visit.template operator()<kLast>(keys,
                                           [&](int n) { add_bias(scores[n], pairs, n, scale); });
        }
      }
      if constexpr (kLast) {
        visit.template operator()<kLast>(keys, [&](int n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + lane % 4 * 2 + i >= keys) scores[n][i] = scores[n][2 + i] = -INFINITY;
          }
        });
      }
    };
    float shrink0 = 1.f, shrink1 = 1.f;
    // The usual way: by a shift from before, which serves as well as the maximum as long as no
    // exponential is too large for half precision. Larger ones are brought down by the power of two
    // that they exceed 1 by, and shrink is what brings down the rest; what single precision does
    // not hold either is left to the other way.
    auto soften = [&]<bool kLast>(int keys) {
      float part0 = 0.f, part1 = 0.f;
      complete.template operator()<kLast>(keys);
      visit.template operator()<kLast>(keys, [&](int n) {
        exponentials(scores[n], factor, top0 - constant, top1 - constant, part0, part1);
      });
      if (!__any_sync(0xffffffffu, part0 > kMostSum || part1 > kMostSum)) {
        sum0 += part0, sum1 += part1;
        return Softened::kAsBefore;
      }
      if (!__all_sync(0xffffffffu, part0 < kHugeSum && part1 < kHugeSum)) return Softened::kNot;
      float most0 = 1.f, most1 = 1.f;
      visit.template operator()<kLast>(keys, [&](int n) {
        most0 = fmaxf(most0, fmaxf(scores[n][0], scores[n][1]));
        most1 = fmaxf(most1, fmaxf(scores[n][2], scores[n][3]));
      });
      const int power0 = (__float_as_int(quad_max(most0)) >> 23) - 127;
      const int power1 = (__float_as_int(quad_max(most1)) >> 23) - 127;
      shrink0 = __int_as_float((127 - power0) << 23);
      shrink1 = __int_as_float((127 - power1) << 23);
      visit.template operator()<kLast>(keys, [&](int n) {
        scores[n][0] *= shrink0, scores[n][1] *= shrink0;
        scores[n][2] *= shrink1, scores[n][3] *= shrink1;
      });
      sum0 = (sum0 + part0) * shrink0, sum1 = (sum1 + part1) * shrink1;
      top0 += static_cast<float>(power0), top1 += static_cast<float>(power1);
      return Softened::kShifted;
    };
    // The way of the first block, and of one whose scores are larger by far than those before:
    // returns whether what there is is to be rescaled, by how much in shrink.
    bool settled = false;
    auto soften_by_maximum = [&]<bool kLast>(int keys) {
      float new0 = -INFINITY, new1 = -INFINITY;
      complete.template operator()<kLast>(keys);
      visit.template operator()<kLast>(keys, [&](int n) {
        new0 = fmaxf(new0, fmaxf(scores[n][0], scores[n][1]));
        new1 = fmaxf(new1, fmaxf(scores[n][2], scores[n][3]));
      });
      new0 = fmaxf(top0, fmaf(quad_max(new0), factor, constant));
      new1 = fmaxf(top1, fmaf(quad_max(new1), factor, constant));
      const bool rescale = __any_sync(0xffffffffu, new0 > top0 || new1 > top1);
      // As long as all scores are minus infinity nothing is to be shifted.
      const float shift0 = new0 == -INFINITY ? 0.f : new0, shift1 = new1 == -INFINITY ? 0.f : new1;
      if (rescale) {
        shrink0 = power_of_two(top0 - shift0);
        shrink1 = power_of_two(top1 - shift1);
        sum0 *= shrink0, sum1 *= shrink1;
      }
      top0 = new0, top1 = new1;
      settled = !__any_sync(0xffffffffu, top0 == -INFINITY || top1 == -INFINITY);
      visit.template operator()<kLast>(keys, [&](int n) {
        exponentials(scores[n], factor, shift0 - constant, shift1 - constant, sum0, sum1);
      });
      return rescale;
    };
    // Takes this warp's scores once more, since those that were there have become exponentials.
    auto repeat_scores = [&](uint32_t key_tile) {
      const uint32_t query_tile = memory.queries(turn.stage, own_group);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
      }
#pragma unroll 1
      for (int k = 0; k < kDim / 16; ++k) {
        const int half = k / 4 * L::kHalfBytes;
        uint32_t a[4], b[4];
        load_matrices(
            query_tile + half + swizzled<L::kLine>(16 * warp + lane % 16, k % 4 * 2 + lane / 16),
            a[0], a[1], a[2], a[3]);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          load_matrices(
              key_tile + half +
                  swizzled<L::kLine>(8 * n + lane % 8 + lane / 16 * 8, k % 4 * 2 + lane / 8 % 2),
              b[0], b[1], b[2], b[3]);
          mma<T>(scores[n], a, b[0], b[1]);
          mma<T>(scores[n + 1], a, b[2], b[3]);
        }
      }
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

    // The scores of a block and the values' product of the one before are in flight together; the
    // exponentials overlap the latter.
    const int keys = min(tile.kv_len - last_block * kKeys, kKeys);  // of the last block
    Place<L::kStages> next = place;
    barrier_wait(memory.query_full(turn.stage), turn.round);
    start_scores(place);
    wgmma_wait<0>();
    for (int block = first_block;; block += step) {
      const bool first = block == first_block, last = block == last_block;
      bool rescale = false;
      if (live) {
        find_bias(block);
        Softened how = Softened::kNot;
        if (settled) {
          how = last ? soften.template operator()<true>(keys)
                     : soften.template operator()<false>(kKeys);
          if (how == Softened::kNot) repeat_scores(memory.keys(next.stage));
          rescale = how == Softened::kShifted;
        }
        if (how == Softened::kNot) {
          rescale = last ? soften_by_maximum.template operator()<true>(keys)
                         : soften_by_maximum.template operator()<false>(kKeys);
        }
      }
      // This block's values are wanted next. Waiting for them here also keeps the compiler from
      // moving the wait below above the exponentials: it schedules freely only within a basic
      // block.
      barrier_wait(memory.value_full(next.stage), next.round);
      wgmma_wait<0>();
      if (!first) {
        release(place);
        if (rescale) rescale_output();
      }
      pack_probabilities<T>(probabilities, scores);
      place = next;
      if (last) break;
      next = place.next(step);
      start_scores(next);
      issue_values<T, kDim>(output, probabilities, memory.values(place.stage), kKeys, !first);
      wgmma_wait<1>();
    }
    if (keys % 16 != 0) clear_values<kDim>(memory.values(place.stage), keys, 5 + threadIdx.x / 128);
    issue_values<T, kDim>(output, probabilities, memory.values(place.stage), keys,
                          last_block > first_block);
    sum0 = quad_sum(sum0);
    sum1 = quad_sum(sum1);
    wgmma_wait<0>();
    release(place);
    place = end;
    if (shared) {
      // The second's part goes through the queries' memory, which both are done with, to the first.
      const uint32_t part = memory.queries(turn.stage, 0) + threadIdx.x % 128 * 16;
      const uint32_t part_rows = memory.rows() + threadIdx.x % 128 / 4 * 16;
      constexpr int kFours = kDim / 8;
      if (group == 1) {
        named_barrier(9 + team, 256);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          store_shared_four(part + i * 2048, output[i / 8][i % 8]);
        }
        if (lane % 4 == 0) store_shared_four(part_rows, {top0, top1, sum0, sum1});
        async_proxy_fence();
        named_barrier_arrive(11 + team, 256);
        arrive(memory.query_free(turn.stage), 1);
        continue;
      }
      named_barrier_arrive(9 + team, 256);
      named_barrier(11 + team, 256);
      const float4 other = load_shared_four(part_rows);
      const float new0 = fmaxf(top0, other.x), new1 = fmaxf(top1, other.y);
      const float own0 = power_of_two(top0 - new0), own1 = power_of_two(top1 - new1);
      const float part0 = power_of_two(other.x - new0), part1 = power_of_two(other.y - new1);
      sum0 = sum0 * own0 + other.z * part0;
      sum1 = sum1 * own1 + other.w * part1;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 four = load_shared_four(part + i * 2048);
        float (&x)[4] = output[i / 8][i % 8];
        x[0] = x[0] * own0 + four.x * part0, x[1] = x[1] * own0 + four.y * part0;
        x[2] = x[2] * own1 + four.z * part1, x[3] = x[3] * own1 + four.w * part1;
      }
      async_proxy_fence();
    }
    write(memory.work(turn.stage), output, sum0, sum1);
    arrive(memory.query_free(turn.stage), 1);
  }
}

template <typename T, int kDim, int kGroups, bool kBiased>
__global__ void __launch_bounds__(Teams<kDim, kGroups, kBiased>::kThreads, 1)
    sm90_attention_kernel(const __grid_constant__ CUtensorMap map,
                          const AttentionArguments arguments) {
  using L = Teams<kDim, kGroups, kBiased>;
  // Swizzled copies and wgmma want 1,024-byte alignment, which the start of shared memory has.
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = sm90::shared_address(shared);
  pdl_launch_dependents();
  const int warp = same(threadIdx.x / 32);
  const int teams = (blockDim.x - 128) / L::kTeamThreads;
  if (warp < teams && threadIdx.x % 32 == 0) {
    if (warp == 0) prefetch_map(&map);
    const TeamMemory<L> memory(base, warp);
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      barrier_init(memory.work_full(turn), 1);
      barrier_init(memory.query_full(turn), 1);
      barrier_init(memory.query_free(turn), 4 * kGroups);
    }
#pragma unroll
    for (int stage = 0; stage < L::kStages; ++stage) {
      barrier_init(memory.key_full(stage), 1);
      barrier_init(memory.value_full(stage), 1);
      barrier_init(memory.released(stage), 4 * kGroups);
    }
    barrier_init_fence();
  }
  pdl_wait();
  // The first tile is everyone's own, spread over the multiprocessors.
  const int fetcher = warp - teams * 4 * kGroups;
  const uint32_t index = fetcher * gridDim.x + blockIdx.x;
  AttentionTile tile{};
  if (fetcher >= 0 && index < static_cast<uint32_t>(arguments.bound * arguments.num_heads)) {
    tile = arguments.plan[index / arguments.num_heads];
  }
  __syncthreads();
  if (fetcher >= 0) {
    give_registers<L::kFetchRegisters>();
    if (fetcher < teams && threadIdx.x % 32 == 0) {
      fetch_tiles<L, kDim, kGroups>(&map, arguments, TeamMemory<L>(base, fetcher),
                                    gridDim.x * teams, index, tile);
    }
  } else {
    take_registers<L::kRegisters>();
    const int team = warp / (4 * kGroups), group = warp / 4 % kGroups;
    attend<T, kDim, kGroups, kBiased>(
        arguments, TeamMemory<L>(base, team), team, group, warp % 4,
        reinterpret_cast<float*>(shared + team * L::kTeamBytes + L::kBiasAt));
  }
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
    return fill_either<T>(tile, arguments, head, kDim, hidden, threadIdx.x, 128);
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
  const float shift0 = max0 == -INFINITY ? 0.f : max0 * scale;
  const float shift1 = max1 == -INFINITY ? 0.f : max1 * scale;
#pragma unroll
  for (int n = 0; n < 8; ++n) exponentials(scores[n], scale, shift0, shift1, sum0, sum1);
  pack_probabilities<T>(probabilities, scores);
  float output[L::kHalves][L::kColumns / 8][4];
  barrier_wait(values_ready, 0);
  if (tile.rows % 16 != 0) clear_values<kDim>(value_tile, tile.rows, 1);
  issue_values<T, kDim>(output, probabilities, value_tile, tile.rows, false);
  wgmma_wait<0>();
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  RowWords<kDim, 8> words;
  divide_rows<T, kDim>(words, output, sum0, sum1);
  uint32_t probe0 = 0, probe1 = 0;
#pragma unroll
  for (int n = 0; n < L::kColumns / 8; ++n) {
    probe_finite<T>(probe0, words[0][n]);
    probe_finite<T>(probe1, words[1][n]);
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
    issue_values<T, kDim>(output, probabilities, value_tile, tile.rows, false);
    wgmma_wait<0>();
    divide_rows<T, kDim>(words, output, sum0, sum1);
  }
  const int64_t at = static_cast<int64_t>(tile.begin + 16 * warp) * hidden + head * kDim;
  const int rows = tile.rows - 16 * warp;
  if (arguments.narrow.rows != nullptr)
    return write_narrow_rows<kDim>(output, sum0, sum1, arguments.narrow, at, hidden, 0, rows);
  write_rows(words, static_cast<T*>(arguments.output) + at, 2 * hidden, 0, rows);
}

template <typename T, int kDim, int kGroups, bool kBiased>
cudaError_t launch_teams(const CUtensorMap& map, const AttentionArguments& arguments,
                         Launch launch) {
  using L = Teams<kDim, kGroups, kBiased>;
  const int64_t tiles = static_cast<int64_t>(arguments.bound) * arguments.num_heads;
  // Few tiles take small blocks, which start sooner.
  const int64_t blocks = std::min<int64_t>(tiles, device_sms());
  const auto teams = static_cast<int>(std::min<int64_t>((tiles + blocks - 1) / blocks, L::kTeams));
  return launch_kernel(sm90_attention_kernel<T, kDim, kGroups, kBiased>,
                       static_cast<unsigned>(blocks), L::threads(teams), L::kTeams * L::kTeamBytes,
                       launch, map, arguments);
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
  return with_or_without_bias(arguments, [&]<bool kBiased>() {
    if constexpr (kDim <= 64) {
      if (choice.kernel == AttentionKernel::kPackedSm90) {
        const auto grid = static_cast<unsigned>(choice.bound) * arguments.num_heads;
        return launch_kernel(sm90_packed_attention_kernel<T, kDim, kBiased>, grid, 128,
                             kPackedBytes<kDim> + (kBiased ? PackedBias::kBytes : 0), launch, map,
                             arguments);
      }
      if (choice.tile_rows == kGroupRows)
        return launch_teams<T, kDim, 1, kBiased>(map, arguments, launch);
    }
    return launch_teams<T, kDim, 2, kBiased>(map, arguments, launch);
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
