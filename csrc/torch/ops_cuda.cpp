// The ops on CUDA tensors: guard, check, allocate, launch. No synchronisation except where an
// output's size is known to the device alone (remove_padding).
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/encoder.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/runtime.h"
#include "torch/checks.h"
#include "torch/text.h"

namespace ft {
namespace {

using cuda::IntType;
using cuda::Launch;
using torch::headeronly::IntHeaderOnlyArrayRef;

// libtorch_cuda cannot be linked (the library must load without it), so the one function that is
// only there is looked up when the first CUDA tensor arrives.
cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static std::atomic<Getter> known{nullptr};
  Getter getter = known.load(std::memory_order_relaxed);
  if (getter == nullptr) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    getter = reinterpret_cast<Getter>(
        dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream"));
    known.store(getter, std::memory_order_relaxed);
  }
  FT_CHECK(getter != nullptr, "this torch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  FT_CHECK(getter(device, &stream) == 0, "torch has no current stream for GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensors' GPU current, in torch's runtime and in the one linked here.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {
    const cudaError_t status = cudaSetDevice(index_);
    FT_CHECK(status == cudaSuccess, "GPU ", index_, ": ", cudaGetErrorString(status));
  }
  Launch launch() const { return {current_stream(index_), false}; }
  int index() const { return index_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
};

// Every failed call ends here: the op, what was asked, and why not.
template <typename... Parts>
void check_status(cudaError_t status, const char* op, const Parts&... request) {
  if (status == cudaSuccess) return;
  const std::string words = cuda::take_failure();
  cudaGetLastError();  // a refused launch must not be reported again by the next caller
  std::string why = words.empty() ? cudaGetErrorString(status) : words;
  if (words.empty() && status == cudaErrorNotSupported)
    why = "this GPU does not support the dtype (bfloat16 needs compute capability 8.0)";
  fail("fastertransformer::", op, " (", request..., ") failed: ", why);
}

IntType int_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool:
      return IntType::kBool;
    case ScalarType::Int:
      return IntType::kInt32;
    default:
      return IntType::kInt64;
  }
}

int narrow_int(int64_t value, const char* what) {
  FT_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), what,
           " is out of range: ", value);
  return static_cast<int>(value);
}

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// Row-major and 16-byte aligned, as the kernels want it.
Tensor packed(const Tensor& tensor) {
  const Tensor rows = torch::stable::contiguous(tensor);
  if (aligned(rows)) return rows;
  return torch::stable::clone(rows);
}

std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return packed(*tensor);
}

const void* pointer(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
Operand operand_of(const Tensor& tensor) { return {pointer(tensor), dtype_of(tensor)}; }
const int32_t* int32_pointer(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

Tensor empty_like_rows(const Tensor& like, std::vector<int64_t> size,
                       std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(size.data(), size.size()), dtype);
  } catch (const std::exception&) {
    // torch's stable interface drops the allocator's words, and callers split a batch for these. A
    // GPU that an earlier kernel broke fails here as well, and then says so when asked.
    size_t free = 0, total = 0;
    const cudaError_t status = cudaMemGetInfo(&free, &total);
    if (status != cudaSuccess) fail("GPU error: ", cudaGetErrorString(status));
    fail("out of memory: no room for ", shape_of(size), " ",
         dtype_name(dtype.value_or(like.scalar_type())), ", the GPU has ", free >> 20, " MiB free");
  }
}

