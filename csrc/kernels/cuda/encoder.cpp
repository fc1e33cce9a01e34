#include "kernels/cuda/encoder.h"

#include <algorithm>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/runtime.h"

#ifdef FT_WITH_SM90
#include "kernels/cuda/small_encoder.h"
#endif

namespace ft::cuda {
namespace {

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

AttentionShape attention_shape(const EncoderShape& s) {
  return {s.batch, s.tokens,          s.max_seqlen, s.num_heads, s.hidden / s.num_heads,
          s.dtype, s.batch_invariant, s.bias_reach};
}

size_t narrow_bytes(const EncoderShape& s, int width) {
  return rounded(static_cast<size_t>(s.tokens) * static_cast<size_t>(width));
}

#ifdef FT_WITH_SM90
SmallShape small_shape(const EncoderShape& s) {
  return {s.dtype,  s.tokens,       s.batch,     s.max_seqlen,
          s.hidden, s.intermediate, s.num_heads, s.layers};
}
#endif

constexpr int kAttentionWaits = 256;  // tokens from which attention is launched after the product

// Whether the few-token path takes this shape on the current device. It knows GELU alone, no
// relative bias, and parameters that lie one a layer behind each other.
bool takes_small_path([[maybe_unused]] const EncoderShape& s) {
#ifdef FT_WITH_SM90
  const DeviceProperties* device = nullptr;
  return s.few_tokens && !s.batch_invariant && s.one_per_layer && !s.projects &&
         s.activation == Activation::kGelu && s.bias_reach < 0 && s.dtype != DType::kFloat32 &&
         current_device(&device) == cudaSuccess &&
         small_encoder_supported(small_shape(s), device->all);
#else
  return false;
#endif
}

// Whether products that have weights in e4m3 are computed with them. The few-token path reads
// weights in 16 bits; from 128 tokens on products in e4m3 were ahead on an H100.
bool takes_narrow_path(const EncoderShape& s) {
  return s.narrow && s.dtype == DType::kFloat16 && narrow_norm_fits(s.hidden) &&
         s.intermediate % 16 == 0 && narrow_gemm_supported() && !takes_small_path(s);
}

// Where each activation lives in the workspace. The intermediate of the feed-forward block takes
// the place of qkv and the attention's output, which are spent by then; embeddings that a
// projection waits for take it first.
struct Places {
  size_t attended, middle, scratch, copies, activated, plan, gemm, bytes;

