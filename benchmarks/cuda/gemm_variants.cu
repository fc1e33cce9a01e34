// The linear layers without torch: every plan checked against a plain fp32 loop, then timed.
//
//   ./gemm_variants check [few [PART]]  every plan, both half types, awkward sizes (few: for a
//                                       sanitizer; PART: plans with that in their names)
//   ./gemm_variants time ROWS...    microseconds a layer of every plan at BERT-base's four layers
//   ./gemm_variants large ROWS...   the same at BERT-large's
//   ./gemm_variants once ROWS       each of our plans once, for a profiler
//   ./gemm_variants measure HIDDEN ROWS...  JSON of every plan's time and what its estimate is made
//                                   of, at an encoder's four layers: for scripts/gemm_costs.py
//   ./gemm_variants measure_fp8 HIDDEN ROWS...  the same of operands in e4m3
//
// Built by benchmarks/cuda/build_gemm_variants.sh. Times are medians of graph replays of twelve
// layers with weights of their own, with programmatic dependent launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_costs.h"
#include "kernels/cuda/gemm_sm90.h"
#include "kernels/cuda/runtime.h"

using namespace ft::cuda;
using ft::Activation;
using ft::DType;

namespace {

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s %s\n", what, cudaGetErrorString(status), take_failure().c_str());
  std::exit(1);
}

__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ float noise(uint32_t seed, uint32_t i) {
  uint32_t h = seed * 0x9E3779B9u ^ i * 0x85EBCA6Bu;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return static_cast<float>(h) * (3.4641f / 4294967296.f) - 1.7320f;  // variance 1
}

template <typename T>
__global__ void fill(T* to, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    to[i] = T(noise(seed, static_cast<uint32_t>(i)) * scale);
}

// One thread an element, fp32; then one block a row for the norm.
template <typename T>
__global__ void plain_linear(const T* x, const T* w, const T* bias, const T* residual, float* out,
                             int rows, int n, int k, bool gelu) {
  const size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  if (i >= size_t(rows) * n) return;
  const size_t row = i / n, column = i % n;
  float sum = 0.f;
  for (int j = 0; j < k; ++j) sum += to_float(x[row * k + j]) * to_float(w[column * k + j]);
  sum += to_float(bias[column]);
  if (residual != nullptr) sum += to_float(residual[i]);
  out[i] = gelu ? 0.5f * sum * (1.f + erff(sum * 0.70710678f)) : sum;
}

template <typename T>
__global__ void plain_norm(float* x, const T* gamma, const T* beta, int n, float eps) {
  float* row = x + size_t{blockIdx.x} * n;
  float mean = 0.f, squares = 0.f;
  for (int i = 0; i < n; ++i) mean += row[i];
  mean /= n;
  for (int i = 0; i < n; ++i) squares += (row[i] - mean) * (row[i] - mean);
  const float scale = rsqrtf(squares / n + eps);
  for (int i = 0; i < n; ++i)
    row[i] = (row[i] - mean) * scale * to_float(gamma[i]) + to_float(beta[i]);
}

template <typename T>
__global__ void compare(const T* out, const float* want, size_t count, double* sums) {
  double difference = 0, square = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const double d = to_float(out[i]) - want[i];
    difference += d * d;
    square += double(want[i]) * want[i];
  }
  atomicAdd(sums, difference);
  atomicAdd(sums + 1, square);
}

// Of products of type X. In e4m3 a weight of 448 is worth about 1.73 standard deviations, and what
// comes out is written in e4m3 too, where an encoder's next product reads that: after GELU instead
// of T, after a layer norm besides.
template <typename T, typename X = T>
struct Layer {
  static constexpr bool kNarrow = std::is_same_v<X, __nv_fp8_e4m3>;
  X *x, *w;
  T *bias, *residual, *gamma, *beta, *out, *scratch;
  X* copy;             // [rows, n]
  float *scale, *one;  // [n] and [1]
  int rows, n, k, copies;

