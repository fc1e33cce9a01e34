#include "kernels/cuda/cublaslt.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/runtime.h"

namespace ft::cuda {
namespace {

struct Opened {
  CublasLt table;
  std::string failure;
};

template <typename Function>
void resolve(void* library, const char* symbol, Function& function, std::string& failure) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function == nullptr && failure.empty()) failure = std::string("cuBLASLt lacks ") + symbol;
}

Opened open_library() {
  Opened opened;
  std::vector<std::string> names;
  // The major version this was compiled against: its structures must match.
  const std::string soname = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  const char* named = std::getenv("FT_HANDLER_CUBLASLT");
  if (named != nullptr && *named != '\0') names.emplace_back(named);
  names.push_back(soname);
  void* library = nullptr;
  std::string tried;
  for (const std::string& name : names) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    const char* why = dlerror();
    tried += (tried.empty() ? "" : "; ") + std::string(why == nullptr ? name : why);
  }
  if (library == nullptr) {
    opened.failure = "cannot open " + soname + ", which torch's CUDA build brings (" + tried +
                     "); FT_HANDLER_CUBLASLT may name the file";
    return opened;
  }
  CublasLt& t = opened.table;
  std::string& failure = opened.failure;
  resolve(library, "cublasLtCreate", t.create, failure);
  resolve(library, "cublasLtMatmul", t.matmul, failure);
  resolve(library, "cublasLtMatmulDescInit_internal", t.desc_init, failure);
  resolve(library, "cublasLtMatmulDescSetAttribute", t.desc_set, failure);
  resolve(library, "cublasLtMatrixLayoutInit_internal", t.layout_init, failure);
  resolve(library, "cublasLtMatmulPreferenceInit_internal", t.preference_init, failure);
  resolve(library, "cublasLtMatmulPreferenceSetAttribute", t.preference_set, failure);
  resolve(library, "cublasLtMatmulAlgoGetHeuristic", t.heuristic, failure);
  resolve(library, "cublasLtMatmulAlgoCheck", t.algo_check, failure);
  resolve(library, "cublasLtGetVersion", t.version, failure);
  return opened;
}

}  // namespace

const CublasLt* cublaslt() {
  static std::mutex mutex;
  static std::atomic<const CublasLt*> known{nullptr};
  if (const CublasLt* found = known.load(std::memory_order_acquire)) return found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const CublasLt* found = known.load(std::memory_order_relaxed)) return found;
  Opened opened = open_library();
  if (!opened.failure.empty()) {
    set_failure(std::move(opened.failure));
    return nullptr;
  }
  // Never freed: threads may run on while the process exits.
  const auto* table = new CublasLt(opened.table);
  known.store(table, std::memory_order_release);
  return table;
}

cublasLtHandle_t cublaslt_handle() {
  static PerDevice<cublasLtHandle_t> handles;
  const CublasLt* library = cublaslt();
  if (library == nullptr) return nullptr;
  int device = 0;
  const cublasLtHandle_t* handle = nullptr;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) {
    set_failure("no current device for cuBLASLt");
    return nullptr;
  }
  status = handles.get(device, &handle, [&](cublasLtHandle_t& made) {
    const cublasStatus_t created = library->create(&made);
    if (created == CUBLAS_STATUS_SUCCESS) return cudaSuccess;
    set_failure("cublasLtCreate failed with status " + std::to_string(created));
    return cudaErrorUnknown;
  });
  return status == cudaSuccess ? *handle : nullptr;
}

}  // namespace ft::cuda