  explicit Places(const EncoderShape& s) {
    const size_t row = static_cast<size_t>(size_of(s.dtype)) * static_cast<size_t>(s.tokens);
    const size_t qkv_bytes = rounded(row * 3 * s.hidden);
    const size_t hidden_bytes = rounded(row * s.hidden);
    attended = qkv_bytes;
    middle = std::max({qkv_bytes + hidden_bytes, rounded(row * s.intermediate),
                       s.projects ? rounded(row * s.embedding) : size_t{0}});
    scratch = middle + hidden_bytes;
    copies = scratch + hidden_bytes;
    const bool narrow = takes_narrow_path(s);
    const size_t after = copies + (narrow ? 2 * narrow_bytes(s, s.hidden) : 0);
    // A product that writes its activation in e4m3 itself writes nothing else.
    activated = s.narrow_pass ? after : 0;
    plan = after + (narrow && s.narrow_pass ? narrow_bytes(s, s.intermediate) : 0);
    gemm = plan + rounded(attention_plan_bytes(attention_shape(s)));
    bytes = gemm + gemm_workspace_bytes();
  }
};

// One layer's parameter of so many elements.
Operand at(const Stack& stack, int64_t layer, int64_t elements) {
  Operand one = stack.first;
  one.data =
      static_cast<const char*>(one.data) + layer % stack.layers * elements * size_of(one.dtype);
  return one;
}

// The up product and its activation, which becomes e4m3 alone where a copy is asked for.
cudaError_t up_product(Gemm gemm, Activation activation, NarrowRows copy, void* workspace,
                       Launch launch) {
  const bool fused =
      !gemm.narrow() || activation == Activation::kNone || activation == Activation::kGelu;
  const bool direct = gemm.narrow() && activation == Activation::kGelu && copy.rows != nullptr;
  if (fused) gemm.activation = activation;
  if (direct) {
    gemm.output = copy.rows;
    gemm.output_step = copy.step;
  }
  cudaError_t status = linear(gemm, workspace, launch);
  if (status == cudaSuccess && !fused)
    status = bias_activation(gemm.output, nullptr, nullptr, activation, gemm.rows, gemm.n,
                             gemm.dtype, gemm.output, nullptr, launch);
  if (status == cudaSuccess && copy.rows != nullptr && !direct)
    status = narrow_rows(gemm.output, gemm.rows, gemm.n, gemm.dtype, copy, launch);
  return status;
}

// One layer's product in e4m3: what it reads and what is known of it.
struct NarrowLayer {
  const void* weight = nullptr;  // null: this layer's is computed in 16 bits
  const float *scale = nullptr, *step = nullptr;
};

NarrowLayer narrow_at(const NarrowProduct& product, int64_t layer, int64_t n, int64_t k) {
  if (product.weight.first.data == nullptr) return {};
  layer %= product.weight.layers;
  if (std::find(product.floats->begin(), product.floats->end(), layer) != product.floats->end())
    return {};
  return {at(product.weight, layer, n * k).data, product.scale + layer * n, product.step + layer};
}

}  // namespace

size_t encoder_workspace_bytes(const EncoderShape& shape) {
#ifdef FT_WITH_SM90
  if (takes_small_path(shape)) return small_encoder_workspace(small_shape(shape));
#endif
  return Places(shape).bytes;
}

cudaError_t encoder(const EncoderShape& s, const EncoderInputs& inputs, const EncoderParameters& w,
                    void* workspace, void* output, cudaStream_t stream) {
  if (s.tokens == 0 || s.batch == 0) return cudaSuccess;
  // The first launch follows copies and kernels that are not ours, so it waits for them in full.
  const Launch first{stream, false};
  const Launch chained{stream, true};
  const auto embed = [&](void* to, Launch launch, NarrowRows copy = {}) {
    return embedding_layer_norm(inputs.input_ids, inputs.token_type_ids, inputs.id_type,
                                inputs.position_ids, inputs.cu_seqlens, s.batch, s.tokens,
                                s.embedding, w.word, s.vocab, w.position, s.positions, w.token_type,
                                s.types, w.embedding_gamma, w.embedding_beta, s.eps, s.dtype, to,
                                launch, copy);
  };
#ifdef FT_WITH_SM90
  if (takes_small_path(s)) {
    const SmallWeights small{
        w.qkv_weight.first.data, w.qkv_bias.first.data,    w.out_weight.first.data,
        w.out_bias.first.data,   w.norm1_gamma.first.data, w.norm1_beta.first.data,
        w.up_weight.first.data,  w.up_bias.first.data,     w.down_weight.first.data,
        w.down_bias.first.data,  w.norm2_gamma.first.data, w.norm2_beta.first.data};
    if (const cudaError_t status = embed(output, first); status != cudaSuccess) return status;
    return small_encoder(small_shape(s), small, s.eps, inputs.cu_seqlens, output, workspace,
                         stream);
  }
#endif
  const Places places(s);
  char* const base = static_cast<char*>(workspace);
  void* const qkv = base;
  void* const up = base;
  void* const attended = base + places.attended;
  void* const middle = base + places.middle;
  void* const scratch = base + places.scratch;
  void* const plan = base + places.plan;
  void* const gemm_workspace = base + places.gemm;
  const int32_t* const live_rows = inputs.cu_seqlens + s.batch;
  const AttentionShape attention = attention_shape(s);
  // Blocks of attention that wait early cost a long product more than their head start is worth:
  // so measured from 384 tokens on; 128 and fewer stay as they were.
  const Launch attends = s.tokens < kAttentionWaits ? chained : first;

  const bool narrow = takes_narrow_path(s);
  // What qkv and out read in e4m3, and what up and down do.
  void* const copy = base + places.copies;
  void* const up_copy = base + places.copies + narrow_bytes(s, s.hidden);
  void* const activated = base + places.activated;

  cudaError_t status = attention_plan(attention, inputs.cu_seqlens, plan, first);
  const auto product = [&](const void* input, const Operand& weight, const void* bias,
                           const void* residual, void* to, int n, int k,
                           Activation activation = Activation::kNone) {
    return Gemm{{input, s.dtype}, weight,           bias, residual, to, s.tokens, n, k, activation,
                s.dtype,          s.batch_invariant};
  };
  const auto layer_product = [&](const void* input, const Stack& weight, const Stack& bias,
                                 const void* residual, void* to, int n, int k, int layer,
                                 const NarrowLayer& narrow_layer) {
    Gemm gemm = product(input, at(weight, layer, int64_t{n} * k), at(bias, layer, n).data, residual,
                        to, n, k);
    if (narrow_layer.weight != nullptr) {
      gemm.input.dtype = DType::kE4M3;
      gemm.weight = {narrow_layer.weight, DType::kE4M3, narrow_layer.scale};
    }
    return gemm;
  };
  const auto narrow_layer = [&](LayerProduct p, int layer, int n, int k) {
    return narrow && layer < s.layers ? narrow_at(w.narrow[p], layer, n, k) : NarrowLayer{};
  };
  // Every second product takes its rows from the last one on: what was written last is still in the
  // cache when it is read first.
  const auto upwards = [](Gemm gemm) {
    gemm.upwards = true;
    return gemm;
  };
  // The copy that a product in e4m3 reads.
  const auto copy_for = [&](const NarrowLayer& reader, void* rows) {
    return reader.weight == nullptr ? NarrowRows{} : NarrowRows{rows, reader.step};
  };
  const auto norm = [&](const Stack& gamma, const Stack& beta, int layer, NarrowRows rows) {
    return GemmNorm{at(gamma, layer, s.hidden).data, at(beta, layer, s.hidden).data, s.eps,
                    live_rows, rows};
  };
  NarrowLayer qkv_narrow = narrow_layer(kQkv, 0, 3 * s.hidden, s.hidden);
  void* const embedded = s.projects ? base : output;
  if (status == cudaSuccess)
    status = embed(embedded, chained, s.projects ? NarrowRows{} : copy_for(qkv_narrow, copy));
  if (status == cudaSuccess && s.projects) {
    status = linear(
        product(embedded, w.projection, w.projection_bias, nullptr, output, s.hidden, s.embedding),
        gemm_workspace, chained);
    if (status == cudaSuccess && qkv_narrow.weight != nullptr)
      status =
          narrow_rows(output, s.tokens, s.hidden, s.dtype, copy_for(qkv_narrow, copy), chained);
  }
  for (int layer = 0; layer < s.layers && status == cudaSuccess; ++layer) {
    const NarrowLayer out_narrow = narrow_layer(kOut, layer, s.hidden, s.hidden);
    const NarrowLayer up_narrow = narrow_layer(kUp, layer, s.intermediate, s.hidden);
    const NarrowLayer down_narrow = narrow_layer(kDown, layer, s.hidden, s.intermediate);
    const auto either = [&](const NarrowLayer& reader, const void* narrow_input,
                            const void* input) {
      return reader.weight == nullptr ? input : narrow_input;
    };
    status =
        linear(upwards(layer_product(either(qkv_narrow, copy, output), w.qkv_weight, w.qkv_bias,
                                     nullptr, qkv, 3 * s.hidden, s.hidden, layer, qkv_narrow)),
               gemm_workspace, chained);
    if (status == cudaSuccess)
      status = varlen_attention(attention, qkv, w.relative_bias, plan, attended, attends,
                                copy_for(out_narrow, copy));
    if (status == cudaSuccess)
      status = linear_layer_norm(
          layer_product(either(out_narrow, copy, attended), w.out_weight, w.out_bias, output,
                        middle, s.hidden, s.hidden, layer, out_narrow),
          norm(w.norm1_gamma, w.norm1_beta, layer, copy_for(up_narrow, up_copy)), scratch,
          gemm_workspace, chained);
    if (status == cudaSuccess)
      status = up_product(
          upwards(layer_product(either(up_narrow, up_copy, middle), w.up_weight, w.up_bias, nullptr,
                                up, s.intermediate, s.hidden, layer, up_narrow)),
          s.activation, copy_for(down_narrow, activated), gemm_workspace, chained);
    qkv_narrow = narrow_layer(kQkv, layer + 1, 3 * s.hidden, s.hidden);
    if (status == cudaSuccess)
      status = linear_layer_norm(
          layer_product(either(down_narrow, activated, up), w.down_weight, w.down_bias, middle,
                        output, s.hidden, s.intermediate, layer, down_narrow),
          norm(w.norm2_gamma, w.norm2_beta, layer, copy_for(qkv_narrow, copy)), scratch,
          gemm_workspace, chained);
  }
  return status;
}

}  // namespace ft::cuda
