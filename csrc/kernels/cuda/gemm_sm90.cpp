#include "kernels/cuda/gemm_sm90.h"

#include <algorithm>

#include "kernels/cuda/runtime.h"

#ifdef FT_WITH_SM90

#include <array>
#include <cstdio>
#include <mutex>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "kernels/cuda/gemm_costs.h"
#include "kernels/cuda/gemm_sm90_variants.h"
#include "kernels/cuda/tensor_map.h"

namespace ft::cuda {
namespace sm90 {

const void* linear_kernel(int variant, bool bfloat16);     // gemm_linear_sm90.cu
const void* but_gelu_kernel(int variant, bool bfloat16);   // all activations but GELU
const void* norm_kernel(int variant, bool bfloat16);       // gemm_norm_sm90.cu
const void* split_kernel(int variant, bool bfloat16);      // gemm_split_sm90.cu
const void* fp8_kernel(int variant, bool narrow_output);   // gemm_fp8_sm90.cu
const void* fp8_norm_kernel(int variant);                  // gemm_fp8_norm_sm90.cu
const void* tall_half_kernel(int cluster, int index);      // gemm_tall_half_sm90.cu
const void* tall_bfloat16_kernel(int cluster, int index);  // gemm_tall_bfloat16_sm90.cu

namespace {

template <int kCluster>
const void* tall_kernel(int index, bool bfloat16) {
  return bfloat16 ? tall_bfloat16_kernel(kCluster, index) : tall_half_kernel(kCluster, index);
}

}  // namespace

}  // namespace sm90

namespace {

// Elements of K in a block of 128 bytes.
int block_k(const Gemm& gemm) { return gemm.narrow() ? 128 : 64; }

// The place of a tile's costs among a card's; a tile without them does not compile. Tiles of e4m3
// operands have costs of their own.
constexpr int costs_of(std::string_view tile, std::string_view operands = "") {
  const auto found =
      std::find_if(kCostedTiles.begin(), kCostedTiles.end(), [&](std::string_view costed) {
        return costed.starts_with(operands) && costed.substr(operands.size()) == tile;
      });
  if (found == kCostedTiles.end()) throw "scripts/gemm_costs.py wrote no costs of this tile";
  return static_cast<int>(found - kCostedTiles.begin());
}

// Those of the card whose name begins as `gpu` does; the first ones serve cards that have none.
const GemmCosts& costs_on(std::string_view gpu) {
  const auto found =
      std::find_if(kGemmCosts.begin(), kGemmCosts.end(),
                   [&](const GemmCosts& costs) { return gpu.starts_with(costs.gpu); });
  return found == kGemmCosts.end() ? kGemmCosts.front() : *found;
}

struct Variant {
  const char* name;                    // null: tall
  const void* (*kernel)(int, bool);    // null: it serves e4m3 outputs alone
  const void* (*but_gelu)(int, bool);  // for what is no GELU, or null
  int index;                           // within its file
  int m, n;                            // tall: tokens, features
  int box_rows, box_columns;           // of an output box
  int splits;                          // of K, over the blocks of a cluster
  int cluster, sharers, threads, shared_bytes;
  int narrow_bytes;  // shared memory of the kernel of e4m3 operands, 0: there is none
  bool norm;
  int costs, narrow_costs;  // indices into a card's tiles; the second where narrow_bytes is not 0