Tensor bytes_like(const Tensor& like, size_t bytes) {
  return empty_like_rows(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// Every tensor of a call lives on the first one's GPU.
void check_device(const char* op, const Tensor& first, const char* name, const Tensor& tensor) {
  FT_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ",
           name, " is on another device than the first argument");
}

void check_vector(const char* op, const char* name, const Tensor& like, const Tensor& vector,
                  int64_t size) {
  check_device(op, like, name, vector);
  FT_CHECK(
      vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == like.scalar_type(), op,
      ": ", name, " must be [", size, "] ", dtype_name(like.scalar_type()), ", is ",
      shape_of(vector), " ", dtype_name(vector.scalar_type()));
}

void check_cu_seqlens(const char* op, const Tensor& like, const Tensor& cu_seqlens) {
  check_device(op, like, "cu_seqlens", cu_seqlens);
  FT_CHECK_DIM(cu_seqlens, 1);
  FT_CHECK_DTYPE(cu_seqlens, ScalarType::Int);
  FT_CHECK(cu_seqlens.size(0) >= 1, op, ": cu_seqlens must have at least one entry");
}

// What the host knows of cu_seqlens: where there are tokens there is a sequence, as long as one of
// them at least. The numbers themselves are checked on the device, which makes all rows NaN.
void check_lengths(const char* op, const Tensor& cu_seqlens, int64_t tokens, int64_t max_seqlen) {
  FT_CHECK(tokens == 0 || cu_seqlens.size(0) > 1, op, ": cu_seqlens must end with the number of ",
           "tokens, ", tokens, ", holds no sequence");
  FT_CHECK(max_seqlen >= (tokens == 0 ? 0 : 1), op,
           ": max_seqlen must be at least the longest sequence, is ", max_seqlen);
}

void check_positions(const char* op, const Tensor& like, const std::optional<Tensor>& position_ids,
                     int64_t tokens) {
  if (!position_ids) return;
  check_device(op, like, "position_ids", *position_ids);
  FT_CHECK(position_ids->scalar_type() == ScalarType::Int,
           "position_ids must have dtype int32, has ", dtype_name(position_ids->scalar_type()));
  FT_CHECK(position_ids->dim() == 1 && position_ids->size(0) == tokens,
           "position_ids must have shape [", tokens, "], has ", shape_of(*position_ids));
}

Tensor prepare_weight(Tensor weight, std::optional<Tensor> scale) {
  FT_CHECK_FLOAT(weight);
  check_no_scale(weight, scale);
  FT_CHECK(weight.dim() == 2 || weight.dim() == 3, "weight must be [n, k] or [layers, n, k], is ",
           shape_of(weight));
  // The schema says that the result is no part of the argument.
  const Tensor whole = packed(weight);
  return pointer(whole) == pointer(weight) ? torch::stable::clone(whole) : whole;
}

// Whether products of operands in e4m3 are computed where a float weight [.., n, k] of theirs is.
bool serves_narrow(Tensor like) {
  if (like.dim() < 2 || like.scalar_type() != ScalarType::Half ||
      like.size(like.dim() - 2) % 16 != 0 || like.size(like.dim() - 1) % 16 != 0)
    return false;
  const OnDeviceOf device(like);
  return cuda::narrow_gemm_supported();
}

Tensor prepare_narrow(Tensor weight) {
  FT_CHECK(weight.scalar_type() == ScalarType::Float8_e4m3fn, "weight must be float8_e4m3fn, is ",
           dtype_name(weight.scalar_type()));
  FT_CHECK(weight.dim() >= 1 && weight.size(weight.dim() - 1) % 16 == 0,
           "weight must have a multiple of 16 columns, is ", shape_of(weight));
  const OnDeviceOf device(weight);
  const Tensor whole = packed(weight);
  Tensor out = torch::stable::empty_like(whole);
  check_status(cuda::narrow_order(pointer(whole), whole.numel(), out.data_ptr(), device.launch()),
               "prepare_narrow", "weight ", shape_of(whole));
  return out;
}

bool is_prepared(Tensor prepared, Tensor weight) {
  bool same = prepared.is_cuda() && weight.is_cuda() &&
              prepared.get_device_index() == weight.get_device_index() &&
              prepared.scalar_type() == weight.scalar_type() && prepared.dim() == weight.dim() &&
              prepared.is_contiguous() && aligned(prepared);
  for (int64_t axis = 0; same && axis < weight.dim(); ++axis)
    same = prepared.size(axis) == weight.size(axis);
  return same;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> remove_padding(Tensor input_ids,
                                                                           Tensor token_type_ids,
                                                                           Tensor attention_mask) {
  FT_CHECK_DIM(input_ids, 2);
  FT_CHECK_IDS(input_ids);
  FT_CHECK(token_type_ids.scalar_type() == input_ids.scalar_type(),
           "token_type_ids must have input_ids' dtype, has ",
           dtype_name(token_type_ids.scalar_type()));
  FT_CHECK(
      is_id_type(attention_mask.scalar_type()) || attention_mask.scalar_type() == ScalarType::Bool,
      "attention_mask must have dtype int64, int32 or bool, has ",
      dtype_name(attention_mask.scalar_type()));
  for (const auto* other : {&token_type_ids, &attention_mask}) {
    check_device("remove_padding", input_ids, "an argument", *other);
    FT_CHECK(shape_of(*other) == shape_of(input_ids),
             "remove_padding: shapes differ: ", shape_of(input_ids), " and ", shape_of(*other));
  }
  FT_CHECK(input_ids.numel() < (int64_t{1} << 31),
           "input_ids must hold fewer than 2^31 tokens, has shape ", shape_of(input_ids));
  const OnDeviceOf device(input_ids);
  const Launch launch = device.launch();
  const int batch = narrow_int(input_ids.size(0), "batch");
  const int seqlen = narrow_int(input_ids.size(1), "seqlen");
  const Tensor ids = packed(input_ids), types = packed(token_type_ids),
               mask = packed(attention_mask);
  Tensor cu_seqlens = empty_like_rows(ids, {int64_t{batch} + 1}, ScalarType::Int);
  cuda::PaddingSummary summary{0, 0, -1, -1};
  const auto ok = [&](cudaError_t status) {
    check_status(status, "remove_padding", "batch ", batch, ", seqlen ", seqlen);
  };
  if (batch > 0 && seqlen > 0) {
    const Tensor on_device = bytes_like(ids, sizeof(summary));
    auto* counted = static_cast<cuda::PaddingSummary*>(on_device.data_ptr());
    ok(cuda::padding_count(pointer(mask), int_type_of(mask), batch, seqlen,
                           static_cast<int32_t*>(cu_seqlens.data_ptr()), counted, launch));
    ok(cudaMemcpyAsync(&summary, counted, sizeof(summary), cudaMemcpyDeviceToHost, launch.stream));
    ok(cudaStreamSynchronize(launch.stream));
  } else {
    ok(cudaMemsetAsync(cu_seqlens.data_ptr(), 0, sizeof(int32_t) * (size_t(batch) + 1),
                       launch.stream));
    if (batch > 0) summary.empty_row = 0;
  }
  FT_CHECK(summary.empty_row < 0 || seqlen == 0, "attention_mask: row ", summary.empty_row,
           " has no token");
  FT_CHECK(summary.late_row < 0, "attention_mask: row ", summary.late_row,
           " has tokens but its column 0 is masked; the heads read column 0");
  const int64_t total = summary.total;
  Tensor packed_ids = empty_like_rows(ids, {total});
  Tensor packed_types = empty_like_rows(ids, {total});
  Tensor position_ids = empty_like_rows(ids, {total}, ScalarType::Int);
  Tensor token_indices = empty_like_rows(ids, {total}, ScalarType::Long);
  if (total > 0)
    ok(cuda::padding_gather(pointer(ids), pointer(types), int_type_of(ids), pointer(mask),
                            int_type_of(mask), batch, seqlen, int32_pointer(cu_seqlens),
                            packed_ids.data_ptr(), packed_types.data_ptr(),
                            static_cast<int32_t*>(position_ids.data_ptr()),
                            static_cast<int64_t*>(token_indices.data_ptr()), launch));
  return {packed_ids, packed_types, position_ids, token_indices, cu_seqlens, summary.max_seqlen};
}

Tensor restore_padding(Tensor packed_rows, Tensor token_indices, int64_t batch, int64_t seqlen,
                       double fill) {
  FT_CHECK_FLOAT(packed_rows);
  FT_CHECK(packed_rows.dim() >= 1, "packed must have at least one dimension");
  FT_CHECK(batch >= 0 && seqlen >= 0, "batch and seqlen must not be negative, are ", batch, " and ",
           seqlen);
  FT_CHECK_DIM(token_indices, 1);
  FT_CHECK_DTYPE(token_indices, ScalarType::Long);
  FT_CHECK_SIZE(token_indices, 0, packed_rows.size(0));
  check_device("restore_padding", packed_rows, "token_indices", token_indices);
  const OnDeviceOf device(packed_rows);
  std::vector<int64_t> size{batch, seqlen};
  int64_t width = 1;
  for (int64_t axis = 1; axis < packed_rows.dim(); ++axis) {
    size.push_back(packed_rows.size(axis));
    width *= packed_rows.size(axis);
  }
  const Tensor rows = packed(packed_rows), indices = packed(token_indices);
  Tensor out = empty_like_rows(rows, size);
  if (out.numel() > 0)
    check_status(
        cuda::restore_padding(pointer(rows), static_cast<const int64_t*>(pointer(indices)),
                              narrow_int(rows.size(0), "tokens"), narrow_int(batch, "batch"),
                              narrow_int(seqlen, "seqlen"), width, dtype_of(rows),
                              static_cast<float>(fill), out.data_ptr(), device.launch()),
        "restore_padding", "packed ", shape_of(rows), ", batch ", batch, ", seqlen ", seqlen);
  return out;
}

Tensor embedding_layer_norm(Tensor input_ids, Tensor token_type_ids,
                            std::optional<Tensor> position_ids, Tensor cu_seqlens, Tensor word,
                            Tensor position, Tensor token_type, Tensor gamma, Tensor beta,
                            double eps) {
  const char* op = "embedding_layer_norm";
  FT_CHECK_FLOAT(word);
  FT_CHECK_DIM(word, 2);
  FT_CHECK_DIM(input_ids, 1);
  FT_CHECK_IDS(input_ids);
  FT_CHECK(token_type_ids.scalar_type() == input_ids.scalar_type() && token_type_ids.dim() == 1 &&
               token_type_ids.size(0) == input_ids.size(0),
           "token_type_ids must have input_ids' dtype and shape");
  check_cu_seqlens(op, word, cu_seqlens);
  check_device(op, word, "input_ids", input_ids);
  check_device(op, word, "token_type_ids", token_type_ids);
  const int64_t hidden = word.size(1), tokens = input_ids.size(0);
  for (const auto* table : {&position, &token_type}) {
    check_device(op, word, "an embedding table", *table);
    FT_CHECK(
        table->dim() == 2 && table->size(1) == hidden && table->scalar_type() == word.scalar_type(),
        op, ": an embedding table must be [*, ", hidden, "] of word's dtype, is ",
        shape_of(*table));
  }
  check_vector(op, "gamma", word, gamma, hidden);
  check_vector(op, "beta", word, beta, hidden);
  check_positions(op, word, position_ids, tokens);
  const OnDeviceOf device(word);
  const Tensor ids = packed(input_ids), types = packed(token_type_ids), cu = packed(cu_seqlens);
  const Tensor w = packed(word), p = packed(position), t = packed(token_type), g = packed(gamma),
               b = packed(beta);
  const std::optional<Tensor> positions = packed(position_ids);
  Tensor out = empty_like_rows(w, {tokens, hidden});
  if (tokens > 0)
    check_status(cuda::embedding_layer_norm(
                     pointer(ids), pointer(types), int_type_of(ids),
                     static_cast<const int32_t*>(pointer(positions)), int32_pointer(cu),
                     narrow_int(cu.size(0) - 1, "batch"), narrow_int(tokens, "tokens"),
                     narrow_int(hidden, "hidden"), pointer(w), narrow_int(w.size(0), "vocab"),
                     pointer(p), narrow_int(p.size(0), "positions"), pointer(t),
                     narrow_int(t.size(0), "types"), pointer(g), pointer(b),
                     static_cast<float>(eps), dtype_of(w), out.data_ptr(), device.launch()),
                 op, "tokens ", tokens, ", hidden ", hidden, ", ", dtype_name(w.scalar_type()));
  return out;
}

// [n, k] of a weight that prepare_weight returned for one layer.
std::pair<int64_t, int64_t> weight_size(const Tensor& weight) {
  FT_CHECK(weight.dim() == 2 || (weight.dim() == 3 && weight.size(0) == 1),
           "weight must be [n, k] or [1, n, k], is ", shape_of(weight));
  return {weight.size(weight.dim() - 2), weight.size(weight.dim() - 1)};
}

// output = activation(input * weight^T + bias) + residual, of packed tensors.
cuda::Gemm gemm_of(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const Tensor& output,
                   Activation activation) {
  const auto [n, k] = weight_size(weight);
  return {operand_of(input),  operand_of(weight),          pointer(bias),
          pointer(residual),  output.data_ptr(),           narrow_int(input.size(0), "rows"),
          narrow_int(n, "n"), narrow_int(k, "k"),          activation,
          dtype_of(input),    cuda::batch_invariant(false)};
}

// What linear layers of any kind ask of their arguments; returns the weight's [n, k].
std::pair<int64_t, int64_t> check_linear(const char* op, const Tensor& input, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual) {
  FT_CHECK_FLOAT(input);
  FT_CHECK_DIM(input, 2);
  FT_CHECK_DTYPE(weight, input.scalar_type());
  check_device(op, input, "weight", weight);
  const auto [n, k] = weight_size(weight);
  FT_CHECK_SIZE(input, 1, k);
  if (bias) check_vector(op, "bias", input, *bias, n);
  if (residual) {
    check_device(op, input, "residual", *residual);
    FT_CHECK(residual->scalar_type() == input.scalar_type(), "residual must have dtype ",
             dtype_name(input.scalar_type()), ", has ", dtype_name(residual->scalar_type()));
    FT_CHECK(residual->dim() == 2 && residual->size(0) == input.size(0) && residual->size(1) == n,
             "residual must be [", input.size(0), ", ", n, "], is ", shape_of(*residual));
  }
  return {n, k};
}

Tensor linear(Tensor input, Tensor weight, std::optional<Tensor> bias,
              std::optional<Tensor> residual, Text activation) {
  const char* op = "linear";
  const int64_t n = check_linear(op, input, weight, bias, residual).first;
  const Activation follows = activation_named(activation);
  const OnDeviceOf device(input);
  const Tensor x = packed(input), w = packed(weight);
  const std::optional<Tensor> b = packed(bias), r = packed(residual);
  Tensor out = empty_like_rows(x, {x.size(0), n});
  if (x.size(0) == 0) return out;
  const Tensor workspace = bytes_like(x, cuda::gemm_workspace_bytes());
  check_status(
      cuda::linear(gemm_of(x, w, b, r, out, follows), workspace.data_ptr(), device.launch()), op,
      "input ", shape_of(x), ", weight ", shape_of(w), ", ", dtype_name(x.scalar_type()));
  return out;
}

int bias_reach_of(const Tensor& relative_bias) {
  return narrow_int(relative_bias.size(1), "distances") / 2;
}

Tensor varlen_attention(Tensor qkv, Tensor cu_seqlens, int64_t max_seqlen, int64_t num_heads,
                        std::optional<Tensor> relative_bias) {
  const char* op = "varlen_attention";
  FT_CHECK_FLOAT(qkv);
  FT_CHECK_DIM(qkv, 2);
  check_cu_seqlens(op, qkv, cu_seqlens);
  check_lengths(op, cu_seqlens, qkv.size(0), max_seqlen);
  FT_CHECK(num_heads > 0 && qkv.size(1) % (3 * num_heads) == 0, "qkv ", shape_of(qkv),
           " does not hold q, k and v of ", num_heads, " heads");
  if (relative_bias) {
    check_device(op, qkv, "relative_bias", *relative_bias);
    check_relative_bias(*relative_bias, "relative_bias", num_heads);
    FT_CHECK(relative_bias->scalar_type() == qkv.scalar_type(), "relative_bias must have dtype ",
             dtype_name(qkv.scalar_type()), ", has ", dtype_name(relative_bias->scalar_type()));
  }
  const OnDeviceOf device(qkv);
  const Tensor x = packed(qkv), cu = packed(cu_seqlens);
  const std::optional<Tensor> bias = packed(relative_bias);
  const int64_t tokens = x.size(0), hidden = x.size(1) / 3;
  Tensor out = empty_like_rows(x, {tokens, hidden});
  const int batch = narrow_int(cu.size(0) - 1, "batch");
  if (tokens == 0 || batch == 0) return out;
  const cuda::AttentionShape shape{batch,
                                   narrow_int(tokens, "tokens"),
                                   narrow_int(max_seqlen, "max_seqlen"),
                                   narrow_int(num_heads, "num_heads"),
                                   narrow_int(hidden / num_heads, "head_dim"),
                                   dtype_of(x),
                                   cuda::batch_invariant(false),
                                   relative_bias ? bias_reach_of(*relative_bias) : -1};
  const Tensor plan = bytes_like(x, cuda::attention_plan_bytes(shape));
  const Launch launch = device.launch();
  cudaError_t status = cuda::attention_plan(shape, int32_pointer(cu), plan.data_ptr(), launch);
  if (status == cudaSuccess)
    status = cuda::varlen_attention(shape, pointer(x), pointer(bias), plan.data_ptr(),
                                    out.data_ptr(), launch);
  check_status(status, op, "qkv ", shape_of(x), ", batch ", batch, ", max_seqlen ", max_seqlen,
               ", ", num_heads, " heads of ", shape.head_dim, ", ", dtype_name(x.scalar_type()));
  return out;
}

Tensor segment_pool(Tensor input, Tensor cu_seqlens, Text how) {
  const char* op = "segment_pool";
  FT_CHECK_FLOAT(input);
  FT_CHECK_DIM(input, 2);
  const Pooling pooling = pooling_named(how);
  check_cu_seqlens(op, input, cu_seqlens);
  check_lengths(op, cu_seqlens, input.size(0), input.size(0));
  const OnDeviceOf device(input);
  const Tensor x = packed(input), cu = packed(cu_seqlens);
  const int batch = narrow_int(cu.size(0) - 1, "batch");
  Tensor out = empty_like_rows(x, {batch, x.size(1)}, ScalarType::Float);
  if (out.numel() > 0)
    check_status(
        cuda::segment_pool(pointer(x), int32_pointer(cu), batch, narrow_int(x.size(0), "tokens"),
                           narrow_int(x.size(1), "hidden"), pooling, dtype_of(x),
                           static_cast<float*>(out.data_ptr()), device.launch()),
        op, "input ", shape_of(x), ", batch ", batch, ", ", dtype_name(x.scalar_type()));
  return out;
}

Tensor residual_layer_norm(Tensor input, std::optional<Tensor> bias, Tensor residual, Tensor gamma,
                           Tensor beta, double eps) {
  const char* op = "residual_layer_norm";
  FT_CHECK_FLOAT(input);
  FT_CHECK_DIM(input, 2);
  FT_CHECK_DTYPE(residual, input.scalar_type());
  check_device(op, input, "residual", residual);
  FT_CHECK(shape_of(residual) == shape_of(input), "residual must have input's shape ",
           shape_of(input), ", is ", shape_of(residual));
  if (bias) check_vector(op, "bias", input, *bias, input.size(1));
  check_vector(op, "gamma", input, gamma, input.size(1));
  check_vector(op, "beta", input, beta, input.size(1));
  const OnDeviceOf device(input);
  const Tensor x = packed(input), r = packed(residual), g = packed(gamma), b = packed(beta);
  const std::optional<Tensor> add = packed(bias);
  Tensor out = empty_like_rows(x, {x.size(0), x.size(1)});
  if (out.numel() > 0)
    check_status(
        cuda::residual_layer_norm(pointer(x), pointer(add), pointer(r), pointer(g), pointer(b),
                                  static_cast<float>(eps), narrow_int(x.size(0), "rows"),
                                  narrow_int(x.size(1), "hidden"), dtype_of(x), out.data_ptr(),
                                  nullptr, device.launch()),
        op, "input ", shape_of(x), ", ", dtype_name(x.scalar_type()));
  return out;
}

Tensor bias_activation(Tensor input, std::optional<Tensor> bias, Text activation) {
  FT_CHECK_FLOAT(input);
  FT_CHECK_DIM(input, 2);
  const Activation follows = activation_named(activation);
  FT_CHECK(follows != Activation::kNone, "bias_activation: activation must be one, is none");
  if (bias) check_vector("bias_activation", "bias", input, *bias, input.size(1));
  const OnDeviceOf device(input);
  const Tensor x = packed(input);
  const std::optional<Tensor> b = packed(bias);
  Tensor out = empty_like_rows(x, {x.size(0), x.size(1)});
  if (out.numel() > 0)
    check_status(
        cuda::bias_activation(pointer(x), pointer(b), nullptr, follows,
                              narrow_int(x.size(0), "rows"), narrow_int(x.size(1), "width"),
                              dtype_of(x), out.data_ptr(), nullptr, device.launch()),
        "bias_activation", "input ", shape_of(x), ", ", dtype_name(x.scalar_type()));
  return out;
}

// What a weight of an encoder must be, whose floats are `floats`.
ScalarType type_of(EncoderWeight weight, ScalarType floats) {
  for (int p = 0; p < kLayerProducts; ++p) {
    const auto product = static_cast<LayerProduct>(p);
    if (weight == narrow_weight(product)) return ScalarType::Float8_e4m3fn;
    if (weight == narrow_scale(product) || weight == input_scale(product)) return ScalarType::Float;
  }
  return floats;
}

Tensor run_encoder(const Tensor& input_ids, const Tensor& token_type_ids,
                   const std::optional<Tensor>& position_ids, const Tensor& cu_seqlens,
                   int64_t max_seqlen, std::vector<Tensor> tensors, const EncoderSpec& spec,
                   const EncoderOptions& options) {
  const char* op = "encode";
  const EncoderWeights w(spec, tensors);
  const Tensor& word = w[kWord];
  FT_CHECK(word.is_cuda() && is_float_type(word.scalar_type()), kEncoderWeightNames[kWord],
           " must be float32, float16 or bfloat16 on the inputs' GPU, is ",
           dtype_name(word.scalar_type()));
  FT_CHECK_DIM(input_ids, 1);
  FT_CHECK_IDS(input_ids);
  FT_CHECK(token_type_ids.scalar_type() == input_ids.scalar_type() && token_type_ids.dim() == 1 &&
               token_type_ids.size(0) == input_ids.size(0),
           "token_type_ids must have input_ids' dtype and shape");
  check_cu_seqlens(op, word, cu_seqlens);
  check_lengths(op, cu_seqlens, input_ids.size(0), max_seqlen);
  bool one_per_layer = true;
  for (int i = 0; i < kEncoderWeightCount; ++i) {
    const auto weight = static_cast<EncoderWeight>(i);
    if (!spec.has(weight)) continue;
    const Tensor& tensor = w[weight];
    const char* name = kEncoderWeightNames[i];
    check_device(op, word, name, tensor);
    if (weight == kRelativeBias) check_relative_bias(tensor, name, spec.heads);
    const EncoderWeightShape shape = shape_of(spec, weight);
    std::vector<int64_t> wanted;
    if (shape.stacked) {
      const bool shared = tensor.dim() > 0 && tensor.size(0) == 1;
      one_per_layer = one_per_layer && (!shared || spec.layers == 1);
      wanted.push_back(shared ? 1 : spec.layers);
    }
    if (shape.rows != 0)
      wanted.push_back(shape.rows < 0 && tensor.dim() > 0 ? tensor.size(0) : shape.rows);
    if (shape.columns != 0) wanted.push_back(shape.columns < 0 ? tensor.size(1) : shape.columns);
    const ScalarType type = type_of(weight, word.scalar_type());
    FT_CHECK(has_shape(tensor, wanted) && tensor.is_contiguous() && tensor.scalar_type() == type,
             op, ": ", name, " must be contiguous ", shape_of(wanted), " ", dtype_name(type),
             ", is ", shape_of(tensor), " ", dtype_name(tensor.scalar_type()));
  }
  check_device(op, word, "input_ids", input_ids);
  check_device(op, word, "token_type_ids", token_type_ids);
  check_positions(op, word, position_ids, input_ids.size(0));
  const OnDeviceOf device(word);
  for (Tensor& tensor : tensors) {
    if (!aligned(tensor)) tensor = torch::stable::clone(tensor);  // `w` and `word` see it
  }
  const Tensor ids = packed(input_ids), types = packed(token_type_ids), cu = packed(cu_seqlens);
  const std::optional<Tensor> positions = packed(position_ids);
  cuda::EncoderShape shape;
  shape.tokens = narrow_int(ids.size(0), "tokens");
  shape.batch = narrow_int(cu.size(0) - 1, "batch");
  shape.max_seqlen = narrow_int(max_seqlen, "max_seqlen");
  shape.hidden = narrow_int(spec.hidden, "hidden");
  shape.embedding = narrow_int(spec.embedding, "embedding");
  shape.intermediate = narrow_int(spec.intermediate, "intermediate");
  shape.layers = narrow_int(spec.layers, "layers");
  shape.num_heads = narrow_int(spec.heads, "heads");
  shape.vocab = narrow_int(word.size(0), "vocab");
  shape.positions = narrow_int(w[kPosition].size(0), "positions");
  shape.types = narrow_int(w[kTokenType].size(0), "types");
  shape.activation = spec.activation;
  shape.eps = static_cast<float>(spec.eps);
  shape.dtype = dtype_of(word);
  if (spec.biased()) shape.bias_reach = bias_reach_of(w[kRelativeBias]);
  shape.one_per_layer = one_per_layer;
  shape.projects = spec.projects();
  shape.narrow = spec.narrow();
  shape.narrow_pass =
      (spec.activation != Activation::kGelu && spec.activation != Activation::kNone) ||
      !spec.narrow(kUp) || !spec.floats[kUp].empty();
  shape.batch_invariant = cuda::batch_invariant(options.batch_invariant);
  shape.few_tokens = cuda::few_tokens_allowed(options.few_tokens);
  Tensor out = empty_like_rows(word, {ids.size(0), spec.hidden});
  if (shape.tokens == 0 || shape.batch == 0) return out;
  const cuda::EncoderInputs inputs{pointer(ids), pointer(types), int_type_of(ids),
                                   static_cast<const int32_t*>(pointer(positions)),
                                   int32_pointer(cu)};
  const auto data = [&](EncoderWeight weight) { return pointer(w[weight]); };
  const auto stack = [&](EncoderWeight weight) {
    return Stack{operand_of(w[weight]), w[weight].size(0)};
  };
  cuda::EncoderParameters parameters{data(kWord),
                                     data(kPosition),
                                     data(kTokenType),
                                     data(kEmbeddingGamma),
                                     data(kEmbeddingBeta),
                                     spec.projects() ? operand_of(w[kProjectionWeight]) : Operand{},
                                     spec.projects() ? data(kProjectionBias) : nullptr,
                                     stack(kQkvWeight),
                                     stack(kQkvBias),
                                     stack(kOutWeight),
                                     stack(kOutBias),
                                     stack(kNorm1Gamma),
                                     stack(kNorm1Beta),
                                     stack(kUpWeight),
                                     stack(kUpBias),
                                     stack(kDownWeight),
                                     stack(kDownBias),
                                     stack(kNorm2Gamma),
                                     stack(kNorm2Beta),
                                     spec.biased() ? data(kRelativeBias) : nullptr,
                                     {}};
  for (int p = 0; p < kLayerProducts; ++p) {
    const auto product = static_cast<LayerProduct>(p);
    if (!spec.narrow(product)) continue;
    parameters.narrow[p] = {
        {{data(narrow_weight(product)), DType::kE4M3}, w[narrow_weight(product)].size(0)},
        static_cast<const float*>(data(narrow_scale(product))),
        static_cast<const float*>(data(input_scale(product))),
        &spec.floats[p]};
  }
  const Tensor workspace = bytes_like(word, cuda::encoder_workspace_bytes(shape));
  check_status(cuda::encoder(shape, inputs, parameters, workspace.data_ptr(), out.data_ptr(),
                             device.launch().stream),
               op, "tokens ", shape.tokens, ", batch ", shape.batch, ", max_seqlen ", max_seqlen,
               ", hidden ", spec.hidden, ", intermediate ", spec.intermediate, ", ", spec.heads,
               " heads, ", dtype_name(word.scalar_type()));
  return out;
}

Tensor encode(Tensor input_ids, Tensor token_type_ids, std::optional<Tensor> position_ids,
              Tensor cu_seqlens, int64_t max_seqlen, std::vector<Tensor> weights, Text spec,
              Text options) {
  return run_encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                     std::move(weights), parse_encoder_spec(spec), parse_encoder_options(options));
}

Tensor encoder(Tensor input_ids, Tensor token_type_ids, std::optional<Tensor> position_ids,
               Tensor cu_seqlens, int64_t max_seqlen, Tensor word, Tensor position,
               Tensor token_type, Tensor emb_gamma, Tensor emb_beta, Tensor qkv_weight,
               Tensor qkv_bias, Tensor out_weight, Tensor out_bias, Tensor ln1_gamma,
               Tensor ln1_beta, Tensor up_weight, Tensor up_bias, Tensor down_weight,
               Tensor down_bias, Tensor ln2_gamma, Tensor ln2_beta, int64_t num_heads, double eps) {
  return run_encoder(
      input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen,
      {word, position, token_type, emb_gamma, emb_beta, qkv_weight, qkv_bias, out_weight, out_bias,
       ln1_gamma, ln1_beta, up_weight, up_bias, down_weight, down_bias, ln2_gamma, ln2_beta},
      spec_of_interface_1(word, qkv_bias, up_bias, num_heads, eps), {});
}

// LayerNorm(input * weight^T + bias + residual), the norm in the product's epilogue where it fits.
Tensor linear_layer_norm(Tensor input, Tensor weight, Tensor bias, Tensor residual, Tensor gamma,
                         Tensor beta, double eps) {
  const char* op = "linear_layer_norm";
  const int64_t n = check_linear(op, input, weight, bias, residual).first;
  check_vector(op, "gamma", input, gamma, n);
  check_vector(op, "beta", input, beta, n);
  const OnDeviceOf device(input);
  const Tensor x = packed(input), w = packed(weight), b = packed(bias), r = packed(residual),
               g = packed(gamma), c = packed(beta);
  Tensor out = empty_like_rows(x, {x.size(0), n});
  if (x.size(0) == 0) return out;
  const Tensor workspace = bytes_like(x, cuda::gemm_workspace_bytes());
  const Tensor scratch = empty_like_rows(x, {x.size(0), n});
  const cuda::GemmNorm norm{pointer(g), pointer(c), static_cast<float>(eps), nullptr, {}};
  check_status(cuda::linear_layer_norm(gemm_of(x, w, b, r, out, Activation::kNone), norm,
                                       scratch.data_ptr(), workspace.data_ptr(), device.launch()),
               op, "input ", shape_of(x), ", weight ", shape_of(w), ", ",
               dtype_name(x.scalar_type()));
  return out;
}

// The plans worth timing for one linear layer, one a line.
std::string gemm_candidates(Tensor weight, int64_t rows, bool gelu, bool residual, bool norm) {
  const bool narrow = weight.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!narrow) FT_CHECK_FLOAT(weight);
  const auto [n, k] = weight_size(weight);
  const OnDeviceOf device(weight);
  // Only alignment is read of the pointers, and torch's allocations have the best there is.
  void* const any = weight.data_ptr();
  const auto* const number = static_cast<const float*>(any);
  const Operand operand = narrow ? Operand{any, DType::kE4M3, number} : operand_of(weight);
  const cuda::Gemm gemm{operand,
                        operand,
                        any,
                        residual ? any : nullptr,
                        any,
                        cuda::gemm_row_class(narrow_int(rows, "rows")),
                        narrow_int(n, "n"),
                        narrow_int(k, "k"),
                        gelu ? Activation::kGelu : Activation::kNone,
                        narrow ? DType::kFloat16 : dtype_of(weight),
                        false,
                        narrow && gelu ? number : nullptr};
  cuda::GemmNorm with_norm{any, any, 1e-12f, nullptr, {}};
  if (narrow) with_norm.narrow = {any, number};
  std::vector<std::string> plans;
  check_status(cuda::gemm_candidates(gemm, norm ? &with_norm : nullptr, &plans), "gemm_candidates",
               "rows ", rows, ", weight ", shape_of(weight));
  std::string lines;
  for (const std::string& plan : plans) lines += (lines.empty() ? "" : "\n") + plan;
  return lines;
}

