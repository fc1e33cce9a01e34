#include "kernels/cuda/cublaslt.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <string>
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
  if (const char* named = std::getenv("FT_HANDLER_CUBLASLT")) names.emplace_back(named);
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
  static const Opened opened = open_library();
  if (opened.failure.empty()) return &opened.table;
  set_failure(opened.failure);
  return nullptr;
}

cublasLtHandle_t cublaslt_handle() {
  static std::mutex mutex;
  static std::array<cublasLtHandle_t, 64> handles{};
  const CublasLt* library = cublaslt();
  if (library == nullptr) return nullptr;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 ||
      device >= static_cast<int>(handles.size())) {
    set_failure("no current device for cuBLASLt");
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (handles[device] == nullptr) {
    if (const cublasStatus_t status = library->create(&handles[device]);
        status != CUBLAS_STATUS_SUCCESS) {
      handles[device] = nullptr;
      set_failure("cublasLtCreate failed with status " + std::to_string(status));
      return nullptr;
    }
  }
  return handles[device];
}

}  // namespace ft::cuda
