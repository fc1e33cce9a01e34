// The CPU kernels against plain loops in double precision, without Torch, for sanitizer builds.
//
// Every allocation is exactly as large as the kernels ask for, so that a sanitizer sees a step too
// far. FT_HANDLER_CPU_ISA picks the instruction set; built with FT_EMULATE_ISAS, those that this
// processor lacks run in emulation. Exits non-zero, naming the case, on the first wrong result.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace {

using ft::Activation;
using ft::DType;
using ft::Operand;

std::mt19937 rng(7);

ft::cpu::Threads threads_of(int count) {
  return {count, [](int workers, void (*body)(void*, int), void* context) {
            std::vector<std::thread> pool;
            for (int w = 1; w < workers; ++w) pool.emplace_back(body, context, w);
            body(context, 0);
            for (auto& t : pool) t.join();
          }};
}

// A buffer of exactly `bytes`, aligned as torch aligns.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) {
    if (posix_memalign(&data_, 64, bytes ? bytes : 1) != 0) std::abort();
  }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  ~Buffer() { std::free(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

float rounded(float x, DType type) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (type == DType::kBFloat16) bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  if (type == DType::kFloat16) bits = (bits + 0xfff + ((bits >> 13) & 1)) & 0xffffe000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Values of one type beside their float copies.
struct Values {
  std::vector<float> f;
  Buffer raw;
  DType type;

  Values(int64_t count, DType t, float spread, float centre = 0)
      : f(count), raw(count * ft::size_of(t)), type(t) {
    std::normal_distribution<float> normal(centre, spread);
    for (int64_t i = 0; i < count; ++i) {
      f[i] = rounded(normal(rng), t);
      uint32_t bits;
      std::memcpy(&bits, &f[i], 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (t == DType::kFloat16) {  // normal numbers only
        if ((bits & 0x7fffffff) < 0x38800000) f[i] = 0, bits = 0;
        half = static_cast<uint16_t>(((bits >> 16) & 0x8000) |
                                     (bits ? ((bits & 0x7fffffff) - 0x38000000) >> 13 : 0));
      }
      if (t == DType::kFloat32) {
        std::memcpy(static_cast<char*>(raw.get()) + 4 * i, &f[i], 4);
      } else {
        std::memcpy(static_cast<char*>(raw.get()) + 2 * i, &half, 2);
      }
    }
  }
  Operand operand() const { return {raw.get(), type}; }
};

float read(const Buffer& buffer, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(buffer.get())[i];
  const uint16_t half = static_cast<const uint16_t*>(buffer.get())[i];
  if (type == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (half >> 10) & 31;
  const float mantissa = static_cast<float>(half & 1023);
  if (exponent == 31) return mantissa > 0 ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
  const float x = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -x : x;
}

void check(const std::string& what, const Buffer& got, DType type, const std::vector<double>& want,
           double tolerance) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double x = read(got, type, static_cast<int64_t>(i));
    if (!(std::abs(x - want[i]) <= tolerance * (1 + std::abs(want[i])))) {
      std::printf("FAILED %s: element %zu is %.9g, should be %.9g\n", what.c_str(), i, x, want[i]);
      std::exit(1);
    }
  }
}

double tolerance_of(DType type) {
  return type == DType::kFloat32 ? 2e-5 : type == DType::kFloat16 ? 2e-3 : 2e-2;
}
const char* name_of(DType type) {
  return type == DType::kFloat32 ? "float32" : type == DType::kFloat16 ? "float16" : "bfloat16";
}

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

double activated(double x, Activation activation) {
  const double cubic = 2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return x / (1 + std::exp(-cubic));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
  }
  std::abort();
}

constexpr Activation kActivations[] = {Activation::kNone, Activation::kGelu, Activation::kGeluTanh,
                                       Activation::kRelu, Activation::kSilu};

// The bounds of kernels/gelu.h, relative to the result.
void test_bound(DType type, Activation activation) {
  const auto t = threads_of(1);
  const int64_t n = 5000;
  Values x(n, type, 4);
  const Buffer out(n * ft::size_of(type)), space(ft::cpu::bias_activation_workspace(n, t));
  ft::cpu::bias_activation(x.operand(), {}, activation, 1, n, out.get(), space.get(), t);
  const bool erf = activation == Activation::kGelu;
  const double share = erf ? 0x1p-10 : 0x1p-16;
  const double least = type == DType::kFloat16 ? 0x1p-14 : erf ? 0x1p-120 : 0x1p-119;
  const double half_unit = type == DType::kFloat32   ? 0x1p-24
                           : type == DType::kFloat16 ? 0x1p-11
                                                     : 0x1p-8;
  for (int64_t i = 0; i < n; ++i) {
    const double want = activated(x.f[i], activation), got = read(out, type, i);
    const double bound = std::abs(want) * (share + half_unit);
    if (std::abs(want) >= least ? !(std::abs(got - want) <= bound)
                                : !(std::abs(got - want) <= 2 * least)) {
      std::printf("FAILED activation %d %s of %.9g: %.9g, should be %.9g\n",
                  static_cast<int>(activation), name_of(type), x.f[i], got, want);
      std::exit(1);
    }
  }
}

std::vector<double> norm(const std::vector<double>& x, int64_t h, const float* gamma,
                         const float* beta, double eps) {
  std::vector<double> y(x.size());
  for (size_t r = 0; r < x.size(); r += h) {
    double mean = 0, var = 0;
    for (int64_t j = 0; j < h; ++j) mean += x[r + j] / h;
    for (int64_t j = 0; j < h; ++j) var += (x[r + j] - mean) * (x[r + j] - mean) / h;
    for (int64_t j = 0; j < h; ++j) {
      y[r + j] = (x[r + j] - mean) / std::sqrt(var + eps) * gamma[j] + beta[j];
    }
  }
  return y;
}

std::vector<double> multiply(const std::vector<double>& a, const float* w, const float* bias,
                             int64_t n, int64_t k) {
  const int64_t m = static_cast<int64_t>(a.size()) / k;
  std::vector<double> c(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias ? bias[j] : 0;
      for (int64_t l = 0; l < k; ++l) sum += a[i * k + l] * w[j * k + l];
      c[i * n + j] = sum;
    }
  }
  return c;
}

