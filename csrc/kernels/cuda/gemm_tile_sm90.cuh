// What a consumer warpgroup of the sm_90 GEMM kernel (gemm_sm90.cuh) makes of a tile.
//
// The tile leaves in chunks of 64 columns, through buffers that the copy engine stores from while
// the next chunk is made; a residual's chunks come in through the same buffers, the first of them
// during the product.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "kernels/cuda/gemm_epilogue_sm90.cuh"
#include "kernels/cuda/gemm_ring_sm90.cuh"
#include "kernels/cuda/gemm_sm90_variants.h"

namespace ft::cuda::sm90 {

// What plain and norm variants have in common: vectors of the tile's columns, and chunks.
template <typename T, typename Config, typename In, typename Out>
struct TileEpilogue {
  static constexpr int kN = Config::kN, kParts = Config::kRows / 64;
  static constexpr int kChunks = Config::kChunks, kBuffers = Config::kBuffers;
  static constexpr bool kScaled = sizeof(In) == 1, kNarrow = sizeof(Out) == 1;
  using Accumulators = float[kParts][kN / 2];

  const GemmParameters& p;
  const CUtensorMap& residual_map;
  const CUtensorMap& output_map;
  const Ring<Config::kStages, Config::kStageBytes>& ring;
  Consumer me;
  int rank;                 // of the block in its cluster
  uint32_t passed = 0;      // chunks that went through the buffers
  uint32_t tiles = 0;       // so far
  int row = 0, column = 0;  // where this warpgroup's tile begins
  uint32_t vectors[Config::kVectors] = {};

  // Before the product. Vectors come from far away: asked for here, put down after it.
  __device__ __forceinline__ void begin(int first_row, int first_column) {
    row = first_row;
    column = first_column;
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) vectors[v] = 0;
    const int mine = column + 2 * me.thread;
    if (me.thread < kN / 2 && (Config::kNorm || mine < p.n)) {
      if (p.bias != nullptr) vectors[0] = pair_at<T>(p.bias, mine);
      if constexpr (Config::kNorm) {
        vectors[1] = pair_at<T>(p.gamma, mine);
        vectors[2] = pair_at<T>(p.beta, mine);
      }
    }
    if constexpr (kScaled) {
      // No thread reads the last tile's scales any more, so these need no registers to wait in.
      const int four = me.thread * 4;
      if (four < kN && column + four < p.n)
        fetch_shared_four(scales_at() + four * 4, p.scale + column + four);
    }
    if (p.residual && me.leads()) {
      store_wait_read<0>();
      for (int chunk = 0; chunk < min(kBuffers, kChunks); ++chunk)
        load_residual(chunk, (passed + chunk) % kBuffers);
    }
  }

  __device__ __forceinline__ uint32_t vectors_at() const {
    return ring.base + Config::kVectorsAt + me.index * Config::kVectors * kN * 2;
  }
  __device__ __forceinline__ uint32_t scales_at() const {
    if constexpr (kScaled) {
      return ring.base + Config::kScalesAt + me.index * kN * 4;
    } else {
      return 0;
    }
  }

  __device__ __forceinline__ void put_vectors() const {
    if (me.thread < kN / 2) {
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v)
        store_shared(vectors_at() + v * kN * 2 + me.thread * 4, vectors[v]);
    }
    if constexpr (kScaled) fetch_wait();
    me.meet();
  }

  // A vector's elements (0: bias, 1: gamma, 2: beta) for this lane's columns of a group.
  __device__ __forceinline__ float2 vector(int v, int group) const {
    return unpack2<T>(load_shared(vectors_at() + v * kN * 2 + group * 16 + (me.lane & 3) * 4));
  }

  __device__ __forceinline__ uint32_t buffer_at(int buffer) const {
    return ring.base + Config::kStagingAt + (me.index * kBuffers + buffer) * Config::kChunkBytes;
  }
  __device__ __forceinline__ uint32_t filled(int buffer) const {
    return ring.further(me.index * kBuffers + buffer);
  }

  // By the leader.
  __device__ __forceinline__ void load_residual(int chunk, int buffer) const {
    barrier_expect(filled(buffer), Config::kChunkBytes);
    load_box(buffer_at(buffer), &residual_map, column + chunk * 64, row, filled(buffer));
  }

  __device__ __forceinline__ void add_residual(Accumulators& acc, int chunk, int buffer) const {
    barrier_wait(filled(buffer), passed / kBuffers & 1);
    add_box<T>(acc, chunk * 8, Box<128>{buffer_at(buffer)}, me);
  }

  // To the accumulators of chunk `place`.
  __device__ __forceinline__ void add_column_bias(Accumulators& acc, int place, int chunk) const {
    const auto bias_of = [&](int group) { return vector(0, chunk * 8 + group); };
    if constexpr (kScaled) {
      const auto scale_of = [&](int group) {
        return load_shared_pair(scales_at() + (chunk * 8 + group) * 32 + (me.lane & 3) * 8);
      };
      scale_and_add_bias<8>(acc, place * 8, scale_of, bias_of);
    } else {
      add_bias<8>(acc, place * 8, bias_of);
    }
  }

  // Waits until a buffer that was stored from may be written.
  __device__ __forceinline__ void await_buffer() const {
    if (me.leads()) store_wait_read<kBuffers - 1>();
    me.meet();
  }

  // The accumulators of chunk `place`.
  __device__ __forceinline__ void send(const Accumulators& acc, int place, int chunk,
                                       int buffer) const {
    if constexpr (kNarrow) {
      fill_box_e4m3(acc, place * 8, Box<64>{buffer_at(buffer)}, me);
    } else {
      fill_box<T>(acc, place * 8, Box<128>{buffer_at(buffer)}, me);
    }
    async_proxy_fence();
    me.meet();
    if (me.leads()) {
      store_box(buffer_at(buffer), &output_map, column + chunk * 64, row);
      store_commit();
    }
  }
};

