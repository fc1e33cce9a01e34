// Attention with wgmma and bulk tensor copies (sm_90a), fp16 and bf16, head sizes 32, 64 and 128:
// sequences of at most 64, packed, and longer ones that have a bias or whose tiles all run at once.
// The others are for attention_teams_sm90.cu.

#include "kernels/cuda/attention_sm90.cuh"

namespace ft::cuda {
namespace {

using namespace attention;

template <typename T>
constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;

// Shared memory of a block of `kGroups` warpgroups: queries, the rings of keys and of values,
// barriers, the bias. One warpgroup is for sequences of at most 128.
template <int kDim, int kGroups, bool kBiased>
struct FewTiles : Layout<kDim> {
  using Layout<kDim>::kTileBytes;
  using Bias = BiasTable<(kGroups == 1 ? 128 : kMostBiasReach) + kBiasMargin, 128 * kGroups>;
  static constexpr int kStages = kGroups == 1 ? 2 : kDim == 32 ? 8 : kBiased ? 5 : 6;
  // Thread blocks on a multiprocessor: four warpgroups share its registers, two of the largest
  // heads.
  static constexpr int kResident = (kDim == 128 ? 2 : 4) / kGroups;
  static constexpr int kKeysAt = kGroups * kTileBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kBiasAt = kBarriersAt + 256;
  static constexpr int kSharedBytes = kBiasAt + (kBiased ? Bias::kBytes : 0);
  static_assert((2 * kStages + 1) * 8 + kStages * 4 <= 256);
};

// Few tiles: a block takes up to 128 query rows of one head, 64 a warpgroup, and reads the keys and
// values of the sequence in blocks of 64, most often all requested at the start. It starts sooner
// than blocks that stay, which have a next tile to prepare.
template <typename T, int kDim, int kGroups, bool kBiased>
__global__ void __launch_bounds__(128 * kGroups, FewTiles<kDim, kGroups, kBiased>::kResident)
    sm90_few_tiles_kernel(const __grid_constant__ CUtensorMap map,
                          const AttentionArguments arguments) {
  using L = FewTiles<kDim, kGroups, kBiased>;
  // Swizzled copies and wgmma want 1,024-byte alignment, which the start of shared memory has.
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = sm90::shared_address(shared);
  const uint32_t query_full = base + L::kBarriersAt;
  const uint32_t key_full = query_full + 8, value_full = key_full + 8 * L::kStages;
  const uint32_t released = value_full + 8 * L::kStages;
  const uint32_t key_tiles = base + L::kKeysAt, value_tiles = base + L::kValuesAt;

  pdl_launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_map(&map);
    for (int i = 0; i < 2 * L::kStages + 1; ++i) barrier_init(query_full + 8 * i, 1);
    for (int i = 0; i < L::kStages; ++i) {
      asm volatile("st.shared.u32 [%0], 0;" ::"r"(released + 4 * i) : "memory");
    }
    barrier_init_fence();
  }
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  const typename L::Bias bias{reinterpret_cast<float*>(shared + L::kBiasAt), arguments.bias_span};
  typename L::Bias::template Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  const int hidden = arguments.num_heads * kDim;
  if (tile.kv_len == 0) {
    return fill_either<T>(tile, arguments, head, kDim, hidden, threadIdx.x, blockDim.x);
  }
  if constexpr (kBiased) bias.store(bias_loaded);
  __syncthreads();

