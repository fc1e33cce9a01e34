// Removing padding (count, scan, gather) and putting it back (fill, scatter).

#include "kernels/cuda/layer_norm.cuh"

namespace ft::cuda {
namespace {

constexpr int kRowWarps = 8;
constexpr int kScanThreads = 1024;
constexpr int kCopyThreads = 256;

// cu_seqlens[row + 1] = number of kept tokens of the row; a warp per row.
__global__ void __launch_bounds__(32 * kRowWarps)
    padding_count_kernel(const void* mask, IntType mask_type, int batch, int seqlen,
                         int32_t* cu_seqlens) {
  pdl_launch_dependents();
  pdl_wait();
  const int row = blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (row >= batch) return;
  int count = 0;
  for (int column = threadIdx.x % 32; column < seqlen; column += 32) {
    count += load_int(mask, mask_type, static_cast<int64_t>(row) * seqlen + column) != 0;
  }
  count = lane_sum<32>(count);
  if (threadIdx.x % 32 == 0) cu_seqlens[row + 1] = count;
}

// Turns the counts into offsets in place and writes the summary; one block.
__global__ void __launch_bounds__(kScanThreads)
    padding_scan_kernel(const void* mask, IntType mask_type, int batch, int seqlen,
                        int32_t* cu_seqlens, PaddingSummary* summary) {
  __shared__ int scratch[kScanThreads / 32];
  __shared__ int longest, empty_row, late_row;
  pdl_launch_dependents();
  pdl_wait();
  if (threadIdx.x == 0) longest = 0, empty_row = batch, late_row = batch;
  __syncthreads();
  int carried = 0;
  for (int base = 0; base < batch; base += kScanThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    const int count = row < batch ? cu_seqlens[row + 1] : 0;
    if (row < batch) {
      atomicMax(&longest, count);
      if (count == 0) atomicMin(&empty_row, row);
      if (count > 0 && load_int(mask, mask_type, static_cast<int64_t>(row) * seqlen) == 0) {
        atomicMin(&late_row, row);
      }
    }
    int total = 0;
    const int offset = block_scan<kScanThreads>(count, scratch, &total);
    if (row < batch) cu_seqlens[row + 1] = carried + offset;
    carried += total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    cu_seqlens[0] = 0;
    *summary = {carried, longest, empty_row < batch ? empty_row : -1,
                late_row < batch ? late_row : -1};
  }
}

// A warp per row: kept tokens move to cu_seqlens[row] + how many were kept before them.
__global__ void __launch_bounds__(32 * kRowWarps)
    padding_gather_kernel(const void* ids, const void* types, IntType id_type, const void* mask,
                          IntType mask_type, int batch, int seqlen, const int32_t* cu_seqlens,
                          void* packed_ids, void* packed_types, int32_t* position_ids,
                          int64_t* token_indices) {
  pdl_launch_dependents();
  pdl_wait();
  const int row = blockIdx.x * kRowWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= batch) return;
  int64_t next = cu_seqlens[row];
  for (int base = 0; base < seqlen; base += 32) {
    const int column = base + lane;
    const int64_t from = static_cast<int64_t>(row) * seqlen + column;
    const bool keep = column < seqlen && load_int(mask, mask_type, from) != 0;
    const unsigned kept = __ballot_sync(0xffffffffu, keep);
    if (keep) {
      const int64_t to = next + __popc(kept & ((1u << lane) - 1));
      if (id_type == IntType::kInt64) {
        static_cast<int64_t*>(packed_ids)[to] = load_int(ids, id_type, from);
        static_cast<int64_t*>(packed_types)[to] = load_int(types, id_type, from);
      } else {
        static_cast<int32_t*>(packed_ids)[to] = static_cast<int32_t>(load_int(ids, id_type, from));
        static_cast<int32_t*>(packed_types)[to] =
            static_cast<int32_t>(load_int(types, id_type, from));
      }
      position_ids[to] = column;
      token_indices[to] = from;
    }
    next += __popc(kept);
  }
}

template <typename T>
__global__ void __launch_bounds__(kCopyThreads) fill_kernel(T* to, int64_t elements, T value) {
  pdl_launch_dependents();
  pdl_wait();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kCopyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < elements;
       i += stride) {
    to[i] = value;
  }
}