// output = activation(acc + bias + residual).
template <typename T, typename Config, bool kButGelu, typename In>
struct PlainEpilogue : TileEpilogue<T, Config, In, T> {
  using Tile = TileEpilogue<T, Config, In, T>;
  using Tile::kBuffers, Tile::kChunks, Tile::p, Tile::passed;

  __device__ __forceinline__ void run(typename Tile::Accumulators& acc) {
    this->put_vectors();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk, ++passed) {
      const int buffer = passed % kBuffers;
      this->add_column_bias(acc, chunk, chunk);
      if (p.residual) this->add_residual(acc, chunk, buffer);
      if constexpr (kButGelu) {
        activate_but_gelu(p.activation, [&](auto&& f) { apply<8>(acc, chunk * 8, f); });
      } else if (p.gelu) {
        apply<8>(acc, chunk * 8, [](float x) { return gelu<T>(x); });
      }
      if (!p.residual) this->await_buffer();
      this->send(acc, chunk, chunk, buffer);
      if (this->me.leads() && p.residual && chunk + kBuffers < kChunks) {
        store_wait_read<0>();
        this->load_residual(chunk + kBuffers, buffer);
      }
    }
  }
};

// output = gelu(acc + bias) in e4m3.
template <typename T, typename Config, typename In>
struct NarrowGeluEpilogue : TileEpilogue<T, Config, In, __nv_fp8_e4m3> {
  using Tile = TileEpilogue<T, Config, In, __nv_fp8_e4m3>;
  using Tile::kBuffers, Tile::kChunks, Tile::kN, Tile::kParts, Tile::p, Tile::passed;
  // Large tiles' chunks are made by the same code, each moved to the first one's registers: a code
  // three times as long waited for its instructions a quarter of its time.
  static constexpr bool kRolled = kParts * kChunks > 4;

  __device__ __forceinline__ void run(typename Tile::Accumulators& acc) {
    const GeluInSteps gelu(__ldg(p.out_scale));
    this->put_vectors();
#pragma unroll(kRolled ? 1 : kChunks)
    for (int chunk = 0; chunk < kChunks; ++chunk, ++passed) {
      const int place = kRolled ? 0 : chunk;
      this->add_column_bias(acc, place, chunk);
      apply<8>(acc, place * 8, gelu);
      this->await_buffer();
      this->send(acc, place, chunk, passed % kBuffers);
      if constexpr (kRolled) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < kN / 2 - 32; ++i) acc[part][i] = acc[part][i + 32];
      }
    }
  }
};

// output = layer norm(acc + bias + residual), of rows that lie across the cluster; of e4m3 operands
// an e4m3 copy too, where it is asked for.
template <typename T, typename Config, typename In>
struct NormEpilogue : TileEpilogue<T, Config, In, T> {
  using Tile = TileEpilogue<T, Config, In, T>;
  using Tile::kBuffers, Tile::kChunks, Tile::kN, Tile::kParts, Tile::p, Tile::passed, Tile::tiles;
  using Tile::me;
  static constexpr int kCluster = Config::kCluster, kRows = Config::kRows;
  using Exchange = ClusterMoments<kCluster, kRows>;
  struct RowNorm {
    float mean, scale;
  };

