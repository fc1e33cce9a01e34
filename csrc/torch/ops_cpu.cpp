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

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;
using torch::stable::contiguous;

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

cpu::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    default:
      return cpu::DType::kFloat32;  // FT_CHECK_FLOAT came first
  }
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
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  if (!same) {
    fail(name, " must have shape ", shape_of(shape), ", has ", shape_of(tensor));
  }
  return contiguous(tensor);
}

cpu::Array array_of(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor)}; }

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

Tensor prepare_weight(const Tensor& weight) {
  FT_CHECK_FLOAT(weight);
  FT_CHECK(weight.dim() == 2 || weight.dim() == 3,
           "weight must have shape [N, K] or [L, N, K], has ", shape_of(weight));
  const Tensor whole = contiguous(weight);
  const int64_t layers = whole.dim() == 3 ? whole.size(0) : 1;
  const int64_t n = whole.size(whole.dim() - 2), k = whole.size(whole.dim() - 1);
  FT_CHECK(n > 0 && k > 0, "weight must not be empty, has shape ", shape_of(weight));
  Tensor blob = empty({cpu::packed_bytes(dtype_of(whole), layers, n, k)}, ScalarType::Byte);
  cpu::pack_weight(whole.const_data_ptr(), dtype_of(whole), layers, n, k, blob.mutable_data_ptr(),
                   torch_threads());
  return blob;
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
  const int64_t width = tokens ? whole.numel() / tokens * cpu::size_of(dtype_of(whole)) : 0;
  const char* from = static_cast<const char*>(whole.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(from + t * width, width, to + indices[t] * width);
  }
  return out;
}

// What the embeddings' pointers point into.
struct EmbeddingInputs {
  Tensor word, position, token_type, gamma, beta;
  std::vector<int64_t> ids, types;
  std::vector<int32_t> positions;
  Sequences sequences;

  EmbeddingInputs(const Tensor& input_ids, const Tensor& token_type_ids,
                  const OptTensor& position_ids, const Tensor& cu_seqlens,
                  std::optional<int64_t> max_seqlen, const Tensor& word_, const Tensor& position_,
                  const Tensor& token_type_, const Tensor& gamma_, const Tensor& beta_)
      : sequences() {
    FT_CHECK_DIM(input_ids, 1);
    const int64_t tokens = input_ids.size(0);
    for (const auto& [table, name] : {std::pair{&word_, "word"}, std::pair{&position_, "position"},
                                      std::pair{&token_type_, "token_type"}}) {
      FT_CHECK(table->dim() == 2, name, " must have shape [rows, H], has ", shape_of(*table));
      FT_CHECK(table->scalar_type() == word_.scalar_type(), name, " must have the dtype of word, ",
               dtype_name(word_.scalar_type()), ", has ", dtype_name(table->scalar_type()));
    }
    const int64_t hidden = word_.size(1);
    FT_CHECK(hidden > 0, "word must have shape [V, H] with H > 0, has ", shape_of(word_));
    word = checked_float(word_, "word", {word_.size(0), hidden});
    position = checked_float(position_, "position", {position_.size(0), hidden});
    token_type = checked_float(token_type_, "token_type", {token_type_.size(0), hidden});
    gamma = checked_float(gamma_, "gamma", {hidden});
    beta = checked_float(beta_, "beta", {hidden});
    sequences = checked_sequences(cu_seqlens, tokens, max_seqlen);
    ids = checked_ids(input_ids, "input_ids", tokens, word.size(0));
    types = checked_ids(token_type_ids, "token_type_ids", tokens, token_type.size(0));
    positions = checked_positions(position_ids, sequences, tokens, position.size(0));
  }

