#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/gemm_sm90.h"
#include "kernels/cuda/runtime.h"

namespace ft::cuda {
namespace {

// What cuBLASLt's own documentation advises for sm_90.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

// How one shape class is computed.
struct Plan {
  Sm90Plan sm90;  // with a variant: ours; else cuBLASLt with `algo`
  cublasLtMatmulAlgo_t algo{};
  bool first_guess = false;  // `algo` is cuBLASLt's own choice, asked for at the first use

  bool ours() const { return sm90.variant >= 0; }
};

struct PlanKey {
  GemmKey key;
  int device = 0;
  bool bias = false;
  bool copies = false;  // the layer norm writes its rows in e4m3 too
  int alignment = 16;   // bytes, of every pointer; 16 stands for more
  bool operator==(const PlanKey&) const = default;
};

struct PlanKeyHash {
  size_t operator()(const PlanKey& p) const {
    uint64_t h = static_cast<uint64_t>(p.key.rows_class);
    for (const int v : {p.key.n, p.key.k, static_cast<int>(p.key.dtype),
                        static_cast<int>(p.key.activation), int{p.key.residual}, int{p.key.norm},
                        p.device, int{p.bias}, int{p.copies}, p.alignment}) {
      h = (h ^ static_cast<uint64_t>(v)) * 0x9E3779B97F4A7C15ull;
      h ^= h >> 29;
    }
    return h;
  }
};

struct Plans {
  std::shared_mutex mutex;
  std::unordered_map<PlanKey, Plan, PlanKeyHash> table;
};

Plans& plans() {
  static Plans& all = *new Plans;  // never freed: threads may run on while the process exits
  return all;
}

cudaDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

cudaError_t library_failure(const char* call, cublasStatus_t status) {
  set_failure(std::string(call) + " failed with status " + std::to_string(status));
  return cudaErrorUnknown;
}

// Descriptors of one product, all on the stack: making them costs nanoseconds and no lock.
// cuBLASLt thinks in columns, so output^T [n, rows] = weight^T^T * input^T.
struct Descriptors {
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t weight, input, output;
};

cudaError_t describe(const CublasLt& lt, const Gemm& gemm, Descriptors* d) {
  const cublasComputeType_t compute = gemm.dtype == DType::kFloat32 && tf32_allowed()
                                          ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F;
  const cudaDataType_t type = data_type(gemm.dtype);
  cublasStatus_t status = lt.desc_init(&d->desc, sizeof(d->desc), compute, CUDA_R_32F);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    if (status == CUBLAS_STATUS_SUCCESS)
      status = lt.desc_set(&d->desc, attribute, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (gemm.bias != nullptr) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, gemm.bias);
  }
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t* l, int rows, int columns) {
    if (status == CUBLAS_STATUS_SUCCESS)
      status = lt.layout_init(l, sizeof(*l), type, rows, columns, rows);
  };
  layout(&d->weight, gemm.k, gemm.n);
  layout(&d->input, gemm.k, gemm.rows);
  layout(&d->output, gemm.n, gemm.rows);
  return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess
                                         : library_failure("a cuBLASLt descriptor", status);
}

// What every pointer of the problem is aligned to: layers of odd widths start at odd places.
int alignment_of(const Gemm& gemm) {
  uintptr_t bits = 16;
  for (const void* p : {gemm.input.data, gemm.weight.data, gemm.bias, gemm.residual,
                        static_cast<const void*>(gemm.output)})
    bits |= reinterpret_cast<uintptr_t>(p);
  return static_cast<int>(bits & (~bits + 1));
}