  __device__ __forceinline__ void run(typename Tile::Accumulators& acc) {
    this->put_vectors();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk, ++passed) {
      const int buffer = passed % kBuffers;
      this->add_column_bias(acc, chunk, chunk);
      if (p.residual) {
        this->add_residual(acc, chunk, buffer);
        if (chunk + kBuffers < kChunks) {
          me.meet();
          if (me.leads()) this->load_residual(chunk + kBuffers, buffer);
        }
      }
    }
    RowNorm rows[kParts][2];
    measure_rows(acc, rows);
    float units = 0.f;
    if constexpr (Tile::kScaled) {
      if (p.narrow != nullptr) units = reciprocal(__ldg(p.out_scale));
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      normalize(acc, chunk, rows);
      if constexpr (Tile::kScaled) {
        if (p.narrow != nullptr) write_narrow(acc, chunk, units);
      }
      // Chunks leave in the ring's order, starting where the residual's chunks will start next.
      const int buffer = (passed + chunk) % kBuffers;
      if (!p.residual || chunk >= kBuffers) this->await_buffer();
      this->send(acc, chunk, chunk, buffer);
    }
    ++tiles;
  }

 private:
  // In the tile, of this thread's elements: `half` says which eight of a warp's sixteen.
  __device__ __forceinline__ int row_of(int part, int half) const {
    return part * 64 + me.warp * 16 + half * 8 + me.lane / 4;
  }

  __device__ __forceinline__ void measure_rows(const typename Tile::Accumulators& acc,
                                               RowNorm (&rows)[kParts][2]) const {
    Moments mine[kParts][2];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = half * 2; i < kN / 2; i += 4) sum += acc[part][i] + acc[part][i + 1];
        const float mean = quad_sum(sum) * (1.f / kN);
#pragma unroll
        for (int i = half * 2; i < kN / 2; i += 4) {
          const float x = acc[part][i] - mean, y = acc[part][i + 1] - mean;
          squares = fmaf(x, x, fmaf(y, y, squares));
        }
        mine[part][half] = {mean, quad_sum(squares)};
      }
    const int set = me.index * 2 + (tiles & 1);
    const Exchange exchange{this->ring.base + Config::kStatsAt + set * Exchange::kBytes,
                            this->ring.further(Config::kConsumers * kBuffers + set), this->rank};
    if (me.leads()) exchange.expect();
#pragma unroll
    for (int block = me.lane & 3; block < kCluster; block += 4) {
      const auto peer = exchange.peer(block);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) peer.give(row_of(part, half), mine[part][half]);
    }
    exchange.wait(tiles / 2 & 1);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Moments whole = exchange.whole(row_of(part, half), kN);
        rows[part][half] = {whole.mean, rsqrtf(whole.squares * (1.f / (kN * kCluster)) + p.eps)};
      }
  }

  __device__ __forceinline__ void normalize(typename Tile::Accumulators& acc, int chunk,
                                            const RowNorm (&rows)[kParts][2]) const {
#pragma unroll
    for (int group = chunk * 8; group < chunk * 8 + 8; ++group) {
      const float2 gamma = this->vector(1, group), beta = this->vector(2, group);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const x = &acc[part][group * 4 + half * 2];
          const RowNorm& row = rows[part][half];
          x[0] = fmaf((x[0] - row.mean) * row.scale, gamma.x, beta.x);
          x[1] = fmaf((x[1] - row.mean) * row.scale, gamma.y, beta.y);
        }
    }
  }

  // Straight from registers, a quad 64 bytes of a row at a time: in shared memory there is no room
  // for a second chunk, and nobody waits for these stores.
  __device__ __forceinline__ void write_narrow(const typename Tile::Accumulators& acc, int chunk,
                                               float units) const {
    auto* const to =
        static_cast<uint8_t*>(p.narrow) + this->column + chunk * 64 + (me.lane & 3) * 16;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const x = &acc[part][(chunk * 4 + i) * 8 + half * 2];
          w[i] = pack_e4m3(x[0] * units, x[1] * units, x[4] * units, x[5] * units);
        }
        turn_quad(w, me.lane);
        const int row = this->row + row_of(part, half);
        if (row < p.rows)
          *reinterpret_cast<uint4*>(to + static_cast<size_t>(row) * p.n) =
              make_uint4(w[0], w[1], w[2], w[3]);
      }
  }
};

template <typename T, typename Config, bool kButGelu, typename In, typename Out>
using EpilogueOf =
    std::conditional_t<Config::kNorm, NormEpilogue<T, Config, In>,
                       std::conditional_t<sizeof(Out) == 1, NarrowGeluEpilogue<T, Config, In>,
                                          PlainEpilogue<T, Config, kButGelu, In>>>;

}  // namespace ft::cuda::sm90
