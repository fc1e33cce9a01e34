// What the sm_90 GEMM kernels have in common: a ring of operand tiles in shared memory that a
// producer thread keeps full of bulk tensor copies, and the product that consumer warpgroups take
// from it.
//
// An operand's tile has rows of 128 bytes of K, swizzled, so a block of K is 64 elements of 16 bits
// or 128 of 8, and a matrix instruction takes 32 bytes of it whatever the type.
#pragma once

#include "kernels/cuda/gemm_wgmma.cuh"
#include "kernels/cuda/ptx_sm90.cuh"

namespace ft::cuda::sm90 {

// A stage of the ring and the parity of its fills.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Two barriers a stage: the bytes that have come, and the readers that are through with them.
// Barriers of the kernel's own lie behind.
template <int kStages_, int kStageBytes_>
struct Ring {
  static constexpr int kStages = kStages_, kStageBytes = kStageBytes_;
  uint32_t base, barriers;

  __device__ __forceinline__ uint32_t stage(int s) const { return base + s * kStageBytes; }
  __device__ __forceinline__ uint32_t full(int s) const { return barriers + 8 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers + 8 * (kStages + s); }
  __device__ __forceinline__ uint32_t further(int b) const {
    return barriers + 8 * (2 * kStages + b);
  }

  // By one thread. `readers`: arrivals that free a stage; `furthers`: barriers behind, of one each.
  __device__ __forceinline__ void init(int readers, int furthers) const {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), 1);
      barrier_init(empty(s), readers);
    }
    for (int b = 0; b < furthers; ++b) barrier_init(further(b), 1);
    barrier_init_fence();
  }
};

// Pieces of work [first, end) in steps, each some blocks of K: begin_of(piece) to end_of(piece).
template <typename Begin, typename End>
struct Pieces {
  int first, end, step;
  Begin begin_of;
  End end_of;
};
template <typename Begin, typename End>
Pieces(int, int, int, Begin, End) -> Pieces<Begin, End>;

// The producer, one thread of those that call it, the block's first warpgroup:
// load_weight(piece, block, stage) and load_input(piece, block, stage) for all blocks of all
// pieces. Weights need no predecessor: the first ring of them is fetched before the wait for the
// kernels before this one.
template <typename Ring, typename Pieces, typename LoadWeight, typename LoadInput>
__device__ __forceinline__ void produce(const Ring& ring, const Pieces& pieces,
                                        const LoadWeight& load_weight,
                                        const LoadInput& load_input) {
  if (same(threadIdx.x / 32) != 0 || !elected()) return;
  const int first = pieces.first;
  int ahead =
      first < pieces.end ? min(Ring::kStages, pieces.end_of(first) - pieces.begin_of(first)) : 0;
  for (int s = 0; s < ahead; ++s) {
    barrier_expect(ring.full(s), Ring::kStageBytes);
    load_weight(first, pieces.begin_of(first) + s, s);
  }
  wait_for_predecessors();
  Place<Ring::kStages> place;
  for (int piece = first; piece < pieces.end; piece += pieces.step) {
    const int end = pieces.end_of(piece);
    for (int block = pieces.begin_of(piece); block < end; ++block) {
      if (ahead > 0) {
        --ahead;
      } else {
        barrier_wait(ring.empty(place.stage), place.phase ^ 1);
        barrier_expect(ring.full(place.stage), Ring::kStageBytes);
        load_weight(piece, block, place.stage);
      }
      load_input(piece, block, place.stage);
      place.advance();
    }
  }
}

// acc = a b^T over the next `blocks` blocks, by a warpgroup; returns the stage of the last, which
// is still read. a_at(stage), b_at(stage): where the operands' rows begin; parts of `acc` are 64
// rows of a apart. Stages are released as they have been read.
template <int kN, typename T, int kParts, typename Ring, typename A, typename B, typename Release>
__device__ __forceinline__ int multiply(float (&acc)[kParts][kN / 2], const Ring& ring,
                                        Place<Ring::kStages>& place, int blocks, const A& a_at,
                                        const B& b_at, const Release& release) {
  int previous = 0, accumulate = 0;
  for (; blocks > 0; --blocks) {
    barrier_wait(ring.full(place.stage), place.phase);
    const uint32_t a = a_at(place.stage), b = b_at(place.stage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        Wgmma<kN, T>::run(acc[part], operand(a, part * 8192 + step * 32), operand(b, step * 32),
                          accumulate | step);
    wgmma_commit();
    if (accumulate) {
      wgmma_wait<1>();
      release(previous);
    }
    accumulate = 1;
    previous = place.stage;
    place.advance();
  }
  return previous;
}

// Waits for the products. The compiler does not know that they end here: no use of acc may move
// above.
template <int kParts, int kCount>
__device__ __forceinline__ void finish(float (&acc)[kParts][kCount]) {
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[part][i])::"memory");
}

}  // namespace ft::cuda::sm90
