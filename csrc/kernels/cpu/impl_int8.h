// GEMM of int8 weights by activations that are quantised row by row. Part of impl.h, in its
// namespace; docs/cpu-kernels.md describes the scheme.
//
// K is cut into slices. A row's slice is rounded to whole steps of max |x| / kLevels, its products
// with the weights are summed in integers, and these sums times the step are added up over the
// slices in float32. FT_INT8_DOT says what multiplies:
//   0  whole numbers in float32, on the tile of impl.h
//   1  vpmaddubsw: bytes without a sign by signed ones, pairs summed in 16 bits
//   2  vpdpbusd: the same, fours summed in 32 bits
//   3  AMX tiles: signed by signed

// Activations are stored as steps + kOffset, which the first panel row's `correction` takes back.
// Of 7 bits, so that a pair's sum stays within 2 x 128 x 127 < 2^15.
constexpr int kLevels = FT_INT8_DOT == 1 ? 64 : 127;
constexpr int kOffset = FT_INT8_DOT == 1 ? 64 : FT_INT8_DOT == 2 ? 128 : 0;

// ---- quantising --------------------------------------------------------------------------------

// Bits of the largest magnitude; those of infinity, or more, where a number is not finite.
template <typename Source>
inline int32_t largest_bits(const void* from, int64_t count) {
  IVec most = {}, other = {};
  const auto with = [](IVec m, Vec x) {
    const IVec magnitude = reinterpret_cast<IVec>(x) & 0x7fffffff;
    return magnitude > m ? magnitude : m;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    most = with(most, Source::at(from, i));
    other = with(other, Source::at(from, i + kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) most = with(most, Source::at(from, i));
  if (i < count) other = with(other, partial_at<Source>(from, i, count - i));
  most = other > most ? other : most;
  int32_t found = most[0];
  for (int e = 1; e < kLanes; ++e) found = most[e] > found ? most[e] : found;
  return found;
}

// The nearest integers, ties to even: of the rounded product x * by, which is not fused.
inline IVec whole_steps(Vec x, Vec by) {
  Vec product = x * by;
#if defined(__AVX512F__) && FT_LANES == 16
  return reinterpret_cast<IVec>(
      _mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(product)));
#elif defined(__AVX2__) && FT_LANES == 8
  return reinterpret_cast<IVec>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(product)));
#else
  asm("" : "+m"(product));
  // Adding 1.5 * 2^23 rounds and leaves the integer in the low bits.
  return reinterpret_cast<IVec>(product + 12582912.0f) - 0x4b400000;
#endif
}

#if FT_INT8_DOT == 0
using Quantised = float;
inline void put_steps(float* to, IVec steps) { store(to, __builtin_convertvector(steps, Vec)); }
#else
using Quantised = uint8_t;
typedef uint8_t BVec __attribute__((vector_size(kLanes)));
typedef uint8_t BVecU __attribute__((vector_size(kLanes), aligned(1), may_alias));
inline void put_steps(uint8_t* to, IVec steps) {
#if defined(__AVX512F__) && FT_LANES == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(steps + kOffset)));
#else
  *reinterpret_cast<BVecU*>(to) = __builtin_convertvector(steps + kOffset, BVec);
#endif
}
#endif

