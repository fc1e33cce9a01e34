#include "kernels/host/spans.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace ft::host {
namespace {

// A window's probabilities as starts or ends: exp(logit - the largest) / their sum.
class Probabilities {
 public:
  // ahead  zeros behind the context's, which a span that leaves its window meets
  void read(const float* logits, int64_t cls, int64_t begin, int64_t count, int64_t ahead) {
    const float* context = logits + begin;
    const float top = std::max(logits[cls], *std::max_element(context, context + count));
    of_context.assign(count + ahead, 0.f);
    of_cls = std::exp(logits[cls] - top);
    double total = of_cls;
    for (int64_t i = 0; i < count; ++i) {
      of_context[i] = std::exp(context[i] - top);
      total += of_context[i];
    }
    const float sum = static_cast<float>(total);
    for (int64_t i = 0; i < count; ++i) of_context[i] /= sum;
    of_cls /= sum;
  }

  std::vector<float> of_context;
  float of_cls = 0.f;
};

// max(values[i : i + width]) in place of every values[i], by doubling; `width - 1` lie behind the
// last one that counts.
void slide_maximum(std::vector<float>& values, int64_t width) {
  int64_t size = static_cast<int64_t>(values.size()), span = 1;
  const auto widen = [&](int64_t by) {
    size -= by;
    for (int64_t i = 0; i < size; ++i) values[i] = std::max(values[i], values[i + by]);
  };
  for (; 2 * span <= width; span *= 2) widen(span);
  widen(width - span);
}

struct Span {
  float score;
  int64_t first;
  int64_t last;
};

bool better(const Span& a, const Span& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.first != b.first ? a.first < b.first : a.last < b.last;
}

// Leaves the best `wanted`, best first.
void keep_best(std::vector<Span>& spans, int64_t wanted) {
  const int64_t kept = std::min<int64_t>(wanted, spans.size());
  std::partial_sort(spans.begin(), spans.begin() + kept, spans.end(), better);
  spans.resize(kept);
}

}  // namespace

void best_spans(const float* logits, int64_t total, const Windows& windows, int64_t wanted,
                float* null, float* scores, int64_t* firsts, int64_t* lasts) {
  Probabilities start, end;
  std::vector<float> best_end;
  std::vector<Span> rows, spans;
  for (int64_t w = 0; w < windows.count; ++w) {
    const int64_t count = windows.counts[w], width = std::min(windows.most_tokens, count);
    start.read(logits, windows.cls[w], windows.begins[w], count, 0);
    end.read(logits + total, windows.cls[w], windows.begins[w], count, width - 1);
    *null++ = start.of_cls * end.of_cls;
    // The best spans begin at the tokens whose best span is best.
    best_end = end.of_context;
    slide_maximum(best_end, width);
    rows.clear();
    for (int64_t i = 0; i < count; ++i) rows.push_back({start.of_context[i] * best_end[i], i, i});
    keep_best(rows, wanted);
    spans.clear();
    for (const Span& row : rows) {
      const int64_t stop = std::min(count, row.first + width);
      for (int64_t last = row.first; last < stop; ++last) {
        spans.push_back({start.of_context[row.first] * end.of_context[last], row.first, last});
      }
    }
    keep_best(spans, wanted);
    spans.resize(wanted, {-1.f, 0, 0});
    for (const Span& span : spans) {
      *scores++ = span.score;
      *firsts++ = span.first;
      *lasts++ = span.last;
    }
  }
}

}  // namespace ft::host
