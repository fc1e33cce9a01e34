// GEMM of int8 weights by activations that are quantised as they are copied. Part of impl.h, in its
// namespace; docs/cpu-kernels.md describes the scheme.
//
// K is cut into slices. A row's slice is rounded to q = round(x kLevels / max |x|), its products
// with the weights are summed in integers, and these sums times max |x| / kLevels are added up over
// the slices in float32. A layer is [scales][panel][slice][k][kNr].

constexpr int kLevels = 127;
constexpr int64_t kMostSlice = 512;
constexpr int64_t kInt8Rows = kMr, kInt8Nr = kNr, kInt8Block = kRowBlock;
constexpr int64_t kInt8Ld = kMostSlice + 16;

// As many slices as kMostSlice demands, as equal as multiples of 64 allow.
inline int64_t slice_length(int64_t k) {
  return ceil_div(ceil_div(k, ceil_div(k, kMostSlice)), 64) * 64;
}

inline int64_t int8_scales(int64_t n) { return ceil_div(ceil_div(n, kNr) * kNr, 16) * 16; }

int64_t int8_layer_bytes(int64_t n, int64_t k) {
  return int8_scales(n) * 4 + ceil_div(ceil_div(n, kNr) * kNr * k, 64) * 64;
}

void pack_int8(const int8_t* weight, const float* scale, int64_t n, int64_t k, void* out,
               int64_t p0, int64_t p1) {
  float* scales = static_cast<float*>(out);
  for (int64_t j = p0 * kNr; j < p1 * kNr; ++j) scales[j] = j < n ? scale[j] : 0.0f;
  pack_panels(weight, n, k, reinterpret_cast<int8_t*>(scales + int8_scales(n)), p0, p1);
}

// Bits of the largest magnitude; those of infinity, or more, where a number is not finite.
template <typename Source>
inline int32_t largest_bits(const void* from, int64_t count) {
  IVec most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x =
        count - i >= kLanes ? Source::at(from, i) : partial_at<Source>(from, i, count - i);
    const IVec magnitude = reinterpret_cast<IVec>(x) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t found = most[0];
  for (int i = 1; i < kLanes; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

// To the nearest integer, ties to even, for numbers below 2^22: of the rounded product, not fused
// with it.
inline Vec rounded(Vec x) {
  asm("" : "+m"(x));
  return (x + 12582912.0f) - 12582912.0f;
}

// Quantises `count` numbers and returns what a step of them is worth: zero for numbers that are all
// below 2^-100, NaN where one is not finite.
template <typename Source>
inline float quantise(const void* from, int64_t count, float* to) {
  const int32_t bits = largest_bits<Source>(from, count);
  float most;
  std::memcpy(&most, &bits, 4);
  if (!(most >= 0x1p-100f && most < __builtin_inff())) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
    return most < 1.0f ? 0.0f : __builtin_nanf("");
  }
  const Vec steps = splat(kLevels / most);
  for (int64_t i = 0; i < count; i += kLanes) {
    if (count - i >= kLanes) {
      store(to + i, rounded(Source::at(from, i) * steps));
    } else {
      partial_put<F32>(to, i, rounded(partial_at<Source>(from, i, count - i) * steps), count - i);
    }
  }
  return most / kLevels;
}

constexpr int64_t kInt8Scratch =
    (kMostSlice * kNr + kMr * kNr + kInt8Block * (1 + kInt8Ld + kPanelColumns)) * 4;

void gemm_int8(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch) {
  float* expanded = static_cast<float*>(scratch);  // [kMostSlice, kNr]
  float* products = expanded + kMostSlice * kNr;   // [kMr, kNr]
  float* block = products + kMr * kNr;             // [kInt8Block, kInt8Ld]
  float* steps = block + kInt8Block * kInt8Ld;     // [kInt8Block]
  float* sums = steps + kInt8Block;                // [kInt8Block, lds]
  const int64_t lds = (p1 - p0) * kNr, rows = m1 - m0, slice = slice_length(g.k);
  const int8_t* panels =
      reinterpret_cast<const int8_t*>(static_cast<const float*>(g.weight.data) + int8_scales(g.n));
  for (int64_t k0 = 0; k0 < g.k; k0 += slice) {
    const int64_t depth = smaller(slice, g.k - k0);
    with_type(g.a.dtype, [&](auto source) {
      using Source = decltype(source);
      const auto* from = static_cast<const typename Source::Element*>(g.a.data) + k0;
      for (int64_t m = 0; m < rows; ++m) {
        steps[m] = quantise<Source>(from + (m0 + m) * g.lda, depth, block + m * kInt8Ld);
      }
    });
    for (int64_t p = p0; p < p1; ++p) {
      const int8_t* panel = panels + (p * g.k + k0) * kNr;
      for (int64_t i = 0; i < depth * kNr; ++i) expanded[i] = static_cast<float>(panel[i]);
      for (int64_t m = 0; m < rows; m += kMr) {
        const int64_t count = smaller(kMr, rows - m);
        run_tile(count, kNv, block + m * kInt8Ld, kInt8Ld, expanded, depth, products, kNr, true);
        for (int64_t i = 0; i < count; ++i) {
          float* sum = sums + (m + i) * lds + (p - p0) * kNr;
          for (int64_t j = 0; j < kNr; j += kLanes) {
            const Vec x = load(products + i * kNr + j) * steps[m + i];
            store(sum + j, k0 ? load(sum + j) + x : x);
          }
        }
      }
    }
  }
  finish_tile(g, sums, lds, m0, rows, p0 * kNr, smaller(lds, g.n - p0 * kNr));
}
