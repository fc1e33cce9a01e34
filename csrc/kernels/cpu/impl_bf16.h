// GEMM and attention for processors that multiply bfloat16 pairs into float32: vdpbf16ps
// (FT_BF16_DOT 1) or AMX tiles (FT_BF16_DOT 2). Part of impl.h, in its namespace.
//
// Both read one operand as plain rows and the other in panels [k / 2][kWide][2]: 32 columns wide,
// two consecutive k side by side, depth padded with zeros to a multiple of 32 (the tiles' depth).

constexpr int kWide = 32;
constexpr int64_t kPairDepth = 384;  // depth of one pass
constexpr int64_t kPairLd = kPairDepth + 32;
constexpr int64_t kTailRows = 16;

inline int64_t padded_depth(int64_t k) { return ceil_div(k, 32) * 32; }

// ---- the tile ----------------------------------------------------------------------------------

#if FT_BF16_DOT == 1

constexpr int kPairRows = 12;
constexpr int64_t kPairBlock = 144;  // rows of a GEMM task

// acc + a0 b0 + a1 b1 on each lane's pair.
inline Vec dot(Vec acc, UVec a, UVec b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else  // in tests, on a processor without the instruction
  const Vec odd = reinterpret_cast<Vec>(a & 0xffff0000u) * reinterpret_cast<Vec>(b & 0xffff0000u);
  return acc + odd + reinterpret_cast<Vec>(a << 16) * reinterpret_cast<Vec>(b << 16);
#endif
}

template <int kRows>
inline void pair_tile(int64_t rows, const uint16_t* a, int64_t lda, const uint16_t* b,
                      int64_t depth, float* c, int64_t ldc, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return pair_tile<kRows - 1>(rows, a, lda, b, depth, c, ldc, first);
  }
  Vec acc[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 2; ++j) acc[i][j] = first ? Vec{} : load(c + i * ldc + j * kLanes);
  }
  for (int64_t k = 0; k < depth; k += 2) {
    const UVec b0 = reinterpret_cast<UVec>(load(reinterpret_cast<const float*>(b)));
    const UVec b1 = reinterpret_cast<UVec>(load(reinterpret_cast<const float*>(b) + kLanes));
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      std::memcpy(&pair, a + i * lda + k, 4);
      const UVec av = pair - UVec{};
      acc[i][0] = dot(acc[i][0], av, b0);
      acc[i][1] = dot(acc[i][1], av, b1);
    }
    b += 2 * kWide;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 2; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

struct TileState {};  // nothing to set up

inline const char* prefetch_piece(const char* next, int64_t piece) {
  for (int64_t line = 0; line < piece; line += 64) __builtin_prefetch(next + line);
  return next + piece;
}

// c[rows, kWide] (+)= a[rows, depth] b; `next`, `bytes`: what to fetch meanwhile.
inline void pair_block(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t*,
                       const uint16_t* b, int64_t depth, float* c, int64_t ldc, bool first,
                       const char* next, int64_t bytes) {
  const int64_t piece = ceil_div(bytes * kPairRows, rows * 64) * 64;
  for (int64_t m = 0; m < rows; m += kPairRows) {
    if (bytes) next = prefetch_piece(next, piece);
    pair_tile<kPairRows>(smaller(kPairRows, rows - m), a + m * lda, lda, b, depth, c + m * ldc, ldc,
                         first);
  }
}

inline void copy_tail(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*) {}

#else  // AMX

constexpr int64_t kPairBlock = 256;

#if defined(__AMX_BF16__)
// GCC's intrinsics are macros that want digits where these have template arguments.
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_save(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
// Gives this thread eight full tiles for as long as it lives.
struct TileState {
  TileState() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes a row
      config[48 + i] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~TileState() { _tile_release(); }
};
#else  // in tests, on a processor without the instructions
static thread_local uint8_t emulated_tiles[8][16][64];
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(emulated_tiles[kTile][r], static_cast<const char*>(p) + r * stride, 64);
  }
}
template <int kTile>
inline void tile_save(void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(p) + r * stride, emulated_tiles[kTile][r], 64);
  }
}
template <int kTile>
inline void tile_clear() {
  std::memset(emulated_tiles[kTile], 0, sizeof(emulated_tiles[kTile]));
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  for (int r = 0; r < 16; ++r) {
    float sums[16];
    uint16_t a[32], b[32];
    std::memcpy(sums, emulated_tiles[kSum][r], 64);
    std::memcpy(a, emulated_tiles[kA][r], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(b, emulated_tiles[kB][k], 64);
      for (int n = 0; n < 32; ++n) {
        const uint32_t x = static_cast<uint32_t>(a[2 * k + n % 2]) << 16;
        const uint32_t y = static_cast<uint32_t>(b[n]) << 16;
        float fx, fy;
        std::memcpy(&fx, &x, 4);
        std::memcpy(&fy, &y, 4);
        sums[n / 2] += fx * fy;
      }
    }
    std::memcpy(emulated_tiles[kSum][r], sums, 64);
  }
}
struct TileState {
  TileState() {}
};
#endif

