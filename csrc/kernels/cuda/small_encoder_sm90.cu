// Launches the few-token encoder: plan, buffers, and the chain of kernels.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/small_encoder.h"
#include "kernels/cuda/small_kernels.cuh"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {
namespace {

using small::AttentionParams;
using small::GemmLayout;
using small::GemmParams;
using small::kAttention;
using small::kAttentionKeys;
using small::kAttentionRows;
using small::kAttentionThreads;
using small::kChunk;
using small::Kind;
using small::kKinds;
using small::kMaxParts;
using small::kMaxSplit;
using small::kMaxStages;
using small::kNorm;
using small::kNormGelu;
using small::kResidual;
using small::kTiles;
using small::NormParams;
using small::round_up;

constexpr int kMultiprocessors = 132;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMaxTokens = 1024;
// Where the chain was measured ahead of larger kernels.
constexpr int kServedTokens = 64;
constexpr int kServedHidden = 768;
constexpr int kMaxBatch = 1024;

struct Tile {
  int rows, columns, threads;
};
constexpr Tile kTileTable[kTiles] = {
#define FT_SMALL_ENTRY(index, rows, columns, groups_m, groups_n, step) \
  {rows, columns, 128 * (groups_m) * (groups_n)},
    FT_SMALL_TILES(FT_SMALL_ENTRY)
#undef FT_SMALL_ENTRY
};

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Keys that a tile of `rows` queries can need: its own rows and the rest of the sequences at its
// ends.
int key_capacity(const SmallShape& s, int rows) {
  const int longest = std::clamp(s.max_seqlen, 1, std::max(s.tokens, 1));
  return round_up(std::min(s.tokens, rows + 2 * (longest - 1)), 32);
}

// What does not depend on where tensors lie.
GemmParams gemm_params(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  GemmParams p = {};
  const int chunks = ceil_div(k / kChunk, plan.split);
  p.tokens = s.tokens;
  p.n = n;
  p.k = k;
  p.batch = s.batch;
  p.width = s.hidden;
  p.parts = kMaxParts;  // until the producer is known
  p.split = plan.split;
  p.stages = std::min(plan.stages, chunks);
  p.held_rows = std::min(kTileTable[plan.tile].rows, round_up(s.tokens, 16));
  if (kind == kAttention) {
    p.key_capacity = key_capacity(s, kTileTable[plan.tile].rows);
    p.longest = s.max_seqlen;
    p.head_dim = s.hidden / s.heads;
    p.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(double(p.head_dim)));
  }
  return p;
}

int gemm_shared(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  const Tile& tile = kTileTable[plan.tile];
  return GemmLayout(kind, tile.rows, tile.columns, gemm_params(s, kind, plan, n, k)).total;
}

int attention_keys(const SmallShape& s) {
  return round_up(key_capacity(s, kAttentionRows), kAttentionKeys);
}

int attention_shared(const SmallShape& s) {
  return round_up(kAttentionRows * 8 + 4 * (s.batch + 1), small::kChunkBytes) +
         (kAttentionRows + 2 * attention_keys(s)) * small::kChunkBytes;
}

bool gemm_plan_fits(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  if (plan.tile < 0 || plan.tile >= kTiles || plan.split < 1 || plan.split > kMaxSplit ||
      plan.split > k / kChunk) {
    return false;
  }
  const int chunks = ceil_div(k / kChunk, plan.split);
  const int tiles = ceil_div(n, kTileTable[plan.tile].columns);
  const bool all = plan.stages >= chunks;
  if (std::min(plan.stages, chunks) > kMaxStages || (!all && plan.stages < 2)) return false;
  if (kind == kAttention && !all) return false;
  const bool ends_branch = kind == kAttention || kind == kResidual;
  if (ends_branch && tiles > kMaxParts) return false;
  return gemm_shared(s, kind, plan, n, k) <= kSharedLimit;
}

// Nanoseconds a plan should take beyond its launch: bytes through L2 and into the busiest
// multiprocessor, matrix instructions, and the exchange of partial sums.
double estimate(const SmallShape& s, Kind kind, const SmallGemmPlan& plan, int n, int k) {
  const Tile& tile = kTileTable[plan.tile];
  const int steps = ceil_div(k / kChunk, plan.split), rows = std::min(tile.rows, s.tokens);
  const int blocks = ceil_div(s.tokens, tile.rows) * ceil_div(n, tile.columns) * plan.split;
  const int turns = ceil_div(blocks, kMultiprocessors);
  const double bytes = double(rows) * steps * small::kChunkBytes;
  // The weights of a first turn are there already.
  double time = std::max(turns * bytes / 90, blocks * bytes / 5000) +
                (turns - 1) * double(tile.columns) * steps * small::kChunkBytes / 90;
  time += turns * steps * tile.rows * tile.columns / 180.0;
  if (plan.split > 1) time += 300 + turns * rows * tile.columns * 4.0 / 20;
  time += turns * double(rows) * tile.columns / plan.split / tile.threads * 40;
  if (kind == kAttention) time += turns * (steps * key_capacity(s, tile.rows) * 256.0 / 90);
  if (gemm_shared(s, kind, plan, n, k) > kSharedLimit / 2) {
    time += 1000;  // leaves no room for the successor's weights
  }
  return time;
}

