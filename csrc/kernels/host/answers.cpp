#include "kernels/host/answers.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/host/characters.h"

namespace ft::host {
namespace {

// More spans than this are not compared with each other here.
constexpr size_t kMostSpans = 256;
// U+0130 in UTF-8, the one letter that lower-casing makes two of.
constexpr std::string_view kDottedI = "\xc4\xb0";

// A context by characters.
class Text {
 public:
  explicit Text(std::string_view bytes)
      : bytes_(bytes), ascii_(std::all_of(bytes.begin(), bytes.end(), is_ascii)) {
    if (ascii_) return;
    starts_.reserve(bytes.size() + 1);
    for (size_t at = 0; at < bytes.size(); ++at) {
      if (!continues_character(bytes[at])) starts_.push_back(static_cast<int64_t>(at));
    }
    starts_.push_back(static_cast<int64_t>(bytes.size()));
  }

  int64_t characters() const {
    return static_cast<int64_t>(ascii_ ? bytes_.size() : starts_.size() - 1);
  }
  std::string_view between(int64_t begin, int64_t end) const {
    const int64_t from = ascii_ ? begin : starts_[begin], to = ascii_ ? end : starts_[end];
    return bytes_.substr(from, to - from);
  }
  // Whether lower-casing may change how many characters there are.
  bool may_grow() const { return !ascii_ && bytes_.find(kDottedI) != bytes_.npos; }

 private:
  std::string_view bytes_;
  bool ascii_;
  std::vector<int64_t> starts_;  // of characters, where they are not the bytes
};

// Whether two texts of as many characters are equal but for case; nothing where that hangs on
// letters beyond ASCII, which are not looked up.
std::optional<bool> alike(std::string_view a, std::string_view b) {
  bool certain = true;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (is_ascii(a[i]) && is_ascii(b[j])) {
      if (lower(a[i++]) != lower(b[j++])) return false;
      continue;
    }
    size_t until = i + 1, others = j + 1;
    while (until < a.size() && continues_character(a[until])) ++until;
    while (others < b.size() && continues_character(b[others])) ++others;
    certain &= a.substr(i, until - i) == b.substr(j, others - j);
    i = until;
    j = others;
  }
  if (!certain) return {};
  return true;
}

struct Answer {
  double score;
  int64_t begin, end;
};

// One question's spans as they become answers.
class Gathered {
 public:
  explicit Gathered(const Text& text) : text_(text), may_grow_(text.may_grow()) {}

  // Whether what was added so far is certain.
  bool certain() const { return certain_; }
  bool inside() const { return inside_; }

  void add(float score, int64_t begin, int64_t end) {
    if (begin < 0 || begin > end || end > text_.characters()) inside_ = false;
    certain_ &= answers.size() < kMostSpans;
    if (!inside_ || !certain_) return;
    for (Answer& known : answers) {
      if (same(known, begin, end)) {
        known.score += score;
        return;
      }
    }
    answers.push_back({score, begin, end});
  }

  std::vector<Answer> answers;

 private:
  bool same(const Answer& known, int64_t begin, int64_t end) {
    if (known.begin == begin && known.end == end) return true;
    if (may_grow_) certain_ = false;
    if (known.end - known.begin != end - begin) return false;
    const auto equal = alike(text_.between(known.begin, known.end), text_.between(begin, end));
    certain_ &= equal.has_value();
    return equal.value_or(false);
  }

  const Text& text_;
  bool may_grow_, certain_ = true, inside_ = true;
};

}  // namespace

Answers best_answers(const float* logits, int64_t total, const Windows& windows,
                     const Contexts& contexts, const Wanted& wanted) {
  Answers out;
  std::vector<float> null, scores;
  std::vector<int64_t> firsts, lasts;
  const auto before = [](const int64_t* ends, int64_t at) { return at ? ends[at - 1] : 0; };
  for (int64_t q = 0; q < contexts.count; ++q) {
    const int64_t window = before(contexts.window_ends, q);
    Windows own = windows;
    own.count = contexts.window_ends[q] - window;
    own.cls += window;
    own.begins += window;
    own.counts += window;
    null.resize(own.count);
    scores.resize(own.count * wanted.spans);
    firsts.resize(scores.size());
    lasts.resize(scores.size());
    best_spans(logits, total, own, wanted.spans, null.data(), scores.data(), firsts.data(),
               lasts.data());
    const int64_t text_begin = q ? contexts.text_ends[q - 1] + 1 : 0;
    const Text text(contexts.text.substr(text_begin, contexts.text_ends[q] - text_begin));
    const int32_t* origins = contexts.origins + 4 * before(contexts.token_ends, q);
    Gathered gathered(text);
    const int from = wanted.words ? 2 : 0, to = from + 1;
    for (int64_t w = 0; w < own.count; ++w) {
      const int64_t at = w * wanted.spans, first = contexts.firsts[window + w];
      const float least = scores[at] * wanted.least_share;
      for (int64_t s = at; s < at + wanted.spans && scores[s] >= least; ++s) {
        gathered.add(scores[s], origins[4 * (first + firsts[s]) + from],
                     origins[4 * (first + lasts[s]) + to]);
      }
    }
    out.null.push_back(*std::min_element(null.begin(), null.end()));
    out.inside &= gathered.inside();
    std::vector<Answer>& answers = gathered.answers;
    std::stable_sort(answers.begin(), answers.end(),
                     [](const Answer& a, const Answer& b) { return a.score > b.score; });
    if (static_cast<int64_t>(answers.size()) > wanted.answers) answers.resize(wanted.answers);
    if (!gathered.certain()) answers.clear();
    out.found.push_back(gathered.certain() ? static_cast<int64_t>(answers.size()) : -1);
    for (const Answer& answer : answers) {
      out.scores.push_back(answer.score);
      out.begins.push_back(answer.begin);
      out.ends.push_back(answer.end);
    }
  }
  return out;
}

}  // namespace ft::host