  const int blocks = (tile.kv_len + kKeys - 1) / kKeys;
  auto request = [&](int block, uint32_t barriers, uint32_t tiles, int column) {
    const int stage = block % L::kStages;
    const uint32_t barrier = barriers + 8 * stage;
    barrier_expect(barrier, L::kTileBytes);
    copy_tile<kDim>(tiles + stage * L::kTileBytes, &map, column + head * kDim,
                    tile.kv_begin + block * kKeys, barrier);
  };
  const int active_groups = kGroups == 2 && tile.rows > kGroupRows ? 2 : 1;
  if (threadIdx.x == 0) {
    barrier_expect(query_full, active_groups * L::kTileBytes);
    copy_tile<kDim>(base, &map, head * kDim, tile.begin, query_full);
    if (active_groups == 2) {
      copy_tile<kDim>(base + L::kTileBytes, &map, head * kDim, tile.begin + kGroupRows, query_full);
    }
    for (int block = 0; block < min(blocks, L::kStages); ++block) {
      request(block, key_full, key_tiles, hidden);
      request(block, value_full, value_tiles, 2 * hidden);
    }
  }
  const int group = kGroups == 1 ? 0 : threadIdx.x / 128;
  if (group >= active_groups) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  unsigned char* query_tile = shared + group * L::kTileBytes;
  uint32_t query[kDim / 16][4];
  barrier_wait(query_full, 0);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    load_matrices(query[k], query_tile + k / 4 * L::kHalfBytes +
                                swizzled<L::kLine>(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
  }

  float scores[8][4];
  RowSums<kDim> output = {};
  uint32_t probabilities[4][4];
  // Rows past the tile's end may be a neighbour's: they never ask for rescaling, which 16 rows
  // share.
  const int row = group * kGroupRows + 16 * warp + lane / 4;
  float max0 = row < tile.rows ? -INFINITY : INFINITY;
  float max1 = row + 8 < tile.rows ? -INFINITY : INFINITY;
  float sum0 = 0.f, sum1 = 0.f;
  const float scale = arguments.scale_log2;
  auto start_scores = [&](int stage, int parity) {
    barrier_wait(key_full + 8 * stage, parity);
    const uint32_t key_tile = key_tiles + stage * L::kTileBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply_keys<T>(scores, query[k],
                       descriptor<L::kLine>(key_tile, k / 4 * L::kHalfBytes + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  auto start_values = [&](int stage, int keys) {
    const uint32_t value_tile = value_tiles + stage * L::kTileBytes;
    if (keys % 16 != 0) clear_values<kDim>(value_tile, keys, 1 + group);
    issue_values<T, kDim>(output, probabilities, value_tile, keys, true);
  };
  // Scores to exponentials. A shift that is too small by up to 2^8 serves as well as the maximum,
  // so that rescaling is rare; returns whether it is due, by how much in shrink. With a bias maxima
  // are of powers of two, without one they are of the products.
  const float unit = kBiased ? 1.f : scale;
  float shift0 = 0.f, shift1 = 0.f, shrink0 = 1.f, shrink1 = 1.f;
  auto soften = [&](int block) {
    const int keys = min(tile.kv_len - block * kKeys, kKeys);
    float factor = scale, constant = 0.f;
    if constexpr (kBiased) {
      const int distance =
          tile.kv_begin + block * kKeys - (tile.begin + group * kGroupRows + 16 * warp);
      if (!bias.is_constant(distance, kKeys, &constant)) {
        const float2* pairs = bias.pairs(distance);
#pragma unroll
        for (int n = 0; n < 8; ++n) add_bias(scores[n], pairs, n, scale);
        factor = 1.f;
      }
    }
    if (keys < kKeys) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * n + lane % 4 * 2 + i >= keys) scores[n][i] = scores[n][2 + i] = -INFINITY;
        }
      }
    }
    float new0 = kBiased ? -INFINITY : max0, new1 = kBiased ? -INFINITY : max1;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      new0 = fmaxf(new0, fmaxf(scores[n][0], scores[n][1]));
      new1 = fmaxf(new1, fmaxf(scores[n][2], scores[n][3]));
    }
    new0 = quad_max(new0);
    new1 = quad_max(new1);
    if constexpr (kBiased) {
      new0 = fmaxf(max0, fmaf(new0, factor, constant));
      new1 = fmaxf(max1, fmaf(new1, factor, constant));
    }
    const bool grown = (new0 - max0) * unit > 8.f || (new1 - max1) * unit > 8.f;
    const bool rescale = __any_sync(0xffffffffu, grown);
    if (rescale) {
      // As long as all scores are minus infinity nothing is to be shifted.
      shift0 = new0 == -INFINITY ? 0.f : new0 * unit;
      shift1 = new1 == -INFINITY ? 0.f : new1 * unit;
      shrink0 = power_of_two(max0 * unit - shift0);
      shrink1 = power_of_two(max1 * unit - shift1);
      max0 = new0, max1 = new1;
      sum0 *= shrink0, sum1 *= shrink1;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      exponentials(scores[n], factor, shift0 - constant, shift1 - constant, sum0, sum1);
    }
    return rescale;
  };
  auto rescale_output = [&] { scale_rows<kDim>(output, shrink0, shrink1); };
  start_scores(0, 0);
  wgmma_wait<0>();
  soften(0);
  pack_probabilities<T>(probabilities, scores);
  barrier_wait(value_full, 0);
  // The scores of a block and the values' product of the one before are in flight together; the
  // exponentials overlap the latter.
  int stage = 0, parity = 0;  // of the values that are next
  for (int block = 1; block < blocks; ++block) {
    const bool wrap = stage == L::kStages - 1;
    const int key_stage = wrap ? 0 : stage + 1, key_parity = parity ^ (wrap ? 1 : 0);
    start_scores(key_stage, key_parity);
    start_values(stage, kKeys);
    wgmma_wait<1>();
    const bool rescale = soften(block);
    // This block's values are wanted next. Waiting for them here also keeps the compiler from
    // moving the wait below above the exponentials: it schedules freely only within a basic block.
    barrier_wait(value_full + 8 * key_stage, key_parity);
    wgmma_wait<0>();
    if (block - 1 + L::kStages < blocks && lane == 0) {
      // The last warp done with a stage asks for its next contents.
      const uint32_t all = 4 * active_groups;
      if (count_up(released + 4 * stage) % all == all - 1) {
        request(block - 1 + L::kStages, key_full, key_tiles, hidden);
        request(block - 1 + L::kStages, value_full, value_tiles, 2 * hidden);
      }
    }
    if (rescale) rescale_output();
    pack_probabilities<T>(probabilities, scores);
    stage = key_stage, parity = key_parity;
  }
  start_values(stage, tile.kv_len - (blocks - 1) * kKeys);
  wgmma_wait<0>();
  const int first = group * kGroupRows + 16 * warp, rows = tile.rows - first;
  const int64_t at = static_cast<int64_t>(tile.begin + first) * hidden + head * kDim;
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  if (arguments.narrow.rows != nullptr)
    return write_narrow_rows<kDim>(output, sum0, sum1, arguments.narrow, at, hidden, 0, rows);
  RowWords<kDim, 8> words;
  divide_rows<T, kDim>(words, output, sum0, sum1);
  write_rows(words, static_cast<T*>(arguments.output) + at, 2 * hidden, 0, rows);
}

