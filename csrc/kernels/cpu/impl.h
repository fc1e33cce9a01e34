// The kernels, written once over GCC/Clang vectors and compiled once per instruction set.
//
// Each including file defines FT_NAMESPACE, FT_LANES (floats in a vector), FT_MR and FT_NV (rows
// and vectors of a GEMM tile). Everything lives in that namespace and nothing here may call an
// inline function of the standard library: the linker keeps one copy of those, possibly compiled
// for instructions that the running processor lacks.
#include <cstring>
#include <utility>

#include "kernels/cpu/isa.h"
#include "kernels/gelu.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ft::cpu::FT_NAMESPACE {

constexpr int kLanes = FT_LANES;
constexpr int kMr = FT_MR;
constexpr int kNv = FT_NV;
constexpr int kNr = kLanes * kNv;
// Depth of one pass: a weight panel of this depth stays in the first-level cache. Measured, like
// the row block (docs/cpu-kernels.md).
constexpr int64_t kDepth = kLanes == 16 ? 128 : 192;
constexpr int64_t kRowBlock = 144;  // most rows of a GEMM task, a multiple of every FT_MR

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVecU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

inline float sum_of(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
inline float max_of(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <int kStep, int... kLane>
inline void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  const Vec low =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
#else
  const Vec low =
      __builtin_shuffle(a, b, IVec{(kLane & kStep ? kLanes + kLane - kStep : kLane)...});
  b = __builtin_shuffle(a, b, IVec{(kLane & kStep ? kLanes + kLane : kLane + kStep)...});
#endif
  a = low;
}

// Transposes a square of kLanes x kLanes, swapping blocks of 1, 2, 4, ... (Eklundh's method).
template <int kStep = 1>
inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) {
      swap_blocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>{});
    }
  }
  if constexpr (kStep * 2 < kLanes) transpose<kStep * 2>(rows);
}

// ---- half types --------------------------------------------------------------------------------

inline float half_bits_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  float value;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // Shifted into place the exponent is 112 too small; the product also normalises subnormals.
  bits = magnitude << 13;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {  // subnormal: let the adder round at the right bit
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);  // to nearest, ties to even
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

inline Vec load_bf16(const uint16_t* p) {
  const HVec h = *reinterpret_cast<const HVecU*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, UVec) << 16);
}

inline HVec to_bf16(Vec v) {
#if defined(__AVX512BF16__) && FT_LANES == 16
  return reinterpret_cast<HVec>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const UVec bits = reinterpret_cast<UVec>(v);
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? rounded : quiet, HVec);
#endif
}

inline void store_bf16(uint16_t* p, Vec v) { *reinterpret_cast<HVecU*>(p) = to_bf16(v); }

inline Vec load_f16(const uint16_t* p) {
#if defined(__AVX512F__) && FT_LANES == 16
  // The zeroing form: GCC warns of an undefined vector inside the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && FT_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_bits_to_float(p[i]);
  return v;
#endif
}

inline void store_f16(uint16_t* p, Vec v) {
#if defined(__AVX512F__) && FT_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, 0));
#elif defined(__F16C__) && FT_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half_bits(v[i]);
#endif
}

// Vectors at element `i` of an array of one type; the partial forms touch only `count` elements and
// read zeros beyond them.
struct F32 {
  using Gelu = GeluFloat32;
  using Element = float;
  static Vec at(const void* p, int64_t i) { return load(static_cast<const float*>(p) + i); }
  static void put(void* p, int64_t i, Vec v) { store(static_cast<float*>(p) + i, v); }
};
struct F16 {
  using Gelu = GeluFloat16;
  using Element = uint16_t;
  static Vec at(const void* p, int64_t i) { return load_f16(static_cast<const uint16_t*>(p) + i); }
  static void put(void* p, int64_t i, Vec v) { store_f16(static_cast<uint16_t*>(p) + i, v); }
};
struct BF16 {
  using Gelu = GeluBFloat16;
  using Element = uint16_t;
  static Vec at(const void* p, int64_t i) { return load_bf16(static_cast<const uint16_t*>(p) + i); }
  static void put(void* p, int64_t i, Vec v) { store_bf16(static_cast<uint16_t*>(p) + i, v); }
};

