// Linear layers: output = epilogue(input * weight^T + bias), in fp32 accumulation.
//
// Two makers of the product: cuBLASLt everywhere, and kernels of our own on sm_90 for fp16 and bf16
// (gemm_sm90.h), which also multiply operands in e4m3, in the order along K of narrow.cuh. Which
// one, and which of its variants, is a plan: chosen once per shape class, kept for the life of the
// process, and overridden by a tuning table (ft-handler tune).
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace ft::cuda {

struct Gemm {
  Operand input;                   // [rows, k]
  Operand weight;                  // [n, k]
  const void* bias = nullptr;      // [n] or null
  const void* residual = nullptr;  // [rows, n] or null; added after the bias
  void* output = nullptr;          // [rows, n]; may be residual
  int rows = 0;
  int n = 0;
  int k = 0;
  Activation activation = Activation::kNone;  // after the bias; excludes residual
  DType dtype = DType::kFloat16;              // of bias, residual and output
  bool batch_invariant = false;               // every sum in one order, whatever the rows
  // Device memory: output is [rows, n] in e4m3, of which 1 is worth so much. Of e4m3 operands
  // alone.
  const float* output_step = nullptr;
  bool upwards = false;  // the last rows first, where the kernel has an order; results are the same

  bool narrow() const { return weight.dtype == DType::kE4M3; }
};

// Layer norm over the rows of a Gemm's result; needs its own output when not fused.
struct GemmNorm {
  const void* gamma = nullptr;  // [n]
  const void* beta = nullptr;   // [n]
  float eps = 0.f;
  const int32_t* live_rows = nullptr;  // device memory or null: rows from *live_rows on are padding
  NarrowRows narrow;                   // [rows, n]
};

// Bytes of scratch memory that any linear() call may use; 256-byte aligned.
size_t gemm_workspace_bytes();

// Enqueues one linear layer. Workspace: gemm_workspace_bytes() of device memory, used in stream
// order.
cudaError_t linear(const Gemm& gemm, void* workspace, Launch launch);

// LayerNorm(linear(gemm)), with the norm in the GEMM's epilogue where a kernel does that. `scratch`
// [rows, n] may be used in between.
cudaError_t linear_layer_norm(const Gemm& gemm, const GemmNorm& norm, void* scratch,
                              void* workspace, Launch launch);

// Whether the current device multiplies operands in e4m3 (sums times weight.scale, then the bias;
// n and k are multiples of 16).
bool narrow_gemm_supported();

// The first row count at or above `rows` that has a plan of its own: a plan serves (class below,
// class].
int gemm_row_class(int rows);

// Every plan worth timing for gemm's shape class on the current device: ours, then cuBLASLt's own
// list, best guess first in each. Plans are opaque text; load_gemm_plan takes them back.
cudaError_t gemm_candidates(const Gemm& gemm, const GemmNorm* norm,
                            std::vector<std::string>* plans);

// What a plan is looked up by besides the device.
struct GemmKey {
  int rows_class = 0;
  int n = 0;
  int k = 0;
  DType dtype = DType::kFloat16;  // of the weight
  Activation activation = Activation::kNone;
  bool residual = false;
  bool norm = false;
  bool operator==(const GemmKey&) const = default;
};

// Makes `plan` the choice for `key` on the current device; one for GELU serves the other
// activations too, where its kernel knows them. cudaErrorInvalidValue with words when the plan was
// made by another cuBLASLt version or is malformed.
cudaError_t load_gemm_plan(const GemmKey& key, const std::string& plan);

}  // namespace ft::cuda
