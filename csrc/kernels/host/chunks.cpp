#include "kernels/host/chunks.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "kernels/host/characters.h"

namespace ft::host {
namespace {

using Key = ChunkMemory::Key;
constexpr int kKeyWords = std::tuple_size_v<Key>;
constexpr int64_t kKeyBytes = sizeof(Key);
static_assert(ChunkMemory::kLongestChunk == kKeyBytes - 1);
static_assert(ChunkMemory::kReadAhead >= kKeyBytes);

// By a chunk's bytes: what of a key belongs to it.
constexpr auto kMasks = [] {
  std::array<Key, kKeyBytes> masks{};
  for (int64_t bytes = 0; bytes < kKeyBytes; ++bytes) {
    for (int64_t at = 0; at < bytes; ++at) masks[bytes][at / 8] |= uint64_t{0xff} << (at % 8 * 8);
  }
  return masks;
}();

Key key_of(const char* chunk, int64_t bytes, bool first) {
  Key key;
  std::memcpy(key.data(), chunk, kKeyBytes);
  const Key& mask = kMasks[bytes];
  for (int w = 0; w < kKeyWords; ++w) key[w] &= mask[w];
  key[kKeyWords - 1] |= static_cast<uint64_t>(bytes + 1 + (first ? 0x80 : 0)) << 56;
  return key;
}

uint64_t hash_of(const Key& key) {
  // Odd factors of mixed bits; few chunks have anything in the words between.
  uint64_t mixed = (key[0] + key[1] * 0x9E3779B97F4A7C15u + key[5]) * 0xD6E8FEB86659FD93u;
  if (key[2]) {
    mixed +=
        key[2] * 0xA0761D6478BD642Fu + key[3] * 0xE7037ED1A0B428DBu + key[4] * 0x8EBC6AF09C88C6E3u;
  }
  return (mixed ^ mixed >> 32) * 0x8EBC6AF09C88C6E3u >> 32;
}

bool same(const int64_t* row, const Key& key) {
  uint64_t differing = 0;
  for (int w = 0; w < kKeyWords; ++w) differing |= static_cast<uint64_t>(row[w]) ^ key[w];
  return differing == 0;
}

int64_t row_of(Place place) { return place >> kPlaceShift; }
int64_t count_of(Place place) { return place & ((Place{1} << kPlaceShift) - 1); }

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Whether the blank at `at` begins a chunk; the one in front of the text always does.
bool opens(const char* text, int64_t bytes, int64_t at, const Cuts& cuts) {
  if (!cuts.behind) return true;
  // A blank that a text begins with is part of its first chunk.
  if (at == 0) return false;
  // One that it ends with is a chunk without anything in it.
  if (at == bytes - 1) return !is_space(text[at - 1]);
  return !is_space(text[at + 1]) && !(cuts.before && is_space(text[at - 1]));
}

}  // namespace

ChunkMemory::Sought ChunkMemory::seek(const char* chunk, int64_t bytes, bool first) const {
  Sought sought;
  if (bytes > kLongestChunk) return sought;
  sought.fits = true;
  sought.key = key_of(chunk, bytes, first);
  sought.begin = hash_of(sought.key);
  __builtin_prefetch(index_ + (sought.begin & mask_));
  return sought;
}

void ChunkMemory::approach(const Sought& sought) const {
  if (!sought.fits) return;
  const int32_t at = index_[sought.begin & mask_];
  if (at > 0 && at < count_) __builtin_prefetch(rows_ + int64_t{at} * kWords);
}

Place ChunkMemory::find(const Sought& sought) const {
  if (!sought.fits) return -1;
  for (uint64_t probe = 0; probe < kProbes; ++probe) {
    const int32_t at = index_[(sought.begin + probe) & mask_];
    if (at <= 0 || at >= count_) break;  // nothing was ever put behind an empty slot
    const int64_t* row = rows_ + int64_t{at} * kWords;
    if (same(row, sought.key)) return row[kKeyWords];
  }
  return -1;
}

bool ChunkMemory::add(std::string_view chunk, bool first, Place place) {
  const int64_t taken = rows_[0] + 1;
  if (static_cast<int64_t>(chunk.size()) > kLongestChunk || taken < 1 || taken >= count_) {
    return false;
  }
  char padded[kReadAhead] = {};
  chunk.copy(padded, chunk.size());
  const Key key = key_of(padded, static_cast<int64_t>(chunk.size()), first);
  const uint64_t begin = hash_of(key);
  for (uint64_t probe = 0; probe < kProbes; ++probe) {
    int32_t& at = index_[(begin + probe) & mask_];
    if (at != 0) continue;
    int64_t* row = rows_ + taken * kWords;
    std::copy(key.begin(), key.end(), row);
    row[kKeyWords] = place;
    rows_[0] = taken;
    at = static_cast<int32_t>(taken);
    return true;
  }
  return false;
}

ReadTexts::ReadTexts(std::string_view joined, const int64_t* ends, int64_t texts,
                     const ChunkMemory& memory, const Cuts& cuts, const std::vector<Place>& given,
                     int64_t rows) {
  chunks_.reserve(joined.size() / 4 + texts);
  token_ends_.reserve(texts);
  std::vector<char> text;
  int64_t begin = 0, tokens = 0;
  size_t counted = 0;
  for (int64_t i = 0; i < texts; ++i) {
    const int64_t bytes = ends[i] - begin;
    text.assign(bytes + ChunkMemory::kReadAhead, 0);
    std::copy_n(joined.data() + begin, bytes, text.begin());
    if (cuts.lower && !std::memchr(text.data(), '[', bytes)) {
      std::transform(text.begin(), text.begin() + bytes, text.begin(), lower);
    }
    read(text.data(), bytes, memory, cuts, given);
    bool whole = false;
    for (; counted < chunks_.size(); ++counted) {
      Place& place = chunks_[counted].place;
      if (place == kWhole) {
        whole = true;
      } else if (place < 0 || row_of(place) + count_of(place) > rows) {
        outside_ = true;
        place = 0;
      }
      tokens += count_of(place);
    }
    if (whole) whole_.push_back(i);
    token_ends_.push_back(tokens);
    begin = ends[i] + 1;
  }
}

void ReadTexts::read(const char* text, int64_t bytes, const ChunkMemory& memory, const Cuts& cuts,
                     const std::vector<Place>& given) {
  char bits = 0;
  for (int64_t at = 0; at < bytes; ++at) bits |= text[at];
  const bool ascii = bits >= 0;
  struct Found {
    ChunkMemory::Sought sought;
    int64_t begin, end;
    int32_t characters;
    bool first;
  };
  constexpr int kTogether = 16;
  std::array<Found, kTogether> group;
  int64_t begin = 0;
  int32_t characters = 0;
  bool first = cuts.apart;
  for (bool more = true; more;) {
    int size = 0;
    for (; more && size < kTogether; ++size) {
      int64_t end = begin;
      while (end < bytes && !(text[end] == ' ' && opens(text, bytes, end, cuts))) ++end;
      group[size] = {memory.seek(text + begin, end - begin, first), begin, end, characters, first};
      more = end < bytes;
      const int64_t next = end + 1;
      if (ascii) {
        characters = static_cast<int32_t>(next);
      } else {
        for (; more && begin < next; ++begin) characters += !continues_character(text[begin]);
      }
      begin = next;
      first = false;
    }
    for (int i = 0; i < size; ++i) memory.approach(group[i].sought);
    for (int i = 0; i < size; ++i) {
      const Found& chunk = group[i];
      Place place = memory.find(chunk.sought);
      if (place < 0) {
        const size_t number = unknown_.size();
        unknown_.emplace_back(1, chunk.first ? kFirst : ' ')
            .append(text + chunk.begin, chunk.end - chunk.begin);
        place = number < given.size() ? given[number] : 0;
      }
      chunks_.push_back({place, chunk.characters});
    }
  }
}

void ReadTexts::write(const int32_t* table, int64_t* ids, int32_t* origins) const {
  constexpr int64_t kColumns = 5;
  constexpr size_t kAhead = 12;  // chunks whose rows are fetched meanwhile
  for (size_t c = 0; c < chunks_.size(); ++c) {
    if (c + kAhead < chunks_.size()) {
      __builtin_prefetch(table + row_of(chunks_[c + kAhead].place) * kColumns);
    }
    const Chunk& chunk = chunks_[c];
    const int64_t count = count_of(chunk.place);
    if (count == 0) continue;
    const int32_t* token = table + row_of(chunk.place) * kColumns;
    for (int64_t i = 0; i < count; ++i, token += kColumns) {
      *ids++ = token[0];
      if (!origins) continue;
      for (int column = 1; column < kColumns; ++column) {
        *origins++ = token[column] + chunk.characters;
      }
    }
  }
}

}  // namespace ft::host
