// Attention over many tiles of sequences over 64, head sizes 32, 64 and 128, fp16 and bf16.
//
// One block stays on each multiprocessor. Its warpgroups form teams of one or two, 64 query rows of
// one head a warpgroup, and each team has a warp that fetches for it: queries, and keys and values
// in blocks of 64 through a ring of bulk tensor copies, which runs on into the team's next tile
// while the last one is finished. Tiles are taken from a queue, longest first. Four warpgroups in
// different phases keep the tensor cores and the exponentials busy; within one, the values' product
// of a block and the scores of the next are in flight together.

#include <algorithm>
#include <climits>

#include "kernels/cuda/attention_sm90.cuh"

namespace ft::cuda {
namespace {

using namespace attention;

// Above this, the sum of a thread's exponentials of a row in a block of keys, a block's scores ask
// for another shift: half precision ends at 2^16.
constexpr float kMostSum = 4096.f;
// And above this one they are left to be taken once more.
constexpr float kHugeSum = 1e30f;

enum class Softened { kAsBefore, kShifted, kNot };

// A block of teams of `kGroups` warpgroups, and a warpgroup whose warps fetch for them. One
// warpgroup a team is for sequences of at most 128.
template <int kDim, int kWarpgroups>
struct Teams : Layout<kDim> {
  using Layout<kDim>::kTileBytes;
  static constexpr int kGroups = kWarpgroups;
  static constexpr int kTeamThreads = 128 * kGroups;
  static constexpr int kTeams = (kDim == 128 ? 2 : 4) / kGroups;
  // Of a block of so many teams, at most kTeams.
  static constexpr int threads(int teams) { return teams * kTeamThreads + 128; }
  static constexpr int kThreads = threads(kTeams);
  // Registers a thread that computes and one that fetches: together what the launch allots.
  static constexpr int kRegisters = kDim == 128 ? 240 : 112;
  static constexpr int kFetchRegisters = kDim == 128 ? 24 : 32;
  static constexpr int kStages = kGroups == 1 ? 2 : kDim == 32 ? 8 : kDim == 64 ? 5 : 4;
  // A team's memory: queries of two tiles, keys, values; then barriers and the tiles. Swizzled
  // tiles begin at multiples of 1,024 bytes.
  static constexpr int kKeysAt = 2 * kGroups * kTileBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kTeamBytes = kBarriersAt + 1024;
  static_assert((3 * kStages + 6) * 8 <= 448);
  static_assert(kTeams * kTeamBytes <= 227 * 1024);
};

// Addresses of a team's shared memory.
template <typename Blocks>
struct TeamMemory {
  uint32_t tiles, barriers;
  __device__ __forceinline__ TeamMemory(uint32_t base, int team)
      : tiles(base + team * Blocks::kTeamBytes), barriers(tiles + Blocks::kBarriersAt) {}
  // The team's tile, and the next.
  __device__ __forceinline__ uint32_t work(uint32_t turn) const {
    return barriers + 448 + 32 * turn;
  }
  // Of each four threads of a warpgroup, what is known of their two rows.
  __device__ __forceinline__ uint32_t rows() const { return barriers + 512; }
  // Of the tiles at even and at odd turns.
  __device__ __forceinline__ uint32_t work_full(int turn) const { return barriers + 24 * turn; }
  __device__ __forceinline__ uint32_t query_full(int turn) const {
    return barriers + 24 * turn + 8;
  }
  __device__ __forceinline__ uint32_t query_free(int turn) const {
    return barriers + 24 * turn + 16;
  }
  __device__ __forceinline__ uint32_t key_full(int stage) const {
    return barriers + 48 + 8 * stage;
  }
  __device__ __forceinline__ uint32_t value_full(int stage) const {
    return key_full(Blocks::kStages + stage);
  }
  __device__ __forceinline__ uint32_t released(int stage) const {
    return key_full(2 * Blocks::kStages + stage);
  }
  __device__ __forceinline__ uint32_t queries(int turn, int group) const {
    return tiles + (turn * Blocks::kGroups + group) * Blocks::kTileBytes;
  }
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return tiles + Blocks::kKeysAt + stage * Blocks::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const {
    return tiles + Blocks::kValuesAt + stage * Blocks::kTileBytes;
  }
};

// A place in the ring, and in which of its rounds.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t round = 0;
  __device__ __forceinline__ Place ahead(int places) const {
    const uint32_t to = stage + places;
    return {static_cast<int>(to % kStages), (round + to / kStages) % 2};
  }
  // At most a round ahead.
  __device__ __forceinline__ Place next(int places = 1) const {
    const int to = stage + places;
    const bool wrap = to >= kStages;
    return {wrap ? to - kStages : to, round ^ (wrap ? 1u : 0u)};
  }
};

// The 64 rows of a warpgroup: rows `first` to `last` - 1 of them are the tile's.
struct GroupRows {
  int begin, first, last;
};

// Whether two warpgroups take blocks of keys in turn, for rows that are one's.
template <int kGroups>
__device__ __forceinline__ bool shares(const AttentionTile& tile) {
  return kGroups == 2 && tile.rows <= kGroupRows && tile.kv_len > kKeys;
}

// Rows of a tile that do not fill a warpgroup's 64 stand at the beginning of its first warp in even
// heads and so that they end in its last one in odd heads: warps without rows, which have less to
// do, then are not always the same.
__device__ __forceinline__ GroupRows group_rows(const AttentionTile& tile, int group, int head) {
  const int rows = min(tile.rows - group * kGroupRows, kGroupRows);
  const int first = head % 2 == 0 ? 0 : (kGroupRows - rows) / 16 * 16;
  return {tile.begin + group * kGroupRows - first, first, first + rows};
}

// Fetches for a team, one thread: takes tiles off the queue and leaves each beside its queries'
// barrier, one without rows after the last.
template <typename Blocks, int kDim, int kGroups>
__device__ __forceinline__ void fetch_tiles(const CUtensorMap* map,
                                            const AttentionArguments& arguments,
                                            const TeamMemory<Blocks>& memory, uint32_t fetchers,
                                            uint32_t index, AttentionTile tile) {
  const int heads = arguments.num_heads, hidden = heads * kDim;
  const uint32_t total = arguments.bound * heads;
  Place<Blocks::kStages> place;
  Place<2> turn;
  for (bool first = true;; first = false, turn = turn.next()) {
    const int head = index % heads;
    // The second tile is everyone's own too, the shorter the longer the first was.
    uint32_t next = 2 * fetchers - 1 - index;
    if (!first && tile.rows > 0) next = 2 * fetchers + atomicAdd(&arguments.queue->taken, 1u);
    barrier_wait(memory.query_free(turn.stage), turn.round ^ 1);
    const uint32_t work = memory.work(turn.stage), query_full = memory.query_full(turn.stage);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(work), "r"(tile.begin),
                 "r"(tile.rows), "r"(tile.kv_begin), "r"(tile.kv_len)
                 : "memory");
    store_shared(work + 16, head);
    barrier_arrive(memory.work_full(turn.stage));
    if (tile.rows == 0) break;
    if (tile.kv_len == 0) barrier_arrive(query_full);
    const int groups = tile.kv_len == 0 ? 0 : kGroups == 2 && tile.rows > kGroupRows ? 2 : 1;
    if (groups > 0) barrier_expect(query_full, groups * Blocks::kTileBytes);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      copy_tile<kDim>(memory.queries(turn.stage, group), map, head * kDim,
                      group_rows(tile, group, head).begin, query_full);
    }
#pragma unroll 1
    for (int key = 0; key < tile.kv_len; key += kKeys) {
      const int row = tile.kv_begin + key;
      barrier_wait(memory.released(place.stage), place.round ^ 1);
      barrier_expect(memory.key_full(place.stage), Blocks::kTileBytes);
      copy_tile<kDim>(memory.keys(place.stage), map, hidden + head * kDim, row,
                      memory.key_full(place.stage));
      barrier_expect(memory.value_full(place.stage), Blocks::kTileBytes);
      copy_tile<kDim>(memory.values(place.stage), map, 2 * hidden + head * kDim, row,
                      memory.value_full(place.stage));
      place = place.next();
    }
    index = next;
    tile = index < total ? arguments.plan[index / heads] : AttentionTile{};
  }
  // The last to find the queue empty leaves it as it was.
  if (atomicInc(&arguments.queue->done, fetchers - 1) == fetchers - 1) arguments.queue->taken = 0;
}

