// The instructions of the few-token kernels that no other kernel has, and how rows lie in their
// shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/small_layout.h"

namespace ft::cuda::small {

using namespace sm90;

// As barrier_wait; with that one's branches in assembly the compiler makes more of these kernels.
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier, int parity = 0) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Copies 16 bytes past L1, which may hold what an earlier kernel of the chain read; zeros if
// !valid.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Relaxed: what blocks send each other is ordered by counted barriers, and a release would wait for
// every outstanding load.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Shared memory of this block to that of another one of the cluster, counted by its barrier: a
// thread's own counted stores leave one by one, eight bytes a cycle.
__device__ __forceinline__ void copy_to_rank(uint32_t remote, uint32_t from, int bytes,
                                             uint32_t remote_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote),
      "r"(from), "r"(bytes), "r"(remote_barrier)
      : "memory");
}

// Byte offset of 16-byte unit `unit` of a 128-byte row; the exclusive or spreads the eight rows a
// matrix load touches over all banks.
__device__ __forceinline__ int swizzled(int row, int unit) {
  return row * kChunkBytes + ((unit ^ (row & 7)) << 4);
}

// Copies rows [0, valid) of a tile's 64-column chunk. What lies in the other rows is never used:
// neither rows of tokens nor columns of a product depend on their neighbours.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* from, int stride, int valid) {
  constexpr int kStep = kThreads / 8;
  static_assert(kStep % 8 == 0);
  const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
  to += swizzled(row, unit);
  from += static_cast<size_t>(row) * stride + unit * 8;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    if (row + i * kStep < valid) copy16(to + i * kStep * kChunkBytes, from, true);
    from += static_cast<size_t>(kStep) * stride;
  }
}

// Copies `valid` rows and fills up to `rows` with zeros.
template <typename T>
__device__ __forceinline__ void copy_rows(uint32_t to, const T* from, size_t stride, int rows,
                                          int valid) {
  const int step = blockDim.x / 8;
  const int unit = threadIdx.x % 8;
#pragma unroll 2
  for (int row = threadIdx.x / 8; row < rows; row += step) {
    const bool in = row < valid;
    copy16(to + swizzled(row, unit), from + (in ? row * stride : 0) + unit * 8, in);
  }
}

}  // namespace ft::cuda::small