// Puts zeros in place of infinities and NaNs in the first `rows` rows of a packed tile's values;
// returns which rows had any, a bit each. `flags` is a word per warp.
template <typename T, int kDim>
__device__ __forceinline__ uint64_t make_finite(unsigned char* value_tile, uint32_t* flags,
                                                int rows) {
  using L = Layout<kDim>;
  static_assert(L::kHalves == 1);
  // Two threads a row, so that a warp's votes are 16 rows.
  const int row = threadIdx.x / 2;
  bool spoilt = false;
  for (int piece = threadIdx.x % 2; row < rows && piece < kDim / 8; piece += 2) {
    auto* words = reinterpret_cast<uint32_t*>(value_tile + swizzled<L::kLine>(row, piece));
    for (int i = 0; i < 4; ++i) {
      const uint32_t finite = finite_or_zero<T>(words[i]);
      spoilt |= finite != words[i];
      words[i] = finite;
    }
  }
  const uint32_t votes = __ballot_sync(0xffffffffu, spoilt);
  if (threadIdx.x % 32 == 0) flags[threadIdx.x / 32] = votes | votes >> 1;  // even bits
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t found = 0;
  for (int r = 0; r < 64; ++r) {
    found |= static_cast<uint64_t>(flags[r / 16] >> r % 16 * 2 & 1) << r;
  }
  return found;
}

// Queries, keys, values, two barriers, a flag a warp.
template <int kDim>
constexpr int kPackedBytes = 3 * Layout<kDim>::kTileBytes + 32;
using PackedBias = BiasTable<64, 128>;