// `bias`: [heads, columns], added by head and distance; none where empty.
std::vector<double> attend(const std::vector<double>& qkv, const std::vector<int32_t>& cu,
                           int64_t heads, int64_t d, const std::vector<float>& bias = {}) {
  const int64_t h = heads * d, columns = static_cast<int64_t>(bias.size()) / heads;
  const int64_t most = columns / 2;
  std::vector<double> out(qkv.size() / 3);
  for (size_t b = 0; b + 1 < cu.size(); ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
        std::vector<double> p;
        double top = -1e300, sum = 0;
        for (int64_t j = cu[b]; j < cu[b + 1]; ++j) {
          double s = 0;
          for (int64_t e = 0; e < d; ++e) {
            s += qkv[i * 3 * h + head * d + e] * qkv[j * 3 * h + h + head * d + e];
          }
          p.push_back(s / std::sqrt(static_cast<double>(d)));
          if (columns) p.back() += bias[head * columns + std::clamp(j - i, -most, most) + most];
          top = std::max(top, p.back());
        }
        for (double& x : p) sum += x = std::exp(x - top);
        for (int64_t j = cu[b]; j < cu[b + 1]; ++j) {
          for (int64_t e = 0; e < d; ++e) {
            out[i * h + head * d + e] += p[j - cu[b]] / sum * qkv[j * 3 * h + 2 * h + head * d + e];
          }
        }
      }
    }
  }
  return out;
}

std::vector<double> wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

Buffer packed(const Values& w, int64_t layers, int64_t n, int64_t k, const ft::cpu::Threads& t) {
  ft::cpu::LayeredWeight weight{n, k};
  weight.kept = w.operand();
  weight.kept_count = layers;
  const int64_t bytes = ft::cpu::packed_bytes(weight);
  Buffer blob(bytes);
  ft::cpu::pack_weight(weight, blob.get(), t);
  if (!ft::cpu::blob_fault(blob.get(), bytes).empty()) std::abort();
  return blob;
}

