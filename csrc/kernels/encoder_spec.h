// What an encoder is and how it is to run, as the text that a traced file hands to the op. No
// Torch. Whatever is not known here is refused: a later library may know it.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "kernels/types.h"

namespace ft {

// The tensors that an encoder may have.
enum EncoderWeight : int {
  kWord,
  kPosition,
  kTokenType,
  kEmbeddingGamma,
  kEmbeddingBeta,
  kProjectionWeight,
  kProjectionBias,
  kQkvWeight,
  kQkvBias,
  kOutWeight,
  kOutBias,
  kNorm1Gamma,
  kNorm1Beta,
  kUpWeight,
  kUpBias,
  kDownWeight,
  kDownBias,
  kNorm2Gamma,
  kNorm2Beta,
  kRelativeBias,
  kQkvNarrow,
  kQkvNarrowScale,
  kQkvInputScale,
  kOutNarrow,
  kOutNarrowScale,
  kOutInputScale,
  kUpNarrow,
  kUpNarrowScale,
  kUpInputScale,
  kDownNarrow,
  kDownNarrowScale,
  kDownInputScale,
  kEncoderWeightCount,
};

inline constexpr std::array<const char*, kEncoderWeightCount> kEncoderWeightNames{
    "embeddings.word",
    "embeddings.position",
    "embeddings.token_type",
    "embeddings.norm.weight",
    "embeddings.norm.bias",
    "embeddings.projection.weight",
    "embeddings.projection.bias",
    "layers.qkv.weight",
    "layers.qkv.bias",
    "layers.out.weight",
    "layers.out.bias",
    "layers.norm1.weight",
    "layers.norm1.bias",
    "layers.up.weight",
    "layers.up.bias",
    "layers.down.weight",
    "layers.down.bias",
    "layers.norm2.weight",
    "layers.norm2.bias",
    "attention.relative_bias",
    "layers.qkv.narrow",
    "layers.qkv.narrow_scale",
    "layers.qkv.input_scale",
    "layers.out.narrow",
    "layers.out.narrow_scale",
    "layers.out.input_scale",
    "layers.up.narrow",
    "layers.up.narrow_scale",
    "layers.up.input_scale",
    "layers.down.narrow",
    "layers.down.narrow_scale",
    "layers.down.input_scale",
};

// The products of a layer, in the order computed.
enum LayerProduct : int { kQkv, kOut, kUp, kDown, kLayerProducts };

inline constexpr std::array<const char*, kLayerProducts> kLayerProductNames{"qkv", "out", "up",
                                                                            "down"};

// What a product in e4m3 has beside its weight in 16 bits.
constexpr EncoderWeight narrow_weight(LayerProduct p) {
  return static_cast<EncoderWeight>(kQkvNarrow + 3 * p);
}
constexpr EncoderWeight narrow_scale(LayerProduct p) {
  return static_cast<EncoderWeight>(kQkvNarrowScale + 3 * p);
}
constexpr EncoderWeight input_scale(LayerProduct p) {
  return static_cast<EncoderWeight>(kQkvInputScale + 3 * p);
}

struct EncoderSpec {
  int64_t hidden = 0;
  int64_t embedding = 0;  // width of the tables and their norm
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t intermediate = 0;
  Activation activation = Activation::kNone;
  double eps = 0;
  std::array<int, kEncoderWeightCount> places;  // where in the list a tensor is, or -1
  int tensors = 0;                              // in the list
  // Layers in which a product that has e4m3 weights is computed without them all the same.
  std::array<std::vector<int64_t>, kLayerProducts> floats;

