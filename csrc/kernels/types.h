// What both backends' interfaces speak of: element types, operands, activations. No Torch.
#pragma once

#include <cstdint>

namespace ft {

// kInt8 is a type of packed weights on the CPU alone, kE4M3 (8 bits: sign, 4 of exponent, 3 of
// mantissa, largest 448) of products' operands on the GPU alone.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kE4M3 = 4 };

// Bytes of one element. Inlined always: a shared copy might be the one compiled for instructions
// that this processor lacks.
__attribute__((always_inline)) constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt8:
    case DType::kE4M3:
      return 1;
  }
  return 0;
}

// What follows a linear layer's bias. Gelu is the exact (erf) form, GeluTanh its approximation by a
// tanh, which is another function.
enum class Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kSilu = 4 };

// What becomes of the rows of a sequence.
enum class Pooling : int32_t { kMean = 0, kMax = 1 };

// Numbers that a kernel reads. prepare_weight chooses a weight's type; kernels look here for it.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  const float* scale = nullptr;  // of each row of a quantised weight; null for the types above
};

// The same parameter of every layer, one behind the other, or a single one that all layers share.
struct Stack {
  Operand first;
  int64_t layers = 1;
};

}  // namespace ft