template <typename Type>
inline Vec partial_at(const void* p, int64_t i, int64_t count) {
  typename Type::Element buffer[kLanes] = {};
  std::memcpy(buffer, static_cast<const typename Type::Element*>(p) + i, count * sizeof(buffer[0]));
  return Type::at(buffer, 0);
}
template <typename Type>
inline void partial_put(void* p, int64_t i, Vec v, int64_t count) {
  typename Type::Element buffer[kLanes];
  Type::put(buffer, 0, v);
  std::memcpy(static_cast<typename Type::Element*>(p) + i, buffer, count * sizeof(buffer[0]));
}

// Calls f with the F32, F16 or BF16 that `type` names.
template <typename Function>
inline void with_type(DType type, Function f) {
  switch (type) {
    case DType::kFloat32:
      return f(F32{});
    case DType::kFloat16:
      return f(F16{});
    case DType::kBFloat16:
      return f(BF16{});
    case DType::kInt8:
    case DType::kE4M3:
      return;  // no type of single numbers
  }
}

void convert(const void* input, DType from, void* out, DType to, int64_t count) {
  with_type(from, [&](auto source) {
    with_type(to, [&](auto target) {
      using Source = decltype(source);
      using Target = decltype(target);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) Target::put(out, i, Source::at(input, i));
      if (i < count) {
        partial_put<Target>(out, i, partial_at<Source>(input, i, count - i), count - i);
      }
    });
  });
}

// ---- exp and activations -----------------------------------------------------------------------

// 2^x for x <= 0, relative error 2e-7; below -126 it stays at 2^-126, which no sum notices.
inline Vec exp2_negative(Vec x) {
  x = vmax(x, splat(-126.0f));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec shifted = x + 12582912.0f;
  const Vec r = x - (shifted - 12582912.0f);
  // Taylor's series of e^(r ln 2), |r| <= 1/2.
  Vec p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const IVec exponent = reinterpret_cast<IVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<IVec>(p) + exponent);
}

// x Phi(x), with the polynomial of the type it is stored in (kernels/gelu.h). Infinities take
// torch's course: the positive one stays, the negative one becomes NaN.
template <typename Target>
inline Vec gelu(Vec x) {
  const Vec y = reinterpret_cast<Vec>(reinterpret_cast<IVec>(x) & 0x7fffffff);
  // As its second operand NaN survives a minimum; beyond 16 all powers vanish.
  const Vec near = vmin(splat(16.0f), y);
  const auto& coefficients = Target::Gelu::kCoefficients;
  constexpr int kLast = sizeof(coefficients) / sizeof(coefficients[0]) - 1;
  Vec p = splat(coefficients[kLast]);
  for (int i = kLast - 1; i >= 0; --i) p = p * near + coefficients[i];
  // NaN is not below, and what the exponential makes of it is multiplied by x.
  const Vec q = select(p < -126.0f, Vec{}, exp2_negative(p));
  return x * select(x > 0.0f, 1.0f - q, q);
}

// x / (1 + 2^-a) for an `a` of the sign of x. For negative x it is x 2^a / (1 + 2^a): no difference
// of nearly equal numbers, so that the left tail keeps its digits. Infinities take torch's course.
inline Vec gated(Vec x, Vec a) {
  const Vec depth = reinterpret_cast<Vec>(reinterpret_cast<UVec>(a) | 0x80000000u);
  const Vec e = select(depth < -126.0f, Vec{}, exp2_negative(depth));
  return x * select(x > 0.0f, splat(1.0f), e) / (1.0f + e);
}

// What follows a linear layer's bias, for results of a type: kernels/gelu.h has the bounds.
struct NoActivation {
  template <typename Target>
  static Vec of(Vec x) {
    return x;
  }
};
struct Gelu {
  template <typename Target>
  static Vec of(Vec x) {
    return gelu<Target>(x);
  }
};
// x / 2 (1 + tanh(u)) is x sigmoid(2 u).
struct GeluTanh {
  template <typename Target>
  static Vec of(Vec x) {
    return gated(x, x * (x * x * kGeluTanhCubic + kGeluTanhLinear));
  }
};
struct Relu {
  template <typename Target>
  static Vec of(Vec x) {
    return select(x < 0.0f, Vec{}, x);  // NaN is not below
  }
};
struct Silu {
  template <typename Target>
  static Vec of(Vec x) {
    return gated(x, x * kLog2E);
  }
};

// Calls f with the one that `activation` names, so that no inner loop has to ask.
template <typename Function>
inline void with_activation(Activation activation, Function f) {
  switch (activation) {
    case Activation::kNone:
      return f(NoActivation{});
    case Activation::kGelu:
      return f(Gelu{});
    case Activation::kGeluTanh:
      return f(GeluTanh{});
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kSilu:
      return f(Silu{});
  }
}

