// Every op's signature; the implementations are in ops_cpu.cpp and ops_cuda.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastertransformer, m) {
  m.def("prepare_weight(Tensor weight, Tensor? scale=None) -> Tensor");
  m.def("prepare_layers(Tensor quantized, Tensor scale, Tensor kept, int[] kept_layers) -> Tensor");
  m.def("prepare_narrow(Tensor weight) -> Tensor");
  m.def("serves_narrow(Tensor like) -> bool");
  m.def("is_prepared(Tensor prepared, Tensor weight) -> bool");
  m.def(
      "remove_padding(Tensor input_ids, Tensor token_type_ids, Tensor attention_mask) -> "
      "(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor token_indices, "
      "Tensor cu_seqlens, int max_seqlen)");
  m.def(
      "restore_padding(Tensor packed, Tensor token_indices, int batch, int seqlen, float fill) -> "
      "Tensor");
  m.def(
      "embedding_layer_norm(Tensor input_ids, Tensor token_type_ids, Tensor? position_ids, "
      "Tensor cu_seqlens, Tensor word, Tensor position, Tensor token_type, Tensor gamma, "
      "Tensor beta, float eps) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation=\"\") -> "
      "Tensor");
  m.def(
      "varlen_attention(Tensor qkv, Tensor cu_seqlens, int max_seqlen, int num_heads, "
      "Tensor? relative_bias=None) -> Tensor");
  m.def(
      "residual_layer_norm(Tensor input, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, "
      "float eps) -> Tensor");
  m.def("bias_activation(Tensor input, Tensor? bias, str activation) -> Tensor");
  m.def("segment_pool(Tensor input, Tensor cu_seqlens, str how) -> Tensor");
  m.def(
      "encode(Tensor input_ids, Tensor token_type_ids, Tensor? position_ids, Tensor cu_seqlens, "
      "int max_seqlen, Tensor[] weights, str spec, str options) -> Tensor");
  // Interface 1: the encoder of files of format 1.
  m.def(
      "encoder(Tensor input_ids, Tensor token_type_ids, Tensor? position_ids, Tensor cu_seqlens, "
      "int max_seqlen, Tensor word, Tensor position, Tensor token_type, Tensor emb_gamma, "
      "Tensor emb_beta, Tensor qkv_weight, Tensor qkv_bias, Tensor out_weight, Tensor out_bias, "
      "Tensor ln1_gamma, Tensor ln1_beta, Tensor up_weight, Tensor up_bias, Tensor down_weight, "
      "Tensor down_bias, Tensor ln2_gamma, Tensor ln2_beta, int num_heads, float eps) -> Tensor");
  // The host's own work beside the encoder; no traced file calls these.
  m.def(
      "read_chunks(Tensor index, Tensor rows, Tensor table, Tensor text, Tensor ends, "
      "Tensor given, bool before, bool behind, bool apart, bool lower, bool located) -> (Tensor "
      "ids, "
      "Tensor origins, Tensor token_ends, Tensor whole, Tensor unknown, Tensor unknown_ends)");
  m.def(
      "remember_chunks(Tensor(a!) index, Tensor(b!) rows, Tensor text, Tensor ends, "
      "Tensor places) -> Tensor");
  m.def(
      "best_spans(Tensor logits, Tensor cls, Tensor begins, Tensor counts, int max_answer_len, "
      "int wanted) -> (Tensor null, Tensor scores, Tensor firsts, Tensor lasts)");
  m.def(
      "best_answers(Tensor logits, Tensor cls, Tensor begins, Tensor counts, Tensor window_ends, "
      "Tensor firsts, Tensor origins, Tensor token_ends, Tensor text, Tensor text_ends, "
      "int max_answer_len, int wanted, int top_k, bool words, float least_share) -> (Tensor null, "
      "Tensor found, Tensor scores, Tensor starts, Tensor ends)");
  m.def("build_info() -> str");
}