  cpu::Embeddings pointers(double eps) const {
    return {ids.data(),      types.data(),       positions.data(),
            array_of(word),  array_of(position), array_of(token_type),
            array_of(gamma), array_of(beta),     static_cast<float>(eps)};
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
              const OptTensor& residual, bool gelu) {
  FT_CHECK_DIM(input, 2);
  const Tensor blob = checked_blob(weight, "weight", 1, -1, input.size(1));
  const int64_t tokens = input.size(0);
  const int64_t n = static_cast<const cpu::BlobHeader*>(blob.const_data_ptr())->n;
  const Tensor whole = checked_float(input, "input", {tokens, input.size(1)});
  Tensor b, r;
  cpu::Linear op{};
  op.input = array_of(whole);
  op.blob = blob.const_data_ptr();
  if (bias) {
    b = checked_float(*bias, "bias", {n});
    op.bias = array_of(b);
  }
  if (residual) {
    r = checked_float(*residual, "residual", {tokens, n});
    op.residual = array_of(r);
  }
  op.gelu = gelu;
  op.out_dtype = dtype_of(whole);
  Tensor out = empty({tokens, n}, whole.scalar_type());
  if (tokens == 0) return out;
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::linear_workspace(tokens, n, threads));
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

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        int64_t num_heads) {
  FT_CHECK_DIM(qkv, 2);
  FT_CHECK(qkv.size(1) % 3 == 0, "qkv must have shape [T, 3H], has ", shape_of(qkv));
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3;
  const int64_t head_dim = checked_head_dim(hidden, num_heads);
  const Tensor whole = checked_float(qkv, "qkv", {tokens, 3 * hidden});
  const Sequences s = checked_sequences(cu_seqlens, tokens, max_seqlen);
  Tensor out = empty({tokens, hidden}, whole.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::attention_workspace(s.longest, head_dim, threads));
  cpu::varlen_attention(array_of(whole), s.bounds, s.batch, s.longest, num_heads, head_dim,
                        dtype_of(whole), out.mutable_data_ptr(), space.get(), threads);
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
  cpu::Array added_bias;
  if (bias) {
    added = checked_float(*bias, "bias", {hidden});
    added_bias = array_of(added);
  }
  Tensor out = empty({tokens, hidden}, x.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::layer_norm_workspace(hidden, threads));
  cpu::residual_layer_norm(array_of(x), added_bias, array_of(r), array_of(g), array_of(b),
                           static_cast<float>(eps), tokens, hidden, dtype_of(x),
                           out.mutable_data_ptr(), space.get(), threads);
  return out;
}

Tensor bias_gelu(const Tensor& input, const OptTensor& bias) {
  FT_CHECK_DIM(input, 2);
  const int64_t tokens = input.size(0), n = input.size(1);
  const Tensor x = checked_float(input, "input", {tokens, n});
  Tensor added;
  cpu::Array added_bias;
  if (bias) {
    added = checked_float(*bias, "bias", {n});
    added_bias = array_of(added);
  }
  Tensor out = empty({tokens, n}, x.scalar_type());
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::bias_gelu_workspace(n, threads));
  cpu::bias_gelu(array_of(x), added_bias, tokens, n, dtype_of(x), out.mutable_data_ptr(),
                 space.get(), threads);
  return out;
}

