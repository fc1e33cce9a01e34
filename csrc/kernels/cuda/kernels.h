// Entry points of the CUDA kernels that surround the GEMMs: pointers, sizes and a stream, no Torch.
//
// Every function only enqueues work: it neither synchronises nor allocates nor reads device memory,
// so each can be captured in a CUDA graph. Strides are implied by the shapes (row-major,
// contiguous); row pointers must be 16-byte aligned. A return other than cudaSuccess means nothing
// useful was enqueued: cudaErrorInvalidValue for sizes or types a kernel does not serve,
// cudaErrorNotSupported for bf16 on a GPU before sm_80, else what the launch itself said.
//
// Rows of a packed tensor at or beyond cu_seqlens[batch] are padding of a CUDA graph's token class:
// they are never a fault and depend on nothing but the parameters (the embedding, attention and
// layer norms write zeros there). A cu_seqlens that does not ascend from 0 to at most the number of
// tokens in steps of at most max_seqlen makes all rows of attention NaN; nothing is read or written
// out of bounds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace ft::cuda {

// Integer tensors from the caller.
enum class IntType : int { kInt32 = 0, kInt64 = 1, kBool = 2 };  // kBool: attention masks only

// How to launch. `pdl` asks for programmatic dependent launch (sm_90 and later, else ignored): the
// kernel may begin while its predecessor in the stream drains, and waits before it reads or writes
// device memory. Every kernel here waits, so chains of such launches stay ordered.
struct Launch {
  cudaStream_t stream = nullptr;
  bool pdl = false;
};

// A second copy of a kernel's rows in e4m3, in the order that products of such operands read
// (narrow.cuh). Kernels that write one take it last; without rows there is none.
struct NarrowRows {
  void* rows = nullptr;         // [rows, width], width a multiple of 16
  const float* step = nullptr;  // device memory: what 1 of the copy is worth
};

// ---- padding -----------------------------------------------------------------------------------

// What padding_count leaves in device memory for the one host read that sizes the outputs.
struct PaddingSummary {
  int32_t total;       // T
  int32_t max_seqlen;  // longest row, counted in tokens
  int32_t empty_row;   // first row without any token, or -1
  int32_t late_row;    // first row whose column 0 is masked though it has tokens, or -1
};

// Counts tokens per row and scans: cu_seqlens and the summary. One or two launches.
cudaError_t padding_count(
    const void* attention_mask,  // [batch, seqlen], any IntType, non-zero keeps
    IntType mask_type, int batch, int seqlen,
    int32_t* cu_seqlens,      // [batch + 1]
    PaddingSummary* summary,  // device
    Launch launch);

// Gathers the kept tokens. Run after padding_count on the same stream (and after the host has read
// `total`, since the outputs have that length).
cudaError_t padding_gather(const void* input_ids,       // [batch, seqlen], id_type
                           const void* token_type_ids,  // [batch, seqlen], id_type
                           IntType id_type,             // kInt32 or kInt64
                           const void* attention_mask,  // [batch, seqlen]
                           IntType mask_type, int batch, int seqlen,
                           const int32_t* cu_seqlens,  // [batch + 1]
                           void* packed_ids,           // [T], id_type
                           void* packed_types,         // [T], id_type
                           int32_t* position_ids,      // [T], the column
                           int64_t* token_indices,     // [T], b * seqlen + s
                           Launch launch);

// padded[token_indices[t], :] = packed[t, :], every other element = fill. Indices outside
// [0, batch * seqlen) are dropped.
cudaError_t restore_padding(const void* packed,            // [tokens, width]
                            const int64_t* token_indices,  // [tokens]
                            int tokens, int batch, int seqlen,
                            int64_t width,  // elements per token
                            DType dtype, float fill,
                            void* padded,  // [batch, seqlen, width]
                            Launch launch);

// ---- layer norm family -------------------------------------------------------------------------

// LayerNorm(word[id] + position[p] + token_type[t]) per token. position_ids absent: 0, 1, ...
// within each sequence, found from cu_seqlens. Rows at or beyond cu_seqlens[batch] become zeros,
// those whose id, type or position lies outside its table NaN.
cudaError_t embedding_layer_norm(const void* input_ids,        // [tokens], id_type
                                 const void* token_type_ids,   // [tokens], id_type
                                 IntType id_type,              // kInt32 or kInt64
                                 const int32_t* position_ids,  // [tokens] or null
                                 const int32_t* cu_seqlens,    // [batch + 1]
                                 int batch, int tokens, int hidden,
                                 const void* word,  // [vocab, hidden]
                                 int vocab,
                                 const void* position,  // [positions, hidden]
                                 int positions,
                                 const void* token_type,  // [types, hidden]
                                 int types,
                                 const void* gamma,  // [hidden]
                                 const void* beta,   // [hidden]
                                 float eps, DType dtype,
                                 void* output,  // [tokens, hidden]
                                 Launch launch, NarrowRows narrow = {});