  Layer(int rows_, int n_, int k_, int copies_) : rows(rows_), n(n_), k(k_), copies(copies_) {
    const auto make = []<typename P>(P** p, size_t count, uint32_t seed, float scale) {
      require(cudaMalloc(p, count * sizeof(P)), "cudaMalloc");
      fill<<<256, 256>>>(*p, count, seed, scale);
    };
    const float weights = 1.f / std::sqrt(float(k)), most = kNarrow ? 258.f : weights;
    make(&x, size_t(rows) * k, 1, 1.f);
    make(&w, size_t(n) * k * copies, 2, most);
    make(&bias, n, 3, 1.f);
    make(&residual, size_t(rows) * n, 4, 1.f);
    make(&gamma, n, 5, 1.f);
    make(&beta, n, 6, 1.f);
    make(&out, size_t(rows) * n, 7, 1.f);
    make(&scratch, size_t(rows) * n, 8, 1.f);
    make(&copy, kNarrow ? size_t(rows) * n : 1, 9, 1.f);
    const std::vector<float> worth(n, weights / most), ones(1, 1.f);
    for (const auto& [to, from] : {std::pair{&scale, &worth}, std::pair{&one, &ones}}) {
      require(cudaMalloc(to, from->size() * 4), "cudaMalloc");
      require(cudaMemcpy(*to, from->data(), from->size() * 4, cudaMemcpyHostToDevice),
              "cudaMemcpy");
    }
  }
  ~Layer() {
    for (void* p : std::initializer_list<void*>{x, w, bias, residual, gamma, beta, out, scratch,
                                                copy, scale, one})
      cudaFree(p);
  }
  Gemm gemm(bool gelu, bool added, int copy = 0) const {
    constexpr DType kType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    constexpr DType kOperands = kNarrow ? DType::kE4M3 : kType;
    return {{x, kOperands},
            {w + size_t(copy) * n * k, kOperands, kNarrow ? scale : nullptr},
            bias,
            added ? residual : nullptr,
            out,
            rows,
            n,
            k,
            gelu ? Activation::kGelu : Activation::kNone,
            kType,
            false,
            kNarrow && gelu ? one : nullptr};
  }
  GemmNorm norm() const {
    return {gamma, beta, 1e-12f, nullptr, kNarrow ? NarrowRows{copy, one} : NarrowRows{}};
  }
};

void* workspace;
cudaStream_t stream;

cudaError_t run(const Gemm& gemm, const GemmNorm* norm, void* scratch, bool pdl) {
  const Launch launch{stream, pdl};
  return norm ? linear_layer_norm(gemm, *norm, scratch, workspace, launch)
              : linear(gemm, workspace, launch);
}

GemmKey key_of(const Gemm& g, bool norm) {
  return {gemm_row_class(g.rows), g.n, g.k, g.weight.dtype, g.activation,
          g.residual != nullptr,  norm};
}

std::string label_of(const std::string& plan, size_t index) {
  return plan.rfind("sm90:", 0) == 0 ? plan.substr(5) : "lt" + std::to_string(index);
}

