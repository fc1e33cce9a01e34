// The steps that the epilogues of the sm_90 GEMM kernels are made of.
//
// A thread's accumulators are those of wgmma: acc[part][4 * group + i] stands in row part * 64 +
// warp * 16 + lane / 4 (+ 8 for i >= 2) of the warpgroup's and in column 8 * group + 2 * (lane % 4)
// + i % 2. Steps work on some groups of eight columns, from group `first` on.
#pragma once

#include <cuda.h>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm_elements.cuh"
#include "kernels/cuda/ptx_sm90.cuh"
#include "kernels/cuda/row_moments.cuh"

namespace ft::cuda::sm90 {

// A thread of one of a block's consumer warpgroups.
struct Consumer {
  int index, thread, warp, lane;

  __device__ __forceinline__ bool leads() const { return thread == 0; }
  // Waits for the warpgroup's threads.
  __device__ __forceinline__ void meet() const { named_barrier(1 + index, 128); }
};

__device__ __forceinline__ Consumer this_consumer() {
  const int thread = threadIdx.x % 128;
  return {same(threadIdx.x / 128) - 1, thread, same(thread / 32), thread % 32};
}

// A box of bulk tensor copies in shared memory: rows of kRowBytes, swizzled over their width.
template <int kRowBytes>
struct Box {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  uint32_t at;

  // Where this lane's row of an ldmatrix or stmatrix of 16 rows by 32 bytes lies, `unit` times 16
  // bytes from the left.
  __device__ __forceinline__ uint32_t matrix(const Consumer& me, int part, int unit) const {
    const int swizzle = kRowBytes == 128 ? me.lane & 7 : me.lane >> 1 & 3;
    return at + (part * 64 + me.warp * 16 + (me.lane & 15)) * kRowBytes +
           (((unit + (me.lane >> 4)) ^ swizzle) << 4);
  }
};

// bias_of(group): of this lane's two columns.
template <int kGroups, int kParts, int kCount, typename BiasOf>
__device__ __forceinline__ void add_bias(float (&acc)[kParts][kCount], int first,
                                         const BiasOf& bias_of) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float2 b = bias_of(group);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float* const x = &acc[part][(first + group) * 4];
      x[0] += b.x;
      x[1] += b.y;
      x[2] += b.x;
      x[3] += b.y;
    }
  }
}

// The same after a multiplication with each column's scale.
template <int kGroups, int kParts, int kCount, typename ScaleOf, typename BiasOf>
__device__ __forceinline__ void scale_and_add_bias(float (&acc)[kParts][kCount], int first,
                                                   const ScaleOf& scale_of, const BiasOf& bias_of) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float2 b = bias_of(group), s = scale_of(group);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float* const x = &acc[part][(first + group) * 4];
      x[0] = fmaf(x[0], s.x, b.x);
      x[1] = fmaf(x[1], s.y, b.y);
      x[2] = fmaf(x[2], s.x, b.x);
      x[3] = fmaf(x[3], s.y, b.y);
    }
  }
}

// Adds a box of 16-bit elements.
template <typename T, int kRowBytes, int kParts, int kCount>
__device__ __forceinline__ void add_box(float (&acc)[kParts][kCount], int first, Box<kRowBytes> box,
                                        const Consumer& me) {
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int group = 0; group < kRowBytes / 16; group += 2) {
      uint32_t r[4];
      load_matrices(box.matrix(me, part, group), r[0], r[1], r[2], r[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack2<T>(r[i]);
        acc[part][(first + group) * 4 + i * 2] += v.x;
        acc[part][(first + group) * 4 + i * 2 + 1] += v.y;
      }
    }
}

// Fills a box of 16-bit elements.
template <typename T, int kRowBytes, int kParts, int kCount>
__device__ __forceinline__ void fill_box(const float (&acc)[kParts][kCount], int first,
                                         Box<kRowBytes> box, const Consumer& me) {
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int group = 0; group < kRowBytes / 16; group += 2) {
      const float* const x = &acc[part][(first + group) * 4];
      store_matrices(box.matrix(me, part, group), pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                     pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
    }
}

// Fills a box of 64 columns of e4m3, in the order of narrow.cuh.
template <int kParts, int kCount>
__device__ __forceinline__ void fill_box_e4m3(const float (&acc)[kParts][kCount], int first,
                                              Box<64> box, const Consumer& me) {
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int unit = 0; unit < 4; unit += 2) {
      const float* const x = &acc[part][(first + unit * 2) * 4];
      store_matrices(box.matrix(me, part, unit), pack_e4m3(x[0], x[1], x[4], x[5]),
                     pack_e4m3(x[2], x[3], x[6], x[7]), pack_e4m3(x[8], x[9], x[12], x[13]),
                     pack_e4m3(x[10], x[11], x[14], x[15]));
    }
}

// x = f(x).
template <int kGroups, int kParts, int kCount, typename F>
__device__ __forceinline__ void apply(float (&acc)[kParts][kCount], int first, const F& f) {
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) acc[part][first * 4 + i] = f(acc[part][first * 4 + i]);
}

// Moments of a cluster's rows, in shared memory [kCluster, kRows]: every block writes its own into
// every block. A set is used anew for every second tile: a block may be one tile ahead of its
// peers, never two.
template <int kCluster, int kRows>
struct ClusterMoments {
  static constexpr int kBytes = kCluster * kRows * 8;
  uint32_t at, arrived;  // the set's barrier
  int rank;

  struct Peer {
    uint32_t at, arrived;
    __device__ __forceinline__ void give(int row, Moments m) const {
      store_remote(at + row * 8, arrived, m.mean, m.squares);
    }
  };

  // By one thread of a block.
  __device__ __forceinline__ void expect() const { barrier_expect(arrived, kBytes); }
  __device__ __forceinline__ Peer peer(int block) const {
    return {in_block(at, block) + rank * kRows * 8, in_block(arrived, block)};
  }
  __device__ __forceinline__ void wait(uint32_t parity) const {
    barrier_wait_cluster(arrived, parity);
  }
  // Of a whole row, of which each block holds `columns`.
  __device__ __forceinline__ Moments whole(int row, int columns) const {
    return total<kCluster>(
        [&](int block) { return load_shared_pair(at + (block * kRows + row) * 8); },
        static_cast<float>(columns));
  }
};

}  // namespace ft::cuda::sm90
