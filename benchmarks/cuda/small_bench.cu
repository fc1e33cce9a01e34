// The few-token encoder without torch: checked against a plain double-precision loop, and timed.
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I csrc
//     benchmarks/cuda/small_bench.cu csrc/kernels/cuda/small_*_sm90.cu
//     csrc/kernels/cuda/small_plan.cpp csrc/kernels/cuda/runtime.cpp -o small_check
//   ./small_check  checks tiles and splits on small shapes (also under compute-sanitizer)
//   ./small_check profile TOKENS  two layers of a BERT-base, for a profiler
//   ./small_check latency  what a link of a chain costs: plain, programmatic, and a grid barrier
//
// Built as a shared library it also serves small_bench.py, which times whole models.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "kernels/cuda/small_encoder.h"

using ft::DType;
using ft::cuda::SmallPlan;
using ft::cuda::SmallShape;
using ft::cuda::SmallWeights;

namespace {

SmallShape to_shape(const int* v) {
  return {static_cast<DType>(v[0]), v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
}
SmallPlan to_plan(const int* v) {
  return {{v[0], v[1], v[2]},   {v[3], v[4], v[5]}, {v[6], v[7], v[8]},
          {v[9], v[10], v[11]}, v[12] != 0,         v[13] != 0};
}
SmallWeights to_weights(const void* const* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11]};
}

// Median milliseconds of `replays` replays of what `enqueue` puts on a stream; negative: an error.
template <typename Enqueue>
float time_graph(Enqueue enqueue, int replays) {
  cudaStream_t stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  const cudaError_t launched = enqueue(stream);
  cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (launched != cudaSuccess) error = launched;
  if (error == cudaSuccess) error = cudaGraphInstantiate(&exec, graph, 0);
  float median = -static_cast<float>(error);
  if (error == cudaSuccess) {
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    std::vector<float> times;
    for (int i = 0; i < replays + 3; ++i) {
      cudaEventRecord(start, stream);
      cudaGraphLaunch(exec, stream);
      cudaEventRecord(stop, stream);
      error = cudaEventSynchronize(stop);
      if (error != cudaSuccess) break;
      float ms = 0;
      cudaEventElapsedTime(&ms, start, stop);
      if (i >= 3) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    median = error == cudaSuccess ? times[times.size() / 2] : -static_cast<float>(error);
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
  }
  if (exec) cudaGraphExecDestroy(exec);
  if (graph) cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return median;
}

// ---- latency of a link -------------------------------------------------------------------------

__global__ void link_kernel(float* data, bool programmatic) {
  extern __shared__ float unused[];
  if (programmatic) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  // Each block reads what another block wrote, as every layer of an encoder does.
  data[i] = __ldcg(data + (i + blockDim.x) % (gridDim.x * blockDim.x)) + 1.f;
  if (data == nullptr) unused[0] = 0;
}

__global__ void barrier_kernel(float* data, unsigned* counter, int links) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int link = 1; link <= links; ++link) {
    data[i] = __ldcg(data + (i + blockDim.x) % (gridDim.x * blockDim.x)) + 1.f;
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      unsigned seen = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < link * gridDim.x);
    }
    __syncthreads();
  }
}

