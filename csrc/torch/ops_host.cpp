// The ops of the host's own work beside the encoder: reading texts, choosing spans.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/host/answers.h"
#include "kernels/host/chunks.h"
#include "kernels/host/spans.h"
#include "torch/checks.h"

namespace ft {
namespace {

template <typename T>
Tensor tensor_of(const std::vector<T>& values, ScalarType dtype) {
  Tensor out = torch::stable::empty({static_cast<int64_t>(values.size())}, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

// A contiguous tensor on the CPU; sizes of -1 may be anything.
template <typename T>
const T* checked(const Tensor& tensor, const char* name, ScalarType dtype,
                 const std::vector<int64_t>& sizes) {
  FT_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  FT_CHECK(tensor.scalar_type() == dtype, name, " must have dtype ", dtype_name(dtype), ", has ",
           dtype_name(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes[i] < 0 || tensor.size(i) == sizes[i];
  }
  FT_CHECK(same, name, " has a shape that does not fit, ", shape_of(tensor));
  FT_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Where texts or chunks end among bytes: rising, `apart` bytes between two.
const int64_t* checked_ends(const Tensor& ends, int64_t bytes, int64_t apart) {
  const int64_t* at = checked<int64_t>(ends, "ends", ScalarType::Long, {-1});
  int64_t begin = 0;
  for (int64_t i = 0; i < ends.size(0); ++i) {
    FT_CHECK(at[i] >= begin && at[i] <= bytes, "ends must rise up to the size of text");
    begin = at[i] + apart;
  }
  return at;
}

host::ChunkMemory memory_of(const Tensor& index, const Tensor& rows) {
  checked<int32_t>(index, "index", ScalarType::Int, {-1});
  const int64_t slots = index.size(0);
  FT_CHECK(slots > 0 && (slots & (slots - 1)) == 0, "index must have a power of two of slots, has ",
           slots);
  checked<int64_t>(rows, "rows", ScalarType::Long, {-1, host::ChunkMemory::kWords});
  FT_CHECK(rows.size(0) > 0 && rows.size(0) <= slots, "rows must be from 1 to the slots of index");
  return {static_cast<int32_t*>(index.mutable_data_ptr()), slots,
          static_cast<int64_t*>(rows.mutable_data_ptr()), rows.size(0)};
}

std::string_view view_of(const Tensor& text) {
  return {checked<char>(text, "text", ScalarType::Byte, {-1}), static_cast<size_t>(text.size(0))};
}

Tensor remember_chunks(const Tensor& index, const Tensor& rows, const Tensor& text,
                       const Tensor& ends, const Tensor& places) {
  host::ChunkMemory memory = memory_of(index, rows);
  const std::string_view bytes = view_of(text);
  const int64_t* stops = checked_ends(ends, text.size(0), 0);
  const int64_t count = ends.size(0);
  const int64_t* place = checked<int64_t>(places, "places", ScalarType::Long, {count});
  Tensor kept = torch::stable::empty({count}, ScalarType::Bool);
  bool* out = static_cast<bool*>(kept.mutable_data_ptr());
  int64_t begin = 0;
  for (int64_t i = 0; i < count; ++i) {
    FT_CHECK(stops[i] > begin, "a chunk has a byte before it");
    const std::string_view chunk = bytes.substr(begin + 1, stops[i] - begin - 1);
    out[i] = memory.add(chunk, bytes[begin] == host::kFirst, place[i]);
    begin = stops[i];
  }
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> read_chunks(
    const Tensor& index, const Tensor& rows, const Tensor& table, const Tensor& text,
    const Tensor& ends, const Tensor& given, bool before, bool behind, bool apart, bool lower,
    bool located) {
  const host::ChunkMemory memory = memory_of(index, rows);
  const int32_t* tokens_of_chunks = checked<int32_t>(table, "table", ScalarType::Int, {-1, 5});
  const int64_t* places = checked<int64_t>(given, "given", ScalarType::Long, {-1});
  const host::ReadTexts read(view_of(text), checked_ends(ends, text.size(0), 1), ends.size(0),
                             memory, {before, behind, apart, lower},
                             std::vector<int64_t>(places, places + given.size(0)), table.size(0));
  FT_CHECK(!read.outside(), "a place lies outside of table");
  std::string unknown;
  std::vector<int64_t> unknown_ends;
  for (const std::string& chunk : read.unknown()) {
    unknown += chunk;
    unknown_ends.push_back(static_cast<int64_t>(unknown.size()));
  }
  const bool complete = static_cast<int64_t>(unknown_ends.size()) == given.size(0);
  const int64_t tokens = complete && ends.size(0) ? read.token_ends().back() : 0;
  Tensor ids = torch::stable::empty({tokens}, ScalarType::Long);
  Tensor origins = torch::stable::empty({located ? tokens : 0, 4}, ScalarType::Int);
  if (complete) {
    read.write(tokens_of_chunks, static_cast<int64_t*>(ids.mutable_data_ptr()),
               located ? static_cast<int32_t*>(origins.mutable_data_ptr()) : nullptr);
  }
  return {ids,
          origins,
          tensor_of(read.token_ends(), ScalarType::Long),
          tensor_of(read.whole(), ScalarType::Long),
          tensor_of(std::vector<uint8_t>(unknown.begin(), unknown.end()), ScalarType::Byte),
          tensor_of(unknown_ends, ScalarType::Long)};
}

// Windows as ops take them: each lies inside of the logits. And how many spans the largest has.
std::pair<host::Windows, int64_t> checked_windows(const Tensor& logits, const Tensor& cls,
                                                  const Tensor& begins, const Tensor& counts,
                                                  int64_t max_answer_len) {
  checked<float>(logits, "logits", ScalarType::Float, {2, -1});
  const int64_t total = logits.size(1), windows = counts.size(0);
  const host::Windows asked = {
      windows,
      checked<int64_t>(cls, "cls", ScalarType::Long, {windows}),
      checked<int64_t>(begins, "begins", ScalarType::Long, {windows}),
      checked<int64_t>(counts, "counts", ScalarType::Long, {windows}),
      max_answer_len,
  };
  FT_CHECK(max_answer_len > 0, "max_answer_len must be at least 1");
  FT_CHECK(total < std::numeric_limits<int32_t>::max(), "logits has too many tokens");
  int64_t most = 0;
  for (int64_t w = 0; w < windows; ++w) {
    const int64_t count = asked.counts[w], begin = asked.begins[w], first = asked.cls[w];
    FT_CHECK(first >= 0 && first < total && begin >= 0 && count > 0 && count <= total - begin,
             "a window lies outside of logits");
    most = std::max(most, count * std::min(max_answer_len, count));
  }
  return {asked, most};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> best_spans(const Tensor& logits, const Tensor& cls,
                                                      const Tensor& begins, const Tensor& counts,
                                                      int64_t max_answer_len, int64_t wanted) {
  const auto [asked, most] = checked_windows(logits, cls, begins, counts, max_answer_len);
  FT_CHECK(wanted > 0, "wanted must be at least 1");
  const int64_t columns = std::min(wanted, most);
  const std::vector<int64_t> shape = {asked.count, columns};
  Tensor null = torch::stable::empty({asked.count}, ScalarType::Float);
  Tensor scores = torch::stable::empty(shape, ScalarType::Float);
  Tensor firsts = torch::stable::empty(shape, ScalarType::Long);
  Tensor lasts = torch::stable::empty(shape, ScalarType::Long);
  host::best_spans(static_cast<const float*>(logits.const_data_ptr()), logits.size(1), asked,
                   columns, static_cast<float*>(null.mutable_data_ptr()),
                   static_cast<float*>(scores.mutable_data_ptr()),
                   static_cast<int64_t*>(firsts.mutable_data_ptr()),
                   static_cast<int64_t*>(lasts.mutable_data_ptr()));
  return {null, scores, firsts, lasts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_answers(
    const Tensor& logits, const Tensor& cls, const Tensor& begins, const Tensor& counts,
    const Tensor& window_ends, const Tensor& firsts, const Tensor& origins,
    const Tensor& token_ends, const Tensor& text, const Tensor& text_ends, int64_t max_answer_len,
    int64_t wanted, int64_t top_k, bool words, double least_share) {
  const auto [asked, most] = checked_windows(logits, cls, begins, counts, max_answer_len);
  FT_CHECK(wanted > 0 && top_k > 0, "wanted and top_k must be at least 1");
  const int64_t questions = text_ends.size(0), tokens = origins.size(0);
  const host::Contexts contexts = {
      questions,
      checked<int64_t>(window_ends, "window_ends", ScalarType::Long, {questions}),
      checked<int64_t>(firsts, "firsts", ScalarType::Long, {asked.count}),
      checked<int32_t>(origins, "origins", ScalarType::Int, {-1, 4}),
      checked<int64_t>(token_ends, "token_ends", ScalarType::Long, {questions}),
      view_of(text),
      checked_ends(text_ends, text.size(0), 1),
  };
  int64_t window = 0, token = 0;
  for (int64_t q = 0; q < questions; ++q) {
    const int64_t window_end = contexts.window_ends[q], token_end = contexts.token_ends[q];
    FT_CHECK(window_end > window && window_end <= asked.count,
             "window_ends must give every question a window");
    FT_CHECK(token_end >= token && token_end <= tokens,
             "token_ends must rise up to the rows of origins");
    for (; window < window_end; ++window) {
      const int64_t first = contexts.firsts[window];
      FT_CHECK(first >= 0 && first <= token_end - token - asked.counts[window],
               "a window lies outside of its context");
    }
    token = token_end;
  }
  FT_CHECK(window == asked.count, "window_ends must end with the last window");
  const host::Wanted asked_for = {std::min(wanted, most), top_k, words,
                                  static_cast<float>(least_share)};
  const host::Answers answers =
      host::best_answers(static_cast<const float*>(logits.const_data_ptr()), logits.size(1), asked,
                         contexts, asked_for);
  FT_CHECK(answers.inside, "an origin lies outside of text");
  return {tensor_of(answers.null, ScalarType::Float), tensor_of(answers.found, ScalarType::Long),
          tensor_of(answers.scores, ScalarType::Double),
          tensor_of(answers.begins, ScalarType::Long), tensor_of(answers.ends, ScalarType::Long)};
}

}  // namespace
}  // namespace ft

STABLE_TORCH_LIBRARY_IMPL(fastertransformer, CPU, m) {
  m.impl("remember_chunks", TORCH_BOX(&ft::remember_chunks));
  m.impl("read_chunks", TORCH_BOX(&ft::read_chunks));
  m.impl("best_spans", TORCH_BOX(&ft::best_spans));
  m.impl("best_answers", TORCH_BOX(&ft::best_answers));
}