// The tile that was fetched for this team. The lane that will tell the fetcher that it may write
// the next one reads it: of the others racecheck does not see that they have read before.
__device__ __forceinline__ AttentionTile fetched_tile(uint32_t work, int* head) {
  AttentionTile tile{INT_MIN, INT_MIN, INT_MIN, INT_MIN};
  int its_head = INT_MIN;
  if (threadIdx.x % 32 == 0) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.begin), "=r"(tile.rows), "=r"(tile.kv_begin), "=r"(tile.kv_len)
                 : "r"(work)
                 : "memory");
    its_head = static_cast<int>(load_shared(work + 16));
  }
  *head = same(its_head);
  return {same(tile.begin), same(tile.rows), same(tile.kv_begin), same(tile.kv_len)};
}

// A warpgroup's part of all of its team's tiles.
template <typename T, int kDim, int kGroups>
__device__ __forceinline__ void attend(const AttentionArguments& arguments,
                                       const TeamMemory<Teams<kDim, kGroups>>& memory, int team,
                                       int group, int warp) {
  using L = Teams<kDim, kGroups>;
  const int lane = threadIdx.x % 32;
  const int hidden = arguments.num_heads * kDim;
  const float scale = arguments.scale_log2;
  const auto arrive = [&](uint32_t barrier, int arrivals) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier, arrivals);
  };
  // Reads the tile again, so that less of it takes registers meanwhile.
  const auto write = [&](uint32_t work, const RowSums<kDim>& output, float sum0, float sum1) {
    int head;
    const AttentionTile tile = fetched_tile(work, &head);
    const GroupRows rows = group_rows(tile, shares<kGroups>(tile) ? 0 : group, head);
    const int first = rows.first - 16 * warp, end = rows.last - 16 * warp;
    const int64_t at = static_cast<int64_t>(rows.begin + 16 * warp) * hidden + head * kDim;
    if (arguments.narrow.rows != nullptr) {
      write_narrow_rows<kDim>(output, sum0, sum1, arguments.narrow, at, hidden, first, end);
    } else {
      RowWords<kDim, 8> words;
      divide_rows<T, kDim>(words, output, sum0, sum1);
      write_rows(words, static_cast<T*>(arguments.output) + at, 2 * hidden, first, end);
    }
  };
  Place<L::kStages> place;
  Place<2> turn;
  for (;; turn = turn.next()) {
    barrier_wait(memory.work_full(turn.stage), turn.round);
    int head;
    const AttentionTile tile = fetched_tile(memory.work(turn.stage), &head);
    if (tile.rows == 0) return;
    if (tile.kv_len == 0) {
      arrive(memory.query_free(turn.stage), 1);
      fill_either<T>(tile, arguments, head, kDim, hidden, threadIdx.x % L::kTeamThreads,
                     L::kTeamThreads);
      continue;
    }
    const int blocks = (tile.kv_len + kKeys - 1) / kKeys;
    const bool shared = shares<kGroups>(tile);
    const int own_group = shared ? 0 : group, step = shared ? 2 : 1;
    const int first_block = shared ? group : 0;
    const Place<L::kStages> end = place.ahead(blocks);
    const auto release = [&](const Place<L::kStages>& at) {
      arrive(memory.released(at.stage), step);
    };
    place = place.next(first_block);
    const int last_block = blocks - 1 - ((blocks - 1 - first_block) & (step - 1));

    float scores[8][4];
    float output[L::kHalves][L::kColumns / 8][4];
    uint32_t probabilities[4][4];
    // Rows that are not the tile's may be a neighbour's: they never ask for rescaling, which 16
    // rows share. A warp of such rows alone has no exponentials to take.
    const GroupRows rows = group_rows(tile, own_group, head);
    const int row = 16 * warp + lane / 4;
    const bool live = 16 * warp < rows.last && 16 * warp + 16 > rows.first;
    // What the exponents are shifted by, in powers of two: a maximum of earlier blocks.
    float top0 = rows.first <= row && row < rows.last ? -INFINITY : INFINITY;
    float top1 = rows.first <= row + 8 && row + 8 < rows.last ? -INFINITY : INFINITY;
    float sum0 = 0.f, sum1 = 0.f;
    auto start_scores = [&](const Place<L::kStages>& at) {
      barrier_wait(memory.key_full(at.stage), at.round);
      const uint32_t key_tile = memory.keys(at.stage);
      wgmma_fence();
      issue_scores<T, kDim>(scores, memory.queries(turn.stage, own_group), key_tile);
    };
    // Scores to exponentials, of the last block of keys those alone that there are, in steps of 16.
    auto visit = [&]<bool kLast>(int keys, auto&& each) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (kLast && n % 2 == 0 && 8 * n >= keys) break;
        each(n);
      }
    };
    auto complete = [&]<bool kLast>(int keys) {
      if constexpr (kLast) {
        visit.template operator()<kLast>(keys, [&](int n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + lane % 4 * 2 + i >= keys) scores[n][i] = scores[n][2 + i] = -INFINITY;
          }
        });
      }
    };
    float shrink0 = 1.f, shrink1 = 1.f;
    // The usual way: by a shift from before, which serves as well as the maximum as long as no
    // exponential is too large for half precision. Larger ones are brought down by the power of two
    // that they exceed 1 by, and shrink is what brings down the rest; what single precision does
    // not hold either is left to the other way.
    auto soften = [&]<bool kLast>(int keys) {
      float part0 = 0.f, part1 = 0.f;
      complete.template operator()<kLast>(keys);
      visit.template operator()<kLast>(
          keys, [&](int n) { exponentials(scores[n], scale, top0, top1, part0, part1); });
      if (!__any_sync(0xffffffffu, part0 > kMostSum || part1 > kMostSum)) {
        sum0 += part0, sum1 += part1;
        return Softened::kAsBefore;
      }
      if (!__all_sync(0xffffffffu, part0 < kHugeSum && part1 < kHugeSum)) return Softened::kNot;
      float most0 = 1.f, most1 = 1.f;
      visit.template operator()<kLast>(keys, [&](int n) {
        most0 = fmaxf(most0, fmaxf(scores[n][0], scores[n][1]));
        most1 = fmaxf(most1, fmaxf(scores[n][2], scores[n][3]));
      });
      const int power0 = (__float_as_int(quad_max(most0)) >> 23) - 127;
      const int power1 = (__float_as_int(quad_max(most1)) >> 23) - 127;
      shrink0 = __int_as_float((127 - power0) << 23);
      shrink1 = __int_as_float((127 - power1) << 23);
      visit.template operator()<kLast>(keys, [&](int n) {
        scores[n][0] *= shrink0, scores[n][1] *= shrink0;
        scores[n][2] *= shrink1, scores[n][3] *= shrink1;
      });
      sum0 = (sum0 + part0) * shrink0, sum1 = (sum1 + part1) * shrink1;
      top0 += static_cast<float>(power0), top1 += static_cast<float>(power1);
      return Softened::kShifted;
    };
    // The way of the first block, and of one whose scores are larger by far than those before:
    // returns whether what there is is to be rescaled, by how much in shrink.
    bool settled = false;
    auto soften_by_maximum = [&]<bool kLast>(int keys) {
      float new0 = -INFINITY, new1 = -INFINITY;
      complete.template operator()<kLast>(keys);
      visit.template operator()<kLast>(keys, [&](int n) {
        new0 = fmaxf(new0, fmaxf(scores[n][0], scores[n][1]));
        new1 = fmaxf(new1, fmaxf(scores[n][2], scores[n][3]));
      });
      new0 = fmaxf(top0, quad_max(new0) * scale);
      new1 = fmaxf(top1, quad_max(new1) * scale);
      const bool rescale = __any_sync(0xffffffffu, new0 > top0 || new1 > top1);
      // As long as all scores are minus infinity nothing is to be shifted.
      const float shift0 = new0 == -INFINITY ? 0.f : new0, shift1 = new1 == -INFINITY ? 0.f : new1;
      if (rescale) {
        shrink0 = power_of_two(top0 - shift0);
        shrink1 = power_of_two(top1 - shift1);
        sum0 *= shrink0, sum1 *= shrink1;
      }
      top0 = new0, top1 = new1;
      settled = !__any_sync(0xffffffffu, top0 == -INFINITY || top1 == -INFINITY);
      visit.template operator()<kLast>(
          keys, [&](int n) { exponentials(scores[n], scale, shift0, shift1, sum0, sum1); });
      return rescale;
    };
    // Takes this warp's scores once more, since those that were there have become exponentials.
    auto repeat_scores = [&](uint32_t key_tile) {
      const uint32_t query_tile = memory.queries(turn.stage, own_group);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
      }