// Sequences of at most 64: whole ones, several to a tile of 64 rows, a warpgroup per tile and head.
template <typename T, int kDim, bool kBiased>
__global__ void __launch_bounds__(128, 6)
    sm90_packed_attention_kernel(const __grid_constant__ CUtensorMap map,
                                 const AttentionArguments arguments) {
  using L = Layout<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t query_tile = sm90::shared_address(shared);
  const uint32_t key_tile = query_tile + L::kTileBytes, value_tile = key_tile + L::kTileBytes;
  const uint32_t scores_ready = value_tile + L::kTileBytes, values_ready = scores_ready + 8;
  pdl_launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_map(&map);
    barrier_init(scores_ready, 1);
    barrier_init(values_ready, 1);
    barrier_init_fence();
  }
  const int head = blockIdx.x % arguments.num_heads, index = blockIdx.x / arguments.num_heads;
  const int hidden = arguments.num_heads * kDim;
  const PackedBias bias{reinterpret_cast<float*>(shared + kPackedBytes<kDim>), 64};
  PackedBias::Loaded<T> bias_loaded;
  if constexpr (kBiased) bias_loaded = bias.template load<T>(arguments, head);
  pdl_wait();
  const AttentionTile tile = arguments.plan[index];
  if (tile.rows == 0) return;
  if (tile.kv_len == 0) {
    return fill_either<T>(tile, arguments, head, kDim, hidden, threadIdx.x, 128);
  }
  if (threadIdx.x == 0) {
    barrier_expect(scores_ready, 2 * L::kTileBytes);
    copy_tile<kDim>(query_tile, &map, head * kDim, tile.begin, scores_ready);
    copy_tile<kDim>(key_tile, &map, hidden + head * kDim, tile.begin, scores_ready);
    barrier_expect(values_ready, L::kTileBytes);
    copy_tile<kDim>(value_tile, &map, 2 * hidden + head * kDim, tile.begin, values_ready);
  }
  // One bit per key of the tile: which this thread's two rows see. Rows past the end see none.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = 16 * warp + lane / 4;
  const uint32_t* bounds = plan_bounds(arguments.plan, arguments.bound) + tile.begin;
  auto own_keys = [&](int r) -> uint64_t {
    const uint32_t bound = r < tile.rows ? bounds[r] : 0;
    const uint32_t low = bound & 0xffff, length = (bound >> 16) - low;
    return length == 0 ? 0 : ~0ull >> (64 - length) << low;
  };
  // Bit 8 n + i is this thread's column i of group n.
  const uint64_t visible0 = own_keys(row) >> (lane % 4 * 2);
  const uint64_t visible1 = own_keys(row + 8) >> (lane % 4 * 2);
  if constexpr (kBiased) bias.store(bias_loaded);
  __syncthreads();

  float scores[8][4];
  barrier_wait(scores_ready, 0);
  wgmma_fence();
  issue_scores<T, kDim>(scores, query_tile, key_tile);
  wgmma_wait<0>();
  if constexpr (kBiased) {
    const float2* pairs = bias.pairs(-16 * warp);
#pragma unroll
    for (int n = 0; n < 8; ++n) add_bias(scores[n], pairs, n, arguments.scale_log2);
  }
  float max0 = -INFINITY, max1 = -INFINITY;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const auto word0 = static_cast<uint32_t>(visible0 >> (n / 4 * 32));
    const auto word1 = static_cast<uint32_t>(visible1 >> (n / 4 * 32));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((word0 & 1u << (n % 4 * 8 + i)) == 0) scores[n][i] = -INFINITY;
      if ((word1 & 1u << (n % 4 * 8 + i)) == 0) scores[n][2 + i] = -INFINITY;
      max0 = fmaxf(max0, scores[n][i]);
      max1 = fmaxf(max1, scores[n][2 + i]);
    }
  }
  max0 = quad_max(max0);
  max1 = quad_max(max1);
  const float scale = kBiased ? 1.f : arguments.scale_log2;
  float sum0 = 0.f, sum1 = 0.f;
  uint32_t probabilities[4][4];
  const float shift0 = max0 == -INFINITY ? 0.f : max0 * scale;
  const float shift1 = max1 == -INFINITY ? 0.f : max1 * scale;
