// What the text of an encoder's specification and options may say, and in which words it is
// refused.
#include "kernels/encoder_spec.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED %s\n", what);
  std::exit(1);
}

void refused(const std::function<void()>& call, const std::string& words) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    const std::string said = error.what();
    if (said.find(words) != std::string::npos &&
        said.find("install the ft_handler that matches") != std::string::npos) {
      return;
    }
    std::printf("FAILED \"%s\" should say \"%s\"\n", said.c_str(), words.c_str());
    std::exit(1);
  }
  std::printf("FAILED: not refused, should say \"%s\"\n", words.c_str());
  std::exit(1);
}

const std::string kSizes =
    "hidden=64 embedding=64 layers=2 heads=2 intermediate=100 activation=gelu eps=1e-12 ";

std::string weights(bool projection, bool bias = false, bool narrow = false) {
  std::string names = "weights=";
  for (int w = 0; w < ft::kEncoderWeightCount; ++w) {
    if (!projection && (w == ft::kProjectionWeight || w == ft::kProjectionBias)) continue;
    if (!bias && w == ft::kRelativeBias) continue;
    if (!narrow && w >= ft::kQkvNarrow) continue;
    names += (names.back() == '=' ? "" : ",") + std::string(ft::kEncoderWeightNames[w]);
  }
  return names;
}

std::string changed(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  require(at != std::string::npos, "a case of this test");
  return text.replace(at, from.size(), to);
}

void test_spec() {
  const std::string whole = kSizes + weights(false);
  const ft::EncoderSpec spec = ft::parse_encoder_spec(whole);
  require(spec.hidden == 64 && spec.embedding == 64 && spec.layers == 2 && spec.heads == 2 &&
              spec.intermediate == 100 && spec.eps == 1e-12 &&
              spec.activation == ft::Activation::kGelu,
          "sizes");
  require(spec.tensors == 17 && spec.places[ft::kWord] == 0 && spec.places[ft::kQkvWeight] == 5 &&
              spec.places[ft::kNorm2Beta] == 16 && !spec.projects(),
          "places");
  const ft::EncoderSpec turned = ft::parse_encoder_spec(
      changed(whole, "embeddings.word,embeddings.position", "embeddings.position,embeddings.word") +
      "  ");
  require(turned.places[ft::kWord] == 1 && turned.places[ft::kPosition] == 0, "another order");
  const std::string narrow = changed(kSizes, "embedding=64", "embedding=16");
  require(ft::parse_encoder_spec(narrow + weights(true)).projects(), "a projection");
  require(
      ft::shape_of(ft::parse_encoder_spec(narrow + weights(true)), ft::kProjectionWeight).columns ==
          16,
      "a projection's shape");

  const ft::EncoderSpec biased = ft::parse_encoder_spec(kSizes + weights(false, true));
  require(biased.biased() && biased.places[ft::kRelativeBias] == 17 && !spec.biased(),
          "a relative bias");
  require(ft::shape_of(biased, ft::kRelativeBias).rows == 2 &&
              ft::shape_of(biased, ft::kRelativeBias).columns == -1,
          "a relative bias's shape");
  const auto activates = [&](const std::string& name) {
    return ft::parse_encoder_spec(changed(whole, "=gelu", "=" + name)).activation;
  };
  require(activates("gelu_tanh") == ft::Activation::kGeluTanh &&
              activates("relu") == ft::Activation::kRelu &&
              activates("silu") == ft::Activation::kSilu && activates("") == ft::Activation::kNone,
          "activations");

  const auto refuse = [&](const std::string& from, const std::string& to,
                          const std::string& words) {
    refused([&] { ft::parse_encoder_spec(changed(whole, from, to)); }, words);
  };
  refuse("eps=1e-12", "eps=1e-12 rotary=1", "\"rotary=1\" is unknown");
  refuse("eps=1e-12", "eps=1e-12 eps=1e-12", "eps comes twice");
  refuse("eps=1e-12 ", "", "lacks its eps");
  refuse("eps=1e-12", "eps=tiny", "eps must be a number");
  refuse("activation=gelu", "activation=mish",
         "gelu_tanh, relu, silu or none (an empty name), is \"mish\"");
  refuse("hidden=64", "hidden=0", "hidden must be a number of 1 to 1048576, is \"0\"");
  refuse("hidden=64", "hidden=64x", "is \"64x\"");
  refuse("hidden=64", "hidden=99999999999999999999", "hidden must be a number");
  refuse("hidden=64", "hidden=32", "lacks the weight \"embeddings.projection.weight\"");
  refuse("heads=2", "heads=3", "heads must divide its hidden size 64, are 3");
  refuse("layers.up.bias", "layers.gate.bias", "weight \"layers.gate.bias\" is unknown");
  refuse("layers.up.bias", "layers.up.weight", "weight \"layers.up.weight\" comes twice");
  refuse(",layers.up.bias", "", "lacks the weight \"layers.up.bias\"");
  refuse("layers.up.bias", "layers.up.bias,embeddings.projection.bias",
         "projection must have a weight and a bias");
  refused([] { ft::parse_encoder_spec(""); }, "lacks its hidden");
}

