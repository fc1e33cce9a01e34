#include "kernels/cuda/runtime.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace ft::cuda {
namespace {

thread_local std::string failure;

}  // namespace

cudaError_t current_device(const DeviceProperties** properties) {
  static PerDevice<DeviceProperties> known;
  int index = 0;
  if (cudaError_t status = cudaGetDevice(&index); status != cudaSuccess) return status;
  return known.get(index, properties, [&](DeviceProperties& device) {
    const cudaError_t status = cudaGetDeviceProperties(&device.all, index);
    device.major = device.all.major;
    device.minor = device.all.minor;
    device.multiprocessors = device.all.multiProcessorCount;
    device.index = index;
    return status;
  });
}

std::optional<bool> environment_switch(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return std::strcmp(value, "0") != 0;
}

bool tf32_allowed() {
  static const bool allowed = environment_switch("FT_HANDLER_TF32").value_or(false);
  return allowed;
}

bool batch_invariant(bool asked) {
  static const std::optional<bool> forced = environment_switch("FT_HANDLER_BATCH_INVARIANT");
  return forced.value_or(asked);
}

bool few_tokens_allowed(bool asked) {
  static const std::optional<bool> forced = environment_switch("FT_HANDLER_SMALL");
  return forced.value_or(asked);
}

void set_failure(std::string words) { failure = std::move(words); }

std::string take_failure() { return std::exchange(failure, {}); }

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kE4M3:
      return "float8_e4m3fn";
    case DType::kInt8:
      break;
  }
  return "unknown";
}

}  // namespace ft::cuda
