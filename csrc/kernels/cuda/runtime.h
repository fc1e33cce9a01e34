// What launchers share: device properties read once, sticky options, and words for failures.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>

#include "kernels/cuda/kernels.h"

namespace ft::cuda {

constexpr int kMaxDevices = 64;

// What a process learns of each device on its first use there. Success alone is remembered: what
// failed, while memory was full for instance, is tried again by the next call. Nothing of it is
// freed while threads may run on at exit, so a value owns no memory.
template <typename Value>
class PerDevice {
 public:
  // make(Value&) returns a cudaError_t; the caller's device is `device`.
  template <typename Make>
  cudaError_t get(int device, const Value** value, Make&& make) {
    static_assert(std::is_trivially_destructible_v<Value>);
    if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
    Slot& slot = slots_[device];
    if (!slot.ready.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> lock(slot.mutex);
      if (!slot.ready.load(std::memory_order_relaxed)) {
        Value made{};
        if (const cudaError_t status = make(made); status != cudaSuccess) {
          cudaGetLastError();  // the next caller must not take it for its own
          return status;
        }
        slot.value = made;
        slot.ready.store(true, std::memory_order_release);
      }
    }
    *value = &slot.value;
    return cudaSuccess;
  }

 private:
  struct Slot {
    std::atomic<bool> ready{false};
    std::mutex mutex;
    Value value{};
  };
  std::array<Slot, kMaxDevices> slots_;
};

// Properties of one device; they never change while the process lives.
struct DeviceProperties {
  int index = -1;
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  cudaDeviceProp all{};
};

// Properties of the calling thread's current device, read on its first use.
cudaError_t current_device(const DeviceProperties** properties);

// Whether fp32 products may run as TF32: FT_HANDLER_TF32=1 in the environment at first use.
bool tf32_allowed();

// Whether a sequence's results may not depend on what shares its batch, down to the last bit: what
// the caller asks for, unless FT_HANDLER_BATCH_INVARIANT in the environment at first use says
// otherwise. Every sum is then taken in one order, whatever the number of tokens and sequences.
bool batch_invariant(bool asked);

// Whether a few tokens may take kernels of their own: what the caller asks for, unless
// FT_HANDLER_SMALL in the environment at first use says otherwise.
bool few_tokens_allowed(bool asked);

// Whether an environment switch is on: unset gives none, "0" false, anything else true.
std::optional<bool> environment_switch(const char* name);

// What the calling thread's latest failed library call was, in words; empty when a plain CUDA error
// says it all. Taking it clears it.
void set_failure(std::string words);
std::string take_failure();

// Name as in Python: "float16".
const char* dtype_name(DType dtype);

}  // namespace ft::cuda