#pragma unroll 1
      for (int k = 0; k < kDim / 16; ++k) {
        const int half = k / 4 * L::kHalfBytes;
        uint32_t a[4], b[4];
        load_matrices(
            query_tile + half + swizzled<L::kLine>(16 * warp + lane % 16, k % 4 * 2 + lane / 16),
            a[0], a[1], a[2], a[3]);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          load_matrices(
              key_tile + half +
                  swizzled<L::kLine>(8 * n + lane % 8 + lane / 16 * 8, k % 4 * 2 + lane / 8 % 2),
              b[0], b[1], b[2], b[3]);
          mma<T>(scores[n], a, b[0], b[1]);
          mma<T>(scores[n + 1], a, b[2], b[3]);
        }
      }
    };
    // The scores of a block and the values' product of the one before are in flight together; the
    // exponentials overlap the latter.
    const int keys = min(tile.kv_len - last_block * kKeys, kKeys);  // of the last block
    Place<L::kStages> next = place;
    barrier_wait(memory.query_full(turn.stage), turn.round);
    start_scores(place);
    wgmma_wait<0>();
    for (int block = first_block;; block += step) {
      const bool first = block == first_block, last = block == last_block;
      bool rescale = false;
      if (live) {
        Softened how = Softened::kNot;
        if (settled) {
          how = last ? soften.template operator()<true>(keys)
                     : soften.template operator()<false>(kKeys);
          if (how == Softened::kNot) repeat_scores(memory.keys(next.stage));
          rescale = how == Softened::kShifted;
        }
        if (how == Softened::kNot) {
          rescale = last ? soften_by_maximum.template operator()<true>(keys)
                         : soften_by_maximum.template operator()<false>(kKeys);
        }
      }
      // This block's values are wanted next. Waiting for them here also keeps the compiler from
      // moving the wait below above the exponentials: it schedules freely only within a basic
      // block.
      barrier_wait(memory.value_full(next.stage), next.round);
      wgmma_wait<0>();
      if (!first) {
        release(place);
        if (rescale) scale_rows<kDim>(output, shrink0, shrink1);
      }
      pack_probabilities<T>(probabilities, scores);
      place = next;
      if (last) break;
      next = place.next(step);
      start_scores(next);
      issue_values<T, kDim>(output, probabilities, memory.values(place.stage), kKeys, !first);
      wgmma_wait<1>();
    }
    if (keys % 16 != 0) clear_values<kDim>(memory.values(place.stage), keys, 5 + threadIdx.x / 128);
    issue_values<T, kDim>(output, probabilities, memory.values(place.stage), keys,
                          last_block > first_block);
    sum0 = quad_sum(sum0);
    sum1 = quad_sum(sum1);
    wgmma_wait<0>();
    release(place);
    place = end;
    if (shared) {
      // The second's part goes through the queries' memory, which both are done with, to the first.
      const uint32_t part = memory.queries(turn.stage, 0) + threadIdx.x % 128 * 16;
      const uint32_t part_rows = memory.rows() + threadIdx.x % 128 / 4 * 16;
      constexpr int kFours = kDim / 8;
      if (group == 1) {
        named_barrier(9 + team, 256);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          store_shared_four(part + i * 2048, output[i / 8][i % 8]);
        }
        if (lane % 4 == 0) store_shared_four(part_rows, {top0, top1, sum0, sum1});
        async_proxy_fence();
        named_barrier_arrive(11 + team, 256);
        arrive(memory.query_free(turn.stage), 1);
        continue;
      }
      named_barrier_arrive(9 + team, 256);
      named_barrier(11 + team, 256);
      const float4 other = load_shared_four(part_rows);
      const float new0 = fmaxf(top0, other.x), new1 = fmaxf(top1, other.y);
      const float own0 = power_of_two(top0 - new0), own1 = power_of_two(top1 - new1);
      const float part0 = power_of_two(other.x - new0), part1 = power_of_two(other.y - new1);
      sum0 = sum0 * own0 + other.z * part0;
      sum1 = sum1 * own1 + other.w * part1;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 four = load_shared_four(part + i * 2048);
        float (&x)[4] = output[i / 8][i % 8];
        x[0] = x[0] * own0 + four.x * part0, x[1] = x[1] * own0 + four.y * part0;
        x[2] = x[2] * own1 + four.z * part1, x[3] = x[3] * own1 + four.w * part1;
      }
      async_proxy_fence();
    }
    write(memory.work(turn.stage), output, sum0, sum1);
    arrive(memory.query_free(turn.stage), 1);
  }
}

