// The ops on the CPU: check, allocate, hand pointers to the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef FT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "kernels/cpu/kernels.h"
#include "torch/checks.h"
#include "torch/text.h"

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;
using torch::stable::contiguous;

// Columns among which prepare_narrow reorders.
constexpr int64_t kNarrowGroup = 16;

// torch's own pool: torch.set_num_threads holds, and a call from inside a parallel region stays on
// its thread.
cpu::Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int workers, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t w = begin; w < end; ++w) body(context, static_cast<int>(w));
            });
          }};
}

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  try {
    return torch::stable::empty(sizes, dtype);
  } catch (const std::exception&) {
    // torch's stable interface drops the allocator's words, and callers split a batch for these.
    fail("can't allocate memory for ", shape_of(sizes), " ", dtype_name(dtype));
  }
}

// This thread's scratch memory, kept from call to call: memory fresh from the system costs a page
// fault every few KiB, some milliseconds for an encoder's worth.
class Workspace {
 public:
  void* of(int64_t bytes) {
    if (bytes > size_) {
      release();
      const int64_t size = (bytes + kStep - 1) / kStep * kStep;
      memory_ = ::operator new(size, std::align_val_t{64});
      size_ = size;
      cpu::prefer_large_pages(memory_, size_);
    }
    return memory_;
  }
  // Gives back what an unusually large call left.
  void trim() {
    if (size_ > kKept) release();
  }
  ~Workspace() { release(); }

 private:
  static constexpr int64_t kStep = int64_t{1} << 21, kKept = int64_t{256} << 20;

  void release() {
    if (memory_) ::operator delete(memory_, std::align_val_t{64});
    memory_ = nullptr;
    size_ = 0;
  }
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Lends the calling thread's workspace to one op; ops never call each other.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(mine().of(bytes)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { mine().trim(); }
  void* get() const { return memory_; }

 private:
  static Workspace& mine() {
    thread_local Workspace workspace;
    return workspace;
  }
  void* memory_;
};

// Contiguous, floating, on the CPU.
Tensor checked_float(const Tensor& tensor, const char* name, std::vector<int64_t> shape) {
  FT_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other tensors");
  FT_CHECK(is_float_type(tensor.scalar_type()), name,
           " must have dtype float32, float16 or bfloat16, has ", dtype_name(tensor.scalar_type()));
  if (!has_shape(tensor, shape)) {
    fail(name, " must have shape ", shape_of(shape), ", has ", shape_of(tensor));
  }
  return contiguous(tensor);
}

Operand operand_of(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor)}; }

// int64 copies of ids [T], checked against their table.
std::vector<int64_t> checked_ids(const Tensor& tensor, const char* name, int64_t tokens,
                                 int64_t limit) {
  FT_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other tensors");
  FT_CHECK(tensor.dim() == 1 && tensor.size(0) == tokens, name, " must have shape [", tokens,
           "], has ", shape_of(tensor));
  FT_CHECK(is_id_type(tensor.scalar_type()), name, " must have dtype int64 or int32, has ",
           dtype_name(tensor.scalar_type()));
  const Tensor whole = contiguous(tensor);
  std::vector<int64_t> ids(tokens);
  if (whole.scalar_type() == ScalarType::Long) {
    std::copy_n(static_cast<const int64_t*>(whole.const_data_ptr()), tokens, ids.begin());
  } else {
    std::copy_n(static_cast<const int32_t*>(whole.const_data_ptr()), tokens, ids.begin());
  }
  for (int64_t t = 0; t < tokens; ++t) {
    FT_CHECK(ids[t] >= 0 && ids[t] < limit, name, " must be in [0, ", limit, "), has ", ids[t],
             " at token ", t);
  }
  return ids;
}

// cu_seqlens, checked, with what it says.
struct Sequences {
  Tensor tensor;
  const int32_t* bounds;
  int64_t batch, longest;
};

Sequences checked_sequences(const Tensor& cu_seqlens, int64_t tokens,
                            std::optional<int64_t> max_seqlen) {
  FT_CHECK(cu_seqlens.is_cpu(), "cu_seqlens must be on the CPU like the other tensors");
  FT_CHECK_DTYPE(cu_seqlens, ScalarType::Int);
  FT_CHECK_DIM(cu_seqlens, 1);
  FT_CHECK(cu_seqlens.size(0) >= 1,
           "cu_seqlens must have one more element than sequences, has none");
  Sequences s{contiguous(cu_seqlens), nullptr, cu_seqlens.size(0) - 1, 0};
  s.bounds = static_cast<const int32_t*>(s.tensor.const_data_ptr());
  FT_CHECK(s.bounds[0] == 0, "cu_seqlens must begin with 0, begins with ", s.bounds[0]);
  for (int64_t b = 0; b < s.batch; ++b) {
    FT_CHECK(s.bounds[b + 1] >= s.bounds[b], "cu_seqlens must not decrease, goes from ",
             s.bounds[b], " to ", s.bounds[b + 1], " at sequence ", b);
    s.longest = std::max<int64_t>(s.longest, s.bounds[b + 1] - s.bounds[b]);
  }
  FT_CHECK(s.bounds[s.batch] == tokens, "cu_seqlens must end with the number of tokens, ", tokens,
           ", ends with ", s.bounds[s.batch]);
  FT_CHECK(!max_seqlen || s.longest <= *max_seqlen,
           "max_seqlen must be at least the longest sequence, ", s.longest, ", is ",
           max_seqlen.value_or(0));
  return s;
}