void test_linear(DType type, DType weights, int64_t m, int64_t n, int64_t k, int threads) {
  const auto t = threads_of(threads);
  const Values a(m * k, type, 1), w(n * k, weights, 0.1f), b(n, weights, 1), r(m * n, type, 1);
  const Buffer blob = packed(w, 1, n, k, t);
  for (int variant = 0; variant < 10; ++variant) {
    ft::cpu::Linear op{};
    op.input = a.operand();
    op.blob = blob.get();
    op.activation = kActivations[variant % 5];
    if (variant != 0) op.bias = b.operand();
    if (variant >= 5) op.residual = r.operand();
    op.out_dtype = type;
    const Buffer out(m * n * ft::size_of(type));
    const Buffer space(ft::cpu::linear_workspace(blob.get(), m, t));
    ft::cpu::linear(op, m, out.get(), space.get(), t);
    auto want = multiply(wide(a.f), w.f.data(), variant ? b.f.data() : nullptr, n, k);
    for (size_t i = 0; i < want.size(); ++i) {
      want[i] = activated(want[i], op.activation);
      if (op.residual.data) want[i] += r.f[i];
    }
    check("linear " + std::string(name_of(type)) + " by " + name_of(weights) + " " +
              std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k),
          out, type, want, std::max(tolerance_of(type), tolerance_of(weights)));
  }
}

// ---- int8 ---------------------------------------------------------------------------------------

// What an instruction set rounds activations to, as docs/cpu-kernels.md has it.
int activation_levels() {
  const std::string isa = ft::cpu::isa_name();
  return isa == "avx2" || isa == "avx512" ? 64 : 127;
}

int64_t slice_of(int64_t k) {
  const int64_t slices = (k + 511) / 512;
  return ((k + slices - 1) / slices + 63) / 64 * 64;
}

// The documented scheme, sums in double precision; NaN in rows that are not finite.
std::vector<double> multiply_int8(const std::vector<float>& a, const std::vector<int8_t>& w,
                                  const std::vector<float>& scale, const float* bias, int64_t n,
                                  int64_t k) {
  const int64_t m = static_cast<int64_t>(a.size()) / k, slice = slice_of(k);
  const auto levels = static_cast<float>(activation_levels());
  std::vector<double> c(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k0 = 0; k0 < k; k0 += slice) {
      const int64_t end = std::min(k, k0 + slice);
      float most = 0;
      bool finite = true;
      for (int64_t l = k0; l < end; ++l) {
        finite = finite && std::isfinite(a[i * k + l]);
        most = std::max(most, std::abs(a[i * k + l]));
      }
      const float by = most < 0x1p-100f ? 0 : levels / most;
      std::vector<int64_t> q(end - k0);
      for (int64_t l = k0; finite && l < end; ++l) {
        volatile float product = a[i * k + l] * by;
        q[l - k0] = static_cast<int64_t>(std::nearbyint(product));
      }
      for (int64_t j = 0; j < n; ++j) {
        int64_t sum = 0;
        for (int64_t l = k0; l < end; ++l) sum += q[l - k0] * w[j * k + l];
        c[i * n + j] += finite ? static_cast<double>(sum) * (by > 0 ? most / levels : 0) : NAN;
      }
    }
    for (int64_t j = 0; j < n; ++j) c[i * n + j] = c[i * n + j] * scale[j] + (bias ? bias[j] : 0);
  }
  return c;
}

