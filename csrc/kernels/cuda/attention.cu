// Which attention kernel serves a problem, and the list of tiles it works through.
//
// The list is made on the device from cu_seqlens, once per forward pass, so that a captured graph
// follows new lengths; its size is bounded by tokens and sequences, not by sequences times the
// longest length, so that a launch over the bound has few idle blocks.

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/runtime.h"

namespace ft::cuda {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kBuckets = 1024;

bool packs(AttentionKernel kernel) {
  return kernel == AttentionKernel::kPacked || kernel == AttentionKernel::kPackedSm90;
}

int64_t tile_bound(const AttentionShape& shape, AttentionKernel kernel, int tile_rows) {
  const int64_t batch = shape.batch, tokens = shape.tokens, longest = shape.max_seqlen;
  // One tile more is for the rows past the last sequence.
  if (packs(kernel)) {
    // Two neighbouring tiles hold more than tile_rows rows, else they would be one; only a round of
    // planning ends a tile early.
    const int64_t by_tokens = 2 * tokens / tile_rows + 1 + batch / kPlanThreads;
    return (batch < by_tokens ? batch : by_tokens) + 1;
  }
  const int64_t by_length = batch * ((longest + tile_rows - 1) / tile_rows);
  const int64_t by_tokens = tokens / tile_rows + batch;
  return (by_length < by_tokens ? by_length : by_tokens) + 1;
}

// Empties the queue and tells whether cu_seqlens says where sequences of at most `longest` lie in
// `tokens` rows; asked by the whole block. Where it does not, all rows are to become NaN, by the
// tiles that this then writes.
__device__ bool plan_valid(const int32_t* cu_seqlens, int batch, int tokens, int longest, int bound,
                           AttentionTile* tiles) {
  if (threadIdx.x == 0) *plan_queue(tiles, bound) = {};
  if (steps_valid<kPlanThreads>(cu_seqlens, batch, tokens, longest)) return true;
  const int rows = (tokens + bound - 1) / bound;
  for (int i = threadIdx.x; i < bound; i += kPlanThreads) {
    const int64_t begin = static_cast<int64_t>(i) * rows;
    tiles[i] = begin < tokens
                   ? AttentionTile{static_cast<int>(begin),
                                   static_cast<int>(min(int64_t{rows}, tokens - begin)), -1, 0}
                   : AttentionTile{};
  }
  return false;
}

// Ends the plan after `done` tiles: rows past the last sequence become zeros.
__device__ void finish_plan(int end, int tokens, int done, int bound, AttentionTile* tiles) {
  if (threadIdx.x == 0) tiles[done] = {end, tokens - end, 0, 0};
  for (int i = done + 1 + threadIdx.x; i < bound; i += kPlanThreads) tiles[i] = {};
}

// Packs whole neighbouring sequences into tiles greedily. Which sequences begin a tile is a chain
// (each tile's first sequence decides the next one's), followed by pointer doubling: after step k
// every chain element less than 2^k links from the start is marked.
__global__ void __launch_bounds__(kPlanThreads)
    packed_plan_kernel(const int32_t* cu_seqlens, int batch, int tile_rows, int tokens, int longest,
                       int bound, AttentionTile* tiles) {
  __shared__ int begin[kPlanThreads + 1];  // first row of each sequence of this round, then the end
  __shared__ int jump[2][kPlanThreads + 1];
  __shared__ bool marked[kPlanThreads + 1];
  __shared__ int tile_begin[kPlanThreads];
  __shared__ int scratch[kPlanThreads / 32];
  pdl_launch_dependents();
  pdl_wait();
  if (!plan_valid(cu_seqlens, batch, tokens, longest, bound, tiles)) return;
  auto* bounds = const_cast<uint32_t*>(plan_bounds(tiles, bound));
  const int thread = threadIdx.x;
  int done = 0;
  for (int base = 0; base < batch; base += kPlanThreads) {
    const int count = min(kPlanThreads, batch - base);
    __syncthreads();
    for (int i = thread; i <= count; i += kPlanThreads) {
      begin[i] = cu_seqlens[base + i];
    }
    __syncthreads();
    int next = count;
    if (thread < count) {
      int low = thread + 1, high = count;  // the last index whose rows still fit
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (begin[middle] - begin[thread] <= tile_rows) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      next = low;
      jump[0][thread] = next;
      marked[thread] = thread == 0;
    }
    if (thread == 0) jump[0][count] = jump[1][count] = count, marked[count] = false;
    __syncthreads();
    for (int step = 0; (1 << step) < count; ++step) {
      const int* from = jump[step % 2];
      const bool mark = thread < count && marked[thread];
      const int target = thread < count ? from[thread] : count;
      const int farther = from[target];
      __syncthreads();
      if (mark) marked[target] = true;
      if (thread < count) jump[(step + 1) % 2][thread] = farther;
      __syncthreads();
    }
    const int rows = thread < count ? begin[next] - begin[thread] : 0;
    const bool first = thread < count && marked[thread] && rows > 0;
    int total = 0;
    const int slot = done + block_scan<kPlanThreads>(first ? 1 : 0, scratch, &total) - 1;
    if (first) tiles[slot] = {begin[thread], rows, begin[thread], rows};
    if (thread < count && marked[thread]) {
      for (int i = thread; i < next; ++i) tile_begin[i] = begin[thread];
    }
    done += total;
    __syncthreads();
    for (int i = thread / 32; i < count; i += kPlanThreads / 32) {
      const uint32_t low = begin[i] - tile_begin[i], high = begin[i + 1] - tile_begin[i];
      for (int row = begin[i] + thread % 32; row < begin[i + 1]; row += 32) {
        bounds[row] = low | high << 16;
      }
    }
  }
  finish_plan(cu_seqlens[batch], tokens, done, bound, tiles);
}

// Cuts every sequence into tiles of query rows and sorts them by length, longest first (a counting
// sort): the last blocks to start are then the short ones.
__global__ void __launch_bounds__(kPlanThreads)
    stream_plan_kernel(const int32_t* cu_seqlens, int batch, int tile_rows, int tokens, int longest,
                       int bucket_width, int bound, AttentionTile* tiles) {
  __shared__ int slots[kBuckets];
  __shared__ int scratch[kPlanThreads / 32];
  static_assert(kBuckets == kPlanThreads);
  pdl_launch_dependents();
  pdl_wait();
  const int thread = threadIdx.x;
  slots[thread] = 0;
  if (!plan_valid(cu_seqlens, batch, tokens, longest, bound, tiles)) return;
  // Bucket 0 is the longest.
  auto bucket = [&](int length) { return kBuckets - 1 - min(length / bucket_width, kBuckets - 1); };
  for (int i = thread; i < batch; i += kPlanThreads) {
    const int length = cu_seqlens[i + 1] - cu_seqlens[i];
    if (length > 0) atomicAdd(&slots[bucket(length)], (length + tile_rows - 1) / tile_rows);
  }
  __syncthreads();
  const int mine = slots[thread];
  int total = 0;
  const int after = block_scan<kPlanThreads>(mine, scratch, &total);
  slots[thread] = after - mine;
  __syncthreads();
  for (int i = thread; i < batch; i += kPlanThreads) {
    const int begin = cu_seqlens[i], length = cu_seqlens[i + 1] - begin;
    if (length <= 0) continue;
    const int count = (length + tile_rows - 1) / tile_rows;
    const int slot = atomicAdd(&slots[bucket(length)], count);
    for (int t = 0; t < count; ++t) {
      tiles[slot + t] = {begin + t * tile_rows, min(tile_rows, length - t * tile_rows), begin,
                         length};
    }
  }
  finish_plan(cu_seqlens[batch], tokens, total, bound, tiles);
}

cudaError_t check_shape(const AttentionShape& shape) {
  if (shape.batch < 0 || shape.tokens < 0 || shape.max_seqlen < 0 || shape.num_heads <= 0 ||
      shape.head_dim < 2 || shape.head_dim > 128 || shape.head_dim % 2 != 0 ||
      shape.bias_reach < -1) {
    return cudaErrorInvalidValue;
  }
  return check_dtype(shape.dtype);
}

// The farthest distance within a sequence at which the bias may still change. One order of all sums
// asks for one kernel too, whatever the longest sequence is.
int bias_reach_within(const AttentionShape& shape) {
  if (shape.batch_invariant || shape.bias_reach < shape.max_seqlen) return shape.bias_reach;
  return shape.max_seqlen - 1;
}

bool nothing_to_do(const AttentionShape& shape) {
  return shape.batch == 0 || shape.tokens == 0 || shape.max_seqlen == 0;
}

}  // namespace