std::vector<int32_t> checked_positions(const OptTensor& position_ids, const Sequences& s,
                                       int64_t tokens, int64_t limit) {
  if (position_ids) {
    FT_CHECK(position_ids->scalar_type() == ScalarType::Int,
             "position_ids must have dtype int32, has ", dtype_name(position_ids->scalar_type()));
    const auto wide = checked_ids(*position_ids, "position_ids", tokens, limit);
    return {wide.begin(), wide.end()};
  }
  FT_CHECK(s.longest <= limit, "cu_seqlens: the longest sequence, ", s.longest,
           ", must fit the position table of ", limit);
  std::vector<int32_t> positions(tokens);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int32_t t = s.bounds[b]; t < s.bounds[b + 1]; ++t) positions[t] = t - s.bounds[b];
  }
  return positions;
}

// A blob of `layers` weights [n, k]; -1: any number.
Tensor checked_blob(const Tensor& tensor, const char* name, int64_t layers, int64_t n, int64_t k) {
  FT_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other tensors");
  FT_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 1, name,
           " must be what prepare_weight returned on the CPU, has dtype ",
           dtype_name(tensor.scalar_type()), " and shape ", shape_of(tensor));
  Tensor blob = contiguous(tensor);
  const std::string fault = cpu::blob_fault(blob.const_data_ptr(), blob.numel());
  FT_CHECK(fault.empty(), name, " ", fault);
  const auto& h = *static_cast<const cpu::BlobHeader*>(blob.const_data_ptr());
  FT_CHECK((layers < 0 || h.layers == layers) && (n < 0 || h.n == n) && (k < 0 || h.k == k), name,
           " must hold ", layers, " x [", n, ", ", k, "] (-1: any), holds ", h.layers, " x [", h.n,
           ", ", h.k, "]");
  return blob;
}

// ---- ops ---------------------------------------------------------------------------------------

Tensor packed(const cpu::LayeredWeight& weight) {
  Tensor blob = empty({cpu::packed_bytes(weight)}, ScalarType::Byte);
  cpu::pack_weight(weight, blob.mutable_data_ptr(), torch_threads());
  return blob;
}

Tensor prepare_weight(const Tensor& weight, const OptTensor& scale) {
  FT_CHECK_FLOAT(weight);
  check_no_scale(weight, scale);
  FT_CHECK(weight.dim() == 2 || weight.dim() == 3,
           "weight must have shape [N, K] or [L, N, K], has ", shape_of(weight));
  const Tensor whole = contiguous(weight);
  const int64_t layers = whole.dim() == 3 ? whole.size(0) : 1;
  const int64_t n = whole.size(whole.dim() - 2), k = whole.size(whole.dim() - 1);
  FT_CHECK(n > 0 && k > 0, "weight must not be empty, has shape ", shape_of(weight));
  cpu::LayeredWeight layered{n, k};
  layered.kept = operand_of(whole);
  layered.kept_count = layers;
  return packed(layered);
}

