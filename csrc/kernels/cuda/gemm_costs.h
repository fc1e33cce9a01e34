// Written by scripts/gemm_costs.py from h100-gemm-plans.json and h200-gemm-plans.json
// in benchmarks/results/; do not edit.
#pragma once

#include <array>
#include <string_view>

#include "kernels/cuda/gemm_sm90.h"

// clang-format off
namespace ft::cuda {

inline constexpr std::array<std::string_view, 27> kCostedTiles{
  "fp8 norm ping-pong 128x128",
  "fp8 norm ping-pong 128x192",
  "fp8 norm ping-pong 64x128",
  "fp8 norm ping-pong 64x192",
  "fp8 norm ping-pong 64x256",
  "fp8 norm trio 64x192",
  "fp8 ping-pong 128x128",
  "fp8 ping-pong 128x192",
  "fp8 ping-pong 128x192 alone",
  "fp8 ping-pong 64x128",
  "fp8 together 128x128",
  "fp8 trio 128x128",
  "norm ping-pong 128x128",
  "norm ping-pong 128x192",
  "norm ping-pong 64x128",
  "norm ping-pong 64x192",
  "norm ping-pong 64x256",
  "norm trio 64x192",
  "ping-pong 128x128",
  "ping-pong 128x192",
  "ping-pong 128x192 alone",
  "ping-pong 64x128",
  "tall",
  "tall norm",
  "together 128x128",
  "together 128x128 / 2",
  "together 128x128 / 4",
};

inline constexpr std::array<std::string_view, 4> kLibraryKinds{
  "cublaslt + activation",
  "cublaslt",
  "cublaslt + norm",
  "cublaslt + norm, large K",
};

struct GemmCosts {
  std::string_view gpu;  // what the names of its cards begin with
  std::array<TileCost, kCostedTiles.size()> tiles;
  AfterCost after, narrow_after;
  std::array<LibraryCost, kLibraryKinds.size()> library;
};

inline constexpr std::array<GemmCosts, 2> kGemmCosts{{
  {"NVIDIA H100",
   {{  // fixed, round, tokens, block, heavy, gelu
     {2.09f, 3.21f, 0.0f, 0.299f, 0.0587f, 0.0f},  // fp8 norm ping-pong 128x128
     {1.99f, 5.89f, 0.0f, 0.406f, 0.00882f, 0.0f},  // fp8 norm ping-pong 128x192
     {1.74f, 1.79f, 0.0f, 0.177f, 0.03f, 0.0f},  // fp8 norm ping-pong 64x128
     {1.31f, 2.59f, 0.0f, 0.256f, 0.0701f, 0.0f},  // fp8 norm ping-pong 64x192
     {1.79f, 2.97f, 0.0f, 0.343f, 0.127f, 0.0f},  // fp8 norm ping-pong 64x256
     {1.8f, 2.23f, 0.0f, 0.251f, 0.092f, 0.0f},  // fp8 norm trio 64x192
     {2.69f, 0.435f, 0.0f, 0.349f, 0.0699f, 0.546f},  // fp8 ping-pong 128x128
     {2.96f, 0.747f, 0.0f, 0.492f, 0.0653f, 0.72f},  // fp8 ping-pong 128x192
     {2.91f, 0.601f, 0.0f, 0.504f, 0.0539f, 0.865f},  // fp8 ping-pong 128x192 alone
     {2.09f, 0.291f, 0.0f, 0.244f, 0.0471f, 0.233f},  // fp8 ping-pong 64x128
     {1.84f, 1.1f, 0.0f, 0.346f, 0.0711f, 0.547f},  // fp8 together 128x128
     {3.29f, 0.465f, 0.0f, 0.3f, 0.0639f, 0.465f},  // fp8 trio 128x128
     {2.32f, 2.37f, 0.0f, 0.316f, 0.0553f, 0.0f},  // norm ping-pong 128x128
     {2.95f, 2.88f, 0.0f, 0.492f, 0.0508f, 0.0f},  // norm ping-pong 128x192
     {2.1f, 1.13f, 0.0f, 0.183f, 0.0991f, 0.0f},  // norm ping-pong 64x128
     {1.64f, 1.53f, 0.0f, 0.257f, 0.173f, 0.0f},  // norm ping-pong 64x192
     {1.53f, 1.42f, 0.0f, 0.405f, 0.0878f, 0.0f},  // norm ping-pong 64x256
     {1.58f, 1.56f, 0.0f, 0.262f, 0.135f, 0.0f},  // norm trio 64x192
     {2.51f, 0.126f, 0.0f, 0.385f, 0.0346f, 0.685f},  // ping-pong 128x128
     {2.84f, 0.221f, 0.0f, 0.548f, 0.0311f, 1.24f},  // ping-pong 128x192
     {2.97f, 0.0f, 0.0f, 0.553f, 0.0559f, 1.01f},  // ping-pong 128x192 alone
     {1.97f, 0.262f, 0.0f, 0.24f, 0.245f, 0.363f},  // ping-pong 64x128
     {2.39f, 0.0f, 0.416f, 0.753f, 0.0877f, 0.556f},  // tall
     {1.37f, 0.0f, 3.05f, 0.575f, 0.14f, 0.0f},  // tall norm
     {1.78f, 0.884f, 0.0f, 0.363f, 0.0891f, 0.576f},  // together 128x128
     {0.0925f, 3.7f, 0.0f, 0.381f, 0.34f, 0.318f},  // together 128x128 / 2
     {0.0128f, 4.15f, 0.0f, 0.376f, 1.77f, 0.0981f},  // together 128x128 / 4
   }},
   {1.22f, 1.14f, 1.51f, 1.65f, 0.858f, 2.2f},  // tile, split, tall, element, more, partial
   {1.21f, 0.0f, 0.0f, 2.02f, 0.801f, 0.0f},  // of e4m3 operands
   {{  // fixed, gflop, more, element
     {5.14f, 1.36f, 0.682f, 1.32f},  // cublaslt + activation
     {3.99f, 1.4f, 0.282f, 0.474f},  // cublaslt
     {6.05f, 1.84f, 0.455f, 1.96f},  // cublaslt + norm
     {9.38f, 1.56f, 0.474f, 0.0f},  // cublaslt + norm, large K
   }}},
  {"NVIDIA H200",
   {{  // fixed, round, tokens, block, heavy, gelu
     {2.09f, 3.21f, 0.0f, 0.299f, 0.0587f, 0.0f},  // fp8 norm ping-pong 128x128
     {1.99f, 5.89f, 0.0f, 0.406f, 0.00882f, 0.0f},  // fp8 norm ping-pong 128x192
     {1.74f, 1.79f, 0.0f, 0.177f, 0.03f, 0.0f},  // fp8 norm ping-pong 64x128
     {1.31f, 2.59f, 0.0f, 0.256f, 0.0701f, 0.0f},  // fp8 norm ping-pong 64x192
     {1.79f, 2.97f, 0.0f, 0.343f, 0.127f, 0.0f},  // fp8 norm ping-pong 64x256
     {1.8f, 2.23f, 0.0f, 0.251f, 0.092f, 0.0f},  // fp8 norm trio 64x192
     {2.69f, 0.435f, 0.0f, 0.349f, 0.0699f, 0.546f},  // fp8 ping-pong 128x128
     {2.96f, 0.747f, 0.0f, 0.492f, 0.0653f, 0.72f},  // fp8 ping-pong 128x192
     {2.91f, 0.601f, 0.0f, 0.504f, 0.0539f, 0.865f},  // fp8 ping-pong 128x192 alone
     {2.09f, 0.291f, 0.0f, 0.244f, 0.0471f, 0.233f},  // fp8 ping-pong 64x128
     {1.84f, 1.1f, 0.0f, 0.346f, 0.0711f, 0.547f},  // fp8 together 128x128
     {3.29f, 0.465f, 0.0f, 0.3f, 0.0639f, 0.465f},  // fp8 trio 128x128
     {2.6f, 2.5f, 0.0f, 0.292f, 0.032f, 0.0f},  // norm ping-pong 128x128
     {0.0f, 3.8f, 0.0f, 0.467f, 0.164f, 0.0f},  // norm ping-pong 128x192
     {1.8f, 1.2f, 0.0f, 0.207f, 0.158f, 0.0f},  // norm ping-pong 64x128
     {2.6f, 1.2f, 0.0f, 0.237f, 0.287f, 0.0f},  // norm ping-pong 64x192
     {1.5f, 2.9f, 0.0f, 0.319f, 0.097f, 0.0f},  // norm ping-pong 64x256
     {1.58f, 1.56f, 0.0f, 0.262f, 0.135f, 0.0f},  // norm trio 64x192
     {2.1f, 0.8f, 0.0f, 0.341f, 0.084f, 0.46f},  // ping-pong 128x128
     {3.0f, 0.1f, 0.0f, 0.521f, 0.026f, 1.3f},  // ping-pong 128x192
     {3.4f, 0.3f, 0.0f, 0.485f, 0.057f, 0.88f},  // ping-pong 128x192 alone
     {2.1f, 0.43f, 0.0f, 0.201f, 0.071f, 0.62f},  // ping-pong 64x128
     {2.3f, 0.76f, 0.095f, 0.684f, 0.154f, 0.55f},  // tall
     {2.3f, 1.7f, 1.0f, 0.684f, 0.154f, 0.0f},  // tall norm
     {1.4f, 1.3f, 0.0f, 0.306f, 0.116f, 1.3f},  // together 128x128
     {0.0f, 3.9f, 0.0f, 0.368f, 0.0f, 0.3f},  // together 128x128 / 2
     {0.0f, 4.2f, 0.0f, 0.385f, 0.0f, 0.2f},  // together 128x128 / 4
   }},
   {2.5f, 1.4f, 1.2f, 1.4f, 0.8f, 1.7f},  // tile, split, tall, element, more, partial
   {1.21f, 0.0f, 0.0f, 2.02f, 0.801f, 0.0f},  // of e4m3 operands
   {{  // fixed, gflop, more, element
     {5.0f, 0.81f, 0.38f, 2.1f},  // cublaslt + activation
     {5.0f, 1.42f, 0.24f, 0.0f},  // cublaslt
     {7.8f, 0.32f, 0.89f, 3.2f},  // cublaslt + norm
     {9.8f, 1.53f, 0.63f, 0.0f},  // cublaslt + norm, large K
   }}},
}};

}  // namespace ft::cuda