__global__ void cluster_kernel(float* data, int links) {
  extern __shared__ float values[];
  values[threadIdx.x] = threadIdx.x;
  for (int link = 0; link < links; ++link) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  data[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

cudaError_t launch(void (*kernel)(float*, bool), cudaStream_t stream, bool programmatic,
                   int cluster, int shared, float* data) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  cudaLaunchAttribute a[2];
  int count = 0;
  if (programmatic) {
    a[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    a[count].id = cudaLaunchAttributeClusterDimension;
    a[count].val.clusterDim.x = cluster;
    a[count].val.clusterDim.y = 1;
    a[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(128);
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = a;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, data, programmatic);
}

void latency() {
  float* data;
  unsigned* counter;
  cudaMalloc(&data, 1 << 20);
  cudaMemset(data, 0, 1 << 20);
  cudaMalloc(&counter, 4);
  constexpr int kLinks = 100;
  for (int programmatic = 0; programmatic < 2; ++programmatic) {
    for (int cluster : {1, 4, 8}) {
      for (int kilobytes : {1, 60, 120}) {
        const float ms = time_graph(
            [&](cudaStream_t stream) {
              cudaError_t error = cudaSuccess;
              for (int i = 0; i < kLinks && error == cudaSuccess; ++i) {
                error = launch(link_kernel, stream, programmatic && i > 0, cluster,
                               kilobytes * 1024, data);
              }
              return error;
            },
            30);
        std::printf("link: %s, cluster %d, %d KiB: %.2f us\n",
                    programmatic ? "programmatic" : "plain", cluster, kilobytes,
                    ms * 1000 / kLinks);
      }
    }
  }
  for (int links : {1, 101}) {
    const float ms = time_graph(
        [&](cudaStream_t stream) {
          cudaMemsetAsync(counter, 0, 4, stream);
          void* arguments[] = {&data, &counter, const_cast<int*>(&links)};
          return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(&barrier_kernel), 128, 256,
                                             arguments, 0, stream);
        },
        30);
    std::printf("grid barriers: %d in %.2f us\n", links, ms * 1000);
  }
  for (int links : {1, 101}) {
    const float ms = time_graph(
        [&](cudaStream_t stream) {
          cudaLaunchAttribute a;
          a.id = cudaLaunchAttributeClusterDimension;
          a.val.clusterDim.x = 4;
          a.val.clusterDim.y = 1;
          a.val.clusterDim.z = 1;
          cudaLaunchConfig_t config = {};
          config.gridDim = dim3(128);
          config.blockDim = dim3(256);
          config.dynamicSmemBytes = 1024;
          config.stream = stream;
          config.attrs = &a;
          config.numAttrs = 1;
          return cudaLaunchKernelEx(&config, cluster_kernel, data, links);
        },
        30);
    std::printf("cluster barriers: %d in %.2f us\n", links, ms * 1000);
  }
  cudaFree(data);
  cudaFree(counter);
}

// ---- check -------------------------------------------------------------------------------------

template <typename T>
struct Model {
  SmallShape shape;
  std::vector<std::vector<T>> host;  // the twelve weights
  std::vector<void*> device;
  std::vector<T> input;
  std::vector<int> cu;
  int* device_cu = nullptr;
  void *hidden = nullptr, *workspace = nullptr;

  Model(SmallShape s, std::vector<int> lengths, int seed) : shape(s) {
    shape.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const size_t l = s.layers, h = s.hidden, i = s.intermediate;
    const auto make = [&](size_t count, float scale, float center) {
      std::vector<T> v(count);
      for (T& x : v) x = T(center + scale * normal(random));
      host.push_back(v);
    };
    const float by_h = 1.f / std::sqrt(float(h)), by_i = 1.f / std::sqrt(float(i));
    make(l * 3 * h * h, 1.5f * by_h, 0), make(l * 3 * h, .2f, 0);
    make(l * h * h, by_h, 0), make(l * h, .2f, 0);
    make(l * h, .2f, 1), make(l * h, .2f, 0);
    make(l * i * h, by_h, 0), make(l * i, .2f, 0);
    make(l * h * i, by_i, 0), make(l * h, .2f, 0);
    make(l * h, .2f, 1), make(l * h, .2f, 0);
    for (const auto& v : host) {
      void* p;
      cudaMalloc(&p, v.size() * sizeof(T));
      cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice);
      device.push_back(p);
    }
    input.resize(size_t(s.tokens) * h);
    for (T& x : input) x = T(normal(random));
    cu.assign(1, 0);
    for (int n : lengths) cu.push_back(cu.back() + n);
    shape.batch = int(lengths.size());
    cudaMalloc(&device_cu, cu.size() * 4);
    cudaMemcpy(device_cu, cu.data(), cu.size() * 4, cudaMemcpyHostToDevice);
    cudaMalloc(&hidden, input.size() * sizeof(T));
    cudaMalloc(&workspace, ft::cuda::small_encoder_workspace(shape));
  }
  ~Model() {
    for (void* p : device) cudaFree(p);
    cudaFree(device_cu), cudaFree(hidden), cudaFree(workspace);
  }

  double weight(int which, size_t index) const { return double(float(host[which][index])); }

  std::vector<double> reference() const {
    const int h = shape.hidden, in = shape.intermediate, heads = shape.heads, d = h / heads;
    const int tokens = cu.back();
    std::vector<double> x(size_t(tokens) * h);
    for (size_t j = 0; j < x.size(); ++j) x[j] = double(float(input[j]));
    const auto linear = [&](const std::vector<double>& a, int which, int layer, int n, int k) {
      std::vector<double> out(size_t(tokens) * n);
      for (int t = 0; t < tokens; ++t) {
        for (int c = 0; c < n; ++c) {
          double sum = weight(which + 1, size_t(layer) * n + c);
          for (int j = 0; j < k; ++j) {
            sum += a[size_t(t) * k + j] * weight(which, (size_t(layer) * n + c) * k + j);
          }
          out[size_t(t) * n + c] = sum;
        }
      }
      return out;
    };
    const auto norm = [&](std::vector<double>& a, int which, int layer) {
      for (int t = 0; t < tokens; ++t) {
        double mean = 0, squares = 0;
        for (int j = 0; j < h; ++j) mean += a[size_t(t) * h + j] / h;
        for (int j = 0; j < h; ++j) squares += std::pow(a[size_t(t) * h + j] - mean, 2) / h;
        for (int j = 0; j < h; ++j) {
          double& v = a[size_t(t) * h + j];
          v = (v - mean) / std::sqrt(squares + 1e-12) * weight(which, size_t(layer) * h + j) +
              weight(which + 1, size_t(layer) * h + j);
        }
      }
    };
    for (int layer = 0; layer < shape.layers; ++layer) {
      const std::vector<double> qkv = linear(x, 0, layer, 3 * h, h);
      std::vector<double> context(x.size());
      for (size_t b = 0; b + 1 < cu.size(); ++b) {
        for (int head = 0; head < heads; ++head) {
          for (int t = cu[b]; t < cu[b + 1]; ++t) {
            std::vector<double> p;
            double sum = 0;
            for (int j = cu[b]; j < cu[b + 1]; ++j) {
              double dot = 0;
              for (int e = 0; e < d; ++e) {
                dot += qkv[size_t(t) * 3 * h + head * d + e] *
                       qkv[size_t(j) * 3 * h + h + head * d + e];
              }
              p.push_back(std::exp(dot / std::sqrt(double(d))));
              sum += p.back();
            }
            for (int j = cu[b]; j < cu[b + 1]; ++j) {
              for (int e = 0; e < d; ++e) {
                context[size_t(t) * h + head * d + e] +=
                    p[j - cu[b]] / sum * qkv[size_t(j) * 3 * h + 2 * h + head * d + e];
              }
            }
          }
        }
      }
      std::vector<double> sum = linear(context, 2, layer, h, h);
      for (size_t j = 0; j < x.size(); ++j) x[j] += sum[j];
      norm(x, 4, layer);
      std::vector<double> up = linear(x, 6, layer, in, h);
      for (double& v : up) v = v / 2 * (1 + std::erf(v / std::sqrt(2.0)));
      sum = linear(up, 8, layer, h, in);
      for (size_t j = 0; j < x.size(); ++j) x[j] += sum[j];
      norm(x, 10, layer);
    }
    return x;
  }

  // Relative error of one run, or a negative CUDA error. Unwritten rows would show as NaN.
  double run(const SmallPlan* plan, const std::vector<double>& expected, std::vector<T>* result) {
    cudaMemset(workspace, 0xff, ft::cuda::small_encoder_workspace(shape));
    cudaMemcpy(hidden, input.data(), input.size() * sizeof(T), cudaMemcpyHostToDevice);
    const SmallWeights w = to_weights(device.data());
    cudaError_t error =
        plan ? ft::cuda::small_encoder_planned(shape, *plan, w, 1e-12f, device_cu, hidden,
                                               workspace, nullptr)
             : ft::cuda::small_encoder(shape, w, 1e-12f, device_cu, hidden, workspace, nullptr);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return -double(error);
    std::vector<T> output(input.size());
    cudaMemcpy(output.data(), hidden, output.size() * sizeof(T), cudaMemcpyDeviceToHost);
    double wrong = 0, size = 0;
    for (size_t j = 0; j < expected.size(); ++j) {
      wrong += std::pow(double(float(output[j])) - expected[j], 2);
      size += expected[j] * expected[j];
    }
    if (result) *result = output;
    return std::sqrt(wrong / size);
  }
};

template <typename T>
int check(int tokens, std::vector<int> lengths, int hidden, int intermediate, int heads,
          double bound, int plans) {
  const int longest = *std::max_element(lengths.begin(), lengths.end());
  SmallShape shape = {DType::kFloat16, tokens, 0, longest, hidden, intermediate, heads, 2};
  Model<T> model(shape, lengths, 7);
  const std::vector<double> expected = model.reference();
  int failures = 0, runs = 0;
  double worst = 0;
  std::mt19937 random(tokens);
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int trial = 0; trial < plans; ++trial) {
    const bool chosen = trial == 0;
    int numbers[14] = {};
    for (int g = 0; g < 4 && !chosen; ++g) {
      numbers[3 * g] = draw(0, ft::cuda::small::kTileCount - 1);
      numbers[3 * g + 1] = draw(1, 3);
      numbers[3 * g + 2] = draw(2, 4);
    }
    numbers[12] = trial % 3 != 0;
    numbers[13] = trial % 5 < 2;
    const SmallPlan plan = to_plan(numbers);
    std::vector<T> once, again;
    const double error = model.run(chosen ? nullptr : &plan, expected, &once);
    if (error == -double(cudaErrorInvalidValue) && !chosen) continue;  // does not fit
    model.run(chosen ? nullptr : &plan, expected, &again);
    const bool same =
        error >= 0 && !again.empty() &&
        std::memcmp(once.data(), again.data(), size_t(model.cu.back()) * hidden * sizeof(T)) == 0;
    ++runs;
    worst = std::max(worst, error);
    // Infinities in the first sequence must not reach the others.
    bool leaks = false;
    if (lengths.size() > 1 && !once.empty()) {
      const std::vector<T> healthy = model.input;
      const size_t spoilt = size_t(lengths[0]) * hidden;
      std::fill(model.input.begin(), model.input.begin() + spoilt, T(INFINITY));
      std::vector<T> beside;
      model.run(chosen ? nullptr : &plan, {}, &beside);
      leaks = std::memcmp(once.data() + spoilt, beside.data() + spoilt,
                          (size_t(model.cu.back()) * hidden - spoilt) * sizeof(T)) != 0;
      model.input = healthy;
    }
    if (!(error >= 0 && error < bound) || !same || leaks) {
      ++failures;
      std::printf(
          "FAIL error %g same %d leaks %d plan qkv %d/%d/%d out %d/%d/%d up %d/%d/%d "
          "down %d/%d/%d%s\n",
          error, same, leaks, plan.qkv.tile, plan.qkv.split, plan.qkv.stages, plan.out.tile,
          plan.out.split, plan.out.stages, plan.up.tile, plan.up.split, plan.up.stages,
          plan.down.tile, plan.down.split, plan.down.stages, chosen ? " (chosen)" : "");
    }
  }
  std::printf(
      "tokens %d of %d, %zu sequences, hidden %d, head size %d, %s: %d plans, worst %.2e, "
      "%d failures\n",
      model.cu.back(), tokens, lengths.size(), hidden, hidden / heads,
      sizeof(T) == 2 && std::is_same_v<T, __half> ? "fp16" : "bf16", runs, worst, failures);
  return failures;
}

}  // namespace

