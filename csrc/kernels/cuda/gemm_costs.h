// Written by scripts/gemm_costs.py from h100-gemm-plans.json and h200-gemm-plans.json
// in benchmarks/results/; do not edit.
#pragma once

#include <array>
#include <string_view>

#include "kernels/cuda/gemm_sm90.h"

// clang-format off
namespace ft::cuda {

inline constexpr std::array<std::string_view, 14> kCostedTiles{
  "norm ping-pong 128x128",
  "norm ping-pong 128x192",
  "norm ping-pong 64x128",
  "norm ping-pong 64x192",
  "norm ping-pong 64x256",
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
  AfterCost after;
  std::array<LibraryCost, kLibraryKinds.size()> library;
};

inline constexpr std::array<GemmCosts, 2> kGemmCosts{{
  {"NVIDIA H100",
   {{  // fixed, round, tokens, block, heavy, gelu
     {1.5f, 2.83f, 0.0f, 0.321f, 0.0534f, 0.0f},  // norm ping-pong 128x128
     {2.13f, 3.42f, 0.0f, 0.468f, 0.0672f, 0.0f},  // norm ping-pong 128x192
     {2.4f, 0.954f, 0.0f, 0.198f, 0.0914f, 0.0f},  // norm ping-pong 64x128
     {1.58f, 1.64f, 0.0f, 0.276f, 0.112f, 0.0f},  // norm ping-pong 64x192
     {1.6f, 1.58f, 0.0f, 0.402f, 0.0863f, 0.0f},  // norm ping-pong 64x256
     {2.58f, 0.234f, 0.0f, 0.386f, 0.049f, 0.631f},  // ping-pong 128x128
     {2.89f, 0.394f, 0.0f, 0.541f, 0.0331f, 1.03f},  // ping-pong 128x192
     {2.88f, 0.115f, 0.0f, 0.556f, 0.042f, 0.989f},  // ping-pong 128x192 alone
     {2.2f, 0.159f, 0.0f, 0.258f, 0.163f, 0.382f},  // ping-pong 64x128
     {2.59f, 0.257f, 0.304f, 0.768f, 0.0792f, 0.522f},  // tall
     {1.64f, 0.0f, 2.78f, 0.645f, 0.106f, 0.0f},  // tall norm
     {1.79f, 0.924f, 0.0f, 0.362f, 0.0981f, 0.613f},  // together 128x128
     {0.0f, 3.84f, 0.0f, 0.383f, 0.39f, 0.271f},  // together 128x128 / 2
     {0.0f, 4.18f, 0.0f, 0.355f, 3.59f, 0.102f},  // together 128x128 / 4
   }},
   {1.06f, 1.2f, 1.62f, 1.54f, 0.709f, 1.8f},  // tile, split, tall, element, more, partial
   {{  // fixed, gflop, more, element
     {5.15f, 1.34f, 0.674f, 1.33f},  // cublaslt + activation
     {3.98f, 1.38f, 0.27f, 0.499f},  // cublaslt
     {6.02f, 1.72f, 0.42f, 1.91f},  // cublaslt + norm
     {9.33f, 1.52f, 0.421f, 0.0f},  // cublaslt + norm, large K
   }}},
  {"NVIDIA H200",
   {{  // fixed, round, tokens, block, heavy, gelu
     {2.6f, 2.5f, 0.0f, 0.292f, 0.032f, 0.0f},  // norm ping-pong 128x128
     {0.0f, 3.8f, 0.0f, 0.467f, 0.164f, 0.0f},  // norm ping-pong 128x192
     {1.8f, 1.2f, 0.0f, 0.207f, 0.158f, 0.0f},  // norm ping-pong 64x128
     {2.6f, 1.2f, 0.0f, 0.237f, 0.287f, 0.0f},  // norm ping-pong 64x192
     {1.5f, 2.9f, 0.0f, 0.319f, 0.097f, 0.0f},  // norm ping-pong 64x256
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
   {{  // fixed, gflop, more, element
     {5.0f, 0.81f, 0.38f, 2.1f},  // cublaslt + activation
     {5.0f, 1.42f, 0.24f, 0.0f},  // cublaslt
     {7.8f, 0.32f, 0.89f, 3.2f},  // cublaslt + norm
     {9.8f, 1.53f, 0.63f, 0.0f},  // cublaslt + norm, large K
   }}},
}};

}  // namespace ft::cuda
