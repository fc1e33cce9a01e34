// The sm_90 GEMM kernels over e4m3 operands, behind a C interface for benchmarks/cuda/fp8_gemm.py.
#include <algorithm>
#include <cstdio>
#include <map>

#include "fp8_gemm.h"
#include "kernels/cuda/gemm_sm90_variants.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_map.h"

using namespace ft::cuda;
using namespace ft::cuda::sm90;

namespace ft::cuda::sm90 {
const void* fp8_kernel(int variant, bool narrow_output);  // gemm_fp8_sm90.cu
const void* fp8_norm_kernel(int variant);                 // gemm_fp8_norm_sm90.cu
}  // namespace ft::cuda::sm90

namespace {

template <typename Plain>
int launch(const Product& q, const void* kernel, cudaStream_t stream) {
  using Config = ScaledConfig<Plain>;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = Config::kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(Config::kCluster);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  static std::map<const void*, int> known;
  int& clusters = known[kernel];
  if (clusters == 0) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Config::kSharedBytes) != cudaSuccess)
      return 1;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess || clusters == 0)
      return 2;
    std::printf("%d x %d, clusters of %d: %d at a time\n", Config::kM, Config::kN, Config::kCluster,
                clusters);
  }
  // The side that a cluster shares is fetched in equal parts.
  constexpr int kInputRows = Config::kNorm ? Config::kM / Config::kSharers : Config::kM;
  constexpr int kWeightRows = Config::kNorm ? Config::kN : Config::kN / Config::kSharers;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  CUtensorMap input, weight, added, output;
  if (encode_tensor_map(&input, ft::DType::kE4M3, q.x, q.rows, q.k, kInputRows, 128, kPromotion))
    return 3;
  if (encode_tensor_map(&weight, ft::DType::kE4M3, q.w, q.n, q.k, kWeightRows, 128, kPromotion))
    return 4;
  if (q.narrow_out ? encode_tensor_map(&output, ft::DType::kE4M3, q.out, q.rows, q.n, Config::kRows,
                                       64, kPromotion)
                   : encode_tensor_map(&output, ft::DType::kFloat16, q.out, q.rows, q.n,
                                       Config::kRows, 64, kPromotion))
    return 5;
  added = output;
  if (q.residual && encode_tensor_map(&added, ft::DType::kFloat16, q.residual, q.rows, q.n,
                                      Config::kRows, 64, kPromotion))
    return 6;
  GemmParameters p{};
  p.bias = q.bias;
  p.gamma = q.gamma;
  p.beta = q.beta;
  p.eps = 1e-12f;
  p.n = q.n;
  p.k_blocks = (q.k + 127) / 128;
  p.n_tiles = (q.n + Config::kN - 1) / Config::kN;
  const int m_tiles = (q.rows + Config::kM - 1) / Config::kM;
  p.cluster_tiles =
      Config::kNorm ? m_tiles : (m_tiles + Config::kCluster - 1) / Config::kCluster * p.n_tiles;
  p.gelu = q.gelu;
  p.residual = q.residual != nullptr;
  p.scale = q.scale;
  p.out_scale = q.out_scale;
  p.narrow = q.narrow;
  p.rows = q.rows;
  config.gridDim = dim3(std::min(p.cluster_tiles, clusters) * Config::kCluster);
  config.numAttrs = 2;
  void* arguments[] = {&input, &weight, &added, &output, &p};
  return cudaLaunchKernelExC(&config, kernel, arguments) == cudaSuccess ? 0 : 7;
}

}  // namespace

// A plain tile. 0 where it was launched, like those below.
extern "C" int fp8_gemm(const Product* q, int variant, cudaStream_t stream) {
  const auto with = [&]<typename Config>(Config) {
    return launch<Config>(*q, fp8_kernel(variant, q->narrow_out), stream);
  };
  if (variant == kTrio) return q->narrow_out ? with(Trio128x128{}) : -1;
  return with_plain_tile(variant, with);
}

// A norm tile; its width times its cluster is n.
extern "C" int fp8_norm_gemm(const Product* q, int variant, cudaStream_t stream) {
  const auto with = [&]<typename Config>(Config) {
    return q->n == Config::kN * Config::kCluster
               ? launch<Config>(*q, fp8_norm_kernel(variant), stream)
               : -1;
  };
  return with_norm_tile(variant, with);
}

// The layer norm kernel that follows a plain tile.
extern "C" int layer_norm(const void* x, const void* gamma, const void* beta, void* out, int rows,
                          int hidden, cudaStream_t stream) {
  return residual_layer_norm(x, nullptr, nullptr, gamma, beta, 1e-12f, rows, hidden,
                             ft::DType::kFloat16, out, nullptr, {stream, true});
}