Tensor prepare_layers(const Tensor& quantized, const Tensor& scale, const Tensor& kept,
                      const std::vector<int64_t>& kept_layers) {
  const int64_t kept_count = static_cast<int64_t>(kept_layers.size());
  const Tensor& any = quantized.numel() > 0 ? quantized : kept;
  FT_CHECK(any.dim() == 3 && any.numel() > 0,
           "quantized and kept must have shape [L, N, K], one of them with L > 0, have ",
           shape_of(quantized), " and ", shape_of(kept));
  const int64_t n = any.size(1), k = any.size(2);
  const int64_t quantized_count = quantized.numel() > 0 ? quantized.size(0) : 0;
  cpu::LayeredWeight layered{n, k};
  Tensor whole, scales, whole_kept;
  if (quantized_count > 0) {
    FT_CHECK(quantized.is_cpu() && scale.is_cpu(),
             "quantized and scale must be on the CPU like the other tensors");
    FT_CHECK_DTYPE(quantized, ScalarType::Char);
    FT_CHECK_DTYPE(scale, ScalarType::Float);
    FT_CHECK(has_shape(scale, {quantized_count, n}), "scale must have shape [", quantized_count,
             ", ", n, "], has ", shape_of(scale));
    whole = contiguous(quantized);
    scales = contiguous(scale);
    layered.quantized = static_cast<const int8_t*>(whole.const_data_ptr());
    layered.scale = static_cast<const float*>(scales.const_data_ptr());
    layered.quantized_count = quantized_count;
  }
  FT_CHECK(kept_count == (kept.numel() > 0 ? kept.size(0) : 0), "kept_layers must have an index ",
           "for each of kept, ", shape_of(kept), ", has ", kept_count);
  for (int64_t i = 0; i < kept_count; ++i) {
    FT_CHECK(kept_layers[i] < quantized_count + kept_count &&
                 kept_layers[i] > (i > 0 ? kept_layers[i - 1] : -1),
             "kept_layers must increase within [0, ", quantized_count + kept_count, "), has ",
             kept_layers[i], " at ", i);
  }
  if (kept_count > 0) {
    whole_kept = checked_float(kept, "kept", {kept_count, n, k});
    layered.kept = operand_of(whole_kept);
    layered.kept_count = kept_count;
    layered.kept_layers = kept_layers.data();
  }
  return packed(layered);
}

// What products of 8-bit floats read, in the order of twins.narrow_order. No CPU multiplies those;
// this is for whoever lays out a weight here for a GPU.
Tensor prepare_narrow(const Tensor& weight) {
  FT_CHECK_DTYPE(weight, ScalarType::Float8_e4m3fn);
  FT_CHECK(weight.dim() == 3 && weight.size(2) > 0 && weight.size(2) % kNarrowGroup == 0,
           "weight must have shape [L, N, K] with K a multiple of ", kNarrowGroup, ", has ",
           shape_of(weight));
  const Tensor whole = contiguous(weight);
  Tensor out = empty({whole.size(0), whole.size(1), whole.size(2)}, whole.scalar_type());
  const auto* from = static_cast<const uint8_t*>(whole.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < whole.numel(); ++i) {
    const int64_t place = i % kNarrowGroup, quad = place / 4, within = place % 4;
    to[i] = from[i - place + 2 * quad + within % 2 + within / 2 * (kNarrowGroup / 2)];
  }
  return out;
}

bool serves_narrow(const Tensor&) { return false; }

bool is_prepared(const Tensor& prepared, const Tensor& weight) {
  const int64_t dim = weight.dim();
  const bool quantized = weight.scalar_type() == ScalarType::Char;
  if (!prepared.is_cpu() || !weight.is_cpu() ||
      !(quantized || is_float_type(weight.scalar_type())) || (dim != 2 && dim != 3) ||
      prepared.scalar_type() != ScalarType::Byte || prepared.dim() != 1 ||
      !prepared.is_contiguous()) {
    return false;
  }
  return cpu::is_packed(prepared.const_data_ptr(), prepared.numel(),
                        quantized ? DType::kInt8 : dtype_of(weight), dim == 3 ? weight.size(0) : 1,
                        weight.size(dim - 2), weight.size(dim - 1));
}

template <typename Id>
void gather(const Tensor& from, const std::vector<int64_t>& indices, Tensor& to) {
  const Id* in = static_cast<const Id*>(from.const_data_ptr());
  Id* out = static_cast<Id*>(to.mutable_data_ptr());
  for (size_t t = 0; t < indices.size(); ++t) out[t] = in[indices[t]];
}

Tensor gathered(const Tensor& from, const std::vector<int64_t>& indices) {
  Tensor out = empty({static_cast<int64_t>(indices.size())}, from.scalar_type());
  if (from.scalar_type() == ScalarType::Long) {
    gather<int64_t>(from, indices, out);
  } else {
    gather<int32_t>(from, indices, out);
  }
  return out;
}