  constexpr bool tall() const { return name == nullptr; }
};

// Clusters that split K among them have no kernel of e4m3 operands.
template <typename Config>
constexpr int narrow_bytes() {
  if constexpr (Config::kSplits > 1) {
    return 0;
  } else {
    return sm90::ScaledConfig<Config>::kSharedBytes;
  }
}

template <typename Config>
constexpr Variant variant(const char* name, const void* (*kernel)(int, bool), int index) {
  return {
      name,
      kernel,
      Config::kNorm || Config::kSplits > 1 || kernel == nullptr ? nullptr : sm90::but_gelu_kernel,
      index,
      Config::kM,
      Config::kN,
      Config::kRows,
      Config::kBoxColumns,
      Config::kSplits,
      Config::kCluster,
      Config::kSharers,
      Config::kThreads,
      Config::kSharedBytes,
      narrow_bytes<Config>(),
      Config::kNorm,
      kernel != nullptr ? costs_of(name) : -1,
      narrow_bytes<Config>() > 0 ? costs_of(name, "fp8 ") : -1};
}

template <int kCluster, int kTokens>
constexpr Variant tall(int index) {
  using Config = sm90::TallConfig<kTokens, kCluster>;
  return {nullptr,
          sm90::tall_kernel<kCluster>,
          nullptr,
          index,
          kTokens,
          Config::kFeatures,
          Config::kChunk,
          64,
          1,
          kCluster,
          1,
          Config::kThreads,
          Config::kSharedBytes,
          0,
          Config::kNorm,
          costs_of(Config::kNorm ? "tall norm" : "tall"),
          -1};
}

template <int kCluster, int... kTokens>
constexpr std::array<Variant, sizeof...(kTokens)> tall_variants() {
  int index = 0;
  return {tall<kCluster, kTokens>(index++)...};
}

constexpr std::array kTiles{
    variant<sm90::PingPong128x192>("ping-pong 128x192", sm90::linear_kernel, 0),
    variant<sm90::PingPong128x192Alone>("ping-pong 128x192 alone", sm90::linear_kernel, 1),
    variant<sm90::PingPong128x128>("ping-pong 128x128", sm90::linear_kernel, 2),
    variant<sm90::PingPong64x128>("ping-pong 64x128", sm90::linear_kernel, 3),
    variant<sm90::Together128x128>("together 128x128", sm90::linear_kernel, 4),
    variant<sm90::Trio128x128>("trio 128x128", nullptr, sm90::kTrio),
    variant<sm90::Together128x128Split2>("together 128x128 / 2", sm90::split_kernel, 0),
    variant<sm90::Together128x128Split4>("together 128x128 / 4", sm90::split_kernel, 1),
    variant<sm90::NormPingPong128x192>("norm ping-pong 128x192", sm90::norm_kernel, 0),
    variant<sm90::NormPingPong64x192>("norm ping-pong 64x192", sm90::norm_kernel, 1),
    variant<sm90::NormPingPong64x128>("norm ping-pong 64x128", sm90::norm_kernel, 2),
    variant<sm90::NormPingPong64x256>("norm ping-pong 64x256", sm90::norm_kernel, 3),
    variant<sm90::NormPingPong128x128>("norm ping-pong 128x128", sm90::norm_kernel, 4),
    variant<sm90::NormTrio64x192>("norm trio 64x192", sm90::norm_kernel, 5),
};

constexpr auto kTall = tall_variants<1, FT_TALL_TOKENS>();
constexpr auto kTallNorm6 = tall_variants<6, FT_TALL_NORM_TOKENS>();
constexpr auto kTallNorm8 = tall_variants<8, FT_TALL_NORM_TOKENS>();

template <size_t... kSizes>
constexpr std::array<Variant, (kSizes + ...)> joined(const std::array<Variant, kSizes>&... parts) {
  std::array<Variant, (kSizes + ...)> all{};
  auto* to = all.data();
  ((to = std::copy(parts.begin(), parts.end(), to)), ...);
  return all;
}

constexpr auto kVariants = joined(kTiles, kTall, kTallNorm6, kTallNorm8);

// Tall tiles that differ in their tokens alone, ascending: [begin, end) of kVariants.
struct Family {
  const char* name;
  int begin, end;
};

constexpr int kTallBegin = static_cast<int>(kTiles.size());
constexpr int kTallEnd = kTallBegin + static_cast<int>(kTall.size());
constexpr int kTallNorms = static_cast<int>(kTallNorm6.size());
constexpr std::array kFamilies{
    Family{"tall", kTallBegin, kTallEnd},
    Family{"tall norm 6", kTallEnd, kTallEnd + kTallNorms},
    Family{"tall norm 8", kTallEnd + kTallNorms, kTallEnd + 2 * kTallNorms},
};

// A plan's variant is an index into kVariants or this plus an index into kFamilies.
constexpr int kFirstFamily = static_cast<int>(kVariants.size());

constexpr int kMostSplits = 8;

// A row-major [rows, columns] matrix and the box a copy moves.
struct MapKey {
  const void* data;
  int rows, columns, box_rows, box_columns;
  DType dtype;
  bool operator==(const MapKey&) const = default;
};

struct MapKeyHash {
  size_t operator()(const MapKey& m) const {
    uint64_t h = reinterpret_cast<uintptr_t>(m.data);
    for (const int v : {m.rows, m.columns, m.box_rows, m.box_columns, static_cast<int>(m.dtype)}) {
      h = (h ^ static_cast<uint64_t>(v)) * 0x9E3779B97F4A7C15ull;
      h ^= h >> 29;
    }
    return h;
  }
};

cudaError_t tensor_map(const MapKey& key, CUtensorMap* map) {
  struct Maps {
    std::shared_mutex mutex;
    std::unordered_map<MapKey, CUtensorMap, MapKeyHash> table;
  };
  static Maps& all = *new Maps;  // never freed: threads may run on while the process exits
  auto& [mutex, maps] = all;
  constexpr size_t kMost = 8192;  // workspaces move; forget the lot rather than grow for ever
  {
    const std::shared_lock<std::shared_mutex> lock(mutex);
    if (const auto found = maps.find(key); found != maps.end()) {
      *map = found->second;
      return cudaSuccess;
    }
  }
  const CUresult result =
      encode_tensor_map(map, key.dtype, key.data, key.rows, key.columns, key.box_rows,
                        key.box_columns, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  if (result == CUDA_ERROR_NOT_SUPPORTED) {
    set_failure("the driver has no cuTensorMapEncodeTiled");
    return cudaErrorNotSupported;
  }
  if (result != CUDA_SUCCESS) {
    set_failure("cuTensorMapEncodeTiled failed with status " + std::to_string(result));
    return cudaErrorInvalidValue;
  }
  const std::unique_lock<std::shared_mutex> lock(mutex);
  if (maps.size() >= kMost) maps.clear();
  maps.emplace(key, *map);
  return cudaSuccess;
}

struct Launchable {
  const void* kernel = nullptr;
  int clusters = 0;  // that run at the same time; none where status is a failure
  cudaError_t status = cudaSuccess;

  // A kernel that does not fit the GPU never will; other failures pass.
  bool sure() const { return status == cudaSuccess || status == cudaErrorNotSupported; }
};

// Which of a variant's kernels a problem takes.
enum Flavour : int {
  kHalf,
  kBFloat16,
  kHalfButGelu,
  kBFloat16ButGelu,
  kNarrow,
  kNarrowOutput,
  kFlavours,
};

Flavour flavour_of(const Gemm& gemm) {
  if (gemm.narrow()) return gemm.output_step != nullptr ? kNarrowOutput : kNarrow;
  const bool but_gelu =
      gemm.activation != Activation::kNone && gemm.activation != Activation::kGelu;
  if (gemm.dtype == DType::kBFloat16) return but_gelu ? kBFloat16ButGelu : kBFloat16;
  return but_gelu ? kHalfButGelu : kHalf;
}

const void* kernel_of(const Variant& variant, Flavour flavour) {
  switch (flavour) {
    case kHalf:
    case kBFloat16:
      return variant.kernel(variant.index, flavour == kBFloat16);
    case kHalfButGelu:
    case kBFloat16ButGelu:
      return variant.but_gelu(variant.index, flavour == kBFloat16ButGelu);
    default:
      return variant.norm ? sm90::fp8_norm_kernel(variant.index)
                          : sm90::fp8_kernel(variant.index, flavour == kNarrowOutput);
  }
}

int shared_bytes_of(const Variant& variant, const Gemm& gemm) {
  return gemm.narrow() ? variant.narrow_bytes : variant.shared_bytes;
}

// Raises the kernel's shared-memory limit and asks how many clusters fit, once a device.
Launchable launchable(int v, const Gemm& gemm, int device) {
  static std::array<std::array<PerDevice<Launchable>, kFlavours>, kVariants.size()> known;
  const Launchable* found = nullptr;
  const Flavour flavour = flavour_of(gemm);
  auto& slot = known[v][flavour];
  const cudaError_t status = slot.get(device, &found, [&](Launchable& made) {
    const Variant& variant = kVariants[v];
    made.kernel = kernel_of(variant, flavour);
    const int shared_bytes = shared_bytes_of(variant, gemm);
    cudaError_t status = cudaFuncSetAttribute(
        made.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(variant.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(variant.cluster));
    config.blockDim = dim3(static_cast<unsigned>(variant.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&made.clusters, made.kernel, &config);
    return status == cudaSuccess && made.clusters == 0 ? cudaErrorNotSupported : status;
  });
  return status == cudaSuccess ? *found : Launchable{nullptr, 0, status};
}

int tiles_of(int total, int tile) { return (total + tile - 1) / tile; }

// Tiles that a whole cluster works on at a time.
int cluster_tiles_of(const Variant& variant, const Gemm& gemm) {
  const int m_tiles = tiles_of(gemm.rows, variant.m);
  if (variant.norm) return m_tiles;
  return tiles_of(m_tiles, variant.cluster / variant.splits) * tiles_of(gemm.n, variant.n);
}

bool activates(const Gemm& gemm) { return gemm.activation != Activation::kNone; }
bool is_gelu(const Gemm& gemm) { return gemm.activation == Activation::kGelu; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

size_t partial_bytes(const Gemm& gemm, int splits) {
  return size_t{4} * splits * gemm.rows * gemm.n;
}

const Family* family_of(Sm90Plan plan) {
  return plan.variant < kFirstFamily ? nullptr : &kFamilies[plan.variant - kFirstFamily];
}

// The plan's variant, or one that has all but the tokens of a tile in common with it.
const Variant& kind_of(Sm90Plan plan) {
  const Family* family = family_of(plan);
  return kVariants[family == nullptr ? plan.variant : family->begin];
}

// The index into kVariants of the plan's tile: of a family, the smallest that needs no more rounds
// than planned.
int tile_of(Sm90Plan plan, const Gemm& gemm, int device) {
  const Family* family = family_of(plan);
  if (family == nullptr) return plan.variant;
  const int capacity = plan.rounds * launchable(family->begin, gemm, device).clusters;
  int v = family->begin;
  while (v + 1 < family->end && cluster_tiles_of(kVariants[v], gemm) * plan.splits > capacity) ++v;
  return v;
}

// What the plan's time is made of; a kernel that does not run here has no tile.
Sm90Amounts amounts_of(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm, int device) {
  const int tile = tile_of(plan, gemm, device);
  const Variant& variant = kVariants[tile];
  const Launchable ready = launchable(tile, gemm, device);
  if (ready.status != cudaSuccess) return {};
  const float elements = 1e-6f * static_cast<float>(gemm.rows) * static_cast<float>(gemm.n);
  const int tiles = cluster_tiles_of(variant, gemm) * plan.splits;
  // A round is a tile for every cluster that the chip runs at a time. The last, partial one has the
  // memory to itself.
  float rounds = static_cast<float>(tiles / ready.clusters);
  const float least = variant.norm ? 1.f : variant.splits > 1 ? 0.7f : 0.8f;
  if (const int rest = tiles % ready.clusters; rest > 0)
    rounds += least + (1 - least) * static_cast<float>(rest) / static_cast<float>(ready.clusters);
  // A block of K takes the tensor cores as long whatever its elements are.
  const float gflop =
      2e-3f * elements * static_cast<float>(gemm.k) * 64 / static_cast<float>(block_k(gemm));
  float blocks = rounds * static_cast<float>(tiles_of(tiles_of(gemm.k, block_k(gemm)),
                                                      plan.splits * variant.splits));
  // A tall tile's block of 64 of K takes the longer of its way in, at 64 bytes a cycle, and its
  // product: thousands of cycles.
  if (variant.tall())
    blocks *= 1e-3f * static_cast<float>(std::max(256 + 2 * variant.m, 4 * variant.m));
  const float tokens = variant.tall() ? 1e-2f * static_cast<float>(variant.m) * rounds : 0.f;
  const float activated = variant.tall() ? tokens : rounds;
  Sm90Amounts amounts{gemm.narrow() ? variant.narrow_costs : variant.costs,
                      {1.f, rounds, tokens, blocks, blocks * std::min(gflop, 128.f) / 100,
                       activates(gemm) ? activated : 0.f},
                      {}};
  if (plan.splits > 1) amounts.after.partial = static_cast<float>(plan.splits) * elements;
  if (norm != nullptr && !variant.norm) {
    // On multiprocessors that the product leaves free, the norm's blocks are ready when it ends.
    const float busy =
        std::min(1.f, static_cast<float>(tiles) / static_cast<float>(ready.clusters));
    (variant.tall()       ? amounts.after.tall
     : variant.splits > 1 ? amounts.after.split
                          : amounts.after.tile) = variant.tall() ? busy : 1.f;
    amounts.after.element = elements;
    amounts.after.more = std::max(0.f, elements - 4);
  }
  return amounts;
}

// Expected microseconds, or a negative number when the kernel does not run here.
float estimate(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm,
               const DeviceProperties& device) {
  const Sm90Amounts many = amounts_of(plan, gemm, norm, device.index);
  if (many.tile < 0) return -1.f;
  const GemmCosts& card = costs_on(device.all.name);
  const TileCost& tile = card.tiles[many.tile];
  const AfterCost& after = gemm.narrow() ? card.narrow_after : card.after;
  return tile.fixed + tile.round * many.product.round + tile.tokens * many.product.tokens +
         tile.block * many.product.block + tile.heavy * many.product.heavy +
         tile.gelu * many.product.gelu + after.tile * many.after.tile +
         after.split * many.after.split + after.tall * many.after.tall +
         after.element * many.after.element + after.more * many.after.more +
         after.partial * many.after.partial;
}

// Attributes of a launch in clusters, with programmatic dependent launch or without.
cudaError_t launch_variant(const Variant& variant, const void* kernel, int shared_bytes,
                           int clusters, Launch launch, void** arguments) {
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(variant.cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * variant.cluster));
  config.blockDim = dim3(static_cast<unsigned>(variant.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = launch.stream;
  config.attrs = attributes.data();
  config.numAttrs = launch.pdl ? 2 : 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

// The product alone or, for norm variants, with the norm; partial sums where `partials` is given.
cudaError_t product(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm, float* partials,
                    Launch launch) {
  const DeviceProperties* device = nullptr;
  if (const cudaError_t status = current_device(&device); status != cudaSuccess) return status;
  const int tile = tile_of(plan, gemm, device->index);
  const Variant& variant = kVariants[tile];
  const Launchable ready = launchable(tile, gemm, device->index);
  if (ready.status != cudaSuccess) return ready.status;

  const int tiles = cluster_tiles_of(variant, gemm) * plan.splits;
  // The side that is shared is fetched in equal parts by the cluster's blocks.
  const int input_box = variant.norm ? variant.m / variant.sharers : variant.m;
  const int weight_box = variant.norm ? variant.n : variant.n / variant.sharers;
  CUtensorMap input, weight, residual, output;
  cudaError_t status = tensor_map(
      {gemm.input.data, gemm.rows, gemm.k, input_box, block_k(gemm), gemm.input.dtype}, &input);
  if (status == cudaSuccess)
    status = tensor_map(
        {gemm.weight.data, gemm.n, gemm.k, weight_box, block_k(gemm), gemm.weight.dtype}, &weight);
  MapKey finished{gemm.output,      gemm.rows,           gemm.n,
                  variant.box_rows, variant.box_columns, gemm.dtype};
  if (gemm.output_step != nullptr) finished.dtype = DType::kE4M3;
  if (status == cudaSuccess) status = tensor_map(finished, &output);
  residual = output;
  finished.data = gemm.residual;
  finished.dtype = gemm.dtype;
  if (status == cudaSuccess && gemm.residual != nullptr) status = tensor_map(finished, &residual);
  if (status != cudaSuccess) return status;

  // Clusters that share one tile's K are not persistent.
  const int clusters = variant.splits > 1 ? tiles : std::min(tiles, ready.clusters);
  if (variant.tall()) {
    sm90::TallParameters p{};
    p.bias = gemm.bias;
    if (variant.norm) {
      p.gamma = norm->gamma;
      p.beta = norm->beta;
      p.eps = norm->eps;
    }
    p.partials = partials;
    p.rows = gemm.rows;
    p.n = gemm.n;
    p.k_blocks = tiles_of(gemm.k, block_k(gemm));
    p.feature_tiles = tiles_of(gemm.n, variant.n);
    p.splits = plan.splits;
    p.items = tiles;
    p.gelu = is_gelu(gemm);
    void* arguments[] = {&input, &weight, &residual, &output, &p};
    return launch_variant(variant, ready.kernel, variant.shared_bytes, clusters, launch, arguments);
  }
  sm90::GemmParameters p{};
  p.bias = gemm.bias;
  p.n = gemm.n;
  p.k_blocks = tiles_of(gemm.k, block_k(gemm));
  p.n_tiles = tiles_of(gemm.n, variant.n);
  p.cluster_tiles = tiles;
  p.upwards = gemm.upwards;
  p.gelu = is_gelu(gemm);
  p.residual = gemm.residual != nullptr;
  p.activation = gemm.activation;
  if (variant.norm) {
    p.gamma = norm->gamma;
    p.beta = norm->beta;
    p.eps = norm->eps;
  }
  p.scale = gemm.weight.scale;
  p.out_scale = gemm.output_step;
  if (variant.norm) {
    p.narrow = norm->narrow.rows;
    p.out_scale = norm->narrow.step;
    p.rows = gemm.rows;
  }
  void* arguments[] = {&input, &weight, &residual, &output, &p};
  return launch_variant(variant, ready.kernel, shared_bytes_of(variant, gemm), clusters, launch,
                        arguments);
}

}  // namespace

std::string gemm_sm90_name(Sm90Plan plan) {
  const Family* family = family_of(plan);
  if (family == nullptr) return kVariants[plan.variant].name;
  std::string name = std::string(family->name) + " x" + std::to_string(plan.rounds);
  if (plan.splits > 1) name += " / " + std::to_string(plan.splits);
  return name;
}

Sm90Plan gemm_sm90_named(const std::string& name) {
  for (int v = 0; v < kTallBegin; ++v)
    if (name == kVariants[v].name) return {v};
  const size_t at = name.rfind(" x");
  for (int f = 0; f < static_cast<int>(kFamilies.size()) && at != std::string::npos; ++f) {
    Sm90Plan plan{kFirstFamily + f, 1, 0};
    if (std::sscanf(name.c_str() + at, " x%4d / %4d", &plan.rounds, &plan.splits) >= 1 &&
        plan.rounds >= 1 && plan.splits >= 1 && plan.splits <= kMostSplits &&
        name == gemm_sm90_name(plan))
      return plan;
  }
  return {};
}

bool gemm_sm90_enabled() {
  static const bool enabled = environment_switch("FT_HANDLER_SM90_GEMM").value_or(true);
  const DeviceProperties* device = nullptr;
  return enabled && current_device(&device) == cudaSuccess && device->major == 9 &&
         device->minor == 0;
}

bool gemm_sm90_supports(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm) {
  if (!gemm_sm90_enabled() || gemm.dtype == DType::kFloat32) return false;
  const Variant& variant = kind_of(plan);
  if (gemm.narrow()) {
    if (gemm.input.dtype != DType::kE4M3 || gemm.dtype != DType::kFloat16 ||
        variant.narrow_bytes == 0 || gemm.n % 16 != 0 || gemm.k % 16 != 0 ||
        (activates(gemm) && !is_gelu(gemm)) || (norm == nullptr && variant.norm) ||
        (gemm.output_step != nullptr &&
         (norm != nullptr || !is_gelu(gemm) || gemm.residual != nullptr)))
      return false;
  } else if (gemm.input.dtype != gemm.dtype || gemm.weight.dtype != gemm.dtype) {
    return false;
  }
  if (variant.kernel == nullptr && gemm.output_step == nullptr) return false;
  if (activates(gemm) && !is_gelu(gemm) && variant.but_gelu == nullptr) return false;
  if (variant.norm && norm == nullptr) return false;
  // A copy in e4m3 is written by the layer norm's own kernel or by products of such operands.
  if (norm != nullptr && norm->narrow.rows != nullptr && !gemm.narrow() &&
      (variant.norm || plan.splits > 1))
    return false;
  if (variant.norm && (gemm.n != variant.n * variant.cluster || activates(gemm))) return false;
  // Tall tiles add a residual with the layer norm or leave it, and partial sums, to its kernel.
  if (variant.tall() && (gemm.n % 64 != 0 || (gemm.residual != nullptr && norm == nullptr)))
    return false;
  if (variant.tall() && variant.norm && gemm.residual == nullptr) return false;
  if (variant.splits > tiles_of(gemm.k, block_k(gemm))) return false;
  if (plan.splits > 1 &&
      (norm == nullptr || variant.norm || plan.splits > tiles_of(gemm.k, block_k(gemm)) ||
       partial_bytes(gemm, plan.splits) > gemm_workspace_bytes()))
    return false;
  return gemm.n % 8 == 0 && gemm.k % 8 == 0 && aligned(gemm.input.data) &&
         aligned(gemm.weight.data) && aligned(gemm.residual) && aligned(gemm.output) &&
         aligned(gemm.bias);
}

namespace {

// The plans worth timing, the best first; clears `sure` where a kernel could not be asked about.
std::vector<Sm90Plan> plans_of(const Gemm& gemm, const GemmNorm* norm, bool* sure) {
  const DeviceProperties* device = nullptr;
  if (current_device(&device) != cudaSuccess) {
    *sure = false;
    return {};
  }
  const auto ask = [&](int v) {
    const Launchable asked = launchable(v, gemm, device->index);
    *sure = *sure && asked.sure();
    return asked;
  };
  std::vector<std::pair<float, Sm90Plan>> timed;
  const auto consider = [&](Sm90Plan plan) {
    if (!gemm_sm90_supports(plan, gemm, norm)) return;
    ask(tile_of(plan, gemm, device->index));
    if (const float time = estimate(plan, gemm, norm, *device); time >= 0.f)
      timed.emplace_back(time, plan);
  };
  for (int v = 0; v < kTallBegin; ++v) {
    // Splitting what fills the chip already only costs.
    if (kVariants[v].splits > 1 && gemm_sm90_supports({v}, gemm, norm) &&
        cluster_tiles_of(kVariants[v], gemm) > ask(v).clusters)
      continue;
    consider({v});
  }
  for (int f = 0; f < static_cast<int>(kFamilies.size()); ++f) {
    const Family& family = kFamilies[f];
    if (!gemm_sm90_supports({kFirstFamily + f}, gemm, norm)) continue;
    const int clusters = ask(family.begin).clusters;
    if (clusters == 0) continue;
    for (int splits = 1; splits <= kMostSplits; ++splits) {
      for (int v = family.begin; v < family.end; ++v) {
        const int tiles = cluster_tiles_of(kVariants[v], gemm) * splits;
        const Sm90Plan plan{kFirstFamily + f, splits, tiles_of(tiles, clusters)};
        // Splitting what fills the chip already only costs, and so do tiles larger than need be.
        if ((splits == 1 || plan.rounds == 1) && tile_of(plan, gemm, device->index) == v)
          consider(plan);
      }
    }
  }
  std::stable_sort(timed.begin(), timed.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Sm90Plan> plans;
  for (const auto& [time, plan] : timed) plans.push_back(plan);
  return plans;
}

}  // namespace

std::vector<Sm90Plan> gemm_sm90_plans(const Gemm& gemm, const GemmNorm* norm) {
  bool sure = true;
  return plans_of(gemm, norm, &sure);
}

Sm90Amounts gemm_sm90_amounts(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm) {
  const DeviceProperties* device = nullptr;
  if (current_device(&device) != cudaSuccess) return {};
  return amounts_of(plan, gemm, norm, device->index);
}

LibraryAmounts gemm_library_amounts(const Gemm& gemm, const GemmNorm* norm) {
  const float elements = 1e-6f * static_cast<float>(gemm.rows) * static_cast<float>(gemm.n);
  const float gflop = 2e-3f * elements * static_cast<float>(gemm.k);
  const int kind = activates(gemm) ? 0 : norm == nullptr ? 1 : gemm.k < 2048 ? 2 : 3;
  return {kind, {1.f, gflop, std::max(0.f, gflop - 15.f), elements}};
}

Sm90Plan gemm_sm90_choose(const Gemm& gemm, const GemmNorm* norm, bool* sure) {
  *sure = true;
  const DeviceProperties* device = nullptr;
  const std::vector<Sm90Plan> plans = plans_of(gemm, norm, sure);
  if (plans.empty() || current_device(&device) != cudaSuccess) return {};
  if (gemm.narrow()) return plans.front();  // cuBLASLt has no such epilogues
  const LibraryAmounts many = gemm_library_amounts(gemm, norm);
  const LibraryCost& library = costs_on(device->all.name).library[many.kind];
  const float theirs = library.fixed + library.gflop * many.product.gflop +
                       library.more * many.product.more + library.element * many.product.element;
  return estimate(plans.front(), gemm, norm, *device) < theirs ? plans.front() : Sm90Plan{};
}

Sm90Plan gemm_sm90_invariant(const Gemm& gemm) {
  const DeviceProperties* device = nullptr;
  if (current_device(&device) != cudaSuccess) return {};
  // Plain tiles: K in one piece, one accumulator an element, one kind of epilogue.
  Sm90Plan best;
  float least = 0.f;
  for (int v = 0; v < kTallBegin; ++v) {
    if (kVariants[v].norm || kVariants[v].splits > 1 || !gemm_sm90_supports({v}, gemm, nullptr))
      continue;
    const float time = estimate({v}, gemm, nullptr, *device);
    if (time < 0.f || (best.variant >= 0 && time >= least)) continue;
    best = {v};
    least = time;
  }
  return best;
}

cudaError_t gemm_sm90(Sm90Plan plan, const Gemm& gemm, const GemmNorm* norm, void* scratch,
                      void* workspace, Launch launch) {
  const Variant& variant = kind_of(plan);
  if (norm == nullptr || variant.norm) return product(plan, gemm, norm, nullptr, launch);
  Gemm before = gemm;
  before.output = scratch;
  const void* residual = nullptr;
  if (variant.tall()) std::swap(before.residual, residual);
  if (plan.splits == 1) {
    const cudaError_t status = product(plan, before, nullptr, nullptr, launch);
    if (status != cudaSuccess) return status;
    return residual_layer_norm(scratch, nullptr, residual, norm->gamma, norm->beta, norm->eps,
                               gemm.rows, gemm.n, gemm.dtype, gemm.output, norm->live_rows, launch,
                               norm->narrow);
  }
  auto* const partials = static_cast<float*>(workspace);
  const cudaError_t status = product(plan, before, nullptr, partials, launch);
  if (status != cudaSuccess) return status;
  return residual_layer_norm_partials(partials, plan.splits, gemm.bias, residual, norm->gamma,
                                      norm->beta, norm->eps, gemm.rows, gemm.n, gemm.dtype,
                                      gemm.output, norm->live_rows, launch);
}

}  // namespace ft::cuda

#else

namespace ft::cuda {

std::string gemm_sm90_name(Sm90Plan) { return {}; }
Sm90Plan gemm_sm90_named(const std::string&) { return {}; }
bool gemm_sm90_enabled() { return false; }
bool gemm_sm90_supports(Sm90Plan, const Gemm&, const GemmNorm*) { return false; }
std::vector<Sm90Plan> gemm_sm90_plans(const Gemm&, const GemmNorm*) { return {}; }
Sm90Plan gemm_sm90_choose(const Gemm&, const GemmNorm*, bool* sure) {
  *sure = true;
  return {};
}
Sm90Amounts gemm_sm90_amounts(Sm90Plan, const Gemm&, const GemmNorm*) { return {}; }
LibraryAmounts gemm_library_amounts(const Gemm&, const GemmNorm*) { return {}; }
Sm90Plan gemm_sm90_invariant(const Gemm&) { return {}; }
cudaError_t gemm_sm90(Sm90Plan, const Gemm&, const GemmNorm*, void*, void*, Launch) {
  return cudaErrorNotSupported;
}

}  // namespace ft::cuda

#endif
