// What the attention kernels share: the tile list, which kernel serves which problem, tensor-core
// and copy instructions.
#pragma once

#include <type_traits>

#include "kernels/cuda/common.cuh"

namespace ft::cuda {

// One tile of work for one head. Packed: `rows` packed rows from `begin`, whole sequences, keys and
// queries alike. Otherwise: query rows [begin, begin + rows) over the keys [kv_begin, kv_begin +
// kv_len). A tile without keys, of any number of rows, is filled: with zeros or, where kv_begin is
// negative, with NaN.
struct alignas(16) AttentionTile {
  int begin, rows, kv_begin, kv_len;
};

// The plan in device memory: `bound` tiles, those past the last with no rows; then, where tiles are
// packed, per packed row the first and the one-past-last key of its sequence, relative to the tile,
// in the low and high half of a word.

// Between the tiles and those words, for kernels whose blocks take tiles in turn: how many were
// taken in this launch and how many takers found none left. Zeros before and after.
struct AttentionQueue {
  uint32_t taken, done;
};

enum class AttentionKernel {
  kPacked,      // short sequences, several to a tile, keys resident: mma.sync
  kStream,      // any length, keys stream through two buffers: mma.sync
  kPackedSm90,  // as kPacked, with wgmma and bulk tensor copies
  kSm90,        // as kStream, with wgmma and bulk tensor copies
  kPlain,       // fused multiply-adds: fp32, odd head sizes, sm_70
};

struct AttentionChoice {
  AttentionKernel kernel;
  int tile_rows;
  int padded_dim;  // head size the kernel computes with
  int bound;       // tiles at most
};

AttentionChoice choose_attention(const AttentionShape& shape, int arch);

struct AttentionArguments {
  const void* qkv;
  void* output;
  const AttentionTile* plan;
  AttentionQueue* queue;
  int num_heads;
  int head_dim;
  int bound;
  int tokens;
  float scale_log2;  // log2(e) / sqrt(head_dim): softmax runs on powers of two
  const void* bias;  // [num_heads, 2 * bias_reach + 1] or null
  int bias_reach;
  int bias_span;      // streaming kernels' BiasTable: distances -bias_span to bias_span - 1
  NarrowRows narrow;  // kernels of sm_90 alone: where given, instead of the output
};

__host__ __device__ inline AttentionQueue* plan_queue(AttentionTile* plan, int bound) {
  return reinterpret_cast<AttentionQueue*>(plan + bound);
}

__host__ __device__ inline const uint32_t* plan_bounds(const AttentionTile* plan, int bound) {
  return reinterpret_cast<const uint32_t*>(plan + bound) + sizeof(AttentionQueue) / 4;
}

// A streaming kernel keeps the bias of every distance at which values differ in shared memory, up
// to this one; beyond, kPlain reads it from device memory.
constexpr int kMostBiasReach = 512;
// By so much the distances in a warp's tile of 16 rows and 64 keys may exceed the least of them.
constexpr int kBiasMargin = 80;

cudaError_t attention_plain(const AttentionChoice& choice, const AttentionArguments& arguments,
                            DType dtype, Launch launch);
cudaError_t attention_mma(const AttentionChoice& choice, const AttentionArguments& arguments,
                          DType dtype, Launch launch);
#ifdef FT_WITH_SM90
cudaError_t attention_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                           DType dtype, Launch launch);
#endif

#ifdef __CUDACC__

constexpr float kLog2e = 1.4426950408889634f;

// Launches make<true>() where there is a bias and make<false>() where there is none.
template <typename Make>
cudaError_t with_or_without_bias(const AttentionArguments& arguments, Make&& make) {
  return arguments.bias != nullptr ? make.template operator()<true>()
                                   : make.template operator()<false>();
}

// One head's bias in shared memory, times log2(e): of distance d (key minus row) it stands at
// [d + span] of a first copy and [d + span - 1] of a second, so that a thread's two neighbouring
// keys are one aligned load whatever its row. The copies are 16 banks apart.
template <int kSpan, int kThreads>
struct BiasTable {
  static constexpr int kStride = 2 * kSpan + 16;
  static constexpr int kBytes = 2 * kStride * sizeof(float);
  static constexpr int kEach = (2 * kSpan + kThreads - 1) / kThreads;
  static_assert(kSpan % 16 == 0);

  float* values;
  int span;  // even, at most kSpan

  // What this thread brings into the table. Loaded apart from being stored: the loads wait for no
  // kernel before this one, and what follows does not wait for them.
  template <typename T>
  struct Loaded {
    T of[kEach];
  };

