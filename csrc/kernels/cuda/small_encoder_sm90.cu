// Launches the few-token encoder: buffers and the chain of kernels.
#include <atomic>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/runtime.h"
#include "kernels/cuda/small_encoder.h"
#include "kernels/cuda/small_kernels.h"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {
namespace {

using small::ceil_div;
using small::GemmLayout;
using small::GemmParams;
using small::GemmSizes;
using small::kAttention;
using small::kChunk;
using small::Kind;
using small::kKinds;
using small::kMaxParts;
using small::kNorm;
using small::kNormGelu;
using small::kResidual;
using small::kTileCount;
using small::kTiles;
using small::NormParams;
using small::Tile;

struct Buffers {
  unsigned char *qkv, *raw1, *raw2, *scaled1, *scaled2, *up;
  float2 *moments1, *moments2;
  size_t bytes;

  Buffers(const SmallShape& s, void* workspace) {
    unsigned char* const base = static_cast<unsigned char*>(workspace);
    bytes = 0;
    const auto take = [&](size_t size) {
      unsigned char* const at = base + bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    const size_t rows = 2 * size_t(s.tokens);
    qkv = take(rows * 3 * s.hidden);
    raw1 = take(rows * s.hidden);
    raw2 = take(rows * s.hidden);
    scaled1 = take(rows * s.hidden);
    scaled2 = take(rows * s.hidden);
    up = take(rows * s.intermediate);
    moments1 = reinterpret_cast<float2*>(take(sizeof(float2) * kMaxParts * s.tokens));
    moments2 = reinterpret_cast<float2*>(take(sizeof(float2) * kMaxParts * s.tokens));
  }
};

// Raises a kernel's limits once a device: all of shared memory, so that neighbours in the chain fit
// beside each other without a change of the split between L1 and shared memory.
cudaError_t allow_shared(const void* function, std::atomic<uint64_t>& done) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               small::kMostSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  done.fetch_or(bit, std::memory_order_release);
  return cudaSuccess;
}

struct Chain {
  const SmallShape& shape;
  const small::Functions& functions;
  cudaStream_t stream;
  const SmallPlan& plan;
  bool started = false;

  cudaError_t launch(const void* function, std::atomic<uint64_t>& allowed, dim3 grid, int threads,
                     int shared, int cluster, void* params) {
    const cudaError_t error = allow_shared(function, allowed);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = cluster;
      attributes[count].val.clusterDim.y = 1;
      attributes[count].val.clusterDim.z = 1;
      ++count;
    }
    // Not the first: the stream's earlier work may still be writing the weights, which kernels
    // read before they wait.
    if (started) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count].val.programmaticStreamSerializationAllowed = 1;
      ++count;
    }
    started = true;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    void* arguments[] = {params};
    return cudaLaunchKernelExC(&config, function, arguments);
  }

  // In boxes of a chunk by box_rows.
  bool map_matrix(CUtensorMap* map, const void* matrix, int rows, int columns, int box_rows) {
    return encode_tensor_map(map, shape.dtype, matrix, rows, columns, box_rows, kChunk,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B) == CUDA_SUCCESS;
  }

  // next_weight [next_n, next_k]: the weight of the product that follows, or null.
  cudaError_t gemm(Kind kind, const SmallGemmPlan& cut, GemmParams& p, const void* next_weight,
                   int next_n, int next_k) {
    p.far_ahead = plan.far_ahead;
    if (plan.prefetch) {
      p.prefetch = next_weight;
      p.prefetch_bytes = 2u * next_n * next_k;
    }
    static std::atomic<uint64_t> allowed[2][kKinds][kTileCount];
    const Tile& tile = kTiles[cut.tile];
    if (!map_matrix(&p.weight_map, p.weight, p.n, p.k, tile.columns)) return cudaErrorNotSupported;
    if (kind != kAttention && !map_matrix(&p.input_map, p.input, p.tokens, p.k, p.held_rows)) {
      return cudaErrorNotSupported;
    }
    const GemmLayout layout(kind, tile.rows, tile.columns, p);
    return launch(functions.gemm[kind][cut.tile],
                  allowed[shape.dtype == DType::kBFloat16][kind][cut.tile],
                  dim3(cut.split, ceil_div(p.n, tile.columns), ceil_div(p.tokens, tile.rows)),
                  tile.threads(), layout.total, cut.split, &p);
  }

  cudaError_t norm(NormParams& p) {
    static std::atomic<uint64_t> allowed[2];
    return launch(functions.norm, allowed[shape.dtype == DType::kBFloat16],
                  dim3(ceil_div(p.tokens, small::kNormRows)), small::kNormThreads, 0, 1, &p);
  }
};

// small_plan, which one forward pass asks three times: an estimate takes 5 to 50 us of the host.
bool known_plan(const SmallShape& shape, int multiprocessors, SmallPlan* plan) {
  thread_local struct {
    SmallShape shape = {};
    int multiprocessors = 0;
    bool found = false;
    SmallPlan plan = {};
  } last;
  if (last.shape != shape || last.multiprocessors != multiprocessors) {
    last = {shape, multiprocessors, small_plan(shape, multiprocessors, plan), *plan};
  }
  *plan = last.plan;
  return last.found;
}

}  // namespace

bool small_encoder_supported(const SmallShape& shape, const cudaDeviceProp& device) {
  SmallPlan plan = {};
  return device.major == 9 && device.minor == 0 &&
         known_plan(shape, device.multiProcessorCount, &plan);
}

size_t small_encoder_workspace(const SmallShape& shape) { return Buffers(shape, nullptr).bytes; }

