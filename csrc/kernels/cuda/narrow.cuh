// Numbers in e4m3 as they leave kernels: conversion and the order in which products read them.
//
// Within each 16 columns, place 4 q + {0, 1, 2, 3} holds columns {2 q, 2 q + 1, 8 + 2 q, 9 + 2 q}:
// what thread q of a quad holds of two neighbouring groups of eight accumulators, so that a product
// and attention write whole words. Weights lie in the same order along K.
#pragma once

#include "kernels/cuda/common.cuh"

namespace ft::cuda {

// Eight neighbouring columns a thread, in steps of `1 / inverse`; the whole warp takes part, and
// threads 2 i and 2 i + 1 hold the halves of 16. Returns what goes to this thread's own eight
// bytes.
__device__ __forceinline__ uint2 narrow_eight(const float (&x)[8], float inverse) {
  const uint32_t low = pack_e4m3(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse);
  const uint32_t high = pack_e4m3(x[4] * inverse, x[5] * inverse, x[6] * inverse, x[7] * inverse);
  const bool second = threadIdx.x % 2 == 1;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? low : high, 1);
  const uint32_t first_half = second ? other : low, second_half = second ? high : other;
  return make_uint2(__byte_perm(first_half, second_half, 0x5410),
                    __byte_perm(first_half, second_half, 0x7632));
}

// This thread's copy of eight columns that begin at `at`, a place in [rows, width], where asked
// for.
struct NarrowWriter {
  uint8_t* rows;
  float inverse;

  __device__ __forceinline__ explicit NarrowWriter(const NarrowRows& narrow)
      : rows(static_cast<uint8_t*>(narrow.rows)),
        inverse(narrow.rows == nullptr ? 0.f : 1.f / *narrow.step) {}

  // The whole warp calls it, with `inside` false where a thread has no columns.
  __device__ __forceinline__ void write(int64_t at, const float (&x)[8], bool inside) const {
    if (rows == nullptr) return;
    const uint2 bytes = narrow_eight(x, inverse);
    if (inside) *reinterpret_cast<uint2*>(rows + at) = bytes;
  }
};

}  // namespace ft::cuda