bool choose(const SmallShape& s, Kind kind, int n, int k, SmallGemmPlan* best, double* cost) {
  bool found = false;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (kTileTable[tile].rows > 64 && s.tokens <= 64) continue;
    for (int split = 1; split <= std::min(kMaxSplit, k / kChunk); ++split) {
      const int steps = ceil_div(k / kChunk, split);
      for (int stages = std::min(steps, 6); stages >= 2 || stages == steps; --stages) {
        const SmallGemmPlan plan = {tile, split, stages};
        if (gemm_plan_fits(s, kind, plan, n, k)) {
          const double time = estimate(s, kind, plan, n, k);
          if (!found || time < *cost) {
            *best = plan;
            *cost = time;
            found = true;
          }
        }
        if (stages == 1) break;
      }
    }
  }
  return found;
}

struct Buffers {
  unsigned char *qkv, *context, *raw1, *raw2, *scaled1, *scaled2, *up;
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
    context = take(rows * s.hidden);
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
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
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
    static std::atomic<uint64_t> allowed[2][kKinds][kTiles];
    const Tile& tile = kTileTable[cut.tile];
    if (!map_matrix(&p.weight_map, p.weight, p.n, p.k, tile.columns)) return cudaErrorNotSupported;
    if (kind != kAttention && !map_matrix(&p.input_map, p.input, p.tokens, p.k, p.held_rows)) {
      return cudaErrorNotSupported;
    }
    const GemmLayout layout(kind, tile.rows, tile.columns, p);
    return launch(functions.gemm[kind][cut.tile],
                  allowed[shape.dtype == DType::kBFloat16][kind][cut.tile],
                  dim3(cut.split, ceil_div(p.n, tile.columns), ceil_div(p.tokens, tile.rows)),
                  tile.threads, layout.total, cut.split, &p);
  }

  cudaError_t attention(AttentionParams& p, int shared) {
    static std::atomic<uint64_t> allowed[2];
    return launch(functions.attention, allowed[shape.dtype == DType::kBFloat16],
                  dim3(p.hidden / kChunk, ceil_div(p.tokens, kAttentionRows)), kAttentionThreads,
                  shared, 1, &p);
  }

  cudaError_t norm(NormParams& p) {
    static std::atomic<uint64_t> allowed[2];
    return launch(functions.norm, allowed[shape.dtype == DType::kBFloat16],
                  dim3(ceil_div(p.tokens, 4)), 128, 0, 1, &p);
  }
};

bool shape_served(const SmallShape& s) {
  if (s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) return false;
  if (s.heads < 1 || s.hidden % kChunk != 0 || s.intermediate % kChunk != 0) return false;
  if (s.hidden < 1 || s.intermediate < 1 || s.layers < 0) return false;
  if (s.hidden != 32 * s.heads && s.hidden != 64 * s.heads) return false;
  return s.tokens >= 0 && s.tokens <= kMaxTokens && s.batch >= 0 && s.batch <= kMaxBatch;
}

bool plan_fits(const SmallShape& s, const SmallPlan& plan) {
  const int h = s.hidden, i = s.intermediate;
  return gemm_plan_fits(s, kNorm, plan.qkv, 3 * h, h) &&
         gemm_plan_fits(s, plan.fuse_attention ? kAttention : kResidual, plan.out, h, h) &&
         gemm_plan_fits(s, kNormGelu, plan.up, i, h) &&
         gemm_plan_fits(s, kResidual, plan.down, h, i) &&
         (plan.fuse_attention || attention_shared(s) <= kSharedLimit);
}

// The fastest plans found on an H200 by timing whole stacks of that many tokens; fewer tokens take
// them too, and other shapes an estimate.
struct Measured {
  int hidden, intermediate, tokens;
  SmallPlan plan;
};
constexpr Measured kMeasured[] = {
    {768, 3072, 32, {{0, 4, 3}, {3, 8, 2}, {0, 3, 4}, {3, 8, 6}, true, false, true}},
    {768, 3072, 64, {{0, 3, 3}, {3, 8, 2}, {2, 2, 6}, {1, 8, 6}, true, false, true}},
    {768, 3072, 96, {{6, 3, 4}, {3, 6, 2}, {7, 3, 3}, {7, 8, 3}, true, false, true}},
    {384, 1536, 32, {{2, 3, 2}, {1, 6, 1}, {3, 4, 2}, {1, 6, 4}, true, false, false}},
    {384, 1536, 64, {{2, 4, 2}, {0, 6, 1}, {0, 4, 2}, {0, 4, 6}, true, false, true}},
};

const Measured* measured(const SmallShape& s) {
  for (const Measured& m : kMeasured)
    if (s.hidden == m.hidden && s.intermediate == m.intermediate && s.tokens <= m.tokens &&
        plan_fits(s, m.plan))
      return &m;
  return nullptr;
}

}  // namespace