template <typename T, int kDim, int kGroups>
__global__ void __launch_bounds__(Teams<kDim, kGroups>::kThreads, 1)
    sm90_attention_kernel(const __grid_constant__ CUtensorMap map,
                          const AttentionArguments arguments) {
  using L = Teams<kDim, kGroups>;
  // Swizzled copies and wgmma want 1,024-byte alignment, which the start of shared memory has.
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = sm90::shared_address(shared);
  pdl_launch_dependents();
  const int warp = same(threadIdx.x / 32);
  const int teams = (blockDim.x - 128) / L::kTeamThreads;
  if (warp < teams && threadIdx.x % 32 == 0) {
    if (warp == 0) prefetch_map(&map);
    const TeamMemory<L> memory(base, warp);
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      barrier_init(memory.work_full(turn), 1);
      barrier_init(memory.query_full(turn), 1);
      barrier_init(memory.query_free(turn), 4 * kGroups);
    }
#pragma unroll
    for (int stage = 0; stage < L::kStages; ++stage) {
      barrier_init(memory.key_full(stage), 1);
      barrier_init(memory.value_full(stage), 1);
      barrier_init(memory.released(stage), 4 * kGroups);
    }
    barrier_init_fence();
  }
  pdl_wait();
  // The first tile is everyone's own, spread over the multiprocessors.
  const int fetcher = warp - teams * 4 * kGroups;
  const uint32_t index = fetcher * gridDim.x + blockIdx.x;
  AttentionTile tile{};
  if (fetcher >= 0 && index < static_cast<uint32_t>(arguments.bound * arguments.num_heads)) {
    tile = arguments.plan[index / arguments.num_heads];
  }
  __syncthreads();
  if (fetcher >= 0) {
    give_registers<L::kFetchRegisters>();
    if (fetcher < teams && elected()) {
      fetch_tiles<L, kDim, kGroups>(&map, arguments, TeamMemory<L>(base, fetcher),
                                    gridDim.x * teams, index, tile);
    }
  } else {
    take_registers<L::kRegisters>();
    const int team = warp / (4 * kGroups), group = warp / 4 % kGroups;
    attend<T, kDim, kGroups>(arguments, TeamMemory<L>(base, team), team, group, warp % 4);
  }
}

