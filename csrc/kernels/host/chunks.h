// Texts cut into chunks between blanks, and a memory of the tokens that each chunk gives. No Torch.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ft::host {

// Where a text may be cut; ft_handler/text/chunking.py says it for every kind of tokenizer.
struct Cuts {
  bool before = false;  // a blank begins a chunk only where no more whitespace stands before it
  bool behind = false;  // ... and where no more whitespace follows it
  bool apart = false;   // a text's first chunk reads otherwise than the same bytes later on
  bool lower = false;   // ASCII is lower-cased, in texts without a bracket
};

// What stands before a chunk: a blank, or this where it is its text's first and is read otherwise.
// No byte of UTF-8.
inline constexpr char kFirst = '\xff';

// Rows of the table of tokens that a chunk has: its first row, shifted, and how many.
using Place = int64_t;
inline constexpr int kPlaceShift = 32;
// The place of a chunk that what stands around it may change: its text has to be read whole.
inline constexpr Place kWhole = Place{1} << 62;

// A hash table over memory of the caller's, zeros at first: a small index, and behind it the chunks
// in the order in which they came, so that words that are used often lie together. A chunk is
// looked for in a few neighbouring places of the index, so that nobody who chooses chunks can make
// it slow; one that finds no room there is not kept.
class ChunkMemory {
 public:
  static constexpr int kWords = 8;          // of 64 bits in a row, one cache line
  static constexpr int kLongestChunk = 47;  // bytes
  static constexpr int kReadAhead = 48;     // bytes behind a chunk's begin that may be read

  // index  [slots] the row of a chunk, 0 where there is none; slots a power of two
  // rows   [count, kWords] a key and a place each; the first one holds how many have been taken
  ChunkMemory(int32_t* index, int64_t slots, int64_t* rows, int64_t count)
      : index_(index), mask_(slots - 1), rows_(rows), count_(count) {}

  // A chunk's bytes, zeros behind them, and in the last byte its length and whether it is a first
  // one: equal only if the chunks are.
  using Key = std::array<uint64_t, 6>;
  // A chunk that is looked for; one that is too long is nowhere.
  struct Sought {
    Key key;
    uint64_t begin = 0;
    bool fits = false;
  };

  // Of memory that a search reads the processor is told beforehand, since it has to wait for it
  // longer than for all the rest: first `seek` for some chunks, then `approach`, then `find`.
  Sought seek(const char* chunk, int64_t bytes, bool first) const;
  void approach(const Sought& sought) const;
  // The place of a chunk, -1 where it is unknown.
  Place find(const Sought& sought) const;
  // Takes a chunk in that is unknown; false where it is too long or finds no room.
  bool add(std::string_view chunk, bool first, Place place);

 private:
  static constexpr uint64_t kProbes = 16;

  int32_t* index_;
  uint64_t mask_;
  int64_t* rows_;
  int64_t count_;
};

// Texts as chunks with their places.
class ReadTexts {
 public:
  // joined  the texts in UTF-8, one byte between two
  // ends    [texts] where each ends
  // given   the places of the chunks that the memory lacks, in their order
  // rows    of the table of tokens that places lie in
  ReadTexts(std::string_view joined, const int64_t* ends, int64_t texts, const ChunkMemory& memory,
            const Cuts& cuts, const std::vector<Place>& given, int64_t rows);

  // Whether some place lies outside of the table; its chunk has no tokens then.
  bool outside() const { return outside_; }

  // The chunks that the memory lacks, each with what stands before it. Where they are not as many
  // as were given nothing else is known.
  const std::vector<std::string>& unknown() const { return unknown_; }
  // [texts] how many tokens there are up to the end of each.
  const std::vector<int64_t>& token_ends() const { return token_ends_; }
  // Texts that have to be read whole; their tokens here are not theirs.
  const std::vector<int64_t>& whole() const { return whole_; }

  // Writes ids [tokens] and, unless null, origins [tokens, 4]: characters of each token's text at
  // which the token begins and ends, then its word.
  //
  // table  [rows, 5] the tokens of all chunks: id, and characters counted from the chunk's begin
  void write(const int32_t* table, int64_t* ids, int32_t* origins) const;

 private:
  struct Chunk {
    Place place;
    int32_t characters;  // of its text before it
  };

  void read(const char* text, int64_t bytes, const ChunkMemory& memory, const Cuts& cuts,
            const std::vector<Place>& given);

  std::vector<Chunk> chunks_;
  std::vector<std::string> unknown_;
  std::vector<int64_t> token_ends_;
  std::vector<int64_t> whole_;
  bool outside_ = false;
};

}  // namespace ft::host