Tensor encoder(const Tensor& input_ids, const Tensor& token_type_ids, const OptTensor& position_ids,
               const Tensor& cu_seqlens, int64_t max_seqlen, const Tensor& word,
               const Tensor& position, const Tensor& token_type, const Tensor& emb_gamma,
               const Tensor& emb_beta, const Tensor& qkv_weight, const Tensor& qkv_bias,
               const Tensor& out_weight, const Tensor& out_bias, const Tensor& ln1_gamma,
               const Tensor& ln1_beta, const Tensor& up_weight, const Tensor& up_bias,
               const Tensor& down_weight, const Tensor& down_bias, const Tensor& ln2_gamma,
               const Tensor& ln2_beta, int64_t num_heads, double eps) {
  const EmbeddingInputs in(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen, word,
                           position, token_type, emb_gamma, emb_beta);
  const int64_t tokens = input_ids.size(0), hidden = word.size(1);
  checked_head_dim(hidden, num_heads);
  FT_CHECK(qkv_bias.dim() == 2, "qkv_bias must have shape [L, 3H], has ", shape_of(qkv_bias));
  FT_CHECK(up_bias.dim() == 2, "up_bias must have shape [L, I], has ", shape_of(up_bias));
  const int64_t layers = qkv_bias.size(0), inner = up_bias.size(1);
  const Tensor qkv = checked_blob(qkv_weight, "qkv_weight", layers, 3 * hidden, hidden);
  const Tensor proj = checked_blob(out_weight, "out_weight", layers, hidden, hidden);
  const Tensor up = checked_blob(up_weight, "up_weight", layers, inner, hidden);
  const Tensor down = checked_blob(down_weight, "down_weight", layers, hidden, inner);
  const Tensor bq = checked_float(qkv_bias, "qkv_bias", {layers, 3 * hidden});
  const Tensor bo = checked_float(out_bias, "out_bias", {layers, hidden});
  const Tensor bu = checked_float(up_bias, "up_bias", {layers, inner});
  const Tensor bd = checked_float(down_bias, "down_bias", {layers, hidden});
  const Tensor g1 = checked_float(ln1_gamma, "ln1_gamma", {layers, hidden});
  const Tensor b1 = checked_float(ln1_beta, "ln1_beta", {layers, hidden});
  const Tensor g2 = checked_float(ln2_gamma, "ln2_gamma", {layers, hidden});
  const Tensor b2 = checked_float(ln2_beta, "ln2_beta", {layers, hidden});
  Tensor out = empty({tokens, hidden}, word.scalar_type());
  if (tokens == 0) return out;
  cpu::Encoder op{};
  op.tokens = tokens;
  op.hidden = hidden;
  op.intermediate = inner;
  op.layers = layers;
  op.batch = in.sequences.batch;
  op.longest = in.sequences.longest;
  op.heads = num_heads;
  op.cu_seqlens = in.sequences.bounds;
  op.embeddings = in.pointers(eps);
  op.qkv = qkv.const_data_ptr();
  op.out = proj.const_data_ptr();
  op.up = up.const_data_ptr();
  op.down = down.const_data_ptr();
  op.qkv_bias = array_of(bq);
  op.out_bias = array_of(bo);
  op.up_bias = array_of(bu);
  op.down_bias = array_of(bd);
  op.ln1_gamma = array_of(g1);
  op.ln1_beta = array_of(b1);
  op.ln2_gamma = array_of(g2);
  op.ln2_beta = array_of(b2);
  op.eps = static_cast<float>(eps);
  op.out_dtype = dtype_of(word);
  const cpu::Threads threads = torch_threads();
  const Scratch space(cpu::encoder_workspace(op, threads));
  cpu::encoder(op, out.mutable_data_ptr(), space.get(), threads);
  return out;
}

#ifndef FT_HANDLER_VERSION
#define FT_HANDLER_VERSION "unknown"
#endif
#ifndef FT_TORCH_BUILD_VERSION
#define FT_TORCH_BUILD_VERSION "unknown"
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
                     "\", \"torch_build\": \"" + FT_TORCH_BUILD_VERSION + "\", \"compiler\": \"" +
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

STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CPU, m) {
  m.impl("prepare_weight", TORCH_BOX(&ft::prepare_weight));
  m.impl("remove_padding", TORCH_BOX(&ft::remove_padding));
  m.impl("restore_padding", TORCH_BOX(&ft::restore_padding));
  m.impl("embedding_layer_norm", TORCH_BOX(&ft::embedding_layer_norm));
  m.impl("linear", TORCH_BOX(&ft::linear));
  m.impl("varlen_attention", TORCH_BOX(&ft::varlen_attention));
  m.impl("residual_layer_norm", TORCH_BOX(&ft::residual_layer_norm));
  m.impl("bias_gelu", TORCH_BOX(&ft::bias_gelu));
  m.impl("encoder", TORCH_BOX(&ft::encoder));
}

// It takes no tensor, so no device's key would lead to it.
STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&ft::build_info));
}
