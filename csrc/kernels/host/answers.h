// The answers to questions: the best spans of their windows, those of one text put together. No
// Torch.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/host/spans.h"

namespace ft::host {

// Contexts of questions, and their windows.
struct Contexts {
  int64_t count = 0;
  const int64_t* window_ends = nullptr;  // [count] how many windows there are up to each one's last
  const int64_t* firsts = nullptr;       // [windows] the context's token that a window begins with
  const int32_t* origins = nullptr;  // [tokens, 4] characters at which each token of the contexts
                                     // begins and ends, then its word
  const int64_t* token_ends = nullptr;  // [count] how many tokens there are up to each one's last
  std::string_view text;                // the contexts in UTF-8, one byte between two
  const int64_t* text_ends = nullptr;   // [count] where each ends
};

struct Wanted {
  int64_t spans = 1;        // of a window
  int64_t answers = 1;      // of a question
  bool words = true;        // whether spans are widened to whole words
  float least_share = 0.f;  // of a window's best score, what a span must have to count
};

struct Answers {
  std::vector<float> null;      // [count] the least score of a question's windows for no answer
  std::vector<int64_t> found;   // [count] how many answers a question has, -1 where letters have to
                                // be compared that this does not know
  std::vector<double> scores;   // [answers] question by question, best first
  std::vector<int64_t> begins;  // [answers] characters of the context
  std::vector<int64_t> ends;
  bool inside = true;  // whether all origins lay within the text; else nothing is known
};

// Spans whose texts are equal, case aside, are one answer: that of the first, their scores added in
// the order of the windows and, in a window, of their scores. Of equals the one that came first is
// better. Nothing of a question's depends on the others.
Answers best_answers(const float* logits, int64_t total, const Windows& windows,
                     const Contexts& contexts, const Wanted& wanted);

}  // namespace ft::host