AttentionChoice choose_attention(const AttentionShape& shape, int arch) {
  AttentionChoice choice{};
  choice.padded_dim = (shape.head_dim + 31) / 32 * 32;
  // The packed kernels sum in another order than the streaming ones do, and that of sm_90 rescales
  // 16 rows together, among which a neighbour's may be.
  const bool one_order = shape.batch_invariant;
  const bool short_sequences = shape.max_seqlen <= 64 && !one_order;
  if (shape.dtype == DType::kFloat32 || shape.head_dim % 8 != 0 || arch < 75 ||
      bias_reach_within(shape) > kMostBiasReach) {
    choice.kernel = AttentionKernel::kPlain;
    choice.tile_rows = 64;
  } else if (short_sequences || (shape.max_seqlen <= 128 && shape.head_dim <= 64 && !one_order)) {
    choice.kernel = AttentionKernel::kPacked;
    choice.tile_rows = short_sequences ? 64 : 128;
  } else {
    choice.kernel = AttentionKernel::kStream;
    choice.tile_rows = shape.head_dim <= 64 ? 128 : 64;
  }
#ifdef FT_WITH_SM90
  const int dim = shape.head_dim;
  if (arch == 90 && choice.kernel != AttentionKernel::kPlain && !one_order) {
    if (short_sequences && (dim == 32 || dim == 64)) {
      choice.kernel = AttentionKernel::kPackedSm90;
    } else if (!short_sequences && (dim == 32 || dim == 64 || dim == 128)) {
      choice.kernel = AttentionKernel::kSm90;
      choice.tile_rows = shape.max_seqlen <= 128 && dim <= 64 ? 64 : 128;
    }
  }
#endif
  choice.bound = static_cast<int>(tile_bound(shape, choice.kernel, choice.tile_rows));
  return choice;
}