cudaError_t heuristics(const Gemm& gemm, int wanted,
                       std::vector<cublasLtMatmulHeuristicResult_t>* results) {
  const CublasLt* lt = cublaslt();
  const cublasLtHandle_t handle = cublaslt_handle();
  if (lt == nullptr || handle == nullptr) return cudaErrorUnknown;
  Descriptors d;
  if (const cudaError_t status = describe(*lt, gemm, &d); status != cudaSuccess) return status;
  cublasLtMatmulPreferenceOpaque_t preference;
  cublasStatus_t status = lt->preference_init(&preference, sizeof(preference));
  if (status == CUBLAS_STATUS_SUCCESS)
    status = lt->preference_set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                &kWorkspaceBytes, sizeof(kWorkspaceBytes));
  const uint32_t alignment = static_cast<uint32_t>(alignment_of(gemm));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    if (status == CUBLAS_STATUS_SUCCESS)
      status = lt->preference_set(&preference, attribute, &alignment, sizeof(alignment));
  if (status != CUBLAS_STATUS_SUCCESS) return library_failure("cublasLtMatmulPreference", status);
  results->resize(wanted);
  int found = 0;
  status = lt->heuristic(handle, &d.desc, &d.weight, &d.input, &d.output, &d.output, &preference,
                         wanted, results->data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0)
    return library_failure("cublasLtMatmulAlgoGetHeuristic", status);
  results->resize(found);
  return cudaSuccess;
}

cudaError_t cublaslt_linear(const Gemm& gemm, const cublasLtMatmulAlgo_t& algo, void* workspace,
                            cudaStream_t stream) {
  const CublasLt* lt = cublaslt();
  const cublasLtHandle_t handle = cublaslt_handle();
  if (lt == nullptr || handle == nullptr) return cudaErrorUnknown;
  Descriptors d;
  if (const cudaError_t status = describe(*lt, gemm, &d); status != cudaSuccess) return status;
  const float one = 1.f;
  const float beta = gemm.residual == nullptr ? 0.f : 1.f;
  const void* addend = gemm.residual == nullptr ? gemm.output : gemm.residual;
  const cublasStatus_t status = lt->matmul(
      handle, &d.desc, &one, gemm.weight.data, &d.weight, gemm.input.data, &d.input, &beta, addend,
      &d.output, gemm.output, &d.output, &algo, workspace, kWorkspaceBytes, stream);
  return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : library_failure("cublasLtMatmul", status);
}

PlanKey key_of(const Gemm& gemm, const GemmNorm* norm, int device) {
  return {{gemm_row_class(gemm.rows), gemm.n, gemm.k, gemm.weight.dtype, gemm.activation,
           gemm.residual != nullptr, norm != nullptr},
          device,
          gemm.bias != nullptr,
          norm != nullptr && norm->narrow.rows != nullptr,
          alignment_of(gemm)};
}

cudaError_t find_plan(const Gemm& gemm, const GemmNorm* norm, Plan* plan) {
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const PlanKey key = key_of(gemm, norm, device);
  bool library = false;
  {
    const std::shared_lock<std::shared_mutex> lock(plans().mutex);
    if (const auto found = plans().table.find(key); found != plans().table.end()) {
      *plan = found->second;
      library = plan->first_guess;
      // A tuned plan may demand more of the pointers' alignment than this call offers.
      if (!library && (!plan->ours() || gemm_sm90_supports(plan->sm90, gemm, norm)))
        return cudaSuccess;
    }
  }
  Plan made;
  Gemm top = gemm;  // the class's largest, so that the plan does not depend on who came first
  top.rows = key.key.rows_class;
  bool sure = true;
  if (!library) made.sm90 = gemm_sm90_choose(top, norm, &sure);
  if (!made.ours() && gemm.narrow()) {
    set_failure("no kernel here multiplies such operands in float8_e4m3fn");
    return cudaErrorNotSupported;
  }
  if (!made.ours()) {
    std::vector<cublasLtMatmulHeuristicResult_t> results;
    if (const cudaError_t status = heuristics(top, 1, &results); status != cudaSuccess)
      return status;
    made.algo = results.front().algo;
  }
  *plan = made;
  if (!sure) return cudaSuccess;  // a kernel could not be asked about: the next call asks again
  const std::unique_lock<std::shared_mutex> lock(plans().mutex);
  // Bounded by shapes x classes; a process serves few models, so nothing is ever dropped.
  plans().table.insert_or_assign(key, made);
  return cudaSuccess;
}

