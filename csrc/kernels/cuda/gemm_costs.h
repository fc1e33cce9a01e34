// Written by scripts/gemm_costs.py from benchmarks/results/h100-gemm-plans.json,
// benchmarks/results/h200-gemm-plans.json; do not edit.
#pragma once

#include <array>
#include <string_view>

#include "kernels/cuda/gemm_sm90.h"

namespace ft::cuda {

inline constexpr std::array<std::string_view, 14> kCostedTiles{"ping-pong 128x192",
                                                               "ping-pong 128x192 alone",
                                                               "ping-pong 128x128",
                                                               "ping-pong 64x128",
                                                               "together 128x128",
                                                               "together 128x128 / 2",
                                                               "together 128x128 / 4",
                                                               "norm ping-pong 128x192",
                                                               "norm ping-pong 64x192",
                                                               "norm ping-pong 64x128",
                                                               "norm ping-pong 64x256",
                                                               "norm ping-pong 128x128",
                                                               "tall",
                                                               "tall norm"};

inline constexpr std::array<std::string_view, 4> kLibraryKinds{
    "cublaslt + activation", "cublaslt", "cublaslt + norm", "cublaslt + norm, large K"};

struct GemmCosts {
  std::string_view gpu;  // what the names of its cards begin with
  std::array<TileCost, kCostedTiles.size()> tiles;
  AfterCost after;
  std::array<LibraryCost, kLibraryKinds.size()> library;
};

inline constexpr std::array<GemmCosts, 2> kGemmCosts{{
    {"NVIDIA H100",
     {{
         // ping-pong 128x192
         {.fixed = 3.0f,
          .round = 0.1f,
          .tokens = 0.0f,
          .block = 0.521f,
          .heavy = 0.026f,
          .gelu = 1.3f},
         // ping-pong 128x192 alone
         {.fixed = 3.4f,
          .round = 0.3f,
          .tokens = 0.0f,
          .block = 0.485f,
          .heavy = 0.057f,
          .gelu = 0.88f},
         // ping-pong 128x128
         {.fixed = 2.1f,
          .round = 0.8f,
          .tokens = 0.0f,
          .block = 0.341f,
          .heavy = 0.084f,
          .gelu = 0.46f},
         // ping-pong 64x128
         {.fixed = 2.1f,
          .round = 0.43f,
          .tokens = 0.0f,
          .block = 0.201f,
          .heavy = 0.071f,
          .gelu = 0.62f},
         // together 128x128
         {.fixed = 1.4f,
          .round = 1.3f,
          .tokens = 0.0f,
          .block = 0.306f,
          .heavy = 0.116f,
          .gelu = 1.3f},
         // together 128x128 / 2
         {.fixed = 0.0f,
          .round = 3.9f,
          .tokens = 0.0f,
          .block = 0.368f,
          .heavy = 0.0f,
          .gelu = 0.3f},
         // together 128x128 / 4
         {.fixed = 0.0f,
          .round = 4.2f,
          .tokens = 0.0f,
          .block = 0.385f,
          .heavy = 0.0f,
          .gelu = 0.2f},
         // norm ping-pong 128x192
         {.fixed = 0.0f,
          .round = 3.8f,
          .tokens = 0.0f,
          .block = 0.467f,
          .heavy = 0.164f,
          .gelu = 0.0f},
         // norm ping-pong 64x192
         {.fixed = 2.6f,
          .round = 1.2f,
          .tokens = 0.0f,
          .block = 0.237f,
          .heavy = 0.287f,
          .gelu = 0.0f},
         // norm ping-pong 64x128
         {.fixed = 1.8f,
          .round = 1.2f,
          .tokens = 0.0f,
          .block = 0.207f,
          .heavy = 0.158f,
          .gelu = 0.0f},
         // norm ping-pong 64x256
         {.fixed = 1.5f,
          .round = 2.9f,
          .tokens = 0.0f,
          .block = 0.319f,
          .heavy = 0.097f,
          .gelu = 0.0f},
         // norm ping-pong 128x128
         {.fixed = 2.6f,
          .round = 2.5f,
          .tokens = 0.0f,
          .block = 0.292f,
          .heavy = 0.032f,
          .gelu = 0.0f},
         // tall
         {.fixed = 2.3f,
          .round = 0.76f,
          .tokens = 0.095f,
          .block = 0.684f,
          .heavy = 0.154f,
          .gelu = 0.55f},
         // tall norm
         {.fixed = 2.3f,
          .round = 1.7f,
          .tokens = 1.0f,
          .block = 0.684f,
          .heavy = 0.154f,
          .gelu = 0.0f},
     }},
     {.tile = 2.5f, .split = 1.4f, .tall = 1.2f, .element = 1.4f, .more = 0.8f, .partial = 1.7f},
     {{
         // cublaslt + activation
         {.fixed = 5.0f, .gflop = 0.81f, .more = 0.38f, .element = 2.1f},
         // cublaslt
         {.fixed = 5.0f, .gflop = 1.42f, .more = 0.24f, .element = 0.0f},
         // cublaslt + norm
         {.fixed = 7.8f, .gflop = 0.32f, .more = 0.89f, .element = 3.2f},
         // cublaslt + norm, large K
         {.fixed = 9.8f, .gflop = 1.53f, .more = 0.63f, .element = 0.0f},
     }}},
    {"NVIDIA H200",
     {{
         // ping-pong 128x192
         {.fixed = 3.0f,
          .round = 0.1f,
          .tokens = 0.0f,
          .block = 0.521f,
          .heavy = 0.026f,
          .gelu = 1.3f},
         // ping-pong 128x192 alone
         {.fixed = 3.4f,
          .round = 0.3f,
          .tokens = 0.0f,
          .block = 0.485f,
          .heavy = 0.057f,
          .gelu = 0.88f},
         // ping-pong 128x128
         {.fixed = 2.1f,
          .round = 0.8f,
          .tokens = 0.0f,
          .block = 0.341f,
          .heavy = 0.084f,
          .gelu = 0.46f},
         // ping-pong 64x128
         {.fixed = 2.1f,
          .round = 0.43f,
          .tokens = 0.0f,
          .block = 0.201f,
          .heavy = 0.071f,
          .gelu = 0.62f},
         // together 128x128
         {.fixed = 1.4f,
          .round = 1.3f,
          .tokens = 0.0f,
          .block = 0.306f,
          .heavy = 0.116f,
          .gelu = 1.3f},
         // together 128x128 / 2
         {.fixed = 0.0f,
          .round = 3.9f,
          .tokens = 0.0f,
          .block = 0.368f,
          .heavy = 0.0f,
          .gelu = 0.3f},
         // together 128x128 / 4
         {.fixed = 0.0f,
          .round = 4.2f,
          .tokens = 0.0f,
          .block = 0.385f,
          .heavy = 0.0f,
          .gelu = 0.2f},
         // norm ping-pong 128x192
         {.fixed = 0.0f,
          .round = 3.8f,
          .tokens = 0.0f,
          .block = 0.467f,
          .heavy = 0.164f,
          .gelu = 0.0f},
         // norm ping-pong 64x192
         {.fixed = 2.6f,
          .round = 1.2f,
          .tokens = 0.0f,
          .block = 0.237f,
          .heavy = 0.287f,
          .gelu = 0.0f},
         // norm ping-pong 64x128
         {.fixed = 1.8f,
          .round = 1.2f,
          .tokens = 0.0f,
          .block = 0.207f,
          .heavy = 0.158f,
          .gelu = 0.0f},
         // norm ping-pong 64x256
         {.fixed = 1.5f,
          .round = 2.9f,
          .tokens = 0.0f,
          .block = 0.319f,
          .heavy = 0.097f,
          .gelu = 0.0f},
         // norm ping-pong 128x128
         {.fixed = 2.6f,
          .round = 2.5f,
          .tokens = 0.0f,
          .block = 0.292f,
          .heavy = 0.032f,
          .gelu = 0.0f},
         // tall
         {.fixed = 2.3f,
          .round = 0.76f,
          .tokens = 0.095f,
          .block = 0.684f,
          .heavy = 0.154f,
          .gelu = 0.55f},
         // tall norm
         {.fixed = 2.3f,
          .round = 1.7f,
          .tokens = 1.0f,
          .block = 0.684f,
          .heavy = 0.154f,
          .gelu = 0.0f},
     }},
     {.tile = 2.5f, .split = 1.4f, .tall = 1.2f, .element = 1.4f, .more = 0.8f, .partial = 1.7f},
     {{
         // cublaslt + activation
         {.fixed = 5.0f, .gflop = 0.81f, .more = 0.38f, .element = 2.1f},
         // cublaslt
         {.fixed = 5.0f, .gflop = 1.42f, .more = 0.24f, .element = 0.0f},
         // cublaslt + norm
         {.fixed = 7.8f, .gflop = 0.32f, .more = 0.89f, .element = 3.2f},
         // cublaslt + norm, large K
         {.fixed = 9.8f, .gflop = 1.53f, .more = 0.63f, .element = 0.0f},
     }}},
}};

}  // namespace ft::cuda