// LayerNorm(input + bias + residual) per row; bias and residual may be null. Output may be input or
// residual. `live_rows`, device memory or null: rows at or beyond *live_rows become zeros.
cudaError_t residual_layer_norm(const void* input,     // [rows, hidden]
                                const void* bias,      // [hidden] or null
                                const void* residual,  // [rows, hidden] or null
                                const void* gamma,     // [hidden]
                                const void* beta,      // [hidden]
                                float eps, int rows, int hidden, DType dtype,
                                void* output,  // [rows, hidden]
                                const int32_t* live_rows, Launch launch, NarrowRows narrow = {});

// Whether the layer norms write a copy in e4m3 of rows so long.
bool narrow_norm_fits(int hidden);

// The same over GEMM partial sums in fp32: LayerNorm(sum_s partials[s] + bias + residual), so that
// a split-K GEMM needs no reduction of its own.
cudaError_t residual_layer_norm_partials(const float* partials,  // [splits, rows, hidden]
                                         int splits,
                                         const void* bias,      // [hidden] or null
                                         const void* residual,  // [rows, hidden] or null
                                         const void* gamma,     // [hidden]
                                         const void* beta,      // [hidden]
                                         float eps, int rows, int hidden, DType dtype,
                                         void* output,  // [rows, hidden]
                                         const int32_t* live_rows, Launch launch);

// activation(input + bias) + residual; bias and residual may be null, output may be input or
// residual. cudaErrorInvalidValue for kNone, which needs no pass.
cudaError_t bias_activation(const void* input,     // [rows, width]
                            const void* bias,      // [width] or null
                            const void* residual,  // [rows, width] or null
                            Activation activation, int rows, int width, DType dtype,
                            void* output,  // [rows, width]
                            const int32_t* live_rows, Launch launch);

// Rows in e4m3 for products of such operands, where no kernel before wrote them so.
cudaError_t narrow_rows(const void* input,  // [rows, width]
                        int rows, int width, DType dtype, NarrowRows narrow, Launch launch);

// A weight's e4m3 elements in the order in which products read them along K, a multiple of 16.
cudaError_t narrow_order(const void* weight, int64_t elements, void* output, Launch launch);

// ---- attention ---------------------------------------------------------------------------------

// One problem's shape. Tile lists depend on it, so pass the same values to all three functions.
struct AttentionShape {
  int batch = 0;       // sequences, empty ones allowed
  int tokens = 0;      // rows of qkv; at least cu_seqlens[batch]
  int max_seqlen = 0;  // at least the longest sequence
  int num_heads = 0;
  int head_dim = 0;  // even, 2 to 128
  DType dtype = DType::kFloat16;
  bool batch_invariant = false;  // a sequence's rows do not depend on the others, to the last bit
  int bias_reach = -1;           // D of a relative bias, from 0 on; -1 where there is none
};

// Bytes of device memory the plan of such a problem takes (a multiple of 256; the same for every
// layer of a model).
size_t attention_plan_bytes(const AttentionShape& shape);

// Lists the tiles of work, longest sequences first, from the lengths in device memory. Once per
// forward pass: every layer of the pass reuses it.
cudaError_t attention_plan(const AttentionShape& shape,
                           const int32_t* cu_seqlens,  // [batch + 1]
                           void* plan,  // attention_plan_bytes(shape), 16-byte aligned
                           Launch launch);

// softmax(q k^T / sqrt(head_dim) + bias) v within each sequence, no mask. A relative bias adds, to
// query i and key j of a head, what stands in the head's column clamp(j - i, -D, D) + D. With
// `narrow` its rows alone are written, and `output` is scratch memory of its size.
cudaError_t varlen_attention(const AttentionShape& shape,
                             const void* qkv,  // [tokens, 3 * num_heads * head_dim]: q | k | v
                             const void* relative_bias,  // [num_heads, 2 * bias_reach + 1] or null
                             void* plan,    // written by attention_plan for these cu_seqlens; one
                                            // launch at a time takes from it
                             void* output,  // [tokens, num_heads * head_dim]
                             Launch launch, NarrowRows narrow = {});

// ---- pooling -----------------------------------------------------------------------------------

// The mean or the largest element of each column over a sequence's rows, in fp32 and in an order
// that the sequence's length alone decides. Empty sequences give zeros, and a cu_seqlens that does
// not ascend from 0 to at most the number of tokens gives NaN everywhere.
cudaError_t segment_pool(const void* input,          // [tokens, hidden]
                         const int32_t* cu_seqlens,  // [batch + 1]
                         int batch, int tokens, int hidden, Pooling how, DType dtype,
                         float* output,  // [batch, hidden]
                         Launch launch);

}  // namespace ft::cuda