#pragma unroll
  for (int n = 0; n < 8; ++n) exponentials(scores[n], scale, shift0, shift1, sum0, sum1);
  pack_probabilities<T>(probabilities, scores);
  float output[L::kHalves][L::kColumns / 8][4];
  barrier_wait(values_ready, 0);
  if (tile.rows % 16 != 0) clear_values<kDim>(value_tile, tile.rows, 1);
  issue_values<T, kDim>(output, probabilities, value_tile, tile.rows, false);
  wgmma_wait<0>();
  sum0 = quad_sum(sum0);
  sum1 = quad_sum(sum1);
  RowWords<kDim, 8> words;
  divide_rows<T, kDim>(words, output, sum0, sum1);
  uint32_t probe0 = 0, probe1 = 0;
#pragma unroll
  for (int n = 0; n < L::kColumns / 8; ++n) {
    probe_finite<T>(probe0, words[0][n]);
    probe_finite<T>(probe1, words[1][n]);
  }
  const bool finite = (row >= tile.rows || probed_finite(probe0)) &&
                      (row + 8 >= tile.rows || probed_finite(probe1));
  // From here on all warps have read their queries: the rows may be written over.
  if (!__syncthreads_and(finite)) [[unlikely]] {
    // Rows whose own values are not finite become NaN, the others what they are alone.
    const uint64_t spoilt = make_finite<T, kDim>(
        shared + 2 * L::kTileBytes, reinterpret_cast<uint32_t*>(shared + 3 * L::kTileBytes + 16),
        tile.rows);
    if ((own_keys(row) & spoilt) != 0) sum0 = NAN;
    if ((own_keys(row + 8) & spoilt) != 0) sum1 = NAN;
    issue_values<T, kDim>(output, probabilities, value_tile, tile.rows, false);
    wgmma_wait<0>();
    divide_rows<T, kDim>(words, output, sum0, sum1);
  }
  const int64_t at = static_cast<int64_t>(tile.begin + 16 * warp) * hidden + head * kDim;
  const int rows = tile.rows - 16 * warp;
  if (arguments.narrow.rows != nullptr)
    return write_narrow_rows<kDim>(output, sum0, sum1, arguments.narrow, at, hidden, 0, rows);
  write_rows(words, static_cast<T*>(arguments.output) + at, 2 * hidden, 0, rows);
}

template <typename T, int kDim>
cudaError_t launch_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                        Launch launch) {
  using L = Layout<kDim>;
  CUtensorMap map;
  const CUresult result = encode_tensor_map(&map, kDType<T>, arguments.qkv, arguments.tokens,
                                            3 * arguments.num_heads * kDim, 64, L::kColumns,
                                            CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  if (result == CUDA_ERROR_NOT_SUPPORTED) return cudaErrorNotSupported;
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  const int64_t tiles = static_cast<int64_t>(choice.bound) * arguments.num_heads;
  const auto grid = static_cast<unsigned>(tiles);
  return with_or_without_bias(arguments, [&]<bool kBiased>() {
    const auto few = [&]<int kGroups>() {
      using Few = FewTiles<kDim, kGroups, kBiased>;
      return !kBiased && tiles > Few::kResident * device_sms()
                 ? attention_teams_sm90(map, arguments, kDType<T>, choice.tile_rows, launch)
                 : launch_kernel(sm90_few_tiles_kernel<T, kDim, kGroups, kBiased>, grid,
                                 128 * kGroups, Few::kSharedBytes, launch, map, arguments);
    };
    if constexpr (kDim <= 64) {
      if (choice.kernel == AttentionKernel::kPackedSm90) {
        return launch_kernel(sm90_packed_attention_kernel<T, kDim, kBiased>, grid, 128,
                             kPackedBytes<kDim> + (kBiased ? PackedBias::kBytes : 0), launch, map,
                             arguments);
      }
      if (choice.tile_rows == kGroupRows) return few.template operator()<1>();
    }
    return few.template operator()<2>();
  });
}

template <typename T>
cudaError_t dispatch_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                          Launch launch) {
  switch (arguments.head_dim) {
    case 32:
      return launch_sm90<T, 32>(choice, arguments, launch);
    case 64:
      return launch_sm90<T, 64>(choice, arguments, launch);
    case 128:
      return launch_sm90<T, 128>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_sm90(const AttentionChoice& choice, const AttentionArguments& arguments,
                           DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat16:
      return dispatch_sm90<__half>(choice, arguments, launch);
    case DType::kBFloat16:
      return dispatch_sm90<__nv_bfloat16>(choice, arguments, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ft::cuda