void put(Values& values, int64_t i, float x) {
  values.f[i] = x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (values.type == DType::kFloat32) {
    std::memcpy(static_cast<char*>(values.raw.get()) + 4 * i, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (values.type == DType::kFloat16) {
    half = x == 0 ? 0 : std::isnan(x) ? 0x7e00 : x > 0 ? 0x7c00 : 0xfc00;  // no others are put
  }
  std::memcpy(static_cast<char*>(values.raw.get()) + 2 * i, &half, 2);
}

enum class Weights { kRandom, kMost, kLeast, kMixed, kTurns };

// Rows 1 to 4, where there are so many, are zeros, hold a NaN, hold an infinity, are large alone.
void test_int8(DType type, Weights pattern, int64_t m, int64_t n, int64_t k, int threads) {
  const auto t = threads_of(threads);
  std::vector<int8_t> w(n * k);
  for (int64_t i = 0; i < n * k; ++i) {
    const int random = static_cast<int>(rng() % 255) - 127;
    const int turns[] = {127, 127, 127, 127, -127, -127, -127, -127};
    w[i] = static_cast<int8_t>(pattern == Weights::kRandom  ? random
                               : pattern == Weights::kMost  ? 127
                               : pattern == Weights::kLeast ? -127
                               : pattern == Weights::kMixed ? (random > 0 ? 127 : -127)
                                                            : turns[i % k % 8]);
  }
  std::vector<float> scale(n);
  for (float& s : scale) s = 1e-3f * static_cast<float>(1 + rng() % 9) / static_cast<float>(k);
  Values a(m * k, type, 1), r(m * n, type, 1);
  const Values b(n, type, 1);
  if (pattern != Weights::kRandom) {  // the largest magnitudes everywhere, of every pair of signs
    for (int64_t i = 0; i < m * k; ++i) {
      a.f[i] = 0;
      const float one = pattern == Weights::kTurns ? (i % k % 8 < 4 ? 1.0f : -1.0f)
                        : i / k % 3 == 0           ? 1.0f
                        : i / k % 3 == 1           ? -1.0f
                                                   : (rng() % 2 ? 1.0f : -1.0f);
      if (type == DType::kFloat16) {
        const uint16_t half = one > 0 ? 0x3c00 : 0xbc00;
        a.f[i] = one;
        std::memcpy(static_cast<char*>(a.raw.get()) + 2 * i, &half, 2);
      } else {
        put(a, i, one);
      }
    }
  }
  if (m > 4) {
    for (int64_t i = 0; i < k; ++i) put(a, k + i, 0);
    put(a, 2 * k + rng() % k, NAN);
    put(a, 3 * k + rng() % k, rng() % 2 ? INFINITY : -INFINITY);
  }
  ft::cpu::LayeredWeight weight{n, k};
  weight.quantized = w.data();
  weight.scale = scale.data();
  weight.quantized_count = 1;
  const int64_t bytes = ft::cpu::packed_bytes(weight);
  const Buffer blob(bytes);
  ft::cpu::pack_weight(weight, blob.get(), t);
  if (!ft::cpu::blob_fault(blob.get(), bytes).empty() ||
      !ft::cpu::is_packed(blob.get(), bytes, DType::kInt8, 1, n, k) ||
      ft::cpu::is_packed(blob.get(), bytes, type, 1, n, k)) {
    std::printf("FAILED int8 blob\n");
    std::exit(1);
  }
  const std::string what = "int8 of " + std::string(name_of(type)) + " weights " +
                           std::to_string(static_cast<int>(pattern)) + " " + std::to_string(m) +
                           "x" + std::to_string(n) + "x" + std::to_string(k);
  for (Activation activation : {Activation::kNone, Activation::kGelu}) {
    const bool none = activation == Activation::kNone;
    ft::cpu::Linear op{};
    op.input = a.operand();
    op.blob = blob.get();
    op.activation = activation;
    if (!none) op.bias = b.operand();
    if (none) op.residual = r.operand();
    op.out_dtype = type;
    const int64_t row = n * ft::size_of(type);
    const Buffer out(m * row), space(ft::cpu::linear_workspace(blob.get(), m, t));
    ft::cpu::linear(op, m, out.get(), space.get(), t);
    const auto want = multiply_int8(a.f, w, scale, none ? nullptr : b.f.data(), n, k);
    const double tolerance = tolerance_of(type);
    for (int64_t i = 0; i < m * n; ++i) {
      const double x = read(out, type, i);
      const double y = activated(want[i], activation) + (none ? r.f[i] : 0);
      const bool fits =
          std::isnan(y) ? std::isnan(x) : std::abs(x - y) <= tolerance * (1 + std::abs(y));
      if (fits) continue;
      std::printf("FAILED %s: element %ld is %.9g, should be %.9g\n", what.c_str(),
                  static_cast<long>(i), x, y);
      std::exit(1);
    }
    // The same bits for a row alone, on one thread.
    const auto alone = threads_of(1);
    for (int64_t i = 0; i < m; i += 1 + m / 7) {
      op.input.data = static_cast<char*>(a.raw.get()) + i * k * ft::size_of(type);
      if (none) op.residual.data = static_cast<char*>(r.raw.get()) + i * row;
      const Buffer one(row), little(ft::cpu::linear_workspace(blob.get(), 1, alone));
      ft::cpu::linear(op, 1, one.get(), little.get(), alone);
      if (std::memcmp(one.get(), static_cast<char*>(out.get()) + i * row, row) == 0) continue;
      std::printf("FAILED %s: row %ld alone has other bits\n", what.c_str(), static_cast<long>(i));
      std::exit(1);
    }
  }
}

// The blob of a weight some of whose layers are quantised; those become what int8 makes of them.
Buffer packed_mixed(Values& w, int64_t layers, const std::vector<int64_t>& kept, int64_t n,
                    int64_t k, const ft::cpu::Threads& t) {
  std::vector<int8_t> quantized;
  std::vector<float> scale;
  const int64_t element = ft::size_of(w.type), each = n * k;
  const Buffer whole(static_cast<int64_t>(kept.size()) * each * element);
  int64_t done = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (std::find(kept.begin(), kept.end(), layer) != kept.end()) {
      std::memcpy(static_cast<char*>(whole.get()) + done++ * each * element,
                  static_cast<char*>(w.raw.get()) + layer * each * element, each * element);
      continue;
    }
    for (int64_t row = layer * n; row < (layer + 1) * n; ++row) {
      float most = 0;
      for (int64_t i = 0; i < k; ++i) most = std::max(most, std::abs(w.f[row * k + i]));
      scale.push_back(most / 127);
      for (int64_t i = 0; i < k; ++i) {
        const float q = std::nearbyint(w.f[row * k + i] / scale.back());
        quantized.push_back(static_cast<int8_t>(q));
        w.f[row * k + i] = q * scale.back();
      }
    }
  }
  ft::cpu::LayeredWeight weight{n, k};
  weight.kept = {whole.get(), w.type};
  weight.kept_count = static_cast<int64_t>(kept.size());
  weight.kept_layers = kept.data();
  weight.quantized = quantized.data();
  weight.scale = scale.data();
  weight.quantized_count = layers - weight.kept_count;
  const int64_t bytes = ft::cpu::packed_bytes(weight);
  Buffer blob(bytes);
  ft::cpu::pack_weight(weight, blob.get(), t);
  const bool fits =
      ft::cpu::is_packed(blob.get(), bytes, DType::kInt8, weight.quantized_count, n, k) &&
      ft::cpu::is_packed(blob.get(), bytes, w.type, weight.kept_count, n, k);
  if (!fits || !ft::cpu::blob_fault(blob.get(), bytes).empty()) std::abort();
  return blob;
}

void test_attention(DType type, std::vector<int32_t> lengths, int64_t heads, int64_t d, int threads,
                    int64_t columns) {
  const auto t = threads_of(threads);
  std::vector<int32_t> cu{0};
  int64_t longest = 0;
  for (int32_t l : lengths) {
    cu.push_back(cu.back() + l);
    longest = std::max<int64_t>(longest, l);
  }
  const int64_t tokens = cu.back(), h = heads * d;
  const Values qkv(tokens * 3 * h, type, 1), table(heads * columns, type, 1);
  ft::cpu::RelativeBias bias;
  if (columns) bias = {table.operand(), columns};
  const Buffer out(tokens * h * ft::size_of(type));
  const Buffer space(ft::cpu::attention_workspace(longest, heads, d, bias, t));
  ft::cpu::varlen_attention(qkv.operand(), bias, cu.data(), static_cast<int64_t>(lengths.size()),
                            longest, heads, d, type, out.get(), space.get(), t);
  check("attention " + std::string(name_of(type)) + " head size " + std::to_string(d) +
            " bias of " + std::to_string(columns),
        out, type, attend(wide(qkv.f), cu, heads, d, table.f), tolerance_of(type));
}

// A row of scores that are all infinite, or that hold a NaN, is NaN; other sequences keep theirs.
void test_attention_not_finite(DType type, int64_t d, int64_t columns) {
  const auto t = threads_of(2);
  const Values table(columns, type, 1);
  ft::cpu::RelativeBias bias;
  if (columns) bias = {table.operand(), columns};
  const std::vector<int32_t> cu{0, 9, 50, 61};
  for (const float value : {INFINITY, -INFINITY, NAN}) {
    Values qkv(61 * 3 * d, type, 0.1f, 1);  // positive: scores take the sign of the infinity
    for (int64_t row = 9; row < 50; ++row) {
      for (int64_t i = 0; i < d; ++i) {
        const int64_t at = row * 3 * d + d + i;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (type == DType::kFloat16)
          half = std::isnan(value) ? 0x7e00 : value > 0 ? 0x7c00 : 0xfc00;
        if (type == DType::kFloat32) {
          std::memcpy(static_cast<char*>(qkv.raw.get()) + 4 * at, &value, 4);
        } else {
          std::memcpy(static_cast<char*>(qkv.raw.get()) + 2 * at, &half, 2);
        }
      }
    }
    const Buffer out(61 * d * ft::size_of(type));
    const Buffer space(ft::cpu::attention_workspace(41, 1, d, bias, t));
    ft::cpu::varlen_attention(qkv.operand(), bias, cu.data(), 3, 41, 1, d, type, out.get(),
                              space.get(), t);
    for (int64_t i = 0; i < 61 * d; ++i) {
      const bool spoilt = i >= 9 * d && i < 50 * d;
      if (std::isnan(read(out, type, i)) == spoilt) continue;
      std::printf("FAILED attention %s of %g: element %ld\n", name_of(type), value,
                  static_cast<long>(i));
      std::exit(1);
    }
  }
}

void test_encoder(DType type, std::vector<int32_t> lengths, int64_t heads, int64_t d, int64_t inner,
                  int64_t layers, int threads, int64_t embedding = 0, bool shared = false,
                  Activation activation = Activation::kGelu, int64_t columns = 0,
                  bool quantised = false) {
  const auto t = threads_of(threads);
  const int64_t h = heads * d, vocab = 11, positions = 600;
  const int64_t e = embedding ? embedding : h;  // another size than h is projected to it
  const int64_t stored = shared ? 1 : layers;   // one layer's parameters may serve all
  std::vector<int32_t> cu{0}, pos;
  int64_t longest = 0;
  for (int32_t l : lengths) {
    cu.push_back(cu.back() + l);
    longest = std::max<int64_t>(longest, l);
    for (int32_t i = 0; i < l; ++i) pos.push_back(i);
  }
  const int64_t tokens = cu.back();
  std::vector<int64_t> ids, types;
  for (int64_t i = 0; i < tokens; ++i) {
    ids.push_back(static_cast<int64_t>(rng() % vocab));
    types.push_back(rng() % 2);
  }
  const Values word(vocab * e, type, 1), position(positions * e, type, 1), kind(2 * e, type, 1);
  const Values eg(e, type, 0.1f, 1), eb(e, type, 0.1f);
  const Values wp(h * e, type, 0.1f), bp(h, type, 0.1f);
  Values wq(stored * 3 * h * h, type, 0.05f), wo(stored * h * h, type, 0.05f);
  Values wu(stored * inner * h, type, 0.05f), wd(stored * h * inner, type, 0.05f);
  const Values bq(stored * 3 * h, type, 0.1f), bo(stored * h, type, 0.1f);
  const Values bu(stored * inner, type, 0.1f), bd(stored * h, type, 0.1f);
  const Values g1(stored * h, type, 0.1f, 1), b1(stored * h, type, 0.1f);
  const Values g2(stored * h, type, 0.1f, 1), b2(stored * h, type, 0.1f);
  const Buffer p = packed(wp, 1, h, e, t);
  const auto pack = [&](Values& w, int64_t n, int64_t k, const std::vector<int64_t>& kept) {
    return quantised ? packed_mixed(w, stored, kept, n, k, t) : packed(w, stored, n, k, t);
  };
  const Buffer q = pack(wq, 3 * h, h, {}), o = pack(wo, h, h, {0});
  const Buffer u = pack(wu, inner, h, {stored - 1}), dn = pack(wd, h, inner, {0});
  ft::cpu::Encoder op{};
  op.tokens = tokens;
  op.hidden = h;
  op.embedding = e;
  op.activation = activation;
  op.intermediate = inner;
  op.layers = layers;
  op.batch = static_cast<int64_t>(lengths.size());
  op.longest = longest;
  op.heads = heads;
  op.cu_seqlens = cu.data();
  op.embeddings = {ids.data(),     types.data(), pos.data(),   word.operand(), position.operand(),
                   kind.operand(), eg.operand(), eb.operand(), 1e-12f};
  if (e != h) {
    op.projection = p.get();
    op.projection_bias = bp.operand();
  }
  const Values bias(heads * columns, type, 1);
  if (columns) op.relative_bias = {bias.operand(), columns};
  op.qkv = q.get();
  op.out = o.get();
  op.up = u.get();
  op.down = dn.get();
  op.qkv_bias = {bq.operand(), stored};
  op.out_bias = {bo.operand(), stored};
  op.up_bias = {bu.operand(), stored};
  op.down_bias = {bd.operand(), stored};
  op.ln1_gamma = {g1.operand(), stored};
  op.ln1_beta = {b1.operand(), stored};
  op.ln2_gamma = {g2.operand(), stored};
  op.ln2_beta = {b2.operand(), stored};
  op.eps = 1e-12f;
  op.out_dtype = type;
  const Buffer out(tokens * h * ft::size_of(type));
  const Buffer space(ft::cpu::encoder_workspace(op, t));
  ft::cpu::encoder(op, out.get(), space.get(), t);

  std::vector<double> x(tokens * e);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < e; ++j) {
      x[i * e + j] = static_cast<double>(word.f[ids[i] * e + j]) + position.f[pos[i] * e + j] +
                     kind.f[types[i] * e + j];
    }
  }
  x = norm(x, e, eg.f.data(), eb.f.data(), 1e-12);
  if (e != h) x = multiply(x, wp.f.data(), bp.f.data(), h, e);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t l = layer % stored;
    const auto qkv = multiply(x, &wq.f[l * 3 * h * h], &bq.f[l * 3 * h], 3 * h, h);
    auto y = multiply(attend(qkv, cu, heads, d, bias.f), &wo.f[l * h * h], &bo.f[l * h], h, h);
    for (size_t i = 0; i < y.size(); ++i) y[i] += x[i];
    x = norm(y, h, &g1.f[l * h], &b1.f[l * h], 1e-12);
    auto z = multiply(x, &wu.f[l * inner * h], &bu.f[l * inner], inner, h);
    for (double& e : z) e = activated(e, activation);
    y = multiply(z, &wd.f[l * h * inner], &bd.f[l * h], h, inner);
    for (size_t i = 0; i < y.size(); ++i) y[i] += x[i];
    x = norm(y, h, &g2.f[l * h], &b2.f[l * h], 1e-12);
  }
  check((quantised ? "int8 encoder " : "encoder ") + std::string(name_of(type)) + " head size " +
            std::to_string(d),
        out, type, x, quantised ? 0.1 : 2 * tolerance_of(type));
}