bool small_plan(const SmallShape& s, SmallPlan* plan) {
  if (!shape_served(s)) return false;
  if (const Measured* const found = measured(s); found != nullptr) {
    *plan = found->plan;
    return true;
  }
  const int h = s.hidden, i = s.intermediate;
  double ignored, fused = 0, plain = 0;
  SmallGemmPlan with_attention = {};
  if (!choose(s, kNorm, 3 * h, h, &plan->qkv, &ignored)) return false;
  if (!choose(s, kNormGelu, i, h, &plan->up, &ignored)) return false;
  if (!choose(s, kResidual, h, i, &plan->down, &ignored)) return false;
  if (!choose(s, kResidual, h, h, &plan->out, &plain)) return false;
  plan->far_ahead = true;
  plan->prefetch = false;
  plan->fuse_attention = s.tokens <= 128 && choose(s, kAttention, h, h, &with_attention, &fused);
  if (plan->fuse_attention) plan->out = with_attention;
  return plan->fuse_attention || attention_shared(s) <= kSharedLimit;
}

bool small_encoder_supported(const SmallShape& shape, const cudaDeviceProp& device) {
  SmallPlan plan;
  return device.major == 9 && device.minor == 0 && shape.hidden <= kServedHidden &&
         (shape.tokens <= kServedTokens || measured(shape) != nullptr) && small_plan(shape, &plan);
}

size_t small_encoder_workspace(const SmallShape& shape) { return Buffers(shape, nullptr).bytes; }

cudaError_t small_encoder_planned(const SmallShape& s, const SmallPlan& plan, const SmallWeights& w,
                                  float eps, const int* cu_seqlens, void* hidden, void* workspace,
                                  cudaStream_t stream) {
  if (!shape_served(s) || !plan_fits(s, plan)) return cudaErrorInvalidValue;
  if (s.tokens == 0 || s.batch == 0 || s.layers == 0) return cudaSuccess;
  const Buffers buffers(s, workspace);
  const int h = s.hidden, i = s.intermediate;
  const auto at = [](const void* base, size_t element) -> const void* {
    return static_cast<const unsigned char*>(base) + 2 * element;
  };
  Chain chain{s, s.dtype == DType::kFloat16 ? small::kHalfFunctions : small::kBFloat16Functions,
              stream, plan};
  const Kind out_kind = plan.fuse_attention ? kAttention : kResidual;
  const int width1 = kTileTable[plan.out.tile].columns, width2 = kTileTable[plan.down.tile].columns;
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

    GemmParams p = gemm_params(s, kNorm, plan.qkv, 3 * h, h);
    p.eps = eps;
    p.input = raw ? buffers.scaled2 : hidden;
    p.weight = at(w.qkv_weight, layer * 3 * h * h);
    p.bias = at(w.qkv_bias, layer * 3 * h);
    p.output = buffers.qkv;
    previous_norm(p);
    error = chain.gemm(kNorm, plan.qkv, p, at(w.out_weight, layer * h * h), h, h);
    if (error != cudaSuccess) break;

    if (!plan.fuse_attention) {
      AttentionParams a = {};
      a.qkv = buffers.qkv;
      a.output = buffers.context;
      a.cu_seqlens = cu_seqlens;
      a.tokens = s.tokens;
      a.hidden = h;
      a.batch = s.batch;
      a.key_capacity = attention_keys(s);
      a.longest = s.max_seqlen;
      a.head_dim = h / s.heads;
      a.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(double(a.head_dim)));
      error = chain.attention(a, attention_shared(s));
      if (error != cudaSuccess) break;
    }

    p = gemm_params(s, out_kind, plan.out, h, h);
    p.eps = eps;
    p.input = plan.fuse_attention ? buffers.qkv : buffers.context;
    p.weight = at(w.out_weight, layer * h * h);
    p.bias = at(w.out_bias, layer * h);
    p.output = buffers.raw1;
    p.scaled_output = buffers.scaled1;
    p.next_gamma = at(w.ln1_gamma, layer * h);
    p.residual = input;
    p.moments_out = buffers.moments1;
    p.cu_seqlens = cu_seqlens;
    previous_norm(p);
    error = chain.gemm(out_kind, plan.out, p, at(w.up_weight, layer * i * h), i, h);
    if (error != cudaSuccess) break;

    p = gemm_params(s, kNormGelu, plan.up, i, h);
    p.eps = eps;
    p.input = buffers.scaled1;
    p.weight = at(w.up_weight, layer * i * h);
    p.bias = at(w.up_bias, layer * i);
    p.output = buffers.up;
    own_norm(p);
    error = chain.gemm(kNormGelu, plan.up, p, at(w.down_weight, layer * h * i), h, i);
    if (error != cudaSuccess) break;

    p = gemm_params(s, kResidual, plan.down, h, i);
    p.eps = eps;
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
  SmallPlan plan;
  if (!small_plan(shape, &plan)) return cudaErrorInvalidValue;
  return small_encoder_planned(shape, plan, weights, eps, cu_seqlens, hidden, workspace, stream);
}

}  // namespace ft::cuda