template <typename Flag>
std::vector<int64_t> kept_tokens(const Tensor& mask, int32_t* cu_seqlens, int64_t& longest) {
  const Flag* m = static_cast<const Flag*>(mask.const_data_ptr());
  const int64_t batch = mask.size(0), seqlen = mask.size(1);
  std::vector<int64_t> kept;
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const size_t before = kept.size();
    for (int64_t s = 0; s < seqlen; ++s) {
      if (m[b * seqlen + s]) kept.push_back(b * seqlen + s);
    }
    const int64_t length = static_cast<int64_t>(kept.size() - before);
    FT_CHECK(length > 0 || seqlen == 0,
             "attention_mask must keep a token of every row, keeps none of row ", b);
    FT_CHECK(length == 0 || kept[before] == b * seqlen,
             "attention_mask must keep column 0 of every row, since the head reads it; row ", b,
             " drops it");
    longest = std::max(longest, length);
    cu_seqlens[b + 1] = static_cast<int32_t>(kept.size());
  }
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> remove_padding(
    const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& attention_mask) {
  FT_CHECK_DIM(input_ids, 2);
  FT_CHECK_IDS(input_ids);
  FT_CHECK_IDS(token_type_ids);
  const int64_t batch = input_ids.size(0), seqlen = input_ids.size(1);
  for (const auto& [tensor, name] : {std::pair{&token_type_ids, "token_type_ids"},
                                     std::pair{&attention_mask, "attention_mask"}}) {
    FT_CHECK(tensor->is_cpu(), name, " must be on the CPU like input_ids");
    FT_CHECK(tensor->dim() == 2 && tensor->size(0) == batch && tensor->size(1) == seqlen, name,
             " must have the shape of input_ids, ", shape_of(input_ids), ", has ",
             shape_of(*tensor));
  }
  FT_CHECK(batch * seqlen < (int64_t{1} << 31),
           "input_ids must hold fewer than 2^31 tokens, has shape ", shape_of(input_ids));
  const Tensor mask = contiguous(attention_mask);
  Tensor cu_seqlens = empty({batch + 1}, ScalarType::Int);
  int32_t* bounds = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  int64_t longest = 0;
  std::vector<int64_t> kept;
  switch (mask.scalar_type()) {
    case ScalarType::Long:
      kept = kept_tokens<int64_t>(mask, bounds, longest);
      break;
    case ScalarType::Int:
      kept = kept_tokens<int32_t>(mask, bounds, longest);
      break;
    case ScalarType::Bool:
      kept = kept_tokens<bool>(mask, bounds, longest);
      break;
    default:
      fail("attention_mask must have dtype int64, int32 or bool, has ",
           dtype_name(mask.scalar_type()));
  }
  const int64_t tokens = static_cast<int64_t>(kept.size());
  Tensor positions = empty({tokens}, ScalarType::Int), indices = empty({tokens}, ScalarType::Long);
  int32_t* p = static_cast<int32_t*>(positions.mutable_data_ptr());
  std::copy(kept.begin(), kept.end(), static_cast<int64_t*>(indices.mutable_data_ptr()));
  for (int64_t t = 0; t < tokens; ++t) p[t] = static_cast<int32_t>(kept[t] % seqlen);
  return {gathered(contiguous(input_ids), kept),
          gathered(contiguous(token_type_ids), kept),
          positions,
          indices,
          cu_seqlens,
          longest};
}

Tensor restore_padding(const Tensor& packed, const Tensor& token_indices, int64_t batch,
                       int64_t seqlen, double fill) {
  FT_CHECK_FLOAT(packed);
  FT_CHECK(packed.dim() >= 1, "packed must have shape [T, ...], has ", shape_of(packed));
  FT_CHECK(batch >= 0 && seqlen >= 0, "batch and seqlen must not be negative, are ", batch, " and ",
           seqlen);
  FT_CHECK(token_indices.scalar_type() == ScalarType::Long,
           "token_indices must have dtype int64, has ", dtype_name(token_indices.scalar_type()));
  const int64_t tokens = packed.size(0), rows = batch * seqlen;
  const auto indices = checked_ids(token_indices, "token_indices", tokens, rows);
  std::vector<int64_t> shape{batch, seqlen};
  for (int64_t i = 1; i < packed.dim(); ++i) shape.push_back(packed.size(i));
  Tensor out = empty(shape, packed.scalar_type());
  torch::stable::fill_(out, fill);
  const Tensor whole = contiguous(packed);
  const int64_t width = tokens ? whole.numel() / tokens * size_of(dtype_of(whole)) : 0;
  const char* from = static_cast<const char*>(whole.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(from + t * width, width, to + indices[t] * width);
  }
  return out;
}

// What the caller calls its tensors.
struct EmbeddingNames {
  const char *word = "word", *position = "position", *token_type = "token_type", *gamma = "gamma",
             *beta = "beta";
};

// What the embeddings' pointers point into.
struct EmbeddingInputs {
  Tensor word, position, token_type, gamma, beta;
  std::vector<int64_t> ids, types;
  std::vector<int32_t> positions;
  Sequences sequences;