// Tiles 0 to 3 sum kGroups x 2 blocks of 16 x 16; 4 and 5 hold rows, 6 and 7 columns.
template <int kGroups>
inline void tile_group(const uint16_t* a0, int64_t lda0, const uint16_t* a1, int64_t lda1,
                       const uint16_t* b, int64_t depth, float* c, int64_t ldc, bool first) {
  if (first) {
    tile_clear<0>();
    tile_clear<1>();
    if constexpr (kGroups == 2) {
      tile_clear<2>();
      tile_clear<3>();
    }
  } else {
    tile_load<0>(c, ldc * 4);
    tile_load<1>(c + 16, ldc * 4);
    if constexpr (kGroups == 2) {
      tile_load<2>(c + 16 * ldc, ldc * 4);
      tile_load<3>(c + 16 * ldc + 16, ldc * 4);
    }
  }
  for (int64_t k = 0; k < depth; k += 32) {
    tile_load<6>(b, kWide * 4);
    tile_load<4>(a0 + k, lda0 * 2);
    tile_dot<0, 4, 6>();
    tile_load<7>(b + 32, kWide * 4);
    tile_dot<1, 4, 7>();
    if constexpr (kGroups == 2) {
      tile_load<5>(a1 + k, lda1 * 2);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    b += 32 * kWide;
  }
  tile_save<0>(c, ldc * 4);
  tile_save<1>(c + 16, ldc * 4);
  if constexpr (kGroups == 2) {
    tile_save<2>(c + 16 * ldc, ldc * 4);
    tile_save<3>(c + 16 * ldc + 16, ldc * 4);
  }
}

// c[rows up to a multiple of 16, kWide] (+)= a[rows, depth] b. The rows past the last whole 16 are
// read from `tail`, where copy_tail put them.
inline void pair_block(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t* tail,
                       const uint16_t* b, int64_t depth, float* c, int64_t ldc, bool first,
                       const char* next, int64_t bytes) {
  const int64_t piece = ceil_div(bytes * 32, rows * 64) * 64;
  for (int64_t m = 0; m < rows; m += 32) {
    for (int64_t line = 0; bytes && line < piece; line += 64) __builtin_prefetch(next + line);
    next += piece;
    const bool whole0 = m + 16 <= rows, whole1 = m + 32 <= rows;
    const uint16_t* a0 = whole0 ? a + m * lda : tail;
    const int64_t lda0 = whole0 ? lda : kPairLd;
    if (m + 16 < rows) {
      const uint16_t* a1 = whole1 ? a + (m + 16) * lda : tail;
      tile_group<2>(a0, lda0, a1, whole1 ? lda : kPairLd, b, depth, c + m * ldc, ldc, first);
    } else {
      tile_group<1>(a0, lda0, a0, lda0, b, depth, c + m * ldc, ldc, first);
    }
  }
}

// Copies the rows past the last whole 16 and zeros below them.
inline void copy_tail(const uint16_t* a, int64_t lda, int64_t rows, int64_t depth, uint16_t* tail) {
  const int64_t begin = rows / kTailRows * kTailRows;
  if (begin == rows) return;
  for (int64_t i = 0; i < kTailRows; ++i) {
    if (begin + i < rows) {
      std::memcpy(tail + i * kPairLd, a + (begin + i) * lda, depth * 2);
    } else {
      std::memset(tail + i * kPairLd, 0, depth * 2);
    }
  }
}

#endif

// ---- GEMM --------------------------------------------------------------------------------------

int64_t pair_layer_bytes(int64_t n, int64_t k) {
  return ceil_div(n, kWide) * kWide * padded_depth(k) * 2;
}

void pack_pairs(const uint16_t* weight, int64_t n, int64_t k, uint16_t* out, int64_t p0,
                int64_t p1) {
  const int64_t depth = padded_depth(k);
  for (int64_t p = p0; p < p1; ++p) {
    uint16_t* panel = out + p * kWide * depth;
    for (int64_t j = 0; j < kWide; ++j) {
      const int64_t row = p * kWide + j;
      for (int64_t i = 0; i < depth; ++i) {
        panel[(i / 2 * kWide + j) * 2 + i % 2] = row < n && i < k ? weight[row * k + i] : 0;
      }
    }
  }
}

constexpr int64_t kPairScratch = (kPairBlock + kTailRows) * (kPairLd * 2 + kPanelColumns * 4);

// `count` elements of any type to bfloat16, then zeros up to `padded`.
inline void to_pairs(const void* from, DType type, int64_t count, int64_t padded, uint16_t* to) {
  convert(from, type, to, DType::kBFloat16, count);
  for (int64_t i = count; i < padded; ++i) to[i] = 0;
}

void gemm_pairs(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch) {
  [[maybe_unused]] const TileState state{};
  float* sums = static_cast<float*>(scratch);  // [kPairBlock + kTailRows, lds]
  uint16_t* block = reinterpret_cast<uint16_t*>(sums + (kPairBlock + kTailRows) * kPanelColumns);
  uint16_t* tail = block + kPairBlock * kPairLd;
  const int64_t lds = (p1 - p0) * kWide, rows = m1 - m0, whole = padded_depth(g.k);
  // Inputs already in bfloat16 are read where they are.
  const bool direct = g.a.dtype == DType::kBFloat16 && whole == g.k;
  for (int64_t k0 = 0; k0 < whole; k0 += kPairDepth) {
    const int64_t depth = smaller(kPairDepth, whole - k0);
    const uint16_t* a = block;
    int64_t lda = kPairLd;
    if (direct) {
      a = static_cast<const uint16_t*>(g.a.data) + m0 * g.lda + k0;
      lda = g.lda;
    } else {
      for (int64_t m = 0; m < rows; ++m) {
        to_pairs(static_cast<const char*>(g.a.data) + ((m0 + m) * g.lda + k0) * size_of(g.a.dtype),
                 g.a.dtype, smaller(depth, g.k - k0), depth, block + m * kPairLd);
      }
    }
    copy_tail(a, lda, rows, depth, tail);
    for (int64_t p = p0; p < p1; ++p) {
      const uint16_t* panel =
          static_cast<const uint16_t*>(g.weight.data) + (p * whole + k0) * kWide;
      pair_block(a, lda, rows, tail, panel, depth, sums + (p - p0) * kWide, lds, k0 == 0,
                 reinterpret_cast<const char*>(panel + whole * kWide), depth * kWide * 2);
    }
  }
  finish_tile(g, sums, lds, m0, rows, p0 * kWide, smaller(lds, g.n - p0 * kWide));
}

// ---- attention ---------------------------------------------------------------------------------

// Query rows whose scores are held at a time.
inline int64_t pair_query_rows(int64_t length) { return length > 1024 ? 32 : 96; }

int64_t pair_attention_scratch(int64_t longest, int64_t head_dim) {
  const int64_t length = padded_depth(longest), d = padded_depth(head_dim);
  // A shorter sequence may hold more rows of narrower scores.
  const int64_t cells =
      larger(pair_query_rows(longest) * length, 96 * padded_depth(smaller(longest, 1024)));
  return 2 * length * d * 2 + cells * (4 + 2) + 96 * (kWide * 4 + d * 2 + 4) +
         kTailRows * kPairLd * 2 + 64 * 8;
}

// The first `count` of 32 or 16 elements, zeros after them.
inline Vec up_to_32(const uint16_t* p, int64_t count) {
  Vec v = {};
  if (count >= 32) return load(reinterpret_cast<const float*>(p));
  std::memcpy(&v, p, count * 2);
  return v;
}
inline HVec up_to_16(const uint16_t* p, int64_t count) {
  if (count >= 16) return *reinterpret_cast<const HVecU*>(p);
  HVec v = {};
  if (count > 0) std::memcpy(&v, p, count * 2);
  return v;
}

// As attention() in impl.h, on pairs: q, k and v in bfloat16, probabilities rounded to it.
void attention_pairs(const Attention& t, void* scratch) {
  [[maybe_unused]] const TileState state{};
  const int64_t length = t.length, d = t.head_dim;
  const int64_t width = padded_depth(length), deep = padded_depth(d);
  char* piece = static_cast<char*>(scratch);
  const auto take = [&](int64_t bytes) {
    char* taken = piece;
    piece += ceil_div(bytes, 64) * 64;
    return taken;
  };
  const int64_t held = pair_query_rows(length);
  auto* keys = reinterpret_cast<uint16_t*>(take(width * deep * 2));    // [width/32][deep/2][32][2]
  auto* values = reinterpret_cast<uint16_t*>(take(width * deep * 2));  // [deep/32][width/2][32][2]
  auto* scores = reinterpret_cast<float*>(take(held * width * 4));     // [held][width]
  auto* shares = reinterpret_cast<uint16_t*>(take(held * width * 2));  // [held][width]
  auto* result = reinterpret_cast<float*>(take(held * kWide * 4));     // [held][kWide]
  auto* copies = reinterpret_cast<uint16_t*>(take(held * deep * 2));   // [held][deep]
  auto* inverse = reinterpret_cast<float*>(take(held * 4));
  auto* tail = reinterpret_cast<uint16_t*>(take(kTailRows * kPairLd * 2));
  const uint16_t* q = static_cast<const uint16_t*>(t.q);
  const uint16_t* k = static_cast<const uint16_t*>(t.k);
  const uint16_t* v = static_cast<const uint16_t*>(t.v);
  // A pair of k's columns moves as one 32-bit element.
  for (int64_t j = 0; j < width; j += kLanes) {
    uint16_t* panel = keys + j / kWide * kWide * deep + j % kWide * 2;
    for (int64_t i = 0; i < deep; i += 2 * kLanes) {
      Vec square[kLanes];
      for (int64_t e = 0; e < kLanes; ++e) {
        square[e] = j + e < length ? up_to_32(k + (j + e) * t.ld + i, d - i) : Vec{};
      }
      transpose(square);
      for (int64_t e = 0; e < kLanes; ++e) {
        store(reinterpret_cast<float*>(panel + (i / 2 + e) * kWide * 2), square[e]);
      }
    }
  }
  for (int64_t i = 0; i < deep; i += kLanes) {
    uint16_t* column = values + i / kWide * kWide * width + i % kWide * 2;
    for (int64_t j = 0; j < width; j += 2) {
      const HVec even = j < length ? up_to_16(v + j * t.ld + i, d - i) : HVec{};
      const HVec odd = j + 1 < length ? up_to_16(v + (j + 1) * t.ld + i, d - i) : HVec{};
      const UVec pair =
          __builtin_convertvector(even, UVec) | (__builtin_convertvector(odd, UVec) << 16);
      store(reinterpret_cast<float*>(column + j * kWide), reinterpret_cast<Vec>(pair));
    }
  }
  for (int64_t r0 = t.row0; r0 < t.row1; r0 += held) {
    const int64_t rows = smaller(held, t.row1 - r0);
    const uint16_t* queries = q + r0 * t.ld;
    int64_t ldq = t.ld;
    if (deep != d) {  // the next head's columns must not reach the padding
      for (int64_t i = 0; i < rows; ++i) {
        to_pairs(q + (r0 + i) * t.ld, DType::kBFloat16, d, deep, copies + i * deep);
      }
      queries = copies;
      ldq = deep;
    }
    copy_tail(queries, ldq, rows, deep, tail);
    for (int64_t j = 0; j < width; j += kWide) {
      pair_block(queries, ldq, rows, tail, keys + j * deep, deep, scores + j, width, true, nullptr,
                 0);
    }
    softmax_rows(t, scores, width, r0, rows, inverse);
    for (int64_t i = 0; i < rows; ++i) {
      to_pairs(scores + i * width, DType::kFloat32, length, width, shares + i * width);
    }
    for (int64_t n0 = 0; n0 < deep; n0 += kWide) {
      for (int64_t k0 = 0; k0 < width; k0 += kPairDepth) {
        const int64_t depth = smaller(kPairDepth, width - k0);
        copy_tail(shares + k0, width, rows, depth, tail);
        pair_block(shares + k0, width, rows, tail, values + n0 * width + k0 * kWide, depth, result,
                   kWide, k0 == 0, nullptr, 0);
      }
      put_result(t, result, kWide, inverse, r0, rows, n0, smaller(kWide, d - n0));
    }
  }
}