extern "C" {

int small_bench_plan(const int* shape, int* plan) {
  SmallPlan p;
  const ft::cuda::DeviceProperties* device = nullptr;
  if (ft::cuda::current_device(&device) != cudaSuccess ||
      !ft::cuda::small_plan(to_shape(shape), device->multiprocessors, &p)) {
    return 0;
  }
  for (const ft::cuda::SmallGemmPlan& cut : {p.qkv, p.out, p.up, p.down}) {
    *plan++ = cut.tile, *plan++ = cut.split, *plan++ = cut.stages;
  }
  *plan++ = p.far_ahead, *plan++ = p.prefetch;
  return 1;
}

size_t small_bench_workspace(const int* shape) {
  return ft::cuda::small_encoder_workspace(to_shape(shape));
}

int small_bench_run(const int* shape, const int* plan, const void* const* weights, float eps,
                    const int* cu_seqlens, void* hidden, void* workspace, void* stream) {
  return ft::cuda::small_encoder_planned(to_shape(shape), to_plan(plan), to_weights(weights), eps,
                                         cu_seqlens, hidden, workspace,
                                         static_cast<cudaStream_t>(stream));
}

float small_bench_time(const int* shape, const int* plan, const void* const* weights, float eps,
                       const int* cu_seqlens, void* hidden, void* workspace, int replays) {
  return time_graph(
      [&](cudaStream_t stream) {
        return static_cast<cudaError_t>(
            small_bench_run(shape, plan, weights, eps, cu_seqlens, hidden, workspace, stream));
      },
      replays);
}

}  // extern "C"

#ifndef FT_SMALL_BENCH_LIBRARY
int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "latency") {
    latency();
    return 0;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (mode == "profile") {  // a BERT-base's first layers, once, to be run under a profiler
    const int tokens = std::stoi(argv[2]);
    Model<__half> model({DType::kFloat16, tokens, 0, tokens, 768, 3072, 12, 2}, {tokens}, 1);
    return model.run(nullptr, {}, nullptr) < 0;
  }
  const int plans = argc > 1 ? std::stoi(mode) : 60;
  int failures = 0;
  failures += check<__half>(32, {32}, 128, 256, 2, 2e-3, plans);
  failures += check<__half>(48, {1, 13, 0, 20}, 128, 256, 4, 2e-3, plans);
  failures += check<__nv_bfloat16>(32, {17, 15}, 128, 192, 2, 1.6e-2, plans);
  failures +=
      check<__half>(64, {33, 30, 1}, 192, 320, 3, 2e-3, plans);  // the most that is estimated
  return failures != 0;
}
#endif
