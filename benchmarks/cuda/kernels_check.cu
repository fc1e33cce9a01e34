// Runs every kernel at small awkward sizes against plain loops on the CPU; made for
// compute-sanitizer.
//
//   nvcc -std=c++20 -O2 -DFT_WITH_SM90 -Icsrc ... -o kernels_check   (objects as for
//   kernels_api.cu) compute-sanitizer --tool memcheck ./kernels_check [attention|bias|rows|pools|
//   embedding|padding|fp8 ...]

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "fp8_gemm.h"
#include "kernels/cuda/gemm_sm90_variants.h"
#include "kernels/cuda/kernels.h"

using namespace ft::cuda;
using ft::Activation;
using ft::DType;

namespace {

int failures = 0;

void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(status));
  ++failures;
}

template <typename T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    must(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit Device(const std::vector<T>& from) : Device(from.size()) {
    must(cudaMemcpy(data_, from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy in");
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() const { return data_; }
  // NaN in every type of ours, so that what a kernel leaves out shows.
  void spoil() const { must(cudaMemset(data_, 0xff, count_ * sizeof(T)), "cudaMemset"); }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    must(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy out");
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

float as_float(float x) { return x; }
float as_float(__half x) { return __half2float(x); }
float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
float as_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
template <typename T>
constexpr DType kType = std::is_same_v<T, float>    ? DType::kFloat32
                        : std::is_same_v<T, __half> ? DType::kFloat16
                                                    : DType::kBFloat16;
template <typename T>
constexpr double kBound = std::is_same_v<T, float>           ? 1e-5
                          : std::is_same_v<T, __half>        ? 2e-3
                          : std::is_same_v<T, __nv_bfloat16> ? 1.5e-2
                                                             : 6e-2;

std::mt19937 generator(7);

template <typename T>
std::vector<T> normal(size_t count) {
  std::normal_distribution<float> draw;
  std::vector<T> out(count);
  for (T& x : out) x = static_cast<T>(draw(generator));
  return out;
}

template <typename T>
void compare(const char* what, const std::vector<T>& ours, const std::vector<double>& exact) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = as_float(ours[i]) - exact[i];
    error += difference * difference;
    size += exact[i] * exact[i];
  }
  const double relative = std::sqrt(error / size);
  if (!(relative <= kBound<T>)) {
    std::printf("FAIL %s: relative error %.2e\n", what, relative);
    ++failures;
  }
}

template <typename T>
void check_attention(const std::vector<int>& lengths, int pad, int empty, int heads, int dim,
                     int stretch, int reach = -1) {
  std::vector<int32_t> cu{0};
  for (int n : lengths) cu.push_back(cu.back() + n);
  const int tokens = cu.back(), rows = tokens + pad, width = heads * dim;
  cu.insert(cu.end(), empty, tokens);
  std::vector<T> qkv = normal<T>(static_cast<size_t>(rows) * 3 * width);
  std::fill(qkv.begin() + static_cast<size_t>(tokens) * 3 * width, qkv.end(), static_cast<T>(NAN));
  const std::vector<T> bias =
      normal<T>(static_cast<size_t>(heads) * (2 * reach + 1) * (reach >= 0));
  std::vector<double> exact(static_cast<size_t>(tokens) * width);
  for (size_t b = 0; b < lengths.size(); ++b) {
    for (int h = 0; h < heads; ++h) {
      auto at = [&](int row, int which, int d) {
        return static_cast<double>(as_float(
            qkv[static_cast<size_t>(cu[b] + row) * 3 * width + which * width + h * dim + d]));
      };
      for (int i = 0; i < lengths[b]; ++i) {
        std::vector<double> p(lengths[b]);
        double sum = 0;
        for (int j = 0; j < lengths[b]; ++j) {
          for (int d = 0; d < dim; ++d) p[j] += at(i, 0, d) * at(j, 1, d);
          const double added =
              reach < 0
                  ? 0.0
                  : as_float(bias[h * (2 * reach + 1) + std::clamp(j - i, -reach, reach) + reach]);
          sum += p[j] = std::exp(p[j] / std::sqrt(dim) + added);
        }
        for (int d = 0; d < dim; ++d) {
          double y = 0;
          for (int j = 0; j < lengths[b]; ++j) y += p[j] * at(j, 2, d);
          exact[static_cast<size_t>(cu[b] + i) * width + h * dim + d] = y / sum;
        }
      }
    }
  }
  const int longest = *std::max_element(lengths.begin(), lengths.end()) + stretch;
  const AttentionShape shape{
      static_cast<int>(cu.size()) - 1, rows, longest, heads, dim, kType<T>, false, reach};
  Device<T> input(qkv), added(bias), output(static_cast<size_t>(rows) * width);
  Device<int32_t> offsets(cu);
  Device<char> plan(attention_plan_bytes(shape));
  // Padding rows stay as they are: give them something to be, for initcheck.
  must(cudaMemset(output.get(), 0, static_cast<size_t>(rows) * width * sizeof(T)), "cudaMemset");
  must(attention_plan(shape, offsets.get(), plan.get(), {}), "attention_plan");
  must(varlen_attention(shape, input.get(), reach < 0 ? nullptr : added.get(), plan.get(),
                        output.get(), {nullptr, true}),
       "varlen_attention");
  char what[96];
  std::snprintf(what, sizeof what, "attention type %d dim %d longest %d reach %d",
                static_cast<int>(kType<T>), dim, longest, reach);
  std::vector<T> ours = output.host();
  ours.resize(exact.size());
  compare(what, ours, exact);
}

template <typename T>
void check_rows(int rows, int hidden) {
  const auto size = static_cast<size_t>(rows) * hidden;
  const auto x = normal<T>(size), r = normal<T>(size), b = normal<T>(hidden), g = normal<T>(hidden),
             s = normal<T>(hidden);
  std::vector<double> norm(size), gelu(size);
  for (int i = 0; i < rows; ++i) {
    double mean = 0, square = 0;
    auto sum = [&](int c) {
      return static_cast<double>(as_float(x[static_cast<size_t>(i) * hidden + c])) +
             as_float(r[static_cast<size_t>(i) * hidden + c]) + as_float(b[c]);
    };
    for (int c = 0; c < hidden; ++c) mean += sum(c) / hidden;
    for (int c = 0; c < hidden; ++c) square += (sum(c) - mean) * (sum(c) - mean) / hidden;
    for (int c = 0; c < hidden; ++c) {
      const size_t at = static_cast<size_t>(i) * hidden + c;
      norm[at] = (sum(c) - mean) / std::sqrt(square + 1e-12) * as_float(g[c]) + as_float(s[c]);
      const double y = static_cast<double>(as_float(x[at])) + as_float(b[c]);
      gelu[at] = y * 0.5 * (1 + std::erf(y / std::sqrt(2.0)));
    }
  }
  Device<T> dx(x), dr(r), db(b), dg(g), ds(s), out(size);
  must(residual_layer_norm(dx.get(), db.get(), dr.get(), dg.get(), ds.get(), 1e-12f, rows, hidden,
                           kType<T>, out.get(), nullptr, {nullptr, true}),
       "residual_layer_norm");
  compare("layer norm", out.host(), norm);
  must(bias_activation(dx.get(), db.get(), nullptr, Activation::kGelu, rows, hidden, kType<T>,
                       out.get(), nullptr, {}),
       "bias_activation");
  compare("gelu", out.host(), gelu);
  for (const auto& [activation, f] : {
           std::pair<Activation, double (*)(double)>{Activation::kGeluTanh,
                                                     [](double y) {
                                                       const double u =
                                                           std::sqrt(2 / 3.14159265358979324) *
                                                           (y + 0.044715 * y * y * y);
                                                       return y / 2 * (1 + std::tanh(u));
                                                     }},
           {Activation::kRelu, [](double y) { return std::max(y, 0.0); }},
           {Activation::kSilu, [](double y) { return y / (1 + std::exp(-y)); }},
       }) {
    std::vector<double> want(size);
    for (size_t i = 0; i < size; ++i) {
      want[i] = f(static_cast<double>(as_float(x[i])) + as_float(b[i % hidden]));
    }
    must(bias_activation(dx.get(), db.get(), nullptr, activation, rows, hidden, kType<T>, out.get(),
                         nullptr, {}),
         "bias_activation");
    compare("activation", out.host(), want);
  }
  std::vector<float> partials(2 * size);
  for (size_t i = 0; i < size; ++i) partials[i] = as_float(x[i]) - (partials[size + i] = 0.25f);
  Device<float> dp(partials);
  must(residual_layer_norm_partials(dp.get(), 2, db.get(), dr.get(), dg.get(), ds.get(), 1e-12f,
                                    rows, hidden, kType<T>, out.get(), nullptr, {}),
       "residual_layer_norm_partials");
  compare("layer norm of partials", out.host(), norm);
}

template <typename T>
void check_pool(const std::vector<int>& lengths, int pad, int empty, int hidden) {
  std::vector<int32_t> cu{0};
  for (int n : lengths) cu.push_back(cu.back() + n);
  cu.insert(cu.end(), empty, cu.back());
  const int tokens = cu.back(), batch = static_cast<int>(cu.size()) - 1;
  std::vector<T> x = normal<T>(static_cast<size_t>(tokens + pad) * hidden);
  std::fill(x.begin() + static_cast<size_t>(tokens) * hidden, x.end(), static_cast<T>(NAN));
  std::vector<double> mean(static_cast<size_t>(batch) * hidden), most(mean);
  for (int b = 0; b < batch; ++b) {
    for (int c = 0; c < hidden; ++c) {
      double sum = 0, largest = cu[b] == cu[b + 1] ? 0 : -INFINITY;
      for (int row = cu[b]; row < cu[b + 1]; ++row) {
        const double value = as_float(x[static_cast<size_t>(row) * hidden + c]);
        sum += value;
        largest = std::max(largest, value);
      }
      mean[static_cast<size_t>(b) * hidden + c] = sum / std::max(cu[b + 1] - cu[b], 1);
      most[static_cast<size_t>(b) * hidden + c] = largest;
    }
  }
  Device<T> input(x);
  Device<int32_t> offsets(cu);
  Device<float> output(mean.size());
  for (const ft::Pooling how : {ft::Pooling::kMean, ft::Pooling::kMax}) {
    must(segment_pool(input.get(), offsets.get(), batch, tokens + pad, hidden, how, kType<T>,
                      output.get(), {}),
         "segment_pool");
    compare("pool", output.host(), how == ft::Pooling::kMean ? mean : most);
  }
}

template <typename Id>
void check_padding(int batch, int seqlen) {
  std::uniform_int_distribution<int> draw(0, 3);
  std::vector<Id> ids(static_cast<size_t>(batch) * seqlen), types(ids), mask(ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<Id>(i), types[i] = draw(generator) & 1;
    mask[i] = i % seqlen == 0 || draw(generator) > 0;
  }
  constexpr IntType kIds = sizeof(Id) == 8 ? IntType::kInt64 : IntType::kInt32;
  Device<Id> di(ids), dt(types), dm(mask);
  Device<int32_t> cu(batch + 1);
  Device<PaddingSummary> summary(1);
  must(padding_count(dm.get(), kIds, batch, seqlen, cu.get(), summary.get(), {}), "padding_count");
  const PaddingSummary found = summary.host()[0];
  const int total = static_cast<int>(std::count(mask.begin(), mask.end(), Id{1}));
  if (found.total != total || found.empty_row != -1 || found.late_row != -1) {
    std::printf("FAIL padding_count: %d tokens, expected %d\n", found.total, total);
    ++failures;
    return;
  }
  Device<Id> pi(total), pt(total);
  Device<int32_t> columns(total);
  Device<int64_t> indices(total);
  must(padding_gather(di.get(), dt.get(), kIds, dm.get(), kIds, batch, seqlen, cu.get(), pi.get(),
                      pt.get(), columns.get(), indices.get(), {}),
       "padding_gather");
  const auto at = indices.host();
  const auto packed = pi.host();
  for (int i = 0; i < total; ++i) {
    if (!mask[at[i]] || packed[i] != ids[at[i]] || (i > 0 && at[i] <= at[i - 1])) ++failures;
  }
  for (int width : {1, 6, 16}) {
    const auto rows = normal<__half>(static_cast<size_t>(total) * width);
    Device<__half> dr(rows), padded(ids.size() * width);
    must(restore_padding(dr.get(), indices.get(), total, batch, seqlen, width, DType::kFloat16,
                         -3.f, padded.get(), {}),
         "restore_padding");
    std::vector<double> exact(ids.size() * width, -3.0);
    for (int i = 0; i < total * width; ++i) {
      exact[at[i / width] * width + i % width] = as_float(rows[i]);
    }
    compare("restore_padding", padded.host(), exact);
  }
}

template <typename T>
void check_embedding(int hidden) {
  const std::vector<int32_t> cu{0, 3, 4, 40, 40, 40};
  const int tokens = 43, live = 40;
  const auto word = normal<T>(50 * hidden), position = normal<T>(36 * hidden),
             kind = normal<T>(2 * hidden), g = normal<T>(hidden), s = normal<T>(hidden);
  std::vector<int32_t> ids(tokens), types(tokens);
  for (int i = 0; i < tokens; ++i) ids[i] = i * 7 % 50, types[i] = i % 2;
  std::vector<double> exact(static_cast<size_t>(tokens) * hidden);
  for (int i = 0; i < live; ++i) {
    const int p = i - (i < 3 ? 0 : i < 4 ? 3 : 4);
    auto sum = [&](int c) {
      return static_cast<double>(as_float(word[ids[i] * hidden + c])) +
             as_float(position[p * hidden + c]) + as_float(kind[types[i] * hidden + c]);
    };
    double mean = 0, square = 0;
    for (int c = 0; c < hidden; ++c) mean += sum(c) / hidden;
    for (int c = 0; c < hidden; ++c) square += (sum(c) - mean) * (sum(c) - mean) / hidden;
    for (int c = 0; c < hidden; ++c) {
      exact[static_cast<size_t>(i) * hidden + c] =
          (sum(c) - mean) / std::sqrt(square + 1e-12) * as_float(g[c]) + as_float(s[c]);
    }
  }
  Device<int32_t> di(ids), dt(types), dc(cu);
  Device<T> dw(word), dp(position), dk(kind), dg(g), ds(s), out(exact.size());
  must(embedding_layer_norm(di.get(), dt.get(), IntType::kInt32, nullptr, dc.get(), 5, tokens,
                            hidden, dw.get(), 50, dp.get(), 36, dk.get(), 2, dg.get(), ds.get(),
                            1e-12f, kType<T>, out.get(), {}),
       "embedding_layer_norm");
  compare("embedding", out.host(), exact);
}

// Every tile of the product of e4m3 operands, with a residual, with GELU, and into e4m3 again.
void check_fp8(int rows, int n, int k) {
  const auto x = normal<__nv_fp8_e4m3>(static_cast<size_t>(rows) * k),
             w = normal<__nv_fp8_e4m3>(static_cast<size_t>(n) * k);
  const auto residual = normal<__half>(static_cast<size_t>(rows) * n), bias = normal<__half>(n);
  std::vector<float> scale(n);
  for (int c = 0; c < n; ++c) scale[c] = 0.5f / std::sqrt(k) + 1e-3f * (c % 7);
  const auto size = static_cast<size_t>(rows) * n;
  std::vector<double> added(size), gelu(size), narrow(size);
  const float step = 1 / 64.f;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      const size_t at = static_cast<size_t>(r) * n + c;
      double sum = 0;
      for (int i = 0; i < k; ++i)
        sum += as_float(x[static_cast<size_t>(r) * k + i]) *
               as_float(w[static_cast<size_t>(c) * k + i]);
      const double y = sum * scale[c] + as_float(bias[c]);
      added[at] = y + as_float(residual[at]);
      gelu[at] = y * 0.5 * (1 + std::erf(y / std::sqrt(2.0)));
      // Within 16 columns, places 4 q + {0, 1, 2, 3} hold columns 2 q + {0, 1, 8, 9}.
      const int q = c % 8 / 2, place = 4 * q + c % 2 + (c % 16 < 8 ? 0 : 2);
      narrow[at - c % 16 + place] = gelu[at] / step;
    }
  }
  Device<__nv_fp8_e4m3> dx(x), dw(w), bytes(size);
  Device<__half> dr(residual), db(bias), out(size);
  Device<float> ds(scale), dstep(std::vector<float>{step});
  const auto run = [&](const __half* plus, void* to, bool active, bool small, int variant) {
    bytes.spoil();
    out.spoil();
    const Product product{dx.get(), dw.get(), ds.get(), db.get(), plus,
                          nullptr,  nullptr,  to,       nullptr,  small ? dstep.get() : nullptr,
                          rows,     n,        k,        active,   small};
    const int status = fp8_gemm(&product, variant, nullptr);
    if (status == 0) return;
    std::printf("FAIL fp8_gemm %d x %d x %d, tile %d: status %d\n", rows, n, k, variant, status);
    ++failures;
  };
  for (int variant = 0; variant <= sm90::kTrio; ++variant) {
    char what[96];
    std::snprintf(what, sizeof what, "fp8 product %d x %d x %d, tile %d", rows, n, k, variant);
    if (variant != sm90::kTrio) {
      run(dr.get(), out.get(), false, false, variant);
      compare(what, out.host(), added);
      run(nullptr, out.get(), true, false, variant);
      compare(what, out.host(), gelu);
    }
    run(nullptr, bytes.get(), true, true, variant);
    compare(what, bytes.host(), narrow);
  }
}

template <typename T>
void check_all(const auto& asked) {
  for (int dim : {6, 32, 48, 64, 96, 128}) {
    if (asked("attention")) {
      check_attention<T>({1, 17, 40, 3}, 5, 2, 2, dim, 0);
      check_attention<T>({100, 128, 31}, 3, 1, 2, dim, 0);
      check_attention<T>({129, 7, 200}, 0, 0, 1, dim, 300);
      if (dim == 32 || dim == 64 || dim == 128) {  // more tiles than run at once
        check_attention<T>({100, 128, 31}, 3, 1, 80, dim, 0);
        check_attention<T>({129, 7, 200}, 0, 0, 80, dim, 0);
      }
      if (dim == 32 || dim == 64) check_attention<T>({577}, 1, 1, 1, dim, 0);
    }
    if (asked("bias")) {
      check_attention<T>({1, 17, 40, 3}, 5, 2, 2, dim, 0, 20);
      check_attention<T>({100, 128, 31}, 3, 1, 2, dim, 0, 128);
      check_attention<T>({129, 7, 200}, 0, 0, 1, dim, 300, 0);
      if (dim == 32 || dim == 64) check_attention<T>({577}, 1, 1, 1, dim, 0, 128);
    }
  }
  for (int hidden : {8, 30, 384, 768, 1280}) {
    if (asked("rows")) check_rows<T>(5, hidden);
    if (asked("embedding")) check_embedding<T>(hidden);
    if (asked("pools")) check_pool<T>({1, 7, 113, 40}, 3, 2, hidden);
  }
}

}  // namespace

int main(int count, char** words) {
  const auto asked = [&](const char* what) {
    return count == 1 || std::any_of(words + 1, words + count,
                                     [&](const char* word) { return !std::strcmp(word, what); });
  };
  check_all<float>(asked);
  check_all<__half>(asked);
  check_all<__nv_bfloat16>(asked);
  if (asked("padding")) {
    check_padding<int32_t>(5, 70);
    check_padding<int64_t>(1100, 3);
  }
  if (asked("fp8")) {
    check_fp8(1, 256, 256);
    check_fp8(113, 512, 384);
    check_fp8(300, 256, 128);
  }
  must(cudaDeviceSynchronize(), "synchronize");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