// `Word` is the widest type that divides a token: uint4 for the usual hidden sizes.
template <typename Word>
__global__ void __launch_bounds__(kCopyThreads)
    scatter_rows_kernel(const Word* packed, const int64_t* token_indices, int64_t words,
                        int64_t per_row, int64_t rows, Word* padded) {
  pdl_launch_dependents();
  pdl_wait();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kCopyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < words;
       i += stride) {
    const int64_t row = token_indices[i / per_row];
    if (row >= 0 && row < rows) padded[row * per_row + i % per_row] = packed[i];
  }
}

unsigned copy_grid(int64_t work) {
  const int64_t wanted = (work + kCopyThreads - 1) / kCopyThreads;
  const int64_t most = 32LL * device_sms();
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <typename Word>
cudaError_t scatter_rows(const void* packed, const int64_t* token_indices, int tokens,
                         int64_t row_bytes, int64_t rows, void* padded, Launch launch) {
  const int64_t per_row = row_bytes / static_cast<int64_t>(sizeof(Word));
  return launch_kernel(scatter_rows_kernel<Word>, copy_grid(tokens * per_row), kCopyThreads, 0,
                       launch, static_cast<const Word*>(packed), token_indices, tokens * per_row,
                       per_row, rows, static_cast<Word*>(padded));
}

}  // namespace

cudaError_t padding_count(const void* attention_mask, IntType mask_type, int batch, int seqlen,
                          int32_t* cu_seqlens, PaddingSummary* summary, Launch launch) {
  if (batch < 0 || seqlen < 0) return cudaErrorInvalidValue;
  if (batch > 0) {
    cudaError_t status =
        launch_kernel(padding_count_kernel, (batch + kRowWarps - 1) / kRowWarps, 32 * kRowWarps, 0,
                      launch, attention_mask, mask_type, batch, seqlen, cu_seqlens);
    if (status != cudaSuccess) return status;
  }
  return launch_kernel(padding_scan_kernel, 1, kScanThreads, 0, launch, attention_mask, mask_type,
                       batch, seqlen, cu_seqlens, summary);
}

cudaError_t padding_gather(const void* input_ids, const void* token_type_ids, IntType id_type,
                           const void* attention_mask, IntType mask_type, int batch, int seqlen,
                           const int32_t* cu_seqlens, void* packed_ids, void* packed_types,
                           int32_t* position_ids, int64_t* token_indices, Launch launch) {
  if (batch < 0 || seqlen < 0 || id_type == IntType::kBool) return cudaErrorInvalidValue;
  if (batch == 0 || seqlen == 0) return cudaSuccess;
  return launch_kernel(padding_gather_kernel, (batch + kRowWarps - 1) / kRowWarps, 32 * kRowWarps,
                       0, launch, input_ids, token_type_ids, id_type, attention_mask, mask_type,
                       batch, seqlen, cu_seqlens, packed_ids, packed_types, position_ids,
                       token_indices);
}

cudaError_t restore_padding(const void* packed, const int64_t* token_indices, int tokens, int batch,
                            int seqlen, int64_t width, DType dtype, float fill, void* padded,
                            Launch launch) {
  if (tokens < 0 || batch < 0 || seqlen < 0 || width < 0) return cudaErrorInvalidValue;
  const int64_t rows = static_cast<int64_t>(batch) * seqlen;
  if (rows * width == 0) return cudaSuccess;
  return dispatch_dtype(dtype, [&]<typename T>() {
    cudaError_t status =
        launch_kernel(fill_kernel<T>, copy_grid(rows * width), kCopyThreads, 0, launch,
                      static_cast<T*>(padded), rows * width, static_cast<T>(fill));
    if (status != cudaSuccess || tokens == 0) return status;
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    if (bytes % 16 == 0) {
      return scatter_rows<uint4>(packed, token_indices, tokens, bytes, rows, padded, launch);
    }
    if (bytes % 4 == 0) {
      return scatter_rows<uint32_t>(packed, token_indices, tokens, bytes, rows, padded, launch);
    }
    return scatter_rows<uint16_t>(packed, token_indices, tokens, bytes, rows, padded, launch);
  });
}

}  // namespace ft::cuda