  template <typename T>
  __device__ __forceinline__ Loaded<T> load(const AttentionArguments& arguments, int head) const {
    const int reach = arguments.bias_reach;
    const T* row = static_cast<const T*>(arguments.bias) +
                   static_cast<int64_t>(head) * (2 * static_cast<int64_t>(reach) + 1) + reach;
    Loaded<T> loaded;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at < 2 * span) loaded.of[i] = row[max(-reach, min(at - span, reach))];
    }
    return loaded;
  }

  template <typename T>
  __device__ __forceinline__ void store(const Loaded<T>& loaded) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at >= 2 * span) continue;
      const float value = kLog2e * to_float(loaded.of[i]);
      values[at] = value;
      if (at > 0) values[kStride + at - 1] = value;
    }
  }

  // Whether all of 16 rows and `keys` keys are farther apart than the values reach, in one
  // direction: then one value serves all. `distance`: of the first key and the first row.
  __device__ __forceinline__ bool is_constant(int distance, int keys, float* value) const {
    const int reach = span - kBiasMargin;
    const bool after = distance - 15 >= reach, before = distance + keys - 1 <= -reach;
    if (after || before) *value = values[after ? 2 * span - 1 : 0];
    return after || before;
  }

  // Where this thread reads for its row lane / 4 of the 16 and its two keys of the first eight.
  __device__ __forceinline__ const float2* pairs(int distance) const {
    const int lane = threadIdx.x % 32, row = lane / 4;
    const int at = distance + span + lane % 4 * 2 - row;
    return reinterpret_cast<const float2*>(values + (row % 2 == 0 ? 0 : kStride - 1) + at);
  }
};

// scores * scale + bias, in powers of two, of group `group` of eight keys. The thread's second row
// is eight rows on: there the bias is that of the group before.
__device__ __forceinline__ void add_bias(float (&scores)[4], const float2* pairs, int group,
                                         float scale) {
  const float2 first = pairs[4 * group], second = pairs[4 * group - 4];
  scores[0] = fmaf(scores[0], scale, first.x);
  scores[1] = fmaf(scores[1], scale, first.y);
  scores[2] = fmaf(scores[2], scale, second.x);
  scores[3] = fmaf(scores[3], scale, second.y);
}

// Fills a head's columns of a tile without keys, with zeros or with `nan`.
template <typename T>
__device__ __forceinline__ void fill_tile(const AttentionTile& tile, void* output, T nan, int head,
                                          int head_dim, int hidden, int thread, int threads) {
  const T value = tile.kv_begin < 0 ? nan : T{};
  T* const to = static_cast<T*>(output) + static_cast<int64_t>(tile.begin) * hidden +
                static_cast<int64_t>(head) * head_dim;
#pragma unroll 1
  for (int row = thread / 16; row < tile.rows; row += threads / 16) {
#pragma unroll 1
    for (int column = thread % 16; column < head_dim; column += 16) {
      to[static_cast<int64_t>(row) * hidden + column] = value;
    }
  }
}

template <typename T>
__device__ __forceinline__ void fill_tile(const AttentionTile& tile, void* output, int head,
                                          int head_dim, int hidden) {
  fill_tile<T>(tile, output, from_float<T>(NAN), head, head_dim, hidden, threadIdx.x, blockDim.x);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros instead where `valid` is false.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void copy_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` committed groups of this thread are still in flight.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// c[16x8] += a[16x16] b[16x8]; sm_75 has only the half of it for fp16 and no bf16.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
  }
#endif
}

// A tile of several sequences multiplies every row's probabilities by every sequence's values: a
// neighbour's are weighed by exact zeros, but zero times infinity is NaN. Results are therefore
// probed as they leave, and a tile with one that is not finite takes its product again with
// infinities and NaNs read as zeros.

// Adds zero times a pair of values to a probe, which stays zero as long as all are finite.
template <typename T>
__device__ __forceinline__ void probe_finite(uint32_t& probe, uint32_t pair) {
  const uint32_t zeros = 0;
  const auto add = [&](auto value, auto zero, auto sum) {
    memcpy(&value, &pair, 4);
    memcpy(&zero, &zeros, 4);
    memcpy(&sum, &probe, 4);
    sum = __hfma2(value, zero, sum);
    memcpy(&probe, &sum, 4);
  };
  if constexpr (std::is_same_v<T, __half>) {
    add(__half2{}, __half2{}, __half2{});
  } else {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // before, bf16 has no arithmetic and no kernel
    add(__nv_bfloat162{}, __nv_bfloat162{}, __nv_bfloat162{});
#endif
  }
}

__device__ __forceinline__ bool probed_finite(uint32_t probe) {
  return (probe & 0x7fff7fffu) == 0;  // zeros, of either sign
}

// A pair of values with zeros in place of infinities and NaNs.
template <typename T>
__device__ __forceinline__ uint32_t finite_or_zero(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  if ((pair & kExponent) == kExponent) pair &= 0xffff0000u;
  if ((pair >> 16 & kExponent) == kExponent) pair &= 0x0000ffffu;
  return pair;
}

#endif  // __CUDACC__

}  // namespace ft::cuda
