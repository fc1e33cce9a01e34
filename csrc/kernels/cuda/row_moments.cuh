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

// (mean, 1 / deviation) of a row of `width` columns, in every one of the kLanes neighbouring lanes
// that share it. The row was cut into `parts`, at most kMost, of `part_width` columns, the last one
// narrower; part(i) gives the i-th one's mean and sum of squared deviations (Chan, Golub and
// LeVeque 1979).
template <int kLanes, int kMost, typename Part>
__device__ __forceinline__ float2 row_norm(Part&& part, int parts, int part_width, int width,
                                           float eps) {
  constexpr int kEach = kMost / kLanes;
  float2 each[kEach];
  float count[kEach], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kLanes + threadIdx.x % kLanes;
    each[i] = at < parts ? part(at) : make_float2(0.f, 0.f);
    count[i] = at < parts ? min(part_width, width - at * part_width) : 0;
    sum += count[i] * each[i].x;
  }
  const float inverse_width = 1.f / width;
  const float mean = lane_sum<kLanes>(sum) * inverse_width;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float apart = each[i].x - mean;
    squares += each[i].y + count[i] * apart * apart;
  }
  return make_float2(mean, rsqrtf(lane_sum<kLanes>(squares) * inverse_width + eps));
}

}  // namespace ft::cuda