// The product, and after it whatever its kernel does not fuse.
cudaError_t run_plan(const Plan& plan, const Gemm& gemm, const GemmNorm* norm, void* scratch,
                     void* workspace, Launch launch) {
  if (plan.ours()) return gemm_sm90(plan.sm90, gemm, norm, scratch, workspace, launch);
  Gemm product = gemm;
  if (norm != nullptr) product.output = scratch;
  cudaError_t status = cublaslt_linear(product, plan.algo, workspace, launch.stream);
  if (status == cudaSuccess && gemm.activation != Activation::kNone)
    status = bias_activation(product.output, nullptr, nullptr, gemm.activation, gemm.rows, gemm.n,
                             gemm.dtype, product.output, nullptr, launch);
  if (status == cudaSuccess && norm != nullptr)
    status = residual_layer_norm(scratch, nullptr, nullptr, norm->gamma, norm->beta, norm->eps,
                                 gemm.rows, gemm.n, gemm.dtype, gemm.output, norm->live_rows,
                                 launch, norm->narrow);
  return status;
}

cudaError_t check(const Gemm& gemm) {
  if (gemm.rows < 0 || gemm.n <= 0 || gemm.k <= 0 ||
      (gemm.activation != Activation::kNone && gemm.residual != nullptr))
    return cudaErrorInvalidValue;
  const bool narrow = gemm.narrow() && gemm.input.dtype == DType::kE4M3 &&
                      gemm.dtype == DType::kFloat16 && gemm.weight.scale != nullptr;
  if (!narrow && (gemm.input.dtype != gemm.dtype || gemm.weight.dtype != gemm.dtype ||
                  gemm.weight.scale != nullptr || gemm.output_step != nullptr)) {
    set_failure("no kernel here multiplies operands of several types or scaled ones");
    return cudaErrorNotSupported;
  }
  if (gemm.dtype == DType::kBFloat16) {
    const DeviceProperties* device = nullptr;
    if (const cudaError_t status = current_device(&device); status != cudaSuccess) return status;
    if (device->major < 8) {
      set_failure("bfloat16 needs compute capability 8.0 or later, and " +
                  std::string(device->all.name) + " has " + std::to_string(device->major) + "." +
                  std::to_string(device->minor) + "; trace the model in float16");
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

cudaError_t run(const Gemm& gemm, const GemmNorm* norm, void* scratch, void* workspace,
                Launch launch) {
  if (const cudaError_t status = check(gemm); status != cudaSuccess) return status;
  if (gemm.rows == 0) return cudaSuccess;
  Plan plan;
  if (gemm.batch_invariant) {
    plan.sm90 = gemm_sm90_invariant(gemm);
    if (!plan.ours()) {
      set_failure(
          "results that do not depend on the batch (batch_invariant, FT_HANDLER_BATCH_INVARIANT) "
          "need an sm_90 GPU and a float16 or bfloat16 model whose widths are multiples of 8");
      return cudaErrorNotSupported;
    }
  } else if (const cudaError_t status = find_plan(gemm, norm, &plan); status != cudaSuccess) {
    return status;
  }
  return run_plan(plan, gemm, norm, scratch, workspace, launch);
}

// A plan as text: "sm90:<name>", "cublaslt:<version>:<hex of the algorithm>", or "cublaslt" alone:
// that library's own choice, whatever its version.
std::string to_text(const Plan& plan) {
  if (plan.ours()) return "sm90:" + gemm_sm90_name(plan.sm90);
  std::string text = "cublaslt:" + std::to_string(cublaslt()->version()) + ":";
  std::array<unsigned char, sizeof(cublasLtMatmulAlgo_t)> bytes;
  std::memcpy(bytes.data(), &plan.algo, bytes.size());
  char hex[3];
  for (const unsigned char b : bytes) {
    std::snprintf(hex, sizeof hex, "%02x", b);
    text += hex;
  }
  return text;
}

bool from_text(const std::string& text, Plan* plan) {
  if (text.rfind("sm90:", 0) == 0) {
    plan->sm90 = gemm_sm90_named(text.substr(5));
    if (plan->ours()) return true;
    set_failure("this build has no GEMM kernel \"" + text.substr(5) + "\"; tune again");
    return false;
  }
  if (text == "cublaslt") {
    plan->sm90 = {};
    plan->first_guess = true;
    return true;
  }
  const CublasLt* lt = cublaslt();
  if (lt == nullptr) return false;
  const std::string prefix = "cublaslt:" + std::to_string(lt->version()) + ":";
  if (text.rfind(prefix, 0) != 0 ||
      text.size() != prefix.size() + 2 * sizeof(cublasLtMatmulAlgo_t) ||
      text.find_first_not_of("0123456789abcdef", prefix.size()) != std::string::npos) {
    set_failure("a tuned plan is not for cuBLASLt " + std::to_string(lt->version()) +
                "; tune again");
    return false;
  }
  std::array<unsigned char, sizeof(cublasLtMatmulAlgo_t)> bytes;
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] =
        static_cast<unsigned char>(std::stoi(text.substr(prefix.size() + 2 * i, 2), nullptr, 16));
  std::memcpy(&plan->algo, bytes.data(), bytes.size());
  plan->sm90 = {};
  return true;
}

}  // namespace

size_t gemm_workspace_bytes() { return kWorkspaceBytes; }

bool narrow_gemm_supported() { return gemm_sm90_enabled(); }

int gemm_row_class(int rows) {
  if (rows <= 32) return 32;
  // 32 classes an octave: tiles fit the rows, and what fits a class's largest must fit the rest.
  int64_t step = 16;
  while (step * 64 < rows) step *= 2;
  const int64_t most = std::numeric_limits<int>::max();
  return static_cast<int>(std::min((rows + step - 1) / step * step, most));
}

cudaError_t linear(const Gemm& gemm, void* workspace, Launch launch) {
  if (gemm.activation == Activation::kNone || gemm.residual == nullptr || gemm.narrow())
    return run(gemm, nullptr, nullptr, workspace, launch);
  // No epilogue adds after it activated.
  Gemm product = gemm;
  product.activation = Activation::kNone;
  product.residual = nullptr;
  const cudaError_t status = run(product, nullptr, nullptr, workspace, launch);
  if (status != cudaSuccess || gemm.rows == 0) return status;
  return bias_activation(gemm.output, nullptr, gemm.residual, gemm.activation, gemm.rows, gemm.n,
                         gemm.dtype, gemm.output, nullptr, launch);
}

cudaError_t linear_layer_norm(const Gemm& gemm, const GemmNorm& norm, void* scratch,
                              void* workspace, Launch launch) {
  return run(gemm, &norm, scratch, workspace, launch);
}

cudaError_t gemm_candidates(const Gemm& gemm, const GemmNorm* norm,
                            std::vector<std::string>* plans) {
  if (const cudaError_t status = check(gemm); status != cudaSuccess) return status;
  plans->clear();
  Plan plan;
  for (const Sm90Plan sm90 : gemm_sm90_plans(gemm, norm)) {
    plan.sm90 = sm90;
    plans->push_back(to_text(plan));
  }
  plan.sm90 = {};
  if (gemm.narrow()) return cudaSuccess;
  std::vector<cublasLtMatmulHeuristicResult_t> results;
  if (const cudaError_t status = heuristics(gemm, 8, &results); status != cudaSuccess)
    return status;
  for (const auto& result : results) {
    if (result.state != CUBLAS_STATUS_SUCCESS) continue;
    plan.algo = result.algo;
    plans->push_back(to_text(plan));
  }
  return cudaSuccess;
}

cudaError_t load_gemm_plan(const GemmKey& key, const std::string& text) {
  Plan plan;
  if (!from_text(text, &plan)) return cudaErrorInvalidValue;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const std::unique_lock<std::shared_mutex> lock(plans().mutex);
  const auto place = [&](Activation activation) {
    PlanKey at{key, device, true, false, 16};
    at.key.activation = activation;
    plans().table.insert_or_assign(at, plan);
    at.copies = true;
    if (key.norm) plans().table.insert_or_assign(at, plan);
  };
  place(key.activation);
  if (key.activation == Activation::kGelu) {
    for (const auto other : {Activation::kGeluTanh, Activation::kRelu, Activation::kSilu})
      place(other);
  }
  return cudaSuccess;
}

}  // namespace ft::cuda