  EncoderSpec() { places.fill(-1); }
  bool has(EncoderWeight weight) const { return places[weight] >= 0; }
  // Whether a linear layer leads from the embeddings to the hidden size.
  bool projects() const { return has(kProjectionWeight); }
  // Whether a bias by head and distance is added to the scaled scores of every layer.
  bool biased() const { return has(kRelativeBias); }
  // Whether a product, or any, has weights in e4m3 too.
  bool narrow(LayerProduct product) const { return has(narrow_weight(product)); }
  bool narrow() const { return narrow(kQkv) || narrow(kOut) || narrow(kUp) || narrow(kDown); }
};

// How to run, which no file says.
struct EncoderOptions {
  bool batch_invariant = false;  // results do not depend on the batch, to the last bit
  bool few_tokens = true;        // CUDA: kernels of their own for a few tokens
};

// A tensor's shape: [layers or 1, rows, columns] where `stacked`, else [rows, columns]; without
// columns a vector, without rows a number a layer. Rows or columns -1: any; the columns of
// kRelativeBias are 2 D + 1, and what is added for query i and key j stands in column clamp(j - i,
// -D, D) + D.
struct EncoderWeightShape {
  bool stacked;
  int64_t rows, columns;
};

inline EncoderWeightShape shape_of(const EncoderSpec& s, EncoderWeight weight) {
  switch (weight) {
    case kWord:
    case kPosition:
    case kTokenType:
      return {false, -1, s.embedding};
    case kEmbeddingGamma:
    case kEmbeddingBeta:
      return {false, s.embedding, 0};
    case kProjectionWeight:
      return {false, s.hidden, s.embedding};
    case kProjectionBias:
      return {false, s.hidden, 0};
    case kQkvWeight:
      return {true, 3 * s.hidden, s.hidden};
    case kQkvBias:
      return {true, 3 * s.hidden, 0};
    case kOutWeight:
      return {true, s.hidden, s.hidden};
    case kUpWeight:
      return {true, s.intermediate, s.hidden};
    case kUpBias:
      return {true, s.intermediate, 0};
    case kDownWeight:
      return {true, s.hidden, s.intermediate};
    case kRelativeBias:
      return {false, s.heads, -1};
    case kQkvNarrow:
      return shape_of(s, kQkvWeight);
    case kOutNarrow:
      return shape_of(s, kOutWeight);
    case kUpNarrow:
      return shape_of(s, kUpWeight);
    case kDownNarrow:
      return shape_of(s, kDownWeight);
    case kQkvNarrowScale:
      return shape_of(s, kQkvBias);
    case kUpNarrowScale:
      return shape_of(s, kUpBias);
    case kQkvInputScale:
    case kOutInputScale:
    case kUpInputScale:
    case kDownInputScale:
      return {true, 0, 0};
    default:
      return {true, s.hidden, 0};
  }
}

namespace spec_detail {

[[noreturn]] inline void refuse(const std::string& what) {
  throw std::runtime_error(what + "; install the ft_handler that matches the model file");
}

inline std::string quoted(std::string_view text) { return '"' + std::string(text) + '"'; }

// f(word) for every part of `text` between separators; empty parts are skipped.
template <typename Function>
void for_words(std::string_view text, char separator, const Function& f) {
  while (!text.empty()) {
    const size_t end = std::min(text.find(separator), text.size());
    if (end > 0) f(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

template <typename Number>
Number number_of(std::string_view key, std::string_view text, Number least) {
  Number value{};
  const char* const end = text.data() + text.size();
  const auto [stop, fault] = std::from_chars(text.data(), end, value);
  // Products of three such sizes stay within 64 bits only below this.
  if (fault != std::errc{} || stop != end || !(value >= least && value <= Number{1 << 20})) {
    refuse("an encoder's " + std::string(key) + " must be a number of " +
           std::to_string(static_cast<int64_t>(least)) + " to " + std::to_string(1 << 20) +
           ", is " + quoted(text));
  }
  return value;
}

inline bool switch_of(std::string_view key, std::string_view text) {
  if (text != "0" && text != "1") {
    refuse("an encoder's " + std::string(key) + " must be 0 or 1, is " + quoted(text));
  }
  return text == "1";
}

inline void place_weights(std::string_view names, EncoderSpec* spec) {
  int guess = 0;  // names usually come in the order of the table
  for_words(names, ',', [&](std::string_view name) {
    int found = -1;
    for (int i = 0; i < kEncoderWeightCount && found < 0; ++i) {
      const int at = (guess + i) % kEncoderWeightCount;
      if (name == kEncoderWeightNames[at]) found = at;
    }
    if (found < 0) refuse("an encoder's weight " + quoted(name) + " is unknown");
    if (spec->places[found] >= 0) refuse("an encoder's weight " + quoted(name) + " comes twice");
    spec->places[found] = spec->tensors++;
    guess = found + 1;
  });
}

// "qkv:1,4;up:0", or nothing.
inline void place_floats(std::string_view text, EncoderSpec* spec) {
  for_words(text, ';', [&](std::string_view word) {
    const size_t at = std::min(word.find(':'), word.size());
    int product = 0;
    while (product < kLayerProducts && word.substr(0, at) != kLayerProductNames[product]) ++product;
    if (product == kLayerProducts || at + 1 >= word.size())
      refuse("an encoder's floats " + quoted(word) + " are unknown");
    for_words(word.substr(std::min(at + 1, word.size())), ',', [&](std::string_view layer) {
      spec->floats[product].push_back(number_of<int64_t>("floats", layer, 0));
    });
  });
}

}  // namespace spec_detail

inline Activation activation_named(std::string_view name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  spec_detail::refuse(
      "the activation must be gelu, gelu_tanh, relu, silu or none (an empty name), is " +
      spec_detail::quoted(name));
}

// Refuses a spec that lacks a tensor it needs or contradicts itself.
inline void check_encoder_spec(const EncoderSpec& s) {
  for (int w = 0; w < kEncoderWeightCount; ++w) {
    if (w >= kRelativeBias) continue;
    const bool optional = w == kProjectionWeight || w == kProjectionBias;
    if (s.places[w] < 0 && (!optional || s.hidden != s.embedding)) {
      spec_detail::refuse("an encoder lacks the weight " +
                          spec_detail::quoted(kEncoderWeightNames[w]));
    }
  }
  if (s.has(kProjectionWeight) != s.has(kProjectionBias)) {
    spec_detail::refuse("an encoder's projection must have a weight and a bias");
  }
  for (int p = 0; p < kLayerProducts; ++p) {
    const auto product = static_cast<LayerProduct>(p);
    if (s.has(narrow_scale(product)) != s.narrow(product) ||
        s.has(input_scale(product)) != s.narrow(product)) {
      spec_detail::refuse("an encoder's product must have all of its e4m3 tensors or none");
    }
    for (const int64_t layer : s.floats[p]) {
      if (layer >= s.layers || !s.narrow(product)) {
        spec_detail::refuse(std::string("an encoder's floats name a product that is not there: ") +
                            kLayerProductNames[p] + " of layer " + std::to_string(layer));
      }
    }
  }
  if (s.hidden % s.heads != 0) {
    spec_detail::refuse("an encoder's heads must divide its hidden size " +
                        std::to_string(s.hidden) + ", are " + std::to_string(s.heads));
  }
}

// "hidden=768 embedding=768 layers=12 heads=12 intermediate=3072 activation=gelu eps=1e-12
// weights=embeddings.word,..." in any order, and where there are e4m3 weights perhaps
// "floats=up:0". Throws std::runtime_error, in words.
inline EncoderSpec parse_encoder_spec(std::string_view text) {
  using spec_detail::number_of;
  constexpr std::array kKeys{"hidden",     "embedding", "layers",  "heads", "intermediate",
                             "activation", "eps",       "weights", "floats"};
  EncoderSpec spec;
  std::array<bool, kKeys.size()> seen{};
  spec_detail::for_words(text, ' ', [&](std::string_view word) {
    const size_t at = std::min(word.find('='), word.size());
    const std::string_view key = word.substr(0, at);
    const std::string_view value = word.substr(std::min(at + 1, word.size()));
    size_t k = 0;
    while (k < kKeys.size() && key != kKeys[k]) ++k;
    if (k == kKeys.size()) {
      spec_detail::refuse("an encoder's " + spec_detail::quoted(word) + " is unknown");
    }
    if (seen[k]) spec_detail::refuse("an encoder's " + std::string(key) + " comes twice");
    seen[k] = true;
    switch (k) {
      case 0:
        spec.hidden = number_of<int64_t>(key, value, 1);
        break;
      case 1:
        spec.embedding = number_of<int64_t>(key, value, 1);
        break;
      case 2:
        spec.layers = number_of<int64_t>(key, value, 0);
        break;
      case 3:
        spec.heads = number_of<int64_t>(key, value, 1);
        break;
      case 4:
        spec.intermediate = number_of<int64_t>(key, value, 1);
        break;
      case 5:
        spec.activation = activation_named(value);
        break;
      case 6:
        spec.eps = number_of<double>(key, value, 0);
        break;
      case 7:
        spec_detail::place_weights(value, &spec);
        break;
      default:
        spec_detail::place_floats(value, &spec);
    }
  });
  for (size_t k = 0; k + 1 < kKeys.size(); ++k) {
    if (!seen[k]) spec_detail::refuse(std::string("an encoder lacks its ") + kKeys[k]);
  }
  check_encoder_spec(spec);
  return spec;
}

// "batch_invariant few_tokens=0", blanks between; a word alone stands for word=1.
inline EncoderOptions parse_encoder_options(std::string_view text) {
  EncoderOptions options;
  spec_detail::for_words(text, ' ', [&](std::string_view word) {
    const size_t at = std::min(word.find('='), word.size());
    const std::string_view key = word.substr(0, at);
    const bool on = at == word.size() || spec_detail::switch_of(key, word.substr(at + 1));
    if (key == "batch_invariant") {
      options.batch_invariant = on;
    } else if (key == "few_tokens") {
      options.few_tokens = on;
    } else {
      spec_detail::refuse("an encoder's option " + spec_detail::quoted(word) + " is unknown");
    }
  });
  return options;
}

}  // namespace ft