// ---- GEMM --------------------------------------------------------------------------------------

// Panels of kNr weight rows, [panel][k][kNr], in the weight's own type; rows past n are zero.
int64_t panel_layer_bytes(DType type, int64_t n, int64_t k) {
  const int64_t bytes = ceil_div(n, kNr) * kNr * k * size_of(type);
  return ceil_div(bytes, 64) * 64;
}

template <typename Element>
void pack_panels(const Element* weight, int64_t n, int64_t k, Element* out, int64_t p0,
                 int64_t p1) {
  for (int64_t p = p0; p < p1; ++p) {
    Element* panel = out + p * kNr * k;
    for (int64_t j = 0; j < kNr; ++j) {
      const int64_t row = p * kNr + j;
      for (int64_t i = 0; i < k; ++i)
        panel[i * kNr + j] = row < n ? weight[row * k + i] : Element{};
    }
  }
}

// c[i, :] = a[i, :] b (+ c[i, :] unless first); a row of c has kNv_ vectors.
template <int kRows, int kVectors>
inline void tile(const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc,
                 bool first) {
  Vec acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) acc[i][j] = first ? Vec{} : load(c + i * ldc + j * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[kVectors];
    for (int j = 0; j < kVectors; ++j) bv[j] = load(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vec av = splat(a[i * lda + k]);
      for (int j = 0; j < kVectors; ++j) acc[i][j] += av * bv[j];
    }
    b += kNr;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

template <int kRows>
inline void tile_of_width(int vectors, const float* a, int64_t lda, const float* b, int64_t depth,
                          float* c, int64_t ldc, bool first) {
  if constexpr (kNv >= 3) {
    if (vectors == 3) return tile<kRows, 3>(a, lda, b, depth, c, ldc, first);
  }
  if constexpr (kNv >= 2) {
    if (vectors == 2) return tile<kRows, 2>(a, lda, b, depth, c, ldc, first);
  }
  tile<kRows, 1>(a, lda, b, depth, c, ldc, first);
}

template <int kRows>
inline void tile_of_rows(int64_t rows, int vectors, const float* a, int64_t lda, const float* b,
                         int64_t depth, float* c, int64_t ldc, bool first) {
  if (rows == kRows) return tile_of_width<kRows>(vectors, a, lda, b, depth, c, ldc, first);
  if constexpr (kRows > 1) {
    tile_of_rows<kRows - 1>(rows, vectors, a, lda, b, depth, c, ldc, first);
  }
}

// Rows of a tile that starts at m: kMr but for the last.
void run_tile(int64_t rows, int vectors, const float* a, int64_t lda, const float* b, int64_t depth,
              float* c, int64_t ldc, bool first) {
  tile_of_rows<kMr>(rows, vectors, a, lda, b, depth, c, ldc, first);
}

// Rows of the copied block lie a little apart, off the powers of two.
constexpr int64_t kCopyLd = kDepth + 16;
constexpr int64_t kGemmScratch = kDepth * kNr + kRowBlock * (kCopyLd + kPanelColumns);  // floats

// bias, activation and residual on a tile that is still in cache; `from` may be `to`.
template <typename Target, typename Activated>
inline void finish_rows(const Gemm& g, const float* from, int64_t ld, int64_t m, int64_t rows,
                        int64_t n0, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    auto* out = static_cast<typename Target::Element*>(g.out) + (m + i) * g.ldo + n0;
    const float* residual = g.residual ? g.residual + (m + i) * g.ldr + n0 : nullptr;
    const float* row = from + i * ld;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      Vec v = load(row + j);
      if (g.weight.scale) v *= load(g.weight.scale + n0 + j);
      if (g.bias) v += load(g.bias + n0 + j);
      v = Activated::template of<Target>(v);
      if (residual) v += load(residual + j);
      Target::put(out, j, v);
    }
    if (j < columns) {
      const int64_t left = columns - j;
      Vec v = partial_at<F32>(row, j, left);
      if (g.weight.scale) v *= partial_at<F32>(g.weight.scale + n0, j, left);
      if (g.bias) v += partial_at<F32>(g.bias + n0, j, left);
      v = Activated::template of<Target>(v);
      if (residual) v += partial_at<F32>(residual, j, left);
      partial_put<Target>(out, j, v, left);
    }
  }
}

