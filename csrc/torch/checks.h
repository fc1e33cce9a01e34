// Checks of what callers pass: each message names the tensor, the demand and what arrived.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/encoder_spec.h"

namespace ft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of a message. Not by a stream: where a toolchain links the C++ runtime statically, streams
// mix its locales with those of the process, and writing a number ends it.
template <typename Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

// Throws std::runtime_error (RuntimeError in Python), without a source location: the message is for
// the caller, who has no use for ours.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text_of(parts)));
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another type";
  }
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return shape_of(sizes);
}

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(i) == sizes[i];
  return same;
}

// Of a tensor that FT_CHECK_FLOAT let pass.
inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline bool is_float_type(ScalarType d) {
  return d == ScalarType::Float || d == ScalarType::Half || d == ScalarType::BFloat16;
}

inline bool is_id_type(ScalarType d) { return d == ScalarType::Int || d == ScalarType::Long; }

// Float weights carry no scale of their own.
inline void check_no_scale(const Tensor& weight, const std::optional<Tensor>& scale) {
  if (!scale) return;
  fail("scale must be None for a ", dtype_name(weight.scalar_type()),
       " weight; only quantised weights have one, and this library knows no quantised format");
}

// How segment_pool is to pool.
inline Pooling pooling_named(const std::string& name) {
  if (name == "mean") return Pooling::kMean;
  if (name == "max") return Pooling::kMax;
  fail("how must be mean or max, is \"", name, "\"");
}

// A relative bias has a row a head and a column for each of the distances -D to D.
inline void check_relative_bias(const Tensor& bias, const char* name, int64_t heads) {
  if (bias.dim() != 2 || bias.size(0) != heads || bias.size(1) % 2 == 0) {
    fail(name, " must have shape [", heads, ", 2 D + 1], has ", shape_of(bias));
  }
}

// The tensors of an encoder by what they are; null where the encoder has none.
class EncoderWeights {
 public:
  EncoderWeights(const EncoderSpec& spec, const std::vector<Tensor>& tensors)
      : spec_(spec), tensors_(tensors) {
    if (static_cast<int64_t>(tensors.size()) != spec.tensors) {
      fail("weights must be the ", spec.tensors, " tensors that spec names, are ", tensors.size());
    }
  }
  const Tensor& operator[](EncoderWeight weight) const { return tensors_[spec_.places[weight]]; }

 private:
  const EncoderSpec& spec_;
  const std::vector<Tensor>& tensors_;
};

// What the op of interface 1 says with its arguments' shapes.
inline EncoderSpec spec_of_interface_1(const Tensor& word, const Tensor& qkv_bias,
                                       const Tensor& up_bias, int64_t num_heads, double eps) {
  for (const auto& [tensor, name] : {std::pair{&word, "word"}, std::pair{&qkv_bias, "qkv_bias"},
                                     std::pair{&up_bias, "up_bias"}}) {
    if (tensor->dim() != 2) fail(name, " must have 2 dimensions, has shape ", shape_of(*tensor));
  }
  if (num_heads < 1) fail("num_heads must be at least 1, is ", num_heads);
  EncoderSpec spec;
  spec.hidden = spec.embedding = word.size(1);
  spec.layers = qkv_bias.size(0);
  spec.heads = num_heads;
  spec.intermediate = up_bias.size(1);
  spec.activation = Activation::kGelu;
  spec.eps = eps;
  for (int w = 0; w < kEncoderWeightCount; ++w) {
    const bool new_since = w == kProjectionWeight || w == kProjectionBias || w >= kRelativeBias;
    if (!new_since) spec.places[w] = spec.tensors++;
  }
  check_encoder_spec(spec);
  return spec;
}

}  // namespace ft

// FT_CHECK(condition, parts of the message...)
#define FT_CHECK(condition, ...) \
  do {                           \
    if (!(condition)) {          \
      ::ft::fail(__VA_ARGS__);   \
    }                            \
  } while (0)

#define FT_CHECK_DIM(tensor, dims)                                                             \
  FT_CHECK((tensor).dim() == (dims), #tensor " must have ", dims, " dimension(s), has shape ", \
           ::ft::shape_of(tensor))

#define FT_CHECK_SIZE(tensor, axis, expected)                                                    \
  FT_CHECK((tensor).size(axis) == (expected), #tensor " must have size ", expected, " on axis ", \
           axis, ", has shape ", ::ft::shape_of(tensor))

#define FT_CHECK_FLOAT(tensor)                                            \
  FT_CHECK(::ft::is_float_type((tensor).scalar_type()),                   \
           #tensor " must have dtype float32, float16 or bfloat16, has ", \
           ::ft::dtype_name((tensor).scalar_type()))

#define FT_CHECK_IDS(tensor)                                \
  FT_CHECK(::ft::is_id_type((tensor).scalar_type()),        \
           #tensor " must have dtype int64 or int32, has ", \
           ::ft::dtype_name((tensor).scalar_type()))

#define FT_CHECK_DTYPE(tensor, expected)                                      \
  FT_CHECK((tensor).scalar_type() == (expected), #tensor " must have dtype ", \
           ::ft::dtype_name(expected), ", has ", ::ft::dtype_name((tensor).scalar_type()))