// Quantises `count` numbers, fills up to `padded` with zeros and returns what a step is worth: zero
// for numbers that are all below 2^-100, NaN where one is not finite.
template <typename Source>
inline float quantise(const void* from, int64_t count, int64_t padded, Quantised* to) {
  const int32_t bits = largest_bits<Source>(from, count);
  float most;
  std::memcpy(&most, &bits, 4);
  const bool usual = most >= 0x1p-100f && most < __builtin_inff();
  const Vec by = splat(usual ? kLevels / most : 0.0f);
  int64_t i = 0;
  if (usual) {
#if defined(__AVX2__) && FT_LANES == 8
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (; i + 32 <= count; i += 32) {
      __m256i part[4];
      for (int e = 0; e < 4; ++e) {
        part[e] = reinterpret_cast<__m256i>(whole_steps(Source::at(from, i + 8 * e), by));
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                               _mm256_packs_epi32(part[2], part[3]));
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(to + i),
          _mm256_add_epi8(_mm256_permutevar8x32_epi32(bytes, order), _mm256_set1_epi8(kOffset)));
    }
#endif
    for (; i + kLanes <= count; i += kLanes)
      put_steps(to + i, whole_steps(Source::at(from, i), by));
    if (i < count) {
      Quantised last[kLanes];
      put_steps(last, whole_steps(partial_at<Source>(from, i, count - i), by));
      std::memcpy(to + i, last, (count - i) * sizeof(Quantised));
      i = count;
    }
  }
  for (; i < padded; ++i) to[i] = kOffset;
  return usual ? most / kLevels : most < 1.0f ? 0.0f : __builtin_nanf("");
}

// ---- the tile ----------------------------------------------------------------------------------

// a b + c, rounded once or twice as the set can, but the same in every tile: left to itself the
// compiler fuses in some and not in others, and a row's bits would depend on its neighbours.
inline Vec times_plus(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && FT_LANES == 16
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__) && FT_LANES == 8
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// sum (+)= products step
inline void add_slice(float* sum, Vec products, float step, bool first) {
  store(sum, times_plus(products, splat(step), first ? Vec{} : load(sum)));
}

#if FT_INT8_DOT == 0

constexpr int64_t kInt8Rows = kMr, kInt8Nr = kNr, kInt8Block = kRowBlock, kInt8Group = 1;
constexpr int64_t kInt8Space = (kMostSlice + kMr) * kNr * 4;

inline int64_t slice_head() { return 0; }
inline void pack_head(const int8_t*, int64_t, void*) {}

inline void int8_block(const float* a, int64_t lda, int64_t rows, const float* steps,
                       const char* panel, int64_t depth, float* c, int64_t ldc, bool first,
                       void* space, const char*) {
  float* expanded = static_cast<float*>(space);   // [kMostSlice, kNr]
  float* products = expanded + kMostSlice * kNr;  // [kMr, kNr]
  for (int64_t i = 0; i < depth * kNr; ++i) {
    expanded[i] = static_cast<float>(reinterpret_cast<const int8_t*>(panel)[i]);
  }
  for (int64_t m = 0; m < rows; m += kMr) {
    const int64_t count = smaller(kMr, rows - m);
    // Exact: sums of whole numbers below 2^24.
    run_tile(count, kNv, a + m * lda, lda, expanded, depth, products, kNr, true);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < kNr; j += kLanes) {
        add_slice(c + (m + i) * ldc + j, load(products + i * kNr + j), steps[m + i], first);
      }
    }
  }
}

#elif FT_INT8_DOT < 3

constexpr int64_t kInt8Nr = kNr, kInt8Space = 0;
#if FT_INT8_DOT == 1
constexpr int64_t kInt8Group = 8, kInt8Rows = kLanes == 8 ? 5 : 8;
constexpr int64_t kInt8Block = kLanes == 8 ? 145 : 144;
#else
constexpr int64_t kInt8Group = 4, kInt8Rows = kMr, kInt8Block = kRowBlock;
#endif

// Before a panel's slice: `correction` for each column, and (vpmaddubsw) a bit for each group of 8
// k in which four products might not fit 16 bits together.
inline int64_t slice_head() { return kNr * 4 + (FT_INT8_DOT == 1 ? 64 : 0); }

// `packed`: [depth / 4][kNr][4]
inline void pack_head(const int8_t* packed, int64_t depth, void* head) {
  int32_t* correction = static_cast<int32_t*>(head);
  for (int64_t j = 0; j < kNr; ++j) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += packed[(k / 4 * kNr + j) * 4 + k % 4];
    correction[j] = -kOffset * sum;
  }
