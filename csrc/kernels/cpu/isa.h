// What one instruction set provides: serial functions over ranges, scheduled by dispatch.cpp.
#pragma once

#include "kernels/cpu/kernels.h"

namespace ft::cpu {

inline constexpr float kLog2E = 1.44269504f;  // exponentials are powers of two

// K of an int8 product is cut into as many slices as kMostSlice demands, as equal as multiples of
// 64 allow. Inlined always, like size_of.
inline constexpr int64_t kMostSlice = 512;
__attribute__((always_inline)) constexpr int64_t slice_length(int64_t k) {
  const int64_t slices = (k + kMostSlice - 1) / kMostSlice;
  return ((k + slices - 1) / slices + 63) / 64 * 64;
}
__attribute__((always_inline)) constexpr int64_t slice_count(int64_t k) {
  return (k + kMostSlice - 1) / kMostSlice;
}

// Activations rounded to whole steps of a float for each row and slice.
struct QuantisedRows {
  void* data;    // [slices, rows + kSpareRows, Kernels::quantised_row bytes]
  float* steps;  // [slices, rows]
  int64_t rows;
};
inline constexpr int64_t kSpareRows = 16;  // AMX reads whole blocks of them

// out[m, n] = act(sum_k a[m, k] w[n, k] + bias[n]) + residual[m, n], over rows [m0, m1) and weight
// panels [p0, p1).
struct Gemm {
  Operand a;  // [M, lda]
  int64_t lda;
  QuantisedRows quantised;  // what Kernels::quantise made of `a` for int8 weights
  Operand weight;           // packed panels of one layer; with a scale for each column where kInt8
  int64_t n, k;
  const float* bias;      // [n] or null
  const float* residual;  // [M, ldr] or null
  int64_t ldr;
  Activation activation;
  void* out;  // [M, ldo], float32 or (with `acc`) bfloat16
  DType out_type;
  int64_t ldo;
};

struct LayerNormRows {
  Operand input, bias, residual;  // [M, ld], [hidden] float32 or null, [M, ld] or null
  int64_t ld_input, ld_residual, hidden;
  const float *gamma, *beta;  // [hidden]
  float eps;
  void* out;
  DType out_type;
  int64_t ldo;
  void* out_bf16;  // a second copy, or null
  int64_t ld_bf16;
};

struct EmbedRows {
  const Embeddings* tables;
  int64_t hidden;
  const float *gamma, *beta;
  void* out;
  DType out_type;
  int64_t ldo;
  void* out_bf16;
  int64_t ld_bf16;
};

// One head of one sequence, query rows [row0, row1).
struct Attention {
  const void *q, *k, *v;  // first row of the sequence, [length, ld]
  DType type;             // float32, or bfloat16 where Kernels::bf16_dot
  int64_t ld;
  int64_t length, head_dim;
  int64_t row0, row1;
  float scale;
  // Null, or for this head what a key `distance` behind the query adds to the scaled score, times
  // log2(e), at bias[distance]: from -(length - 1) to length - 1, and a vector beyond.
  const float* bias;
  void* out;  // first row of the sequence, [length, ldo]
  DType out_type;
  int64_t ldo;
};

struct PoolRows {
  Operand input;  // [T, hidden]
  int64_t hidden;
  Pooling pooling;
};

// How a GEMM over such weights is cut: rows of a tile, columns of a panel, most rows of a task.
struct Tiling {
  int64_t mr, nr, row_block;
};

struct Kernels {
  const char* name;
  int layout;     // identifies the panels: other values cannot read them
  bool bf16_dot;  // bfloat16 weights are multiplied as they are, by bfloat16 inputs
  Tiling (*tiling)(DType weight);
  int64_t (*layer_bytes)(DType type, int64_t n, int64_t k);
  void (*pack)(const void* weight, DType type, int64_t n, int64_t k, void* out, int64_t p0,
               int64_t p1);
  void (*pack_int8)(const int8_t* weight, const float* scale, int64_t n, int64_t k, void* out,
                    int64_t p0, int64_t p1);
  int64_t (*quantised_row)(int64_t k);
  void (*quantise)(Operand a, int64_t lda, int64_t k, int64_t m0, int64_t m1,
                   const QuantisedRows& to);
  int64_t (*gemm_scratch)();
  void (*gemm)(const Gemm& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1, void* scratch);
  int64_t (*attention_scratch)(int64_t longest, int64_t head_dim);
  void (*attention)(const Attention& a, void* scratch);
  void (*embed)(const EmbedRows& e, int64_t m0, int64_t m1, float* scratch);           // [hidden]
  void (*layer_norm)(const LayerNormRows& l, int64_t m0, int64_t m1, float* scratch);  // [hidden]
  void (*activate)(Operand input, const float* bias, Activation activation, int64_t n, void* out,
                   int64_t m0, int64_t m1);
  void (*pool)(const PoolRows& p, int64_t row0, int64_t row1, float* out);  // [hidden]
  void (*convert)(const void* input, DType from, void* out, DType to, int64_t count);
};

// Most columns of a GEMM task: a multiple of every nr.
inline constexpr int64_t kPanelColumns = 768;

extern const Kernels kPortable, kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx;

}  // namespace ft::cpu