  EmbeddingInputs(const Tensor& input_ids, const Tensor& token_type_ids,
                  const OptTensor& position_ids, const Tensor& cu_seqlens,
                  std::optional<int64_t> max_seqlen, const Tensor& word_, const Tensor& position_,
                  const Tensor& token_type_, const Tensor& gamma_, const Tensor& beta_,
                  const EmbeddingNames& called = {})
      : sequences() {
    FT_CHECK_DIM(input_ids, 1);
    const int64_t tokens = input_ids.size(0);
    for (const auto& [table, name] :
         {std::pair{&word_, called.word}, std::pair{&position_, called.position},
          std::pair{&token_type_, called.token_type}}) {
      FT_CHECK(table->dim() == 2, name, " must have shape [rows, H], has ", shape_of(*table));
      FT_CHECK(table->scalar_type() == word_.scalar_type(), name, " must have the dtype of ",
               called.word, ", ", dtype_name(word_.scalar_type()), ", has ",
               dtype_name(table->scalar_type()));
    }
    const int64_t hidden = word_.size(1);
    FT_CHECK(hidden > 0, called.word, " must have shape [V, H] with H > 0, has ", shape_of(word_));
    word = checked_float(word_, called.word, {word_.size(0), hidden});
    position = checked_float(position_, called.position, {position_.size(0), hidden});
    token_type = checked_float(token_type_, called.token_type, {token_type_.size(0), hidden});
    gamma = checked_float(gamma_, called.gamma, {hidden});
    beta = checked_float(beta_, called.beta, {hidden});
    sequences = checked_sequences(cu_seqlens, tokens, max_seqlen);
    ids = checked_ids(input_ids, "input_ids", tokens, word.size(0));
    types = checked_ids(token_type_ids, "token_type_ids", tokens, token_type.size(0));
    positions = checked_positions(position_ids, sequences, tokens, position.size(0));
  }

  cpu::Embeddings pointers(double eps) const {
    return {ids.data(),        types.data(),         positions.data(),
            operand_of(word),  operand_of(position), operand_of(token_type),
            operand_of(gamma), operand_of(beta),     static_cast<float>(eps)};
  }
};

Tensor embedding_layer_norm(const Tensor& input_ids, const Tensor& token_type_ids,
                            const OptTensor& position_ids, const Tensor& cu_seqlens,
                            const Tensor& word, const Tensor& position, const Tensor& token_type,
                            const Tensor& gamma, const Tensor& beta, double eps) {
  const EmbeddingInputs in(input_ids, token_type_ids, position_ids, cu_seqlens, std::nullopt, word,
                           position, token_type, gamma, beta);
  const int64_t tokens = input_ids.size(0), hidden = word.size(1);
  Tensor out = empty({tokens, hidden}, word.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::embedding_workspace(hidden, threads));
  cpu::embedding_layer_norm(in.pointers(eps), tokens, hidden, dtype_of(word),
                            out.mutable_data_ptr(), space.get(), threads);
  return out;
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptTensor& bias,
              const OptTensor& residual, const Text& activation) {
  FT_CHECK_DIM(input, 2);
  const Tensor blob = checked_blob(weight, "weight", 1, -1, input.size(1));
  const int64_t tokens = input.size(0);
  const int64_t n = static_cast<const cpu::BlobHeader*>(blob.const_data_ptr())->n;
  const Tensor whole = checked_float(input, "input", {tokens, input.size(1)});
  Tensor b, r;
  cpu::Linear op{};
  op.input = operand_of(whole);
  op.blob = blob.const_data_ptr();
  if (bias) {
    b = checked_float(*bias, "bias", {n});
    op.bias = operand_of(b);
  }
  if (residual) {
    r = checked_float(*residual, "residual", {tokens, n});
    op.residual = operand_of(r);
  }
  op.activation = activation_named(activation);
  op.out_dtype = dtype_of(whole);
  Tensor out = empty({tokens, n}, whole.scalar_type());
  if (tokens == 0) return out;
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::linear_workspace(op.blob, tokens, threads));
  cpu::linear(op, tokens, out.mutable_data_ptr(), space.get(), threads);
  return out;
}

int64_t checked_head_dim(int64_t hidden, int64_t num_heads) {
  FT_CHECK(num_heads > 0 && hidden % num_heads == 0, "num_heads must divide the hidden size ",
           hidden, ", is ", num_heads);
  const int64_t head_dim = hidden / num_heads;
  FT_CHECK(head_dim % 2 == 0 && head_dim <= 128, "the head size must be even and at most 128, is ",
           head_dim);
  return head_dim;
}

// [heads, 2 D + 1], and the tensor that keeps it alive.
struct CheckedBias {
  Tensor tensor;
  cpu::RelativeBias bias;
};