cudaError_t small_encoder_planned(const SmallShape& s, const SmallPlan& plan, const SmallWeights& w,
                                  float eps, const int* cu_seqlens, void* hidden, void* workspace,
                                  cudaStream_t stream) {
  if (!small_plan_fits(s, plan)) return cudaErrorInvalidValue;
  if (s.tokens == 0 || s.batch == 0 || s.layers == 0) return cudaSuccess;
  const Buffers buffers(s, workspace);
  const int h = s.hidden, i = s.intermediate;
  const auto at = [](const void* base, size_t element) -> const void* {
    return static_cast<const unsigned char*>(base) + 2 * element;
  };
  Chain chain{s, s.dtype == DType::kFloat16 ? small::kHalfFunctions : small::kBFloat16Functions,
              stream, plan};
  const int width1 = kTiles[plan.out.tile].columns, width2 = kTiles[plan.down.tile].columns;
  const auto sizes = [&](Kind kind, const SmallGemmPlan& cut, int n, int k) {
    GemmParams p = {};
    static_cast<GemmSizes&>(p) = small::gemm_sizes(s, kind, cut, n, k);
    p.eps = eps;
    if (kind == kAttention) {
      p.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(double(p.head_dim)));
    }
    return p;
  };
  cudaError_t error = cudaSuccess;

  for (size_t layer = 0; layer < static_cast<size_t>(s.layers) && error == cudaSuccess; ++layer) {
    // The layer's input: `hidden` as given, or the previous layer's raw sum, not yet normalised.
    const bool raw = layer > 0;
    const void* const input = raw ? buffers.raw2 : hidden;
    const auto previous_norm = [&](GemmParams& p) {
      p.parts = 0;
      if (!raw) return;
      p.moments = buffers.moments2;
      p.parts = ceil_div(h, width2);
      p.part_width = width2;
      p.gamma = at(w.ln2_gamma, (layer - 1) * h);
      p.beta = at(w.ln2_beta, (layer - 1) * h);
    };
    const auto own_norm = [&](GemmParams& p) {
      p.moments = buffers.moments1;
      p.parts = ceil_div(h, width1);
      p.part_width = width1;
      p.gamma = at(w.ln1_gamma, layer * h);
      p.beta = at(w.ln1_beta, layer * h);
    };

    GemmParams p = sizes(kNorm, plan.qkv, 3 * h, h);
    p.input = raw ? buffers.scaled2 : hidden;
    p.weight = at(w.qkv_weight, layer * 3 * h * h);
    p.bias = at(w.qkv_bias, layer * 3 * h);
    p.output = buffers.qkv;
    previous_norm(p);
    error = chain.gemm(kNorm, plan.qkv, p, at(w.out_weight, layer * h * h), h, h);
    if (error != cudaSuccess) break;

    p = sizes(kAttention, plan.out, h, h);
    p.input = buffers.qkv;
    p.weight = at(w.out_weight, layer * h * h);
    p.bias = at(w.out_bias, layer * h);
    p.output = buffers.raw1;
    p.scaled_output = buffers.scaled1;
    p.next_gamma = at(w.ln1_gamma, layer * h);
    p.residual = input;
    p.moments_out = buffers.moments1;
    p.cu_seqlens = cu_seqlens;
    previous_norm(p);
    error = chain.gemm(kAttention, plan.out, p, at(w.up_weight, layer * i * h), i, h);
    if (error != cudaSuccess) break;

    p = sizes(kNormGelu, plan.up, i, h);
    p.input = buffers.scaled1;
    p.weight = at(w.up_weight, layer * i * h);
    p.bias = at(w.up_bias, layer * i);
    p.output = buffers.up;
    own_norm(p);
    error = chain.gemm(kNormGelu, plan.up, p, at(w.down_weight, layer * h * i), h, i);
    if (error != cudaSuccess) break;

    p = sizes(kResidual, plan.down, h, i);
    p.input = buffers.up;
    p.weight = at(w.down_weight, layer * h * i);
    p.bias = at(w.down_bias, layer * h);
    p.output = buffers.raw2;
    p.scaled_output = buffers.scaled2;
    p.next_gamma = at(w.ln2_gamma, layer * h);
    p.residual = buffers.raw1;
    p.moments_out = buffers.moments2;
    own_norm(p);
    const bool last = layer + 1 == static_cast<size_t>(s.layers);
    error = chain.gemm(kResidual, plan.down, p,
                       last ? nullptr : at(w.qkv_weight, (layer + 1) * 3 * h * h), 3 * h, h);
  }
  if (error != cudaSuccess) return error;

  NormParams n = {};
  n.input = buffers.raw2;
  n.moments = buffers.moments2;
  n.gamma = at(w.ln2_gamma, static_cast<size_t>(s.layers - 1) * h);
  n.beta = at(w.ln2_beta, static_cast<size_t>(s.layers - 1) * h);
  n.output = hidden;
  n.tokens = s.tokens;
  n.parts = ceil_div(h, width2);
  n.part_width = width2;
  n.width = h;
  n.eps = eps;
  return chain.norm(n);
}

cudaError_t small_encoder(const SmallShape& shape, const SmallWeights& weights, float eps,
                          const int* cu_seqlens, void* hidden, void* workspace,
                          cudaStream_t stream) {
  const DeviceProperties* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  SmallPlan plan = {};
  if (!known_plan(shape, device->multiprocessors, &plan)) return cudaErrorInvalidValue;
  return small_encoder_planned(shape, plan, weights, eps, cu_seqlens, hidden, workspace, stream);
}

}  // namespace ft::cuda
