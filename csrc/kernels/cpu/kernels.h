// Entry points of the CPU backend: pointers, sizes and a thread launcher, no Torch.
//
// Matrices are row-major and contiguous unless a leading dimension is passed; strides and leading
// dimensions count elements. Arguments are checked by the caller, except where a function says
// otherwise. T tokens, B sequences, H hidden, N x K a weight's shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/types.h"

namespace ft::cpu {

// How to run on several threads: `launch` calls body(context, worker) for every worker in
// [0, workers), each at most once at a time, and returns when all are done.
struct Threads {
  int count = 1;
  void (*launch)(int workers, void (*body)(void* context, int worker), void* context) = nullptr;
};

// First bytes of a packed weight; a BlobLayer for each layer follows at kBlobHeader, then their
// panels.
struct BlobHeader {
  uint32_t magic;
  int32_t layout;  // Kernels::layout of the instruction set it was packed for
  int64_t layers, n, k;
};
struct BlobLayer {
  int64_t offset;  // of its panels, from the header's first byte
  DType dtype;
  int32_t reserved;
};
inline constexpr uint32_t kBlobMagic = 0x4c505446;  // "FTPL"
inline constexpr int64_t kBlobHeader = 64;

// ---- instruction sets --------------------------------------------------------------------------

// The one in use, from the processor or FT_HANDLER_CPU_ISA. Throws std::runtime_error, in words,
// when the variable names none or one that this processor lacks.
const char* isa_name();
// Those this processor can run, best first, comma-separated.
std::string isas_available();

// ---- memory ------------------------------------------------------------------------------------

// Asks for large pages, before the first write: a GEMM walks hundreds of rows at a time, and small
// pages cost it 2 % in translation misses and the workspace a fault every 4 KiB.
void prefer_large_pages(void* memory, int64_t bytes);

// ---- weights -----------------------------------------------------------------------------------

// The weights [n, k] of layers, some of them kept in a float type, the others quantised to
// `scale[n] int8[n, k]`.
struct LayeredWeight {
  int64_t n, k;
  Operand kept = {};  // [kept_count, n, k]
  int64_t kept_count = 0;
  const int64_t* kept_layers = nullptr;  // which layers they are, increasing; null: the first ones
  const int8_t* quantized = nullptr;     // [quantized_count, n, k] of the other layers, in order
  const float* scale = nullptr;          // [quantized_count, n]
  int64_t quantized_count = 0;
};

int64_t packed_bytes(const LayeredWeight& weight);
void pack_weight(const LayeredWeight& weight, void* blob, const Threads& threads);
// Why this is no blob for this process, or an empty string.
std::string blob_fault(const void* blob, int64_t bytes);
// Whether this is what pack_weight makes here of a weight with so many layers of that type.
bool is_packed(const void* blob, int64_t bytes, DType dtype, int64_t layers, int64_t n, int64_t k);

// ---- ops ---------------------------------------------------------------------------------------

// Ids are widened to int64 and checked by the caller.
struct Embeddings {
  const int64_t *ids, *types;  // [T]
  const int32_t* positions;    // [T]
  Operand word, position, token_type, gamma, beta;
  float eps;
};

// out = act(input weight^T + bias) + residual
struct Linear {
  Operand input;           // [T, K]
  const void* blob;        // checked
  int64_t layer = 0;       // which of the blob's
  Operand bias, residual;  // [N], [T, N]; data null when absent
  Activation activation = Activation::kNone;
  DType out_dtype;
};

// What is added to the scaled score of a query i and a key j of a head: the element of its row in
// column clamp(j - i, -D, D) + D.
struct RelativeBias {
  Operand table;        // [heads, columns]; data null when absent
  int64_t columns = 0;  // 2 D + 1
};

struct Encoder {
  int64_t tokens, hidden, embedding, intermediate, layers;
  int64_t batch, longest, heads;
  Activation activation;
  const int32_t* cu_seqlens;  // [B + 1], checked
  Embeddings embeddings;
  const void* projection = nullptr;  // blob [hidden, embedding]; null: the sizes are one
  Operand projection_bias;
  RelativeBias relative_bias;
  const void *qkv, *out, *up, *down;  // blobs, checked: a weight a layer, or one for all
  Stack qkv_bias, out_bias, up_bias, down_bias, ln1_gamma, ln1_beta, ln2_gamma, ln2_beta;
  float eps;
  DType out_dtype;
};

// Each op takes a workspace of at least so many bytes, 64-byte aligned.
int64_t embedding_workspace(int64_t hidden, const Threads& threads);
void embedding_layer_norm(const Embeddings& e, int64_t tokens, int64_t hidden, DType out_dtype,
                          void* out, void* workspace, const Threads& threads);

int64_t linear_workspace(const void* blob, int64_t tokens, const Threads& threads);
void linear(const Linear& op, int64_t tokens, void* out, void* workspace, const Threads& threads);

int64_t attention_workspace(int64_t longest, int64_t heads, int64_t head_dim,
                            const RelativeBias& bias, const Threads& threads);
void varlen_attention(Operand qkv, const RelativeBias& bias, const int32_t* cu_seqlens,
                      int64_t batch, int64_t longest, int64_t heads, int64_t head_dim,
                      DType out_dtype, void* out, void* workspace, const Threads& threads);

int64_t layer_norm_workspace(int64_t hidden, const Threads& threads);
// bias and residual may be absent.
void residual_layer_norm(Operand input, Operand bias, Operand residual, Operand gamma, Operand beta,
                         float eps, int64_t tokens, int64_t hidden, DType out_dtype, void* out,
                         void* workspace, const Threads& threads);

int64_t bias_activation_workspace(int64_t n, const Threads& threads);
// bias may be absent; out is of the input's type.
void bias_activation(Operand input, Operand bias, Activation activation, int64_t tokens, int64_t n,
                     void* out, void* workspace, const Threads& threads);

// out [B, hidden] in float32, summed in it, row by row; zeros for empty sequences.
void segment_pool(Operand input, const int32_t* cu_seqlens, int64_t batch, int64_t hidden,
                  Pooling pooling, float* out, const Threads& threads);

int64_t encoder_workspace(const Encoder& op, const Threads& threads);
void encoder(const Encoder& op, void* out, void* workspace, const Threads& threads);

}  // namespace ft::cpu
