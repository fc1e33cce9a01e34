// LayerNorm(word[id] + position[p] + token_type[t]): three gathered rows in, one row out.

#include "kernels/cuda/layer_norm.cuh"

namespace ft::cuda {
namespace {

struct EmbeddingTables {
  const void* word;
  const void* position;
  const void* token_type;
  int vocab, positions, types;
};

// Offsets in rows of one token in the three tables; the first ones where not `valid`.
struct TokenRows {
  int64_t word, position, token_type;
  bool valid;
};

__device__ __forceinline__ int64_t row_in(int64_t row, int rows, bool& valid) {
  const bool inside = row >= 0 && row < rows;
  valid = valid && inside;
  return inside ? row : 0;
}

__device__ __forceinline__ TokenRows token_rows(const void* ids, const void* types, IntType id_type,
                                                const int32_t* position_ids,
                                                const int32_t* cu_seqlens, int batch, int token,
                                                const EmbeddingTables& tables) {
  int position = 0;
  if (position_ids != nullptr) {
    position = position_ids[token];
  } else {
    const int sequence = find_sequence(cu_seqlens, batch, token);
    // Of bounds that do not ascend the search may find any, and none where they do not start at 0.
    const int begin = cu_seqlens[sequence];
    position = begin >= 0 && begin <= token && token < cu_seqlens[min(sequence + 1, batch)]
                   ? token - begin
                   : -1;
  }
  TokenRows found{};
  found.valid = true;
  found.word = row_in(load_int(ids, id_type, token), tables.vocab, found.valid);
  found.position = row_in(position, tables.positions, found.valid);
  found.token_type = row_in(load_int(types, id_type, token), tables.types, found.valid);
  return found;
}

template <typename T, int kThreads, int kVecs>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads)
    embedding_layer_norm_kernel(const void* ids, const void* types, IntType id_type,
                                const int32_t* position_ids, const int32_t* cu_seqlens, int batch,
                                int tokens, int hidden, EmbeddingTables tables, const T* gamma,
                                const T* beta, float eps, T* output, NarrowRows narrow_rows) {
  pdl_launch_dependents();
  const NarrowWriter narrow(narrow_rows);
  RowWeights<T, kThreads, kVecs> weights;
  weights.load(gamma, beta, hidden);
  pdl_wait();
  const int token = blockIdx.x * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  if (token >= tokens) return;
  const int64_t begin = static_cast<int64_t>(token) * hidden;
  if (token >= cu_seqlens[batch])
    return clear_row<T, kThreads, kVecs>(hidden, begin, output, narrow);
  float x[kVecs][8] = {};
  const TokenRows rows =
      token_rows(ids, types, id_type, position_ids, cu_seqlens, batch, token, tables);
  const T* word = static_cast<const T*>(tables.word) + rows.word * hidden;
  const T* position = static_cast<const T*>(tables.position) + rows.position * hidden;
  const T* token_type = static_cast<const T*>(tables.token_type) + rows.token_type * hidden;
  if (!rows.valid) eps = NAN;  // and with it the row
  Vec8<T> pieces[kVecs][3];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = row_column<kThreads>(v);
    if (column < hidden) {
      pieces[v][0].load(word + column);
      pieces[v][1].load(position + column);
      pieces[v][2].load(token_type + column);
    }
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (row_column<kThreads>(v) < hidden) {
#pragma unroll
      for (int i = 0; i < 3; ++i) pieces[v][i].add_to(x[v]);
    }
  }
  normalize_row<T, kThreads, kVecs>(x, weights, hidden, eps, begin, output, narrow);
}

// Any hidden size: a block per token, one element at a time.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    embedding_layer_norm_any_kernel(const void* ids, const void* types, IntType id_type,
                                    const int32_t* position_ids, const int32_t* cu_seqlens,
                                    int batch, int hidden, EmbeddingTables tables, const T* gamma,
                                    const T* beta, float eps, T* output) {
  __shared__ float scratch[2][kBlockThreads / 32];
  pdl_launch_dependents();
  pdl_wait();
  const int token = blockIdx.x;
  T* to = output + static_cast<int64_t>(token) * hidden;
  if (token >= cu_seqlens[batch]) {
    for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
      to[column] = from_float<T>(0.f);
    }
    return;
  }
  const TokenRows rows =
      token_rows(ids, types, id_type, position_ids, cu_seqlens, batch, token, tables);
  const T* word = static_cast<const T*>(tables.word) + rows.word * hidden;
  const T* position = static_cast<const T*>(tables.position) + rows.position * hidden;
  const T* token_type = static_cast<const T*>(tables.token_type) + rows.token_type * hidden;
  if (!rows.valid) eps = NAN;  // and with it the row
  auto element = [&](int column) {
    return to_float(word[column]) + to_float(position[column]) + to_float(token_type[column]);
  };
  float sum = 0.f, squares = 0.f;
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) sum += element(column);
  const float mean = block_sum<kBlockThreads / 32>(sum, scratch[0]) / static_cast<float>(hidden);
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
    const float x = element(column) - mean;
    squares += x * x;
  }
  const float variance =
      block_sum<kBlockThreads / 32>(squares, scratch[1]) / static_cast<float>(hidden);
  const float scale = rsqrtf(variance + eps);
  for (int column = threadIdx.x; column < hidden; column += kBlockThreads) {
    const float x = (element(column) - mean) * scale;
    to[column] = from_float<T>(x * to_float(gamma[column]) + to_float(beta[column]));
  }
}

}  // namespace

cudaError_t embedding_layer_norm(const void* input_ids, const void* token_type_ids, IntType id_type,
                                 const int32_t* position_ids, const int32_t* cu_seqlens, int batch,
                                 int tokens, int hidden, const void* word, int vocab,
                                 const void* position, int positions, const void* token_type,
                                 int types, const void* gamma_, const void* beta_, float eps,
                                 DType dtype, void* output_, Launch launch, NarrowRows narrow) {
  if (tokens < 0 || batch < 0 || hidden <= 0 || vocab <= 0 || positions <= 0 || types <= 0 ||
      id_type == IntType::kBool) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(dtype, [&]<typename T>() {
    if (tokens == 0) return cudaSuccess;
    const EmbeddingTables tables{word, position, token_type, vocab, positions, types};
    const auto* gamma = static_cast<const T*>(gamma_);
    const auto* beta = static_cast<const T*>(beta_);
    auto* output = static_cast<T*>(output_);
    if (!fits_row_shape(hidden)) {
      if (narrow.rows != nullptr) return cudaErrorInvalidValue;
      return launch_kernel(embedding_layer_norm_any_kernel<T>, tokens, kBlockThreads, 0, launch,
                           input_ids, token_type_ids, id_type, position_ids, cu_seqlens, batch,
                           hidden, tables, gamma, beta, eps, output);
    }
    return dispatch_row_shape(hidden, [&]<int kThreads, int kVecs>() {
      const int per_block = rows_per_block(tokens, kThreads);
      return launch_kernel(embedding_layer_norm_kernel<T, kThreads, kVecs>,
                           (tokens + per_block - 1) / per_block, kThreads * per_block, 0, launch,
                           input_ids, token_type_ids, id_type, position_ids, cu_seqlens, batch,
                           tokens, hidden, tables, gamma, beta, eps, output, narrow);
    });
  });
}

}  // namespace ft::cuda
