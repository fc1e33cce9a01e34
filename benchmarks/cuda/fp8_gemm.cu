// The sm_90 GEMM kernel over e4m3 operands, behind a C interface for benchmarks/cuda/fp8_gemm.py.
#include <algorithm>
#include <cstdio>

#include "kernels/cuda/gemm_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

using namespace ft::cuda;
using namespace ft::cuda::sm90;

namespace {

template <typename Plain, typename Out>
int launch(const void* x, const void* w, const float* scale, const void* bias, const void* residual,
           void* out, int rows, int n, int k, bool gelu, const float* out_scale,
           cudaStream_t stream) {
  using Config = ScaledConfig<Plain>;
  const void* kernel =
      reinterpret_cast<const void*>(gemm_kernel<__half, Config, false, __nv_fp8_e4m3, Out>);
  static int clusters = 0;
  if (clusters == 0) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Config::kSharedBytes) != cudaSuccess)
      return 1;
    cudaLaunchAttribute a{};
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = Config::kCluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
    cudaLaunchConfig_t c{};
    c.gridDim = dim3(Config::kCluster);
    c.blockDim = dim3(Config::kThreads);
    c.dynamicSmemBytes = Config::kSharedBytes;
    c.attrs = &a;
    c.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &c) != cudaSuccess || clusters == 0)
      return 2;
  }
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  CUtensorMap input, weight, added, output;
  if (encode_byte_map(&input, x, rows, k, Config::kM, 128, kPromotion)) return 3;
  if (encode_byte_map(&weight, w, n, k, Config::kN / Config::kCluster, 128, kPromotion)) return 4;
  if (sizeof(Out) == 1 ? encode_byte_map(&output, out, rows, n, Config::kRows, 64, kPromotion)
                       : encode_tensor_map(&output, ft::DType::kFloat16, out, rows, n,
                                           Config::kRows, 64, kPromotion))
    return 5;
  added = output;
  if (residual && encode_tensor_map(&added, ft::DType::kFloat16, residual, rows, n, Config::kRows,
                                    64, kPromotion))
    return 6;
  GemmParameters p{};
  p.bias = bias;
  p.n = n;
  p.k_blocks = (k + 127) / 128;
  p.n_tiles = (n + Config::kN - 1) / Config::kN;
  const int m_tiles = (rows + Config::kM - 1) / Config::kM;
  p.cluster_tiles = (m_tiles + Config::kCluster - 1) / Config::kCluster * p.n_tiles;
  p.gelu = gelu;
  p.residual = residual != nullptr;
  p.scale = scale;
  p.out_scale = out_scale;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = Config::kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(p.cluster_tiles, clusters) * Config::kCluster);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  void* arguments[] = {&input, &weight, &added, &output, &p};
  return cudaLaunchKernelExC(&config, kernel, arguments) == cudaSuccess ? 0 : 7;
}

}  // namespace

// variant: which tile; narrow: the output is e4m3. 0 where it was launched.
extern "C" int fp8_gemm(const void* x, const void* w, const float* scale, const void* bias,
                        const void* residual, void* out, int rows, int n, int k, int gelu,
                        const float* out_scale, int narrow, int variant, void* stream) {
  const auto with = [&]<typename Config>(Config) {
    const auto s = static_cast<cudaStream_t>(stream);
    return narrow ? launch<Config, __nv_fp8_e4m3>(x, w, scale, bias, residual, out, rows, n, k,
                                                  gelu, out_scale, s)
                  : launch<Config, __half>(x, w, scale, bias, residual, out, rows, n, k, gelu,
                                           out_scale, s);
  };
  switch (variant) {
    case 0:
      return with(PingPong128x192{});
    case 1:
      return with(PingPong128x192Alone{});
    case 2:
      return with(PingPong128x128{});
    case 3:
      return with(PingPong64x128{});
    case 4:
      return with(GemmConfig<64, 256, 4, 2, 1, false, false>{});
    case 5:
      return with(GemmConfig<64, 256, 4, 2, 2, false, false>{});
    default:
      return with(Together128x128{});
  }
}