inline void finish_tile(const Gemm& g, const float* from, int64_t ld, int64_t m, int64_t rows,
                        int64_t n0, int64_t columns) {
  with_type(g.out_type, [&](auto target) {
    with_activation(g.activation, [&](auto activated) {
      finish_rows<decltype(target), decltype(activated)>(g, from, ld, m, rows, n0, columns);
    });
  });
}

void gemm_panels(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch) {
  float* expanded = static_cast<float*>(scratch);  // [kDepth, kNr]
  float* block = expanded + kDepth * kNr;          // [kRowBlock, kCopyLd]
  float* sums = block + kRowBlock * kCopyLd;       // [kRowBlock, lds]
  const int64_t lds = (p1 - p0) * kNr, rows = m1 - m0;
  const int64_t element = size_of(g.weight.dtype);
  // Depth outermost: the block of rows at one depth stays in the second-level cache for all panels.
  // It is copied, so that a tile's rows share pages instead of lying a page or more apart.
  for (int64_t k0 = 0; k0 < g.k; k0 += kDepth) {
    const int64_t depth = smaller(kDepth, g.k - k0);
    for (int64_t m = 0; m < rows; ++m) {
      convert(static_cast<const char*>(g.a.data) + ((m0 + m) * g.lda + k0) * size_of(g.a.dtype),
              g.a.dtype, block + m * kCopyLd, DType::kFloat32, depth);
    }
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t columns = smaller(kNr, g.n - p * kNr);
      const int vectors = static_cast<int>(ceil_div(columns, kLanes));
      const char* packed = static_cast<const char*>(g.weight.data) + (p * g.k + k0) * kNr * element;
      const float* panel = expanded;
      if (g.weight.dtype == DType::kFloat32) {
        panel = reinterpret_cast<const float*>(packed);
      } else {
        convert(packed, g.weight.dtype, expanded, DType::kFloat32, depth * kNr);
      }
      // Fetch the next panel's part, a piece at each tile.
      const char* next = packed + g.k * kNr * element;
      const int64_t piece = ceil_div(depth * kNr * element * kMr, rows * 64) * 64;
      for (int64_t m = 0; m < rows; m += kMr) {
        for (int64_t line = 0; line < piece; line += 64) __builtin_prefetch(next + line);
        next += piece;
        run_tile(smaller(kMr, rows - m), vectors, block + m * kCopyLd, kCopyLd, panel, depth,
                 sums + m * lds + (p - p0) * kNr, lds, k0 == 0);
      }
    }
  }
  finish_tile(g, sums, lds, m0, rows, p0 * kNr, smaller(lds, g.n - p0 * kNr));
}

// ---- attention ---------------------------------------------------------------------------------

constexpr int64_t kQueryRows = 4 * kMr;  // query rows whose scores are held at a time

inline int64_t padded_length(int64_t length) { return ceil_div(length, kNr) * kNr; }

int64_t panel_attention_scratch(int64_t longest, int64_t head_dim) {
  const int64_t keys = padded_length(longest) * head_dim;
  const int64_t values = longest * padded_length(head_dim);
  const int64_t scores = kQueryRows * padded_length(longest);
  const int64_t rows = kQueryRows * (kNr + head_dim);
  return (keys + values + scores + rows + kQueryRows) * 4;
}

// `count` elements from i on, zeros after them.
template <typename Type>
inline Vec up_to(const void* p, int64_t i, int64_t count) {
  return count >= kLanes ? Type::at(p, i) : partial_at<Type>(p, i, larger(count, 0));
}

// Keys [length, d] into panels [length / kNr][d][kNr], values into [d / kNr][length][kNr], both in
// float32 and with zeros in the panels' last columns.
template <typename Source>
void pack_keys_values(const Attention& t, float* keys, float* values) {
  using Element = typename Source::Element;
  const Element* k = static_cast<const Element*>(t.k);
  const Element* v = static_cast<const Element*>(t.v);
  const int64_t d = t.head_dim, length = t.length;
  for (int64_t j = 0; j < padded_length(length); j += kLanes) {
    float* panel = keys + j / kNr * kNr * d + j % kNr;
    for (int64_t i = 0; i < d; i += kLanes) {
      Vec square[kLanes];
      for (int64_t e = 0; e < kLanes; ++e) {
        square[e] = j + e < length ? up_to<Source>(k + (j + e) * t.ld, i, d - i) : Vec{};
      }
      transpose(square);
      for (int64_t e = 0; e < smaller(kLanes, d - i); ++e) store(panel + (i + e) * kNr, square[e]);
    }
  }
  for (int64_t i = 0; i < padded_length(d); i += kLanes) {
    float* column = values + i / kNr * length * kNr + i % kNr;
    for (int64_t j = 0; j < length; ++j) {
      store(column + j * kNr, i < d ? up_to<Source>(v + j * t.ld, i, d - i) : Vec{});
    }
  }
}