template <typename T>
int check(bool few, const std::string& part) {
  const double budget = std::is_same_v<T, __half> ? 1e-3 : 8e-3;
  std::map<std::string, double> worst;
  int wrong = 0;
  double* sums;
  require(cudaMalloc(&sums, 16), "cudaMalloc");
  const std::vector<std::pair<int, int>> sizes =
      few ? std::vector<std::pair<int, int>>{{768, 320}, {1024, 128}}
          : std::vector<std::pair<int, int>>{{2304, 768}, {768, 768},   {768, 832},
                                             {768, 3072}, {1024, 1024}, {200, 72}};
  const std::vector<int> row_counts =
      few ? std::vector<int>{129, 3000}
          : std::vector<int>{1, 7, 63, 113, 129, 511, 515, 1344, 9001};
  for (const auto [n, k] : sizes)
    for (const int rows : row_counts) {
      Layer<T> layer(rows, n, k, 1);
      float* want;
      const size_t count = size_t(rows) * n;
      require(cudaMalloc(&want, count * 4), "cudaMalloc");
      for (const char* kind : {"bias", "gelu", "residual", "norm"}) {
        const bool gelu = !std::strcmp(kind, "gelu"), normed = !std::strcmp(kind, "norm");
        const bool added = normed || !std::strcmp(kind, "residual");
        const Gemm gemm = layer.gemm(gelu, added);
        const GemmNorm norm = layer.norm();
        plain_linear<T><<<unsigned((count + 255) / 256), 256>>>(
            layer.x, layer.w, layer.bias, added ? layer.residual : nullptr, want, rows, n, k, gelu);
        if (normed) plain_norm<T><<<rows, 1>>>(want, layer.gamma, layer.beta, n, 1e-12f);
        std::vector<std::string> plans;
        require(gemm_candidates(gemm, normed ? &norm : nullptr, &plans), "gemm_candidates");
        for (size_t i = 0; i < plans.size(); ++i) {
          if (plans[i].rfind("sm90", 0) != 0 && (few || i + 1 != plans.size())) continue;
          if (plans[i].find(part) == std::string::npos) continue;
          const std::string label = label_of(plans[i], 0) + " " + kind;
          alarm(10);
          require(load_gemm_plan(key_of(gemm, normed), plans[i]), "load_gemm_plan");
          require(cudaMemset(layer.out, 0xFF, count * sizeof(T)), "cudaMemset");
          require(cudaMemset(sums, 0, 16), "cudaMemset");
          require(cudaDeviceSynchronize(), "before");
          std::printf("\r%-60s", (label + " rows " + std::to_string(rows)).c_str());
          std::fflush(stdout);
          require(run(gemm, normed ? &norm : nullptr, layer.scratch, false), label.c_str());
          require(cudaStreamSynchronize(stream), label.c_str());
          compare<T><<<64, 256>>>(layer.out, want, count, sums);
          double host[2];
          require(cudaMemcpy(host, sums, 16, cudaMemcpyDeviceToHost), "compare");
          alarm(0);
          const double error = std::sqrt(host[0] / host[1]);
          if (!(error <= budget)) {
            std::printf("\nWRONG %s rows %d n %d k %d: %.3g\n", label.c_str(), rows, n, k, error);
            ++wrong;
          }
          if (!(error <= worst[label])) worst[label] = error;
        }
      }
      cudaFree(want);
    }
  std::printf("\n");
  for (const auto& [label, error] : worst) std::printf("%s %.2e; ", label.c_str(), error);
  std::printf("\n%d wrong\n", wrong);
  return wrong;
}

cudaGraphExec_t graph_of(const std::vector<Gemm>& gemms, const GemmNorm* norm, void* scratch,
                         bool pdl) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(run(gemms[0], norm, scratch, pdl), "first run");  // attributes are set outside a capture
  require(cudaStreamSynchronize(stream), "first run");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (const Gemm& gemm : gemms) require(run(gemm, norm, scratch, pdl), "run");
  require(cudaStreamEndCapture(stream, &graph), "end of capture");
  require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaGraphDestroy(graph);
  return exec;
}