CheckedBias checked_relative_bias(const Tensor& tensor, const char* name, int64_t heads) {
  check_relative_bias(tensor, name, heads);
  Tensor whole = checked_float(tensor, name, {heads, tensor.size(1)});
  const cpu::RelativeBias bias{operand_of(whole), whole.size(1)};
  return {std::move(whole), bias};
}

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        int64_t num_heads, const OptTensor& relative_bias) {
  FT_CHECK_DIM(qkv, 2);
  FT_CHECK(qkv.size(1) % 3 == 0, "qkv must have shape [T, 3H], has ", shape_of(qkv));
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3;
  const int64_t head_dim = checked_head_dim(hidden, num_heads);
  const Tensor whole = checked_float(qkv, "qkv", {tokens, 3 * hidden});
  const Sequences s = checked_sequences(cu_seqlens, tokens, max_seqlen);
  CheckedBias added;
  if (relative_bias) added = checked_relative_bias(*relative_bias, "relative_bias", num_heads);
  Tensor out = empty({tokens, hidden}, whole.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(
      cpu::attention_workspace(s.longest, num_heads, head_dim, added.bias, threads));
  cpu::varlen_attention(operand_of(whole), added.bias, s.bounds, s.batch, s.longest, num_heads,
                        head_dim, dtype_of(whole), out.mutable_data_ptr(), space.get(), threads);
  return out;
}

Tensor residual_layer_norm(const Tensor& input, const OptTensor& bias, const Tensor& residual,
                           const Tensor& gamma, const Tensor& beta, double eps) {
  FT_CHECK_DIM(input, 2);
  const int64_t tokens = input.size(0), hidden = input.size(1);
  const Tensor x = checked_float(input, "input", {tokens, hidden});
  const Tensor r = checked_float(residual, "residual", {tokens, hidden});
  const Tensor g = checked_float(gamma, "gamma", {hidden}),
               b = checked_float(beta, "beta", {hidden});
  Tensor added;
  Operand added_bias;
  if (bias) {
    added = checked_float(*bias, "bias", {hidden});
    added_bias = operand_of(added);
  }
  Tensor out = empty({tokens, hidden}, x.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::layer_norm_workspace(hidden, threads));
  cpu::residual_layer_norm(operand_of(x), added_bias, operand_of(r), operand_of(g), operand_of(b),
                           static_cast<float>(eps), tokens, hidden, dtype_of(x),
                           out.mutable_data_ptr(), space.get(), threads);
  return out;
}

Tensor bias_activation(const Tensor& input, const OptTensor& bias, const Text& activation) {
  FT_CHECK_DIM(input, 2);
  const Activation follows = activation_named(activation);
  FT_CHECK(follows != Activation::kNone, "bias_activation: activation must be one, is none");
  const int64_t tokens = input.size(0), n = input.size(1);
  const Tensor x = checked_float(input, "input", {tokens, n});
  Tensor added;
  Operand added_bias;
  if (bias) {
    added = checked_float(*bias, "bias", {n});
    added_bias = operand_of(added);
  }
  Tensor out = empty({tokens, n}, x.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::bias_activation_workspace(n, threads));
  cpu::bias_activation(operand_of(x), added_bias, follows, tokens, n, out.mutable_data_ptr(),
                       space.get(), threads);
  return out;
}

Tensor segment_pool(const Tensor& input, const Tensor& cu_seqlens, const Text& how) {
  FT_CHECK_DIM(input, 2);
  const Pooling pooling = pooling_named(how);
  const int64_t tokens = input.size(0), hidden = input.size(1);
  const Tensor x = checked_float(input, "input", {tokens, hidden});
  const Sequences s = checked_sequences(cu_seqlens, tokens, std::nullopt);
  Tensor out = empty({s.batch, hidden}, ScalarType::Float);
  cpu::segment_pool(operand_of(x), s.bounds, s.batch, hidden, pooling,
                    static_cast<float*>(out.mutable_data_ptr()), torch_threads());
  return out;
}

// A parameter of each layer or one for all, contiguous and floating.
struct CheckedStack {
  Tensor tensor;
  Stack stack;
};

CheckedStack checked_stack(const Tensor& tensor, const char* name, const EncoderSpec& spec,
                           int64_t width) {
  const int64_t layers = tensor.dim() == 2 && tensor.size(0) == 1 ? 1 : spec.layers;
  Tensor whole = checked_float(tensor, name, {layers, width});
  const Stack stack{operand_of(whole), layers};
  return {std::move(whole), stack};
}

Tensor checked_layers(const Tensor& tensor, const char* name, const EncoderSpec& spec,
                      EncoderWeightShape shape) {
  Tensor blob = checked_blob(tensor, name, -1, shape.rows, shape.columns);
  const int64_t layers = static_cast<const cpu::BlobHeader*>(blob.const_data_ptr())->layers;
  FT_CHECK(layers == spec.layers || layers == 1, name, " must hold ", spec.layers,
           " weights, one a layer, or a single one for all, holds ", layers);
  return blob;
}

Tensor run_encoder(const Tensor& input_ids, const Tensor& token_type_ids,
                   const OptTensor& position_ids, const Tensor& cu_seqlens, int64_t max_seqlen,
                   const std::vector<Tensor>& tensors, const EncoderSpec& spec) {
  const EncoderWeights w(spec, tensors);
  FT_CHECK(!spec.narrow(), "a CPU computes no products in float8_e4m3fn: prepare the model here");
  const auto& names = kEncoderWeightNames;
  FT_CHECK(w[kWord].dim() == 2 && w[kWord].size(1) == spec.embedding, names[kWord],
           " must have shape [V, ", spec.embedding, "], has ", shape_of(w[kWord]));
  const EmbeddingInputs in(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                           w[kWord], w[kPosition], w[kTokenType], w[kEmbeddingGamma],
                           w[kEmbeddingBeta],
                           {names[kWord], names[kPosition], names[kTokenType],
                            names[kEmbeddingGamma], names[kEmbeddingBeta]});
  const int64_t tokens = input_ids.size(0), hidden = spec.hidden;
  checked_head_dim(hidden, spec.heads);
  const auto blob = [&](EncoderWeight weight) {
    return checked_layers(w[weight], names[weight], spec, shape_of(spec, weight));
  };
  const auto vectors = [&](EncoderWeight weight) {
    return checked_stack(w[weight], names[weight], spec, shape_of(spec, weight).rows);
  };
  const Tensor qkv = blob(kQkvWeight), proj = blob(kOutWeight);
  const Tensor up = blob(kUpWeight), down = blob(kDownWeight);
  const CheckedStack bq = vectors(kQkvBias), bo = vectors(kOutBias);
  const CheckedStack bu = vectors(kUpBias), bd = vectors(kDownBias);
  const CheckedStack g1 = vectors(kNorm1Gamma), b1 = vectors(kNorm1Beta);
  const CheckedStack g2 = vectors(kNorm2Gamma), b2 = vectors(kNorm2Beta);
  cpu::Encoder op{};
  Tensor projection, projection_bias;
  if (spec.projects()) {
    projection =
        checked_blob(w[kProjectionWeight], names[kProjectionWeight], 1, hidden, spec.embedding);
    projection_bias = checked_float(w[kProjectionBias], names[kProjectionBias], {hidden});
    op.projection = projection.const_data_ptr();
    op.projection_bias = operand_of(projection_bias);
  }
  CheckedBias relative_bias;
  if (spec.biased()) {
    relative_bias = checked_relative_bias(w[kRelativeBias], names[kRelativeBias], spec.heads);
    op.relative_bias = relative_bias.bias;
  }
  Tensor out = empty({tokens, hidden}, w[kWord].scalar_type());
  if (tokens == 0) return out;
  op.tokens = tokens;
  op.hidden = hidden;
  op.embedding = spec.embedding;
  op.intermediate = spec.intermediate;
  op.layers = spec.layers;
  op.activation = spec.activation;
  op.batch = in.sequences.batch;
  op.longest = in.sequences.longest;
  op.heads = spec.heads;
  op.cu_seqlens = in.sequences.bounds;
  op.embeddings = in.pointers(spec.eps);
  op.qkv = qkv.const_data_ptr();
  op.out = proj.const_data_ptr();
  op.up = up.const_data_ptr();
  op.down = down.const_data_ptr();
  op.qkv_bias = bq.stack;
  op.out_bias = bo.stack;
  op.up_bias = bu.stack;
  op.down_bias = bd.stack;
  op.ln1_gamma = g1.stack;
  op.ln1_beta = b1.stack;
  op.ln2_gamma = g2.stack;
  op.ln2_beta = b2.stack;
  op.eps = static_cast<float>(spec.eps);
  op.out_dtype = dtype_of(w[kWord]);
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::encoder_workspace(op, threads));
  cpu::encoder(op, out.mutable_data_ptr(), space.get(), threads);
  return out;
}

