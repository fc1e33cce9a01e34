#include "kernels/host/spans.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

namespace ft::host {
namespace {

// exp(x) for x <= 0, off by at most 2^-22 of itself; zero below -87. Without calls or branches, so
// that compilers make it one instruction for several numbers.
inline float exp_below_zero(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kRounds = 12582912.f;  // 1.5 * 2^23: what is added to it has no fraction
  const float bounded = x < -87.f ? -87.f : x;
  const float shifted = bounded * kLog2E + kRounds;
  const float whole = shifted - kRounds;
  const float rest = (bounded - whole * kLn2High) - whole * kLn2Low;  // within log(2) / 2 of zero
  float series = 1.f / 720;
  series = series * rest + 1.f / 120;
  series = series * rest + 1.f / 24;
  series = series * rest + 1.f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.f;
  series = series * rest + 1.f;
  // The whole part, in the lowest bits of `shifted`, added to the exponent.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) << 23;
  const float power = std::bit_cast<float>(std::bit_cast<int32_t>(series) + exponent);
  return x < -87.f ? 0.f : power;
}

// Several at once of what has to be added, or compared, in the same order everywhere.
constexpr int64_t kLanes = 8;

float largest_of(const float* values, int64_t count) {
  std::array<float, kLanes> lanes;
  lanes.fill(values[0]);
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = std::max(lanes[l], values[at + l]);
  }
  for (; at < count; ++at) lanes[0] = std::max(lanes[0], values[at]);
  return *std::max_element(lanes.begin(), lanes.end());
}

double sum_of(const float* values, int64_t count) {
  std::array<double, kLanes> lanes{};
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += values[at + l];
  }
  for (; at < count; ++at) lanes[0] += values[at];
  return std::accumulate(lanes.begin(), lanes.end(), 0.0);
}

// A window's probabilities as starts or ends: exp(logit - the largest) / their sum.
class Probabilities {
 public:
  // ahead  zeros behind the context's, which a span that leaves its window meets
  void read(const float* logits, int64_t cls, int64_t begin, int64_t count, int64_t ahead) {
    const float* context = logits + begin;
    const float top = std::max(logits[cls], largest_of(context, count));
    of_context.assign(count + ahead, 0.f);
    float* out = of_context.data();
    for (int64_t i = 0; i < count; ++i) out[i] = exp_below_zero(context[i] - top);
    of_cls = exp_below_zero(logits[cls] - top);
    const float total = static_cast<float>(sum_of(out, count) + of_cls);
    for (int64_t i = 0; i < count; ++i) out[i] /= total;
    of_cls /= total;
  }

  std::vector<float> of_context;
  float of_cls = 0.f;
};

// max(values[i : i + width]) for every i, by doubling; `width - 1` lie behind the last that counts.
// Both are overwritten; the result is in `values`.
void slide_maximum(std::vector<float>& values, std::vector<float>& other, int64_t width) {
  int64_t size = static_cast<int64_t>(values.size()), span = 1;
  other.resize(values.size());
  const auto widen = [&](int64_t by) {
    size -= by;
    const float* __restrict from = values.data();
    float* __restrict to = other.data();
    for (int64_t i = 0; i < size; ++i) to[i] = std::max(from[i], from[i + by]);
    values.swap(other);
  };
  for (; 2 * span <= width; span *= 2) widen(span);
  widen(width - span);
}

struct Span {
  float score;
  int32_t first;
  int32_t last;
};

// Of equals the earlier one is better.
bool better(const Span& a, const Span& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.first != b.first ? a.first < b.first : a.last < b.last;
}

// The best `wanted` of the spans that it is offered, best first; of equals that have no room
// together those offered first.
class Best {
 public:
  void begin(int64_t wanted) {
    wanted_ = wanted;
    spans.clear();
    least_ = -1.f;
  }
  // Whether a span of such a score would be among them.
  bool takes(float score) const { return score > least_; }
  void offer(const Span& span) {
    if (!takes(span.score)) return;
    if (static_cast<int64_t>(spans.size()) == wanted_) spans.pop_back();
    size_t at = spans.size();
    spans.push_back(span);
    for (; at > 0 && better(span, spans[at - 1]); --at) spans[at] = spans[at - 1];
    spans[at] = span;
    if (static_cast<int64_t>(spans.size()) == wanted_) least_ = spans.back().score;
  }

  std::vector<Span> spans;

 private:
  int64_t wanted_ = 0;
  float least_ = -1.f;  // what has to be exceeded; no score is negative
};

}  // namespace

void best_spans(const float* logits, int64_t total, const Windows& windows, int64_t wanted,
                float* null, float* scores, int64_t* firsts, int64_t* lasts) {
  Probabilities start, end;
  std::vector<float> best_end, other;
  Best rows, best;
  for (int64_t w = 0; w < windows.count; ++w) {
    const int64_t count = windows.counts[w], width = std::min(windows.most_tokens, count);
    start.read(logits, windows.cls[w], windows.begins[w], count, 0);
    end.read(logits + total, windows.cls[w], windows.begins[w], count, width - 1);
    *null++ = start.of_cls * end.of_cls;
    // The best spans begin at the tokens whose best span is best.
    best_end = end.of_context;
    slide_maximum(best_end, other, width);
    for (int64_t i = 0; i < count; ++i) best_end[i] *= start.of_context[i];
    rows.begin(wanted);
    const int32_t tokens = static_cast<int32_t>(count);
    for (int32_t i = 0; i < tokens; ++i) rows.offer({best_end[i], i, i});
    best.begin(wanted);
    for (const Span& row : rows.spans) {
      if (!best.takes(row.score)) break;  // nor do those behind it begin a better one
      const int32_t stop = std::min(tokens, row.first + static_cast<int32_t>(width));
      for (int32_t last = row.first; last < stop; ++last) {
        best.offer({start.of_context[row.first] * end.of_context[last], row.first, last});
      }
    }
    best.spans.resize(wanted, {-1.f, 0, 0});
    for (const Span& span : best.spans) {
      *scores++ = span.score;
      *firsts++ = span.first;
      *lasts++ = span.last;
    }
  }
}

}  // namespace ft::host