// row = exp2(scale (row - its largest)), the largest and the sum over `length` elements; what lies
// between and the next whole vector is overwritten. Returns the sum: NaN, whatever the row then
// holds, where a score is NaN or the largest is infinite, of either sign.
inline float exponentials(float* row, int64_t length, float scale) {
  const int64_t end = ceil_div(length, kLanes) * kLanes;
  for (int64_t j = length; j < end; ++j) row[j] = row[0];
  // The largest passes over NaN, whose bits the exponential would make a number of; the sum of all
  // scores does not.
  Vec highest = load(row), all = highest;
  for (int64_t j = kLanes; j < length; j += kLanes) {
    const Vec score = load(row + j);
    highest = vmax(highest, score);
    all += score;
  }
  const float top = max_of(highest), probe = sum_of(all);
  if (!(probe - probe == 0.0f)) {
    const float nan = __builtin_nanf("");
    if (!(top - top == 0.0f)) return nan;
    for (int64_t j = 0; j < length; ++j) {
      if (row[j] != row[j]) return nan;
    }
  }
  for (int64_t j = length; j < end; ++j) row[j] = -1e30f;  // exp2 makes it vanish
  Vec total = {};
  for (int64_t j = 0; j < length; j += kLanes) {
    const Vec e = exp2_negative((load(row + j) - top) * scale);
    store(row + j, e);
    total += e;
  }
  return sum_of(total);
}

// inverse[i] = 1 / the sum of the i-th of `rows` rows of scores, row0 the first one's query, after
// `scale` (to powers of two instead of e: one multiplication fewer for each score) and, where
// `kBiased`, what the distances add.
template <bool kBiased>
inline void softmax_rows(const Attention& t, float* scores, int64_t ld, int64_t row0, int64_t rows,
                         float* inverse) {
  const float scale = t.scale * kLog2E;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * ld;
    if constexpr (kBiased) {
      const float* bias = t.bias - (row0 + i);
      for (int64_t j = 0; j < t.length; j += kLanes) {
        store(row + j, load(row + j) * scale + load(bias + j));
      }
      inverse[i] = 1.0f / exponentials(row, t.length, 1.0f);
    } else {
      inverse[i] = 1.0f / exponentials(row, t.length, scale);
    }
  }
}

inline void softmax_rows(const Attention& t, float* scores, int64_t ld, int64_t row0, int64_t rows,
                         float* inverse) {
  if (t.bias) {
    softmax_rows<true>(t, scores, ld, row0, rows, inverse);
  } else {
    softmax_rows<false>(t, scores, ld, row0, rows, inverse);
  }
}

// Scales the rows of result [rows, ld] and writes them as columns [n0, n0 + columns) of the head.
void put_result(const Attention& t, const float* result, int64_t ld, const float* inverse,
                int64_t r0, int64_t rows, int64_t n0, int64_t columns) {
  with_type(t.out_type, [&](auto target) {
    using Target = decltype(target);
    for (int64_t i = 0; i < rows; ++i) {
      auto* out = static_cast<typename Target::Element*>(t.out) + (r0 + i) * t.ldo + n0;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec x = load(result + i * ld + j) * inverse[i];
        if (columns - j >= kLanes) {
          Target::put(out, j, x);
        } else {
          partial_put<Target>(out, j, x, columns - j);
        }
      }
    }
  });
}

