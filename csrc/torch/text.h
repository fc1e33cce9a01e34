// A string argument of an op.
//
// torch's own conversion to std::string copies the string to the heap and returns a copy of that,
// which nobody frees: some 300 bytes a call (torch 2.10 to 2.13, `ToImpl<std::string>` in
// stableivalue_conversions.h).
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <stdexcept>
#include <string>

namespace ft {

struct Text : std::string {
  using std::string::string;
};

}  // namespace ft

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<ft::Text> {
  static ft::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    if (torch_string_length(handle, &length) != 0 || torch_string_c_str(handle, &data) != 0) {
      throw std::runtime_error("torch cannot read a string of its own");
    }
    ft::Text text(data, length);
    torch_delete_string(handle);
    return text;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
