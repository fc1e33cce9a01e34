// Mean and sum of squared deviations of rows whose elements are spread over threads, in parts that
// are merged by Chan, Golub and LeVeque's pairwise update ("Updating formulae and a pairwise
// algorithm for computing sample variances", 1979): nothing cancels.
#pragma once

#include "kernels/cuda/reductions.cuh"

namespace ft::cuda {

struct Moments {
  float mean, squares;
};

__device__ __forceinline__ Moments moments_of(float x, float y) {
  const float apart = x - y;
  return {0.5f * (x + y), 0.5f * apart * apart};
}

// Of two sets of `count` elements each.
__device__ __forceinline__ Moments merged(Moments a, Moments b, float count) {
  const float apart = a.mean - b.mean;
  return {0.5f * (a.mean + b.mean), fmaf(apart * apart, 0.5f * count, a.squares + b.squares)};
}

__device__ __forceinline__ Moments from_lane(Moments m, int mask) {
  return {__shfl_xor_sync(0xFFFFFFFFu, m.mean, mask),
          __shfl_xor_sync(0xFFFFFFFFu, m.squares, mask)};
}

// Merges the rows of v with those of the lane at `mask`: each lane keeps one half of them.
template <int kHalf>
__device__ __forceinline__ void fold(Moments* v, int lane, int mask, float count) {
  const bool upper = (lane & mask) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Moments kept = upper ? v[i + kHalf] : v[i], given = upper ? v[i] : v[i + kHalf];
    v[i] = merged(kept, from_lane(given, mask), count);
  }
}

// Of kSets sets of `count` elements each; get(set): a float2 of mean and squares.
template <int kSets, typename Get>
__device__ __forceinline__ Moments total(const Get& get, float count) {
  Moments each[kSets], whole{0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const float2 pair = get(i);
    each[i] = {pair.x, pair.y};
    whole.mean += pair.x;
    whole.squares += pair.y;
  }
  whole.mean *= 1.f / kSets;
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const float apart = each[i].mean - whole.mean;
    whole.squares = fmaf(count * apart, apart, whole.squares);
  }
  return whole;
}

}  // namespace ft::cuda