Tensor encode(const Tensor& input_ids, const Tensor& token_type_ids, const OptTensor& position_ids,
              const Tensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& weights,
              const Text& spec, const Text& options) {
  // Whatever they say, a sequence's results depend on it alone here.
  parse_encoder_options(options);
  return run_encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen, weights,
                     parse_encoder_spec(spec));
}

Tensor encoder(const Tensor& input_ids, const Tensor& token_type_ids, const OptTensor& position_ids,
               const Tensor& cu_seqlens, int64_t max_seqlen, const Tensor& word,
               const Tensor& position, const Tensor& token_type, const Tensor& emb_gamma,
               const Tensor& emb_beta, const Tensor& qkv_weight, const Tensor& qkv_bias,
               const Tensor& out_weight, const Tensor& out_bias, const Tensor& ln1_gamma,
               const Tensor& ln1_beta, const Tensor& up_weight, const Tensor& up_bias,
               const Tensor& down_weight, const Tensor& down_bias, const Tensor& ln2_gamma,
               const Tensor& ln2_beta, int64_t num_heads, double eps) {
  return run_encoder(
      input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen,
      {word, position, token_type, emb_gamma, emb_beta, qkv_weight, qkv_bias, out_weight, out_bias,
       ln1_gamma, ln1_beta, up_weight, up_bias, down_weight, down_bias, ln2_gamma, ln2_beta},
      spec_of_interface_1(word, qkv_bias, up_bias, num_heads, eps));
}