// softmax(scale q k^T + bias) v. Keys are transposed into panels and values gathered into panels
// once per call, then both products run on the GEMM's tile.
void attention_panels(const Attention& t, void* scratch) {
  const int64_t length = t.length, d = t.head_dim, width = padded_length(length);
  float* keys = static_cast<float*>(scratch);          // [width / kNr][d][kNr]
  float* values = keys + width * d;                    // [d / kNr][length][kNr]
  float* scores = values + length * padded_length(d);  // [kQueryRows][width]
  float* result = scores + kQueryRows * width;         // [kQueryRows][kNr]
  float* copies = result + kQueryRows * kNr;           // [kQueryRows][d]
  float* inverse = copies + kQueryRows * d;            // [kQueryRows]
  with_type(t.type, [&](auto source) { pack_keys_values<decltype(source)>(t, keys, values); });
  for (int64_t r0 = t.row0; r0 < t.row1; r0 += kQueryRows) {
    const int64_t rows = smaller(kQueryRows, t.row1 - r0);
    const float* queries = static_cast<const float*>(t.q) + r0 * t.ld;
    int64_t ldq = t.ld;
    if (t.type != DType::kFloat32) {
      for (int64_t i = 0; i < rows; ++i) {
        convert(static_cast<const char*>(t.q) + (r0 + i) * t.ld * size_of(t.type), t.type,
                copies + i * d, DType::kFloat32, d);
      }
      queries = copies;
      ldq = d;
    }
    for (int64_t j = 0; j < width; j += kNr) {
      const int vectors = static_cast<int>(ceil_div(smaller(kNr, length - j), kLanes));
      for (int64_t i = 0; i < rows; i += kMr) {
        run_tile(smaller(kMr, rows - i), vectors, queries + i * ldq, ldq, keys + j * d, d,
                 scores + i * width + j, width, true);
      }
    }
    softmax_rows(t, scores, width, r0, rows, inverse);
    for (int64_t n0 = 0; n0 < d; n0 += kNr) {
      const int64_t columns = smaller(kNr, d - n0);
      const int vectors = static_cast<int>(ceil_div(columns, kLanes));
      for (int64_t k0 = 0; k0 < length; k0 += kDepth) {
        const int64_t depth = smaller(kDepth, length - k0);
        for (int64_t i = 0; i < rows; i += kMr) {
          run_tile(smaller(kMr, rows - i), vectors, scores + i * width + k0, width,
                   values + (n0 / kNr * length + k0) * kNr, depth, result + i * kNr, kNr, k0 == 0);
        }
      }
      put_result(t, result, kNr, inverse, r0, rows, n0, columns);
    }
  }
}

#if FT_BF16_DOT
#include "kernels/cpu/impl_bf16.h"
#endif
#include "kernels/cpu/impl_int8.h"

// ---- rows --------------------------------------------------------------------------------------

// Normalises x [hidden], which it may overwrite, into up to two outputs.
template <typename Target>
inline void normalise(float* x, int64_t hidden, const float* gamma, const float* beta, float eps,
                      void* out, uint16_t* out_bf16) {
  const int64_t whole = hidden / kLanes * kLanes;
  Vec sum = {};
  for (int64_t j = 0; j < whole; j += kLanes) sum += load(x + j);
  float total = sum_of(sum);
  for (int64_t j = whole; j < hidden; ++j) total += x[j];
  const float mean = total / static_cast<float>(hidden);
  Vec squares = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec centred = load(x + j) - mean;
    squares += centred * centred;
  }
  float variance = sum_of(squares);
  for (int64_t j = whole; j < hidden; ++j) variance += (x[j] - mean) * (x[j] - mean);
  const float scale = 1.0f / __builtin_sqrtf(variance / static_cast<float>(hidden) + eps);
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec y = (load(x + j) - mean) * scale * load(gamma + j) + load(beta + j);
    Target::put(out, j, y);
    if (out_bf16) store_bf16(out_bf16 + j, y);
  }
  if (whole < hidden) {
    const int64_t left = hidden - whole;
    const Vec y =
        (partial_at<F32>(x, whole, left) - mean) * scale * partial_at<F32>(gamma, whole, left) +
        partial_at<F32>(beta, whole, left);
    partial_put<Target>(out, whole, y, left);
    if (out_bf16) partial_put<BF16>(out_bf16, whole, y, left);
  }
}

void layer_norm(const LayerNormRows& l, int64_t m0, int64_t m1, float* row) {
  const auto gather = [&](Operand from, int64_t offset, bool add) {
    with_type(from.dtype, [&](auto source) {
      using Source = decltype(source);
      const auto* p = static_cast<const typename Source::Element*>(from.data) + offset;
      for (int64_t j = 0; j < l.hidden; j += kLanes) {
        const int64_t left = l.hidden - j;
        if (left >= kLanes) {
          store(row + j, add ? load(row + j) + Source::at(p, j) : Source::at(p, j));
        } else {
          const Vec x = partial_at<Source>(p, j, left);
          partial_put<F32>(row, j, add ? partial_at<F32>(row, j, left) + x : x, left);
        }
      }
    });
  };
  for (int64_t m = m0; m < m1; ++m) {
    gather(l.input, m * l.ld_input, false);
    if (l.bias.data) gather(l.bias, 0, true);
    if (l.residual.data) gather(l.residual, m * l.ld_residual, true);
    with_type(l.out_type, [&](auto target) {
      using Target = decltype(target);
      normalise<Target>(row, l.hidden, l.gamma, l.beta, l.eps,
                        static_cast<typename Target::Element*>(l.out) + m * l.ldo,
                        l.out_bf16 ? static_cast<uint16_t*>(l.out_bf16) + m * l.ld_bf16 : nullptr);
    });
  }
}

