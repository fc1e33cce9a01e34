// The best spans of windows. No Torch.
#pragma once

#include <cstdint>

namespace ft::host {

// Windows of a question's context, and what of their spans is wanted.
struct Windows {
  int64_t count = 0;
  const int64_t* cls = nullptr;     // [count] position of each one's first token
  const int64_t* begins = nullptr;  // [count] position of its first context token
  const int64_t* counts = nullptr;  // [count] how many of these it has, at least 1
  int64_t most_tokens = 1;          // of a span
};

// Start and end logits become probabilities over a window's first token and its context; a span's
// score is the product of its ends'. Nothing of a window's depends on the other windows.
//
// logits  [2, total]
// wanted  how many spans a window gives
//
// null    [count] the score of the first token as start and end
// scores  [count, wanted] of the best spans, best first, those alike in their order in the text;
//         where a window has fewer, what is left scores -1
// firsts, lasts  [count, wanted] their ends, counted from the window's first context token
void best_spans(const float* logits, int64_t total, const Windows& windows, int64_t wanted,
                float* null, float* scores, int64_t* firsts, int64_t* lasts);

}  // namespace ft::host