// The ops' interfaces: 1 is `encoder` with its 24 arguments, 2 is `encode`, 3 are its activations
// beside gelu, its relative bias and `segment_pool`, 4 is `prepare_layers`, 5 are `prepare_narrow`,
// `serves_narrow` and the weights of `encode` for products in 8-bit floats. A change of a signature
// or of what an argument means is a new one.
#define FT_FIRST_INTERFACE "1"
#define FT_LAST_INTERFACE "5"

#ifndef FT_HANDLER_VERSION
#define FT_HANDLER_VERSION "unknown"
#endif
#ifndef FT_TORCH_BUILD_VERSION
#define FT_TORCH_BUILD_VERSION "unknown"
#endif
#ifndef FT_CUDA_ARCHS
#define FT_CUDA_ARCHS ""
#endif

std::string json_list(const std::string& separated, char by) {
  std::string out = "[";
  size_t begin = 0;
  while (begin < separated.size()) {
    const size_t end = std::min(separated.find(by, begin), separated.size());
    out += (out.size() > 1 ? ", \"" : "\"") + separated.substr(begin, end - begin) + "\"";
    begin = end + 1;
  }
  return out + "]";
}

std::string build_info() {
  std::string text = std::string("{\"version\": \"") + FT_HANDLER_VERSION +
                     "\", \"interface\": [" FT_FIRST_INTERFACE ", " FT_LAST_INTERFACE "]" +
                     ", \"torch_build\": \"" + FT_TORCH_BUILD_VERSION + "\", \"compiler\": \"" +
                     __VERSION__ + "\", \"cpu_isa\": \"" + cpu::isa_name() +
                     "\", \"cpu_isas\": " + json_list(cpu::isas_available(), ',');
#ifdef FT_WITH_CUDA
  text += std::string(", \"cuda_archs\": ") + json_list(FT_CUDA_ARCHS, ';') +
          ", \"cuda_version\": \"" + std::to_string(CUDART_VERSION / 1000) + "." +
          std::to_string(CUDART_VERSION % 1000 / 10) + "\"";
  const char* tf32 = std::getenv("FT_HANDLER_TF32");
  text += std::string(", \"tf32\": ") + (tf32 && std::string(tf32) == "1" ? "true" : "false");
#else
  text += ", \"cuda_archs\": [], \"cuda_version\": null, \"tf32\": false";
#endif
  return text + "}";
}

}  // namespace
}  // namespace ft

// Read in the file, before it is loaded: which interfaces of the ops it has, and which GPUs it has
// code for. Exported, so that no linker drops it.
extern "C" __attribute__((visibility("default"))) const char ft_handler_library[] =
    "ft_handler library interface=" FT_FIRST_INTERFACE "-" FT_LAST_INTERFACE " cuda=" FT_CUDA_ARCHS
    " ";

STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CPU, m) {
  m.impl("prepare_weight", TORCH_BOX(&ft::prepare_weight));
  m.impl("prepare_layers", TORCH_BOX(&ft::prepare_layers));
  m.impl("prepare_narrow", TORCH_BOX(&ft::prepare_narrow));
  m.impl("serves_narrow", TORCH_BOX(&ft::serves_narrow));
  m.impl("is_prepared", TORCH_BOX(&ft::is_prepared));
  m.impl("remove_padding", TORCH_BOX(&ft::remove_padding));
  m.impl("restore_padding", TORCH_BOX(&ft::restore_padding));
  m.impl("embedding_layer_norm", TORCH_BOX(&ft::embedding_layer_norm));
  m.impl("linear", TORCH_BOX(&ft::linear));
  m.impl("varlen_attention", TORCH_BOX(&ft::varlen_attention));
  m.impl("residual_layer_norm", TORCH_BOX(&ft::residual_layer_norm));
  m.impl("bias_activation", TORCH_BOX(&ft::bias_activation));
  m.impl("segment_pool", TORCH_BOX(&ft::segment_pool));
  m.impl("encode", TORCH_BOX(&ft::encode));
  m.impl("encoder", TORCH_BOX(&ft::encoder));
}

// It takes no tensor, so no device's key would lead to it.
STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&ft::build_info));
}