float time_graph(const std::vector<Gemm>& gemms, const GemmNorm* norm, void* scratch, bool pdl) {
  const cudaGraphExec_t exec = graph_of(gemms, norm, scratch, pdl);
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<float> times;
  alarm(20);
  for (int i = 0; i < 9; ++i) {
    cudaEventRecord(start, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(stop, stream);
    require(cudaEventSynchronize(stop), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (i > 1) times.push_back(ms);
  }
  alarm(0);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaGraphExecDestroy(exec);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3f / static_cast<float>(gemms.size());
}

struct Kind {
  const char* name;
  int n, k;
  bool gelu, norm;
};

std::vector<Kind> kinds_of(int hidden) {
  const int wide = 4 * hidden;
  return {{"qkv", 3 * hidden, hidden, false, false},
          {"out", hidden, hidden, false, true},
          {"up", wide, hidden, true, false},
          {"down", hidden, wide, false, true}};
}

void time_rows(int rows, int hidden) {
  for (const Kind& kind : kinds_of(hidden)) {
    constexpr int kCopies = 12;
    const Layer<__half> layer(rows, kind.n, kind.k, kCopies);
    const GemmNorm norm = layer.norm();
    const auto timed = [&](bool gelu, bool normed, const std::string& plan, bool pdl) {
      std::vector<Gemm> gemms;
      for (int copy = 0; copy < kCopies; ++copy) gemms.push_back(layer.gemm(gelu, normed, copy));
      require(load_gemm_plan(key_of(gemms[0], normed), plan), "load_gemm_plan");
      return time_graph(gemms, normed ? &norm : nullptr, layer.scratch, pdl);
    };
    std::vector<std::string> plans, plain;
    const Gemm bare = layer.gemm(false, false);
    require(gemm_candidates(bare, nullptr, &plain), "gemm_candidates");
    const auto first = std::find_if(plain.begin(), plain.end(),
                                    [](const std::string& p) { return p.rfind("sm90", 0) != 0; });
    std::printf("%d %s: alone %.1f |", rows, kind.name, timed(false, false, *first, false));
    const Gemm gemm = layer.gemm(kind.gelu, kind.norm);
    require(gemm_candidates(gemm, kind.norm ? &norm : nullptr, &plans), "gemm_candidates");
    float best_library = 1e9f;
    std::string best_label;
    for (size_t i = 0; i < plans.size(); ++i) {
      const bool ours = plans[i].rfind("sm90", 0) == 0;
      const float us = timed(kind.gelu, kind.norm, plans[i], true);
      if (!ours) {
        if (us < best_library) {
          best_library = us;
          best_label = label_of(plans[i], i);
        }
        continue;
      }
      std::printf(" %s %.1f,", label_of(plans[i], i).c_str(), us);
    }
    std::printf(" | %s %.1f | %.1f at 790 TFLOP/s\n", best_label.c_str(), best_library,
                2.0 * rows * kind.n * kind.k / 790e6);
    std::fflush(stdout);
  }
}

std::string numbers(const float* values, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, "%s%.5g", i == 0 ? "[" : ", ", values[i]);
    text += number;
  }
  return text + "]";
}

template <typename Cost>
std::string numbers(const Cost& cost) {
  static_assert(sizeof(Cost) % sizeof(float) == 0);
  return numbers(reinterpret_cast<const float*>(&cost), sizeof(Cost) / sizeof(float));
}