void embed(const EmbedRows& e, int64_t m0, int64_t m1, float* row) {
  const Embeddings& t = *e.tables;
  with_type(t.word.dtype, [&](auto source) {
    using Source = decltype(source);
    using Element = typename Source::Element;
    for (int64_t m = m0; m < m1; ++m) {
      const Element* w = static_cast<const Element*>(t.word.data) + t.ids[m] * e.hidden;
      const Element* p = static_cast<const Element*>(t.position.data) + t.positions[m] * e.hidden;
      const Element* s = static_cast<const Element*>(t.token_type.data) + t.types[m] * e.hidden;
      for (int64_t j = 0; j < e.hidden; j += kLanes) {
        const int64_t left = e.hidden - j;
        if (left >= kLanes) {
          store(row + j, Source::at(w, j) + Source::at(p, j) + Source::at(s, j));
        } else {
          partial_put<F32>(row, j,
                           partial_at<Source>(w, j, left) + partial_at<Source>(p, j, left) +
                               partial_at<Source>(s, j, left),
                           left);
        }
      }
      with_type(e.out_type, [&](auto target) {
        using Target = decltype(target);
        normalise<Target>(
            row, e.hidden, e.gamma, e.beta, t.eps,
            static_cast<typename Target::Element*>(e.out) + m * e.ldo,
            e.out_bf16 ? static_cast<uint16_t*>(e.out_bf16) + m * e.ld_bf16 : nullptr);
      });
    }
  });
}

// Into the type of the input.
void activate_rows(Operand input, const float* bias, Activation activation, int64_t n, void* out,
                   int64_t m0, int64_t m1) {
  const auto run = [&](auto type, auto activated) {
    using Type = decltype(type);
    for (int64_t m = m0; m < m1; ++m) {
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t left = n - j;
        if (left >= kLanes) {
          Vec x = Type::at(input.data, m * n + j);
          if (bias) x += load(bias + j);
          Type::put(out, m * n + j, activated.template of<Type>(x));
        } else {
          Vec x = partial_at<Type>(input.data, m * n + j, left);
          if (bias) x += partial_at<F32>(bias, j, left);
          partial_put<Type>(out, m * n + j, activated.template of<Type>(x), left);
        }
      }
    }
  };
  with_type(input.dtype, [&](auto type) {
    with_activation(activation, [&](auto activated) { run(type, activated); });
  });
}

// ---- segments ----------------------------------------------------------------------------------

// What becomes of the rows of a sequence, column by column, in their order: NaN reaches the result.
struct MeanOfRows {
  static Vec add(Vec sum, Vec x) { return sum + x; }
  static Vec result(Vec sum, int64_t rows) { return sum / static_cast<float>(rows); }
};
struct MaxOfRows {
  static Vec add(Vec most, Vec x) { return select((x > most) | (x != x), x, most); }
  static Vec result(Vec most, int64_t) { return most; }
};

// `kVectors` vectors of columns; `partial`: columns of a last vector that is not whole.
template <typename Source, typename Pooled, int kVectors>
inline void pool_columns(const typename Source::Element* input, int64_t ld, int64_t rows,
                         float* out, int64_t partial) {
  const auto at = [&](const typename Source::Element* row, int64_t v) {
    return partial ? partial_at<Source>(row, 0, partial) : Source::at(row, v * kLanes);
  };
  Vec pooled[kVectors];
  for (int v = 0; v < kVectors; ++v) pooled[v] = at(input, v);
  for (int64_t r = 1; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) pooled[v] = Pooled::add(pooled[v], at(input + r * ld, v));
  }
  for (int v = 0; v < kVectors; ++v) {
    const Vec x = Pooled::result(pooled[v], rows);
    if (partial) {
      partial_put<F32>(out, 0, x, partial);
    } else {
      store(out + v * kLanes, x);
    }
  }
}

