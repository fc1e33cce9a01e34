// How the few-token kernels cut their work and where it lies in shared memory: what plans, launcher
// and kernels agree on. No CUDA headers, so that plans are tested where there is no toolkit.
#pragma once

namespace ft::cuda::small {

constexpr int kChunk = 64;  // columns of K a step holds: 128 bytes, one swizzled row
constexpr int kChunkBytes = 128;
constexpr int kTileAlign = 1024;              // eight rows: the period of the swizzle
constexpr int kMostSharedBytes = 227 * 1024;  // a block may have on sm_90
constexpr int kMaxSplit = 8;                  // largest portable cluster
constexpr int kMaxParts = 32;                 // moments a row: one lane each
constexpr int kMaxStages = 16;

// What a GEMM reads and makes.
enum Kind {
  kNorm,       // LN(x) W^T + b, from input = x * gamma
  kNormGelu,   // gelu of the same
  kResidual,   // input W^T + b + LN(residual), and its moments
  kAttention,  // the same with input = attention(qkv)
  kKinds
};

constexpr bool ends_branch(int kind) { return kind == kResidual || kind == kAttention; }

// Part of a GEMM's output that a block makes: rows of tokens by columns of the weight, divided
// among warpgroups; `step` columns are one matrix instruction. `serves`: the kinds that some plan
// asks it for (csrc/tests/small_plan_test.cpp); no other kernel is compiled.
struct Tile {
  int rows, columns, groups_m, groups_n, step;
  bool serves[kKinds];

  constexpr int threads() const { return 128 * groups_m * groups_n; }
};

constexpr Tile kTiles[] = {
    {64, 32, 1, 1, 32, {true, true, true, true}},
    {64, 48, 1, 1, 48, {true, true, true, true}},
    {64, 64, 1, 2, 32, {true, true, true, true}},
    {64, 96, 1, 2, 48, {false, true, true, true}},
    // Of measured plans alone: no estimate is made where more than 64 rows have work.
    {128, 48, 2, 1, 48, {true, false, false, false}},
    {128, 64, 2, 1, 32, {false, true, true, false}},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(Tile);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Floats from one row of partial sums to the next: 8 or 24 mod 32 keeps stores off one bank.
constexpr int pitch(int columns) { return columns + 8; }

// The numbers of one GEMM [tokens, k] x [n, k]^T.
struct GemmSizes {
  int tokens, n, k, batch;
  int parts, part_width, width;  // of moments
  int split, stages;
  int held_rows;     // of a tile's rows, those that are copied; what follows is never used
  int key_capacity;  // rows of K and V held in shared memory, a multiple of 32
  int longest;       // sequence that cu_seqlens may hold
  int head_dim;
};

// Byte offsets in dynamic shared memory.
struct GemmLayout {
  int barrier, released, bounds, bias, gamma, beta, next_gamma, residual, moments, affine,
      affine_parts, sequences;
  int weight, input, keys, sums, total;

  constexpr GemmLayout(int kind, int tile_rows, int tile_columns, const GemmSizes& p)
      : barrier(0) {  // sums, affine parts, weights, then an input's stages
    const int chunks = (p.k / kChunk + p.split - 1) / p.split;
    const int rows = tile_rows < p.tokens ? tile_rows : p.tokens;
    const int share = (rows + p.split - 1) / p.split;  // most rows a block finishes
    const bool last = ends_branch(kind);
    const int vector = 2 * (last ? tile_columns : chunks * kChunk);
    released = barrier + 8 * (3 + kMaxStages);
    bounds = 256;
    bias = bounds + (kind == kAttention ? tile_rows * 8 : 0);
    gamma = bias + 2 * tile_columns;
    beta = gamma + vector;
    next_gamma = beta + vector;
    residual = next_gamma + (last ? vector : 0);
    moments = residual + (last ? share * tile_columns * 2 : 0);
    affine = moments + share * round_up(p.parts, 2) * 8;
    affine_parts = affine + (last ? 0 : 2 * tile_columns * 4);
    sequences = affine_parts + (last ? 0 : p.split * 2 * tile_columns * 4);
    weight = round_up(sequences + (kind == kAttention ? 4 * (p.batch + 1) : 0), kTileAlign);
    input = weight + chunks * tile_columns * kChunkBytes;
    // A product reads whole tiles, past what is held of the last one.
    keys = input + (p.stages * p.held_rows + tile_rows - p.held_rows) * kChunkBytes;
    sums = keys + (kind == kAttention ? 2 * chunks * p.key_capacity * kChunkBytes : 0);
    // What other blocks finish leaves from where weights and inputs were.
    const int sent = weight + (p.split > 1 ? rows * pitch(tile_columns) * 4 : 0);
    if (sums < sent) sums = sent;
    total = sums + p.split * share * pitch(tile_columns) * 4;
  }
};

}  // namespace ft::cuda::small