template <typename T, int kDim, int kGroups>
cudaError_t launch_teams(const CUtensorMap& map, const AttentionArguments& arguments,
                         Launch launch) {
  using L = Teams<kDim, kGroups>;
  const int64_t tiles = static_cast<int64_t>(arguments.bound) * arguments.num_heads;
  // Few tiles take small blocks, which start sooner.
  const int64_t blocks = std::min<int64_t>(tiles, device_sms());
  const auto teams = static_cast<int>(std::min<int64_t>((tiles + blocks - 1) / blocks, L::kTeams));
  return launch_kernel(sm90_attention_kernel<T, kDim, kGroups>, static_cast<unsigned>(blocks),
                       L::threads(teams), L::kTeams * L::kTeamBytes, launch, map, arguments);
}

template <typename T>
cudaError_t dispatch_teams(const CUtensorMap& map, const AttentionArguments& arguments,
                           int tile_rows, Launch launch) {
  const bool one = tile_rows == kGroupRows;
  switch (arguments.head_dim) {
    case 32:
      return one ? launch_teams<T, 32, 1>(map, arguments, launch)
                 : launch_teams<T, 32, 2>(map, arguments, launch);
    case 64:
      return one ? launch_teams<T, 64, 1>(map, arguments, launch)
                 : launch_teams<T, 64, 2>(map, arguments, launch);
    default:
      return launch_teams<T, 128, 2>(map, arguments, launch);
  }
}

}  // namespace

cudaError_t attention_teams_sm90(const CUtensorMap& map, const AttentionArguments& arguments,
                                 DType dtype, int tile_rows, Launch launch) {
  return dtype == DType::kFloat16
             ? dispatch_teams<__half>(map, arguments, tile_rows, launch)
             : dispatch_teams<__nv_bfloat16>(map, arguments, tile_rows, launch);
}

}  // namespace ft::cuda
