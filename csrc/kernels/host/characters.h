// Bytes of UTF-8.
#pragma once

namespace ft::host {

inline bool is_ascii(char byte) { return byte >= 0; }
inline bool continues_character(char byte) { return (byte & 0xc0) == 0x80; }
// A letter of ASCII as a small one; everything else as it is.
inline char lower(char c) { return static_cast<char>(c + (c >= 'A' && c <= 'Z' ? 'a' - 'A' : 0)); }

}  // namespace ft::host
