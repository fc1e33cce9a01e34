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
     {2.51f, 3.2f, 0.0f, 0.3f, 0.0637f, 0.0f},  // fp8 norm ping-pong 128x128
     {1.93f, 5.22f, 0.0f, 0.43f, 0.0123f, 0.0f},  // fp8 norm ping-pong 128x192
     {1.73f, 2.08f, 0.0f, 0.181f, 0.00936f, 0.0f},  // fp8 norm ping-pong 64x128
     {1.31f, 2.93f, 0.0f, 0.265f, 0.0619f, 0.0f},  // fp8 norm ping-pong 64x192
     {1.76f, 3.37f, 0.0f, 0.359f, 0.094f, 0.0f},  // fp8 norm ping-pong 64x256
     {1.31f, 2.93f, 0.0f, 0.265f, 0.0619f, 0.0f},  // fp8 norm trio 64x192
     {2.69f, 0.359f, 0.0f, 0.369f, 0.0543f, 0.696f},  // fp8 ping-pong 128x128
     {3.14f, 0.547f, 0.0f, 0.52f, 0.0418f, 1.15f},  // fp8 ping-pong 128x192
     {3.24f, 0.411f, 0.0f, 0.524f, 0.0528f, 1.17f},  // fp8 ping-pong 128x192 alone
     {2.18f, 0.26f, 0.0f, 0.252f, 0.0275f, 0.233f},  // fp8 ping-pong 64x128
     {2.01f, 1.0f, 0.0f, 0.344f, 0.0707f, 0.674f},  // fp8 together 128x128
     {2.69f, 0.359f, 0.0f, 0.369f, 0.0543f, 0.696f},  // fp8 trio 128x128
     {1.36f, 2.99f, 0.0f, 0.322f, 0.0575f, 0.0f},  // norm ping-pong 128x128
     {2.39f, 3.16f, 0.0f, 0.476f, 0.0738f, 0.0f},  // norm ping-pong 128x192
     {2.18f, 1.0f, 0.0f, 0.2f, 0.0887f, 0.0f},  // norm ping-pong 64x128
     {1.52f, 1.66f, 0.0f, 0.279f, 0.11f, 0.0f},  // norm ping-pong 64x192
     {1.54f, 1.52f, 0.0f, 0.412f, 0.0822f, 0.0f},  // norm ping-pong 64x256
     {1.52f, 1.66f, 0.0f, 0.279f, 0.11f, 0.0f},  // norm trio 64x192
     {2.43f, 0.299f, 0.0f, 0.39f, 0.0537f, 0.58f},  // ping-pong 128x128
     {2.87f, 0.336f, 0.0f, 0.551f, 0.0396f, 1.03f},  // ping-pong 128x192
     {2.98f, 0.000495f, 0.0f, 0.562f, 0.0574f, 0.877f},  // ping-pong 128x192 alone
     {2.02f, 0.185f, 0.0f, 0.262f, 0.147f, 0.376f},  // ping-pong 64x128
     {2.47f, 0.314f, 0.312f, 0.771f, 0.094f, 0.497f},  // tall
     {1.59f, 0.0f, 2.88f, 0.644f, 0.122f, 0.0f},  // tall norm
     {1.66f, 1.01f, 0.0f, 0.363f, 0.097f, 0.621f},  // together 128x128
     {0.0f, 3.85f, 0.0f, 0.385f, 0.261f, 0.251f},  // together 128x128 / 2
     {0.0f, 4.15f, 0.0f, 0.358f, 2.98f, 0.123f},  // together 128x128 / 4
   }},
   {1.17f, 1.19f, 1.66f, 1.51f, 0.725f, 1.84f},  // tile, split, tall, element, more, partial
   {1.08f, 0.0f, 0.0f, 2.01f, 0.884f, 0.0f},  // of e4m3 operands
   {{  // fixed, gflop, more, element
     {5.13f, 1.38f, 0.702f, 1.3f},  // cublaslt + activation
     {3.98f, 1.41f, 0.35f, 0.468f},  // cublaslt
     {6.01f, 1.76f, 0.492f, 1.88f},  // cublaslt + norm
     {9.28f, 1.54f, 0.459f, 0.0f},  // cublaslt + norm, large K
   }}},
  {"NVIDIA H200",
   {{  // fixed, round, tokens, block, heavy, gelu
     {2.51f, 3.2f, 0.0f, 0.3f, 0.0637f, 0.0f},  // fp8 norm ping-pong 128x128
     {1.93f, 5.22f, 0.0f, 0.43f, 0.0123f, 0.0f},  // fp8 norm ping-pong 128x192
     {1.73f, 2.08f, 0.0f, 0.181f, 0.00936f, 0.0f},  // fp8 norm ping-pong 64x128
     {1.31f, 2.93f, 0.0f, 0.265f, 0.0619f, 0.0f},  // fp8 norm ping-pong 64x192
     {1.76f, 3.37f, 0.0f, 0.359f, 0.094f, 0.0f},  // fp8 norm ping-pong 64x256
     {1.31f, 2.93f, 0.0f, 0.265f, 0.0619f, 0.0f},  // fp8 norm trio 64x192
     {2.69f, 0.359f, 0.0f, 0.369f, 0.0543f, 0.696f},  // fp8 ping-pong 128x128
     {3.14f, 0.547f, 0.0f, 0.52f, 0.0418f, 1.15f},  // fp8 ping-pong 128x192
     {3.24f, 0.411f, 0.0f, 0.524f, 0.0528f, 1.17f},  // fp8 ping-pong 128x192 alone
     {2.18f, 0.26f, 0.0f, 0.252f, 0.0275f, 0.233f},  // fp8 ping-pong 64x128
     {2.01f, 1.0f, 0.0f, 0.344f, 0.0707f, 0.674f},  // fp8 together 128x128
     {2.69f, 0.359f, 0.0f, 0.369f, 0.0543f, 0.696f},  // fp8 trio 128x128
     {2.6f, 2.5f, 0.0f, 0.292f, 0.032f, 0.0f},  // norm ping-pong 128x128
     {0.0f, 3.8f, 0.0f, 0.467f, 0.164f, 0.0f},  // norm ping-pong 128x192
     {1.8f, 1.2f, 0.0f, 0.207f, 0.158f, 0.0f},  // norm ping-pong 64x128
     {2.6f, 1.2f, 0.0f, 0.237f, 0.287f, 0.0f},  // norm ping-pong 64x192
     {1.5f, 2.9f, 0.0f, 0.319f, 0.097f, 0.0f},  // norm ping-pong 64x256
     {2.6f, 1.2f, 0.0f, 0.237f, 0.287f, 0.0f},  // norm trio 64x192
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
   {1.08f, 0.0f, 0.0f, 2.01f, 0.884f, 0.0f},  // of e4m3 operands
   {{  // fixed, gflop, more, element
     {5.0f, 0.81f, 0.38f, 2.1f},  // cublaslt + activation
     {5.0f, 1.42f, 0.24f, 0.0f},  // cublaslt
     {7.8f, 0.32f, 0.89f, 3.2f},  // cublaslt + norm
     {9.8f, 1.53f, 0.63f, 0.0f},  // cublaslt + norm, large K
   }}},
}};

}  // namespace ft::cuda