// Makes a measured plan the choice for its shape class on `device`.
void load_gemm_plan(int64_t device, Text dtype, int64_t rows, int64_t n, int64_t k, bool gelu,
                    bool residual, bool norm, Text plan) {
  cuda::GemmKey key{cuda::gemm_row_class(narrow_int(rows, "rows")),
                    narrow_int(n, "n"),
                    narrow_int(k, "k"),
                    DType::kFloat32,
                    gelu ? Activation::kGelu : Activation::kNone,
                    residual,
                    norm};
  if (dtype == "float16")
    key.dtype = DType::kFloat16;
  else if (dtype == "bfloat16")
    key.dtype = DType::kBFloat16;
  else if (dtype == "float8_e4m3fn")
    key.dtype = DType::kE4M3;
  else
    FT_CHECK(dtype == "float32", "load_gemm_plan: unknown dtype ", dtype);
  const torch::stable::accelerator::DeviceGuard guard(narrow_int(device, "device"));
  cudaError_t status = cudaSetDevice(static_cast<int>(device));
  if (status == cudaSuccess) status = cuda::load_gemm_plan(key, plan);
  check_status(status, "load_gemm_plan", "rows ", rows, ", n ", n, ", k ", k);
}

// The row class a plan for `rows` serves.
int64_t gemm_row_class(int64_t rows) { return cuda::gemm_row_class(narrow_int(rows, "rows")); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastertransformer, m) {
  m.def(
      "linear_layer_norm(Tensor input, Tensor weight, Tensor bias, Tensor residual, Tensor gamma, "
      "Tensor beta, float eps) -> Tensor");
  m.def("gemm_candidates(Tensor weight, int rows, bool gelu, bool residual, bool norm) -> str");
  m.def(
      "load_gemm_plan(int device, str dtype, int rows, int n, int k, bool gelu, bool residual, "
      "bool norm, str plan) -> ()");
  m.def("gemm_row_class(int rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CompositeExplicitAutograd, m) {
  m.impl("load_gemm_plan", TORCH_BOX(&load_gemm_plan));
  m.impl("gemm_row_class", TORCH_BOX(&gemm_row_class));
}

STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CUDA, m) {
  m.impl("prepare_weight", TORCH_BOX(&prepare_weight));
  m.impl("prepare_narrow", TORCH_BOX(&prepare_narrow));
  m.impl("serves_narrow", TORCH_BOX(&serves_narrow));
  m.impl("is_prepared", TORCH_BOX(&is_prepared));
  m.impl("remove_padding", TORCH_BOX(&remove_padding));
  m.impl("restore_padding", TORCH_BOX(&restore_padding));
  m.impl("embedding_layer_norm", TORCH_BOX(&embedding_layer_norm));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm));
  m.impl("bias_activation", TORCH_BOX(&bias_activation));
  m.impl("segment_pool", TORCH_BOX(&segment_pool));
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("encoder", TORCH_BOX(&encoder));
  m.impl("linear_layer_norm", TORCH_BOX(&linear_layer_norm));
  m.impl("gemm_candidates", TORCH_BOX(&gemm_candidates));
}

}  // namespace ft