#if FT_INT8_DOT == 1
  uint64_t apart = 0;
  for (int64_t k = 0; k < depth; k += 8) {
    for (int64_t at = 0; at < kNr * 4; at += 2) {  // a column's first or second pair
      const int8_t* w = packed + k * kNr + at;
      int32_t most = 0, least = 0;
      const int32_t four[] = {w[0], w[1], w[kNr * 4], w[kNr * 4 + 1]};
      for (const int32_t x : four) (x > 0 ? most : least) += x;
      if (most * 2 * kOffset > 32767 || least * 2 * kOffset < -32768) apart |= 1ull << (k / 8);
    }
  }
  std::memcpy(correction + kNr, &apart, 8);
#endif
}

#if FT_INT8_DOT == 1
// Sums of two neighbouring products in 16 bits, which they never leave.
#if defined(__AVX512BW__) && FT_LANES == 16
inline IVec pair_products(IVec a, IVec b) {
  return reinterpret_cast<IVec>(
      _mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline IVec add_pairs(IVec a, IVec b) {
  return reinterpret_cast<IVec>(
      _mm512_add_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline IVec widened(IVec pairs) {
  return reinterpret_cast<IVec>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(pairs), _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__) && FT_LANES == 8
inline IVec pair_products(IVec a, IVec b) {
  return reinterpret_cast<IVec>(
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline IVec add_pairs(IVec a, IVec b) {
  return reinterpret_cast<IVec>(
      _mm256_add_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline IVec widened(IVec pairs) {
  return reinterpret_cast<IVec>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(pairs), _mm256_set1_epi16(1)));
}
#else  // in tests, on a processor without the instructions
typedef int16_t SVec __attribute__((vector_size(kLanes * 4)));
inline IVec pair_products(IVec a, IVec b) {
  uint8_t x[kLanes * 4];
  int8_t w[kLanes * 4];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(w, &b, sizeof(w));
  SVec sums;
  for (int i = 0; i < kLanes * 2; ++i) {
    const int32_t sum = x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1];
    sums[i] = static_cast<int16_t>(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return reinterpret_cast<IVec>(sums);
}
inline IVec add_pairs(IVec a, IVec b) {
  typedef uint16_t Words __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<IVec>(reinterpret_cast<Words>(a) + reinterpret_cast<Words>(b));
}
inline IVec widened(IVec pairs) {
  const SVec sums = reinterpret_cast<SVec>(pairs);
  IVec out;
  for (int i = 0; i < kLanes; ++i) out[i] = sums[2 * i] + sums[2 * i + 1];
  return out;
}
#endif
#else
// acc + the four products of each lane's bytes, `a` without signs.
inline IVec dot_bytes(IVec acc, IVec a, IVec b) {
#if defined(__AVX512VNNI__) && FT_LANES == 16
  return reinterpret_cast<IVec>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && FT_LANES == 8
  return reinterpret_cast<IVec>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(acc), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else  // in tests, on a processor without the instruction
  uint8_t x[kLanes * 4];
  int8_t w[kLanes * 4];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(w, &b, sizeof(w));
  for (int i = 0; i < kLanes * 4; ++i) acc[i / 4] += x[i] * w[i];
  return acc;
#endif
}
#endif

inline IVec load_whole(const void* p) {
  return reinterpret_cast<IVec>(load(static_cast<const float*>(p)));
}
inline IVec four_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four - IVec{};
}

template <int kRows>
inline void int8_tile(int64_t rows, const uint8_t* a, int64_t lda, const float* steps,
                      const char* panel, int64_t depth, float* c, int64_t ldc, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return int8_tile<kRows - 1>(rows, a, lda, steps, panel, depth, c, ldc, first);
  }
  constexpr int64_t kStep = kNr * 4;  // bytes of a panel's row of fours
  IVec acc[kRows][kNv];
  for (int j = 0; j < kNv; ++j) acc[0][j] = load_whole(panel + j * kLanes * 4);
  for (int i = 1; i < kRows; ++i) {
    for (int j = 0; j < kNv; ++j) acc[i][j] = acc[0][j];
  }
  const char* b = panel + slice_head();
#if FT_INT8_DOT == 1
  uint64_t apart;
  std::memcpy(&apart, panel + kNr * 4, 8);
  for (int64_t k = 0; k < depth; k += 8, apart >>= 1, b += 2 * kStep) {
    if (__builtin_expect(apart & 1, 0)) {
      for (int i = 0; i < kRows; ++i) {
        const IVec a0 = four_bytes(a + i * lda + k), a1 = four_bytes(a + i * lda + k + 4);
        for (int j = 0; j < kNv; ++j) {
          acc[i][j] += widened(pair_products(a0, load_whole(b + j * kLanes * 4)));
          acc[i][j] += widened(pair_products(a1, load_whole(b + kStep + j * kLanes * 4)));
        }
      }
    } else {
      for (int i = 0; i < kRows; ++i) {
        const IVec a0 = four_bytes(a + i * lda + k), a1 = four_bytes(a + i * lda + k + 4);
        for (int j = 0; j < kNv; ++j) {
          acc[i][j] +=
              widened(add_pairs(pair_products(a0, load_whole(b + j * kLanes * 4)),
                                pair_products(a1, load_whole(b + kStep + j * kLanes * 4))));
        }
      }
    }
  }
#else
  for (int64_t k = 0; k < depth; k += 4, b += kStep) {
    IVec bv[kNv];
    for (int j = 0; j < kNv; ++j) bv[j] = load_whole(b + j * kLanes * 4);
    for (int i = 0; i < kRows; ++i) {
      const IVec av = four_bytes(a + i * lda + k);
      for (int j = 0; j < kNv; ++j) acc[i][j] = dot_bytes(acc[i][j], av, bv[j]);
    }
  }
#endif
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kNv; ++j) {
      add_slice(c + i * ldc + j * kLanes, __builtin_convertvector(acc[i][j], Vec), steps[i], first);
    }
  }
}

// `next`: the panel's part that will follow, fetched a piece at each tile.
inline void int8_block(const uint8_t* a, int64_t lda, int64_t rows, const float* steps,
                       const char* panel, int64_t depth, float* c, int64_t ldc, bool first, void*,
                       const char* next) {
  const int64_t piece = ceil_div((slice_head() + depth * kNr) * kInt8Rows, rows * 64) * 64;
  for (int64_t m = 0; m < rows; m += kInt8Rows) {
    for (int64_t line = 0; line < piece; line += 64) __builtin_prefetch(next + line);
    next += piece;
    int8_tile<kInt8Rows>(smaller(kInt8Rows, rows - m), a + m * lda, lda, steps + m, panel, depth,
                         c + m * ldc, ldc, first);
  }
}

#else  // AMX

constexpr int64_t kInt8Rows = 32, kInt8Nr = kWide, kInt8Block = kPairBlock, kInt8Group = 64;
constexpr int64_t kInt8Space = 2 * 32 * kWide * 4;

inline int64_t slice_head() { return 0; }
inline void pack_head(const int8_t*, int64_t, void*) {}

#if defined(__AMX_INT8__)
template <int kSum, int kA, int kB>
inline void tile_dot_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
#else  // in tests, on a processor without the instructions
template <int kSum, int kA, int kB>
inline void tile_dot_bytes() {
  for (int r = 0; r < 16; ++r) {
    int32_t sums[16];
    int8_t a[64], b[64];
    std::memcpy(sums, emulated_tiles[kSum][r], 64);
    std::memcpy(a, emulated_tiles[kA][r], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(b, emulated_tiles[kB][k], 64);
      for (int n = 0; n < 64; ++n) sums[n / 4] += a[4 * k + n % 4] * b[n];
    }
    std::memcpy(emulated_tiles[kSum][r], sums, 64);
  }
}
#endif

// products [16 kGroups, kWide] = a b
template <int kGroups>
inline void int8_tiles(const uint8_t* a, int64_t lda, const char* b, int64_t depth,
                       int32_t* products) {
  constexpr int64_t kLd = kWide * 4;
  tile_clear<0>();
  tile_clear<1>();
  if constexpr (kGroups == 2) {
    tile_clear<2>();
    tile_clear<3>();
  }
  for (int64_t k = 0; k < depth; k += 64) {
    tile_load<6>(b, kLd);
    tile_load<4>(a + k, lda);
    tile_dot_bytes<0, 4, 6>();
    tile_load<7>(b + 64, kLd);
    tile_dot_bytes<1, 4, 7>();
    if constexpr (kGroups == 2) {
      tile_load<5>(a + 16 * lda + k, lda);
      tile_dot_bytes<2, 5, 6>();
      tile_dot_bytes<3, 5, 7>();
    }
    b += 16 * kLd;
  }
  tile_save<0>(products, kLd);
  tile_save<1>(products + 16, kLd);
  if constexpr (kGroups == 2) {
    tile_save<2>(products + 16 * kWide, kLd);
    tile_save<3>(products + 16 * kWide + 16, kLd);
  }
}

// Rows are readable up to a multiple of 16. A block of 32 is added to the sums while the tiles of
// the next one run.
inline void int8_block(const uint8_t* a, int64_t lda, int64_t rows, const float* steps,
                       const char* panel, int64_t depth, float* c, int64_t ldc, bool first,
                       void* space, const char* next) {
  int32_t* const products = static_cast<int32_t*>(space);  // [2, 32, kWide]
  const int64_t deep = ceil_div(depth, kInt8Group) * kInt8Group;
  const int64_t piece = ceil_div(deep * kWide * 32, rows * 64) * 64;
  for (int64_t m = 0; m < rows + 32; m += 32) {
    if (m < rows) {
      for (int64_t line = 0; line < piece; line += 64) __builtin_prefetch(next + line);
      next += piece;
      int32_t* const to = products + m % 64 * kWide;
      if (m + 16 < rows) {
        int8_tiles<2>(a + m * lda, lda, panel, depth, to);
      } else {
        int8_tiles<1>(a + m * lda, lda, panel, depth, to);
      }
    }
    if (m == 0) continue;
    for (int64_t i = m - 32; i < smaller(m, rows); ++i) {
      const float* from = reinterpret_cast<const float*>(products + i % 64 * kWide);
      for (int64_t j = 0; j < kWide; j += kLanes) {
        const IVec whole = reinterpret_cast<IVec>(load(from + j));
        add_slice(c + i * ldc + j, __builtin_convertvector(whole, Vec), steps[i], first);
      }
    }
  }
}

#endif

// ---- GEMM --------------------------------------------------------------------------------------

// A layer is the scales, then [panel][slice][head, then k / fours][kInt8Nr][fours]: `fours` is 4,
// or 1 where FT_INT8_DOT is 0. Depth is padded with zeros to a multiple of kInt8Group.
constexpr int64_t kFours = FT_INT8_DOT == 0 ? 1 : 4;

inline int64_t int8_scales(int64_t n) { return ceil_div(ceil_div(n, kInt8Nr) * kInt8Nr, 16) * 16; }
inline int64_t int8_depth(int64_t k) { return ceil_div(k, kInt8Group) * kInt8Group; }
inline int64_t int8_slice_bytes(int64_t depth) {
  return slice_head() + int8_depth(depth) * kInt8Nr;
}
inline int64_t int8_panel_bytes(int64_t k) {
  return ceil_div(k, slice_length(k)) * slice_head() + int8_depth(k) * kInt8Nr;
}

int64_t int8_layer_bytes(int64_t n, int64_t k) {
  return int8_scales(n) * 4 + ceil_div(ceil_div(n, kInt8Nr) * int8_panel_bytes(k), 64) * 64;
}

void pack_int8(const int8_t* weight, const float* scale, int64_t n, int64_t k, void* out,
               int64_t p0, int64_t p1) {
  float* scales = static_cast<float*>(out);
  for (int64_t j = p0 * kInt8Nr; j < p1 * kInt8Nr; ++j) scales[j] = j < n ? scale[j] : 0.0f;
  const int64_t slice = slice_length(k);
  for (int64_t p = p0; p < p1; ++p) {
    char* to = reinterpret_cast<char*>(scales + int8_scales(n)) + p * int8_panel_bytes(k);
    for (int64_t k0 = 0; k0 < k; k0 += slice) {
      const int64_t depth = int8_depth(smaller(slice, k - k0));
      int8_t* panel = reinterpret_cast<int8_t*>(to + slice_head());
      for (int64_t j = 0; j < kInt8Nr; ++j) {
        const int64_t row = p * kInt8Nr + j;
        for (int64_t i = 0; i < depth; ++i) {
          panel[(i / kFours * kInt8Nr + j) * kFours + i % kFours] =
              row < n && k0 + i < k ? weight[row * k + k0 + i] : int8_t{0};
        }
      }
      pack_head(panel, depth, to);
      to += slice_head() + depth * kInt8Nr;
    }
  }
}

// Rows of a slice lie a little apart, off the powers of two.
inline int64_t quantised_ld(int64_t k) { return slice_length(k) + 64; }
int64_t quantised_row(int64_t k) {
  return quantised_ld(k) * static_cast<int64_t>(sizeof(Quantised));
}

void quantise_rows(Operand a, int64_t lda, int64_t k, int64_t m0, int64_t m1,
                   const QuantisedRows& to) {
  const int64_t slice = slice_length(k), ld = quantised_ld(k);
  with_type(a.dtype, [&](auto source) {
    using Source = decltype(source);
    const auto* from = static_cast<const typename Source::Element*>(a.data);
    for (int64_t m = m0; m < m1; ++m) {
      for (int64_t s = 0; s * slice < k; ++s) {
        const int64_t depth = smaller(slice, k - s * slice);
        Quantised* row = static_cast<Quantised*>(to.data) + (s * (to.rows + kSpareRows) + m) * ld;
        to.steps[s * to.rows + m] =
            quantise<Source>(from + m * lda + s * slice, depth, int8_depth(depth), row);
      }
    }
  });
}

constexpr int64_t kInt8Scratch = kInt8Space + kInt8Block * kPanelColumns * 4;

void gemm_int8(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch) {
#if FT_INT8_DOT == 3
  [[maybe_unused]] const TileState state{};
#endif
  const QuantisedRows& a = g.quantised;
  float* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + kInt8Space);  // [rows, lds]
  const int64_t lds = (p1 - p0) * kInt8Nr, rows = m1 - m0;
  const int64_t slice = slice_length(g.k), ld = quantised_ld(g.k);
  const int64_t panel_bytes = int8_panel_bytes(g.k), whole_slice = int8_slice_bytes(slice);
  const char* panels =
      reinterpret_cast<const char*>(static_cast<const float*>(g.weight.data) + int8_scales(g.n));
  // Depth outermost: the rows of one slice stay in the second-level cache for all panels.
  for (int64_t s = 0; s * slice < g.k; ++s) {
    const int64_t depth = smaller(slice, g.k - s * slice);
    const Quantised* block =
        static_cast<const Quantised*>(a.data) + (s * (a.rows + kSpareRows) + m0) * ld;
    for (int64_t p = p0; p < p1; ++p) {
      const char* panel = panels + p * panel_bytes + s * whole_slice;
      int8_block(block, ld, rows, a.steps + s * a.rows + m0, panel, depth,
                 sums + (p - p0) * kInt8Nr, lds, s == 0, scratch, panel + panel_bytes);
    }
  }
  finish_tile(g, sums, lds, m0, rows, p0 * kInt8Nr, smaller(lds, g.n - p0 * kInt8Nr));
}