void test_rows(DType type) {
  const auto t = threads_of(2);
  for (int64_t n : {1, 7, 33, 100}) {
    const int64_t m = 21;
    const Values x(m * n, type, 3), b(n, type, 1), r(m * n, type, 1), g(n, type, 0.1f, 1);
    const Buffer out(m * n * ft::size_of(type)), s1(ft::cpu::bias_activation_workspace(n, t));
    std::vector<double> want(m * n);
    for (Activation activation : kActivations) {
      ft::cpu::bias_activation(x.operand(), b.operand(), activation, m, n, out.get(), s1.get(), t);
      for (int64_t i = 0; i < m * n; ++i) {
        want[i] = activated(static_cast<double>(x.f[i]) + b.f[i % n], activation);
      }
      check("bias_activation", out, type, want, tolerance_of(type));
    }
    if (n == 1) continue;  // a row of one has no variance
    const Buffer s2(ft::cpu::layer_norm_workspace(n, t));
    ft::cpu::residual_layer_norm(x.operand(), b.operand(), r.operand(), g.operand(), b.operand(),
                                 1e-5f, m, n, type, out.get(), s2.get(), t);
    for (int64_t i = 0; i < m * n; ++i) {
      want[i] = static_cast<double>(x.f[i]) + b.f[i % n] + r.f[i];
    }
    check("residual_layer_norm", out, type, norm(want, n, g.f.data(), b.f.data(), 1e-5),
          tolerance_of(type));
  }
}