// A line of JSON a layer: medians over replays of every plan in turn, so that a drift of clocks
// hits all of them. X: of the operands.
template <typename X>
void measure_rows(int rows, int hidden) {
  for (const Kind& kind : kinds_of(hidden)) {
    const int copies = rows <= 2048 ? 12 : 6, rounds = rows <= 8192 ? 9 : 5;
    const Layer<__half, X> layer(rows, kind.n, kind.k, copies);
    const GemmNorm norm = layer.norm();
    const GemmNorm* const normed = kind.norm ? &norm : nullptr;
    std::vector<Gemm> gemms;
    for (int copy = 0; copy < copies; ++copy)
      gemms.push_back(layer.gemm(kind.gelu, kind.norm, copy));
    std::vector<std::string> plans;
    require(gemm_candidates(gemms[0], normed, &plans), "gemm_candidates");
    // cuBLASLt has no epilogues that products in e4m3 need.
    if (!layer.kNarrow) plans.push_back("cublaslt");
    struct Timed {
      cudaGraphExec_t exec;
      cudaEvent_t start, stop;
      std::vector<float> us;
    };
    std::vector<Timed> all;
    for (const std::string& plan : plans) {
      require(load_gemm_plan(key_of(gemms[0], kind.norm), plan), "load_gemm_plan");
      Timed& made = all.emplace_back();
      made.exec = graph_of(gemms, normed, layer.scratch, true);
      cudaEventCreate(&made.start);
      cudaEventCreate(&made.stop);
    }
    for (int round = -1; round < rounds; ++round) {
      for (Timed& timed : all) {
        cudaEventRecord(timed.start, stream);
        cudaGraphLaunch(timed.exec, stream);
        cudaEventRecord(timed.stop, stream);
      }
      require(cudaStreamSynchronize(stream), "replay");
      for (Timed& timed : all) {
        float ms = 0;
        cudaEventElapsedTime(&ms, timed.start, timed.stop);
        if (round >= 0) timed.us.push_back(ms * 1e3f / static_cast<float>(copies));
      }
    }
    std::printf(R"({"fp8": %s, "rows": %d, "n": %d, "k": %d, "gelu": %s, "norm": %s, "ours": [)",
                layer.kNarrow ? "true" : "false", rows, kind.n, kind.k,
                kind.gelu ? "true" : "false", kind.norm ? "true" : "false");
    std::vector<float> medians;
    float best_library = 1e9f;
    for (size_t i = 0; i < plans.size(); ++i) {
      std::sort(all[i].us.begin(), all[i].us.end());
      medians.push_back(all[i].us[all[i].us.size() / 2]);
      cudaGraphExecDestroy(all[i].exec);
      cudaEventDestroy(all[i].start);
      cudaEventDestroy(all[i].stop);
      if (plans[i].rfind("sm90:", 0) != 0) {
        best_library = std::min(best_library, medians[i]);
        continue;
      }
      const std::string name = plans[i].substr(5);
      const Sm90Amounts many = gemm_sm90_amounts(gemm_sm90_named(name), gemms[0], normed);
      std::printf(R"(%s["%s", %.2f, "%s", %s, %s])", i == 0 ? "" : ", ", name.c_str(), medians[i],
                  kCostedTiles[many.tile].data(), numbers(many.product).c_str(),
                  numbers(many.after).c_str());
    }
    std::printf("]");
    if (!layer.kNarrow) {
      const LibraryAmounts many = gemm_library_amounts(gemms[0], normed);
      std::printf(R"(, "library": [%.2f, "%s", %s], "best_library": %.2f)", medians.back(),
                  kLibraryKinds[many.kind].data(), numbers(many.product).c_str(), best_library);
    }
    std::printf("}\n");
    std::fflush(stdout);
  }
}

void once(int rows) {
  for (const auto [n, k] : {std::pair{2304, 768}, std::pair{768, 3072}}) {
    const Layer<__half> layer(rows, n, k, 1);
    const GemmNorm norm = layer.norm();
    const bool normed = n == 768;
    const Gemm gemm = layer.gemm(!normed, normed);
    for (const Sm90Plan plan : gemm_sm90_plans(gemm, normed ? &norm : nullptr)) {
      require(gemm_sm90(plan, gemm, normed ? &norm : nullptr, layer.scratch, workspace,
                        {stream, false}),
              "gemm_sm90");
      require(cudaDeviceSynchronize(), gemm_sm90_name(plan).c_str());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  require(cudaMalloc(&workspace, gemm_workspace_bytes()), "cudaMalloc");
  const std::string what = argc > 1 ? argv[1] : "check";
  if (what == "check") {
    const bool few = argc > 2;
    const std::string part = argc > 3 ? argv[3] : "";
    return check<__half>(few, part) + check<__nv_bfloat16>(few, part) == 0 ? 0 : 1;
  }
  const bool measure = what == "measure", measure_fp8 = what == "measure_fp8";
  for (int i = measure || measure_fp8 ? 3 : 2; i < argc; ++i) {
    if (measure)
      measure_rows<__half>(std::atoi(argv[i]), std::atoi(argv[2]));
    else if (measure_fp8)
      measure_rows<__nv_fp8_e4m3>(std::atoi(argv[i]), std::atoi(argv[2]));
    else if (what == "once")
      once(std::atoi(argv[i]));
    else
      time_rows(std::atoi(argv[i]), what == "large" ? 1024 : 768);
  }
  return 0;
}
