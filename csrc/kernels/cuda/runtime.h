// What launchers share: device properties read once, sticky options, and words for failures.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "kernels/cuda/kernels.h"

namespace ft::cuda {

// Properties of one device; they never change while the process lives.
struct DeviceProperties {
  int index = -1;
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  std::string name;
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