void pool(const PoolRows& p, int64_t row0, int64_t row1, float* out) {
  if (row0 == row1) {
    std::memset(out, 0, p.hidden * 4);
    return;
  }
  const auto run = [&](auto source, auto pooled) {
    using Source = decltype(source);
    using Pooled = decltype(pooled);
    const auto* from = static_cast<const typename Source::Element*>(p.input.data) + row0 * p.hidden;
    constexpr int kWhole = 8;  // vectors at a time, which the registers hold
    const int64_t rows = row1 - row0;
    int64_t j = 0;
    for (; j + kWhole * kLanes <= p.hidden; j += kWhole * kLanes) {
      pool_columns<Source, Pooled, kWhole>(from + j, p.hidden, rows, out + j, 0);
    }
    for (; j < p.hidden; j += kLanes) {
      const int64_t left = p.hidden - j;
      pool_columns<Source, Pooled, 1>(from + j, p.hidden, rows, out + j, left < kLanes ? left : 0);
    }
  };
  with_type(p.input.dtype, [&](auto source) {
    switch (p.pooling) {
      case Pooling::kMean:
        return run(source, MeanOfRows{});
      case Pooling::kMax:
        return run(source, MaxOfRows{});
    }
  });
}

// ---- the table ---------------------------------------------------------------------------------

#if FT_BF16_DOT
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

inline bool on_pairs(DType type) { return kPairs && type == DType::kBFloat16; }

Tiling tiling(DType weight) {
#if FT_BF16_DOT
  if (on_pairs(weight)) return {FT_BF16_DOT == 1 ? 12 : 32, kWide, kPairBlock};
#endif
  if (weight == DType::kInt8) return {kInt8Rows, kInt8Nr, kInt8Block};
  return {kMr, kNr, kRowBlock};
}

int64_t layer_bytes(DType type, int64_t n, int64_t k) {
#if FT_BF16_DOT
  if (on_pairs(type)) return pair_layer_bytes(n, k);
#endif
  if (type == DType::kInt8) return int8_layer_bytes(n, k);
  return panel_layer_bytes(type, n, k);
}

void pack(const void* weight, DType type, int64_t n, int64_t k, void* out, int64_t p0, int64_t p1) {
#if FT_BF16_DOT
  if (on_pairs(type)) {
    return pack_pairs(static_cast<const uint16_t*>(weight), n, k, static_cast<uint16_t*>(out), p0,
                      p1);
  }
#endif
  if (type == DType::kFloat32) {
    pack_panels(static_cast<const float*>(weight), n, k, static_cast<float*>(out), p0, p1);
  } else {
    pack_panels(static_cast<const uint16_t*>(weight), n, k, static_cast<uint16_t*>(out), p0, p1);
  }
}

int64_t gemm_scratch() {
  const int64_t bytes = larger(kInt8Scratch, kGemmScratch * 4);
#if FT_BF16_DOT
  return larger(kPairScratch, bytes);
#else
  return bytes;
#endif
}

void gemm(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch) {
#if FT_BF16_DOT
  if (on_pairs(g.weight.dtype)) return gemm_pairs(g, m0, m1, p0, p1, scratch);
#endif
  if (g.weight.dtype == DType::kInt8) return gemm_int8(g, m0, m1, p0, p1, scratch);
  gemm_panels(g, m0, m1, p0, p1, scratch);
}

int64_t attention_scratch(int64_t longest, int64_t head_dim) {
#if FT_BF16_DOT
  return larger(pair_attention_scratch(longest, head_dim),
                panel_attention_scratch(longest, head_dim));
#else
  return panel_attention_scratch(longest, head_dim);
#endif
}

void attention(const Attention& a, void* scratch) {
#if FT_BF16_DOT
  if (on_pairs(a.type)) return attention_pairs(a, scratch);
#endif
  attention_panels(a, scratch);
}

constexpr Kernels table(const char* name, int layout) {
  return {
      .name = name,
      .layout = layout,
      .bf16_dot = kPairs,
      .tiling = tiling,
      .layer_bytes = layer_bytes,
      .pack = pack,
      .pack_int8 = pack_int8,
      .quantised_row = quantised_row,
      .quantise = quantise_rows,
      .gemm_scratch = gemm_scratch,
      .gemm = gemm,
      .attention_scratch = attention_scratch,
      .attention = attention,
      .embed = embed,
      .layer_norm = layer_norm,
      .activate = activate_rows,
      .pool = pool,
      .convert = convert,
  };
}

}  // namespace ft::cpu::FT_NAMESPACE