size_t attention_plan_bytes(const AttentionShape& shape) {
  // Enough for any kernel's choice, so that the size does not depend on the device.
  const size_t tiles = static_cast<size_t>(shape.tokens) / 32 + shape.batch + 1;
  const size_t bytes = tiles * sizeof(AttentionTile) + sizeof(AttentionQueue) +
                       static_cast<size_t>(shape.tokens) * sizeof(uint32_t);
  return (bytes + 255) / 256 * 256;
}

cudaError_t attention_plan(const AttentionShape& shape, const int32_t* cu_seqlens, void* plan,
                           Launch launch) {
  if (cudaError_t status = check_shape(shape); status != cudaSuccess) return status;
  if (nothing_to_do(shape)) return cudaSuccess;
  const AttentionChoice choice = choose_attention(shape, device_arch());
  auto* tiles = static_cast<AttentionTile*>(plan);
  if (packs(choice.kernel)) {
    return launch_kernel(packed_plan_kernel, 1, kPlanThreads, 0, launch, cu_seqlens, shape.batch,
                         choice.tile_rows, shape.tokens, shape.max_seqlen, choice.bound, tiles);
  }
  const int bucket_width = shape.max_seqlen / kBuckets + 1;
  return launch_kernel(stream_plan_kernel, 1, kPlanThreads, 0, launch, cu_seqlens, shape.batch,
                       choice.tile_rows, shape.tokens, shape.max_seqlen, bucket_width, choice.bound,
                       tiles);
}

cudaError_t varlen_attention(const AttentionShape& shape, const void* qkv,
                             const void* relative_bias, void* plan, void* output, Launch launch,
                             NarrowRows narrow) {
  if (cudaError_t status = check_shape(shape); status != cudaSuccess) return status;
  if ((relative_bias != nullptr) != (shape.bias_reach >= 0)) return cudaErrorInvalidValue;
  if (nothing_to_do(shape)) return cudaSuccess;
  const AttentionChoice choice = choose_attention(shape, device_arch());
  const float scale_log2 = 1.4426950408889634f / sqrtf(static_cast<float>(shape.head_dim));
  auto* const tiles = static_cast<AttentionTile*>(plan);
  AttentionArguments arguments{qkv,
                               output,
                               tiles,
                               plan_queue(tiles, choice.bound),
                               shape.num_heads,
                               shape.head_dim,
                               choice.bound,
                               shape.tokens,
                               scale_log2,
                               relative_bias,
                               shape.bias_reach,
                               (bias_reach_within(shape) + 1) / 2 * 2 + kBiasMargin,
                               {}};
  cudaError_t status = cudaSuccess;
  switch (choice.kernel) {
    case AttentionKernel::kPlain:
      status = attention_plain(choice, arguments, shape.dtype, launch);
      break;
    case AttentionKernel::kPackedSm90:
    case AttentionKernel::kSm90:
#ifdef FT_WITH_SM90
      arguments.narrow = narrow;
      return attention_sm90(choice, arguments, shape.dtype, launch);
#endif
    default:
      status = attention_mma(choice, arguments, shape.dtype, launch);
  }
  if (status != cudaSuccess || narrow.rows == nullptr) return status;
  return narrow_rows(output, shape.tokens, shape.num_heads * shape.head_dim, shape.dtype, narrow,
                     launch);
}

}  // namespace ft::cuda