void test_pool(DType type, std::vector<int32_t> lengths, int64_t hidden, int threads) {
  std::vector<int32_t> cu{0};
  for (int32_t l : lengths) cu.push_back(cu.back() + l);
  const int64_t batch = static_cast<int64_t>(lengths.size());
  const Values x(cu.back() * hidden, type, 1);
  for (const auto pooling : {ft::Pooling::kMean, ft::Pooling::kMax}) {
    const Buffer out(batch * hidden * 4);
    ft::cpu::segment_pool(x.operand(), cu.data(), batch, hidden, pooling,
                          static_cast<float*>(out.get()), threads_of(threads));
    std::vector<double> want(batch * hidden);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < hidden && lengths[b] > 0; ++j) {
        double sum = 0, most = -INFINITY;
        for (int64_t r = cu[b]; r < cu[b + 1]; ++r) {
          sum += x.f[r * hidden + j];
          most = std::max<double>(most, x.f[r * hidden + j]);
        }
        want[b * hidden + j] = pooling == ft::Pooling::kMax ? most : sum / lengths[b];
      }
    }
    check("pool " + std::string(name_of(type)), out, DType::kFloat32, want, 1e-6);
  }
}

}  // namespace

int main() {
  const DType types[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (DType type : types) {
    for (DType weights : types) {
      test_linear(type, weights, 1, 1, 1, 1);
      test_linear(type, weights, 7, 50, 66, 2);
      test_linear(type, weights, 33, 97, 448, 3);
    }
    test_linear(type, type, 300, 130, 400, 2);
    test_int8(type, Weights::kRandom, 1, 1, 1, 1);
    test_int8(type, Weights::kRandom, 7, 50, 66, 2);
    test_int8(type, Weights::kRandom, 33, 97, 448, 3);
    test_int8(type, Weights::kRandom, 300, 130, 1029, 2);
    for (auto weights : {Weights::kMost, Weights::kLeast, Weights::kMixed, Weights::kTurns}) {
      test_int8(type, weights, 23, 49, 519, 2);
    }
    test_encoder(type, {1, 7, 61, 17}, 3, 32, 130, 3, 2, 0, false, Activation::kGelu, 0, true);
    for (int64_t d : {2, 6, 32, 48, 64, 80, 128}) {
      for (int64_t columns : {0, 21}) test_attention(type, {1, 7, 0, 40, 113}, 2, d, 2, columns);
    }
    for (int64_t columns : {0, 1, 255, 1201}) test_attention(type, {511, 3}, 1, 32, 2, columns);
    test_attention(type, {0, 0}, 3, 32, 1, 5);
    for (int64_t d : {6, 32, 80}) {
      for (int64_t columns : {0, 9}) test_attention_not_finite(type, d, columns);
    }
    for (Activation activation : kActivations) test_bound(type, activation);
    test_encoder(type, {1, 7, 61, 17}, 3, 32, 130, 2, 2);
    test_encoder(type, {5, 40}, 11, 6, 70, 1, 1);
    test_encoder(type, {5}, 2, 64, 200, 1, 3);
    test_encoder(type, {9, 1}, 3, 32, 130, 3, 2, 40, true);
    test_encoder(type, {9, 1}, 2, 6, 20, 2, 2, 70);
    test_encoder(type, {3}, 2, 32, 20, 0, 2, 40);
    test_encoder(type, {9, 40}, 3, 32, 130, 2, 2, 0, false, Activation::kGeluTanh);
    test_encoder(type, {9, 1}, 2, 6, 20, 2, 2, 70, true, Activation::kRelu, 7);
    test_encoder(type, {1, 113}, 2, 64, 50, 2, 3, 0, false, Activation::kSilu, 65);
    test_rows(type);
    for (int64_t n : {1, 7, 64, 100, 300}) test_pool(type, {1, 0, 7, 113, 0}, n, 2);
  }
  for (int64_t columns : {0, 301}) test_attention(DType::kBFloat16, {1100}, 1, 2, 2, columns);
  std::printf("ok %s\n", ft::cpu::isa_name());
  return 0;
}