void test_narrow() {
  const std::string whole = kSizes + weights(false, false, true);
  const ft::EncoderSpec spec = ft::parse_encoder_spec(whole + " floats=qkv:1;down:0,1");
  require(spec.narrow() && spec.tensors == 29 && spec.floats[ft::kQkv] == std::vector<int64_t>{1} &&
              spec.floats[ft::kDown] == std::vector<int64_t>{0, 1} && spec.floats[ft::kUp].empty(),
          "products that do without e4m3");
  require(
      ft::kEncoderWeightNames[ft::narrow_weight(ft::kDown)] == std::string("layers.down.narrow") &&
          ft::kEncoderWeightNames[ft::narrow_scale(ft::kUp)] ==
              std::string("layers.up.narrow_scale") &&
          ft::kEncoderWeightNames[ft::input_scale(ft::kOut)] ==
              std::string("layers.out.input_scale"),
      "names of e4m3 tensors");
  const auto shape = [&](ft::EncoderWeight weight) { return ft::shape_of(spec, weight); };
  require(shape(ft::kDownNarrow).rows == 64 && shape(ft::kDownNarrow).columns == 100 &&
              shape(ft::kQkvNarrowScale).rows == 192 && shape(ft::kQkvNarrowScale).columns == 0 &&
              shape(ft::kUpInputScale).stacked && shape(ft::kUpInputScale).rows == 0,
          "shapes of e4m3 tensors");
  require(!ft::parse_encoder_spec(kSizes + weights(false)).narrow(), "none in e4m3");
  const std::string up = "layers.up.narrow,layers.up.narrow_scale,layers.up.input_scale";
  const ft::EncoderSpec three = ft::parse_encoder_spec(changed(whole, "," + up, ""));
  require(three.narrow() && !three.narrow(ft::kUp) && three.narrow(ft::kDown),
          "a product without e4m3");
  const auto refuse = [&](const std::string& text, const std::string& words) {
    refused([&] { ft::parse_encoder_spec(text); }, words);
  };
  refuse(changed(whole, ",layers.up.input_scale", ""), "all of its e4m3 tensors or none");
  refuse(whole + " floats=gate:0", "floats \"gate:0\" are unknown");
  refuse(whole + " floats=up:", "floats \"up:\" are unknown");
  refuse(whole + " floats=up:2", "is not there: up of layer 2");
  refuse(whole + " floats=up:x", "floats must be a number");
  refuse(kSizes + weights(false) + " floats=up:0", "is not there: up of layer 0");
}

void test_options() {
  require(!ft::parse_encoder_options("").batch_invariant, "the default");
  require(ft::parse_encoder_options("").few_tokens, "the default");
  require(ft::parse_encoder_options("batch_invariant").batch_invariant, "a word alone");
  require(!ft::parse_encoder_options("few_tokens=0 batch_invariant=0").few_tokens, "two words");
  refused([] { ft::parse_encoder_options("quick"); }, "option \"quick\" is unknown");
  refused([] { ft::parse_encoder_options("few_tokens=no"); }, "few_tokens must be 0 or 1");
}

}  // namespace

int main() {
  test_spec();
  test_narrow();
  test_options();
  std::printf("ok encoder_spec\n");
  return 0;
}
