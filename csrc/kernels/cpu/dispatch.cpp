// Picks the instruction set and schedules its serial kernels over threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/cpu/isa.h"

namespace ft::cpu {
namespace {

// ---- instruction sets --------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(FT_EMULATE_ISAS)
// Newer than the names that every compiler knows.
bool avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

// Whether there are AMX tiles of bfloat16 and int8 and the kernel lets this process use them: their
// state is too large to be saved for every process, so Linux wants to be asked.
bool amx_usable() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return (d & kBf16) && (d & kTile) && (d & kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> available() {
#if defined(FT_EMULATE_ISAS)  // tests: everything, compiled for a processor that lacks it
  return {&kAmx, &kAvx512Bf16, &kAvx512Vnni, &kAvx512, &kAvx2Vnni, &kAvx2, &kPortable};
#else
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (bf16 && amx_usable()) found.push_back(&kAmx);
  // Intel's vdpbf16ps runs at half the rate of its AVX-512 FMA, AMD's at twice that of theirs.
  const bool slow = __builtin_cpu_is("intel");
  if (bf16 && !slow) found.push_back(&kAvx512Bf16);
  if (vnni) found.push_back(&kAvx512Vnni);
  if (avx512) found.push_back(&kAvx512);
  if (bf16 && slow) found.push_back(&kAvx512Bf16);
  if (avx2 && avx_vnni()) found.push_back(&kAvx2Vnni);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
#endif
}

const Kernels& choose() {
  const std::vector<const Kernels*> found = available();
  const char* wanted = std::getenv("FT_HANDLER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *found.front();
  for (const Kernels* k : found) {
    if (std::strcmp(k->name, wanted) == 0) return *k;
  }
  throw std::runtime_error("FT_HANDLER_CPU_ISA must be one of " + isas_available() +
                           " on this processor, is " + wanted);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

// ---- threads -----------------------------------------------------------------------------------

// f(task, worker) for every task in [0, tasks); workers take the next task as they come free, so a
// thread that the system holds up delays nothing but its own task.
template <typename Function>
void for_tasks(const Threads& threads, int64_t tasks, const Function& f) {
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, tasks));
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
    return;
  }
  struct Context {
    const Function& f;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context{f, tasks, {}};
  threads.launch(
      workers,
      [](void* opaque, int worker) {
        auto& c = *static_cast<Context*>(opaque);
        for (int64_t t = c.next.fetch_add(1); t < c.tasks; t = c.next.fetch_add(1)) c.f(t, worker);
      },
      &context);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(m0, m1, worker) over blocks of rows.
template <typename Function>
void for_rows(const Threads& threads, int64_t rows, int64_t block, const Function& f) {
  for_tasks(threads, ceil_div(rows, block), [&](int64_t task, int worker) {
    f(task * block, std::min(rows, (task + 1) * block), worker);
  });
}

// ---- workspace ---------------------------------------------------------------------------------

constexpr int64_t kAlign = 64;
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// Hands out pieces of the workspace; with no memory behind it, only counts them.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T = void>
  T* take(int64_t bytes) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += aligned(bytes);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// One piece for each worker.
struct Scratch {
  char* memory;
  int64_t stride;
  template <typename T = void>
  T* of(int worker) const {
    return reinterpret_cast<T*>(memory + worker * stride);
  }
};

Scratch take_scratch(Arena& arena, const Threads& threads, int64_t bytes) {
  // A cache line pair between workers: neighbours must not share what the prefetcher fetches.
  const int64_t stride = aligned(bytes) + 2 * kAlign;
  return {arena.take<char>(stride * threads.count), stride};
}

// Leading dimension of an activation: whole vectors, and off the powers of two that would put the
// rows of a tile on the same cache sets.
int64_t leading(int64_t width) { return ceil_div(width, 32) * 32 + 32; }

const float* as_float(Operand array, int64_t count, Arena& arena, bool fill) {
  if (array.dtype == DType::kFloat32) return static_cast<const float*>(array.data);
  float* out = arena.take<float>(count * 4);
  if (fill && array.data) {
    kernels().convert(array.data, array.dtype, out, DType::kFloat32, count);
  }
  return array.data || !fill ? out : nullptr;
}

const BlobHeader& header(const void* blob) { return *static_cast<const BlobHeader*>(blob); }

const BlobLayer* blob_layers(const void* blob) {
  return reinterpret_cast<const BlobLayer*>(static_cast<const char*>(blob) + kBlobHeader);
}

// Where the panels of a blob begin.
int64_t first_layer(int64_t layers) {
  return kBlobHeader + aligned(layers * static_cast<int64_t>(sizeof(BlobLayer)));
}

// One layer's weight, or the one that all layers share. A quantised one begins with its scales.
Operand layer_of(const void* blob, int64_t layer) {
  const BlobLayer& l = blob_layers(blob)[layer % header(blob).layers];
  const void* data = static_cast<const char*>(blob) + l.offset;
  return {data, l.dtype, l.dtype == DType::kInt8 ? static_cast<const float*>(data) : nullptr};
}

// f(layer, offset, dtype, index among the layers of its kind) for every layer of a weight; returns
// the blob's size.
template <typename Function>
int64_t for_layers(const LayeredWeight& w, const Function& f) {
  const int64_t layers = w.kept_count + w.quantized_count;
  int64_t offset = first_layer(layers), kept = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool keep =
        kept < w.kept_count && (w.kept_layers == nullptr || w.kept_layers[kept] == layer);
    const DType dtype = keep ? w.kept.dtype : DType::kInt8;
    f(layer, offset, dtype, keep ? kept : layer - kept);
    kept += keep;
    offset += kernels().layer_bytes(dtype, w.n, w.k);
  }
  return offset;
}

// A parameter in float32 [width] for each layer, or one that all share.
struct Vectors {
  const float* first;
  int64_t layers, width;
  const float* of(int64_t layer) const { return first + layer % layers * width; }
};

// A relative bias laid out for attention over sequences of up to `longest` tokens: a row a head, in
// which every distance has its element and none has to be clamped.
struct Distances {
  const float* rows = nullptr;
  int64_t ld = 0, longest = 0;
  const float* of(int64_t head) const {
    return rows ? rows + head * ld + std::max<int64_t>(longest - 1, 0) : nullptr;
  }
};

Distances spread_bias(const RelativeBias& bias, int64_t heads, int64_t longest, Arena& arena,
                      bool run) {
  if (bias.table.data == nullptr) return {};
  constexpr int64_t kVector = 16;  // of the widest instruction set
  const int64_t ld = 2 * longest + kVector, most = bias.columns / 2;
  const float* table = as_float(bias.table, heads * bias.columns, arena, run);
  float* rows = arena.take<float>(heads * ld * 4);
  for (int64_t head = 0; run && head < heads; ++head) {
    const float* from = table + head * bias.columns + most;
    for (int64_t i = 0; i < ld; ++i) {
      rows[head * ld + i] = from[std::clamp(i - (longest - 1), -most, most)] * kLog2E;
    }
  }
  return {rows, ld, longest};
}

// ---- stages ------------------------------------------------------------------------------------

constexpr int64_t kRowsPerTask = 16;

// Room for an input of any of these depths.
QuantisedRows take_quantised(Arena& arena, int64_t rows, const std::vector<int64_t>& depths) {
  int64_t bytes = 0, slices = 0;
  for (int64_t k : depths) {
    slices = std::max(slices, slice_count(k));
    bytes = std::max(bytes, slice_count(k) * (rows + kSpareRows) * kernels().quantised_row(k));
  }
  void* data = arena.take(bytes);
  return {data, arena.take<float>(slices * rows * 4), rows};
}

// `quantised`: room for the input in int8, where the weight is.
void run_gemm(Gemm g, int64_t tokens, const QuantisedRows& quantised, const Scratch& scratch,
              const Threads& threads) {
  const Kernels& k = kernels();
  if (g.weight.dtype == DType::kInt8) {
    // Once, not in each task that reads the rows.
    const int64_t block = std::min(kRowsPerTask, ceil_div(tokens, threads.count));
    for_rows(threads, tokens, block,
             [&](int64_t m0, int64_t m1, int) { k.quantise(g.a, g.lda, g.k, m0, m1, quantised); });
    g.quantised = quantised;
  }
  const Tiling tiling = k.tiling(g.weight.dtype);
  const int64_t panels = ceil_div(g.n, tiling.nr);
  const int64_t blocks = ceil_div(tokens, tiling.row_block);
  // Wide tasks reuse their rows most; about 8 a thread, and as many for each, level the threads.
  const int64_t least = ceil_div(g.n, kPanelColumns);
  int64_t across =
      std::clamp(ceil_div(8 * threads.count, blocks), least, std::max(least, ceil_div(g.n, 64)));
  while (across < panels && blocks * across % threads.count != 0) ++across;
  const int64_t rows = ceil_div(ceil_div(tokens, blocks), tiling.mr) * tiling.mr;
  for_tasks(threads, ceil_div(tokens, rows) * across, [&](int64_t task, int worker) {
    const int64_t m0 = task / across * rows, part = task % across;
    k.gemm(g, m0, std::min(tokens, m0 + rows), panels * part / across, panels * (part + 1) / across,
           scratch.of(worker));
  });
}

void run_attention(Attention a, const Distances& distances, const int32_t* cu_seqlens,
                   int64_t batch, int64_t heads, const Scratch& scratch, const Threads& threads) {
  const Kernels& k = kernels();
  constexpr int64_t kRows = 192;  // query rows of a task: they share one packing of keys and values
  std::vector<std::pair<int64_t, int64_t>> pieces;  // sequence, first row
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < cu_seqlens[b + 1] - cu_seqlens[b]; r += kRows) pieces.push_back({b, r});
  }
  const int64_t es = size_of(a.type), os = size_of(a.out_type);
  for_tasks(threads, static_cast<int64_t>(pieces.size()) * heads, [&](int64_t task, int worker) {
    const auto [b, row] = pieces[task / heads];
    const int64_t head = task % heads, start = cu_seqlens[b];
    Attention one = a;
    one.length = cu_seqlens[b + 1] - start;
    const int64_t in = (start * a.ld + head * a.head_dim) * es;
    one.q = static_cast<const char*>(a.q) + in;
    one.k = static_cast<const char*>(a.k) + in;
    one.v = static_cast<const char*>(a.v) + in;
    one.out = static_cast<char*>(a.out) + (start * a.ldo + head * a.head_dim) * os;
    one.bias = distances.of(head);
    one.row0 = row;
    one.row1 = std::min(one.length, row + kRows);
    k.attention(one, scratch.of(worker));
  });
}

}  // namespace

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

const char* isa_name() { return kernels().name; }

std::string isas_available() {
  std::string names;
  for (const Kernels* k : available()) {
    if (!names.empty()) names += ',';
    names += k->name;
  }
  return names;
}

// ---- weights -----------------------------------------------------------------------------------

int64_t packed_bytes(const LayeredWeight& weight) {
  return for_layers(weight, [](int64_t, int64_t, DType, int64_t) {});
}

void pack_weight(const LayeredWeight& weight, void* blob, const Threads& threads) {
  const Kernels& isa = kernels();
  const int64_t n = weight.n, k = weight.k;
  prefer_large_pages(blob, packed_bytes(weight));
  const int64_t layers = weight.kept_count + weight.quantized_count;
  const BlobHeader h{kBlobMagic, isa.layout, layers, n, k};
  char* const bytes = static_cast<char*>(blob);
  std::memset(blob, 0, first_layer(layers));
  std::memcpy(blob, &h, sizeof(h));
  for_layers(weight, [&](int64_t layer, int64_t offset, DType dtype, int64_t index) {
    const BlobLayer entry{offset, dtype, 0};
    std::memcpy(bytes + kBlobHeader + layer * sizeof(entry), &entry, sizeof(entry));
    const int64_t panels = ceil_div(n, isa.tiling(dtype).nr);
    const int64_t first = index * n * k * size_of(dtype);
    for_tasks(threads, panels, [&](int64_t p, int) {
      if (dtype == DType::kInt8) {
        isa.pack_int8(weight.quantized + first, weight.scale + index * n, n, k, bytes + offset, p,
                      p + 1);
      } else {
        isa.pack(static_cast<const char*>(weight.kept.data) + first, dtype, n, k, bytes + offset, p,
                 p + 1);
      }
    });
  });
}

namespace {

// How large a blob of at least these bytes is by what stands in it, or -1 if that cannot be.
int64_t described_bytes(const void* blob, int64_t bytes) {
  const BlobHeader& h = header(blob);
  constexpr int64_t kEntry = sizeof(BlobLayer);
  if (h.layers < 0 || h.layers > (bytes - kBlobHeader) / kEntry) return -1;
  int64_t offset = first_layer(h.layers);
  for (int64_t layer = 0; layer < h.layers; ++layer) {
    const BlobLayer& l = blob_layers(blob)[layer];
    if (l.offset != offset || l.dtype < DType::kFloat32 || l.dtype > DType::kInt8) return -1;
    offset += kernels().layer_bytes(l.dtype, h.n, h.k);
  }
  return offset;
}

}  // namespace

std::string blob_fault(const void* blob, int64_t bytes) {
  if (bytes < kBlobHeader || header(blob).magic != kBlobMagic) {
    return "is not what prepare_weight returned";
  }
  const BlobHeader& h = header(blob);
  if (h.layout != kernels().layout) {
    return std::string("was prepared for another instruction set than ") + isa_name();
  }
  if (bytes != described_bytes(blob, bytes)) return "has the wrong size for what its header says";
  return "";
}

bool is_packed(const void* blob, int64_t bytes, DType dtype, int64_t layers, int64_t n, int64_t k) {
  if (bytes < kBlobHeader) return false;
  const BlobHeader& h = header(blob);
  if (h.magic != kBlobMagic || h.layout != kernels().layout || h.n != n || h.k != k ||
      bytes != described_bytes(blob, bytes)) {
    return false;
  }
  const BlobLayer* first = blob_layers(blob);
  return layers == std::count_if(first, first + h.layers,
                                 [&](const BlobLayer& l) { return l.dtype == dtype; });
}

// ---- ops ---------------------------------------------------------------------------------------

namespace {

void embedding_plan(const Embeddings& e, int64_t tokens, int64_t hidden, DType out_dtype, void* out,
                    Arena& arena, bool run, const Threads& threads) {
  const float* gamma = as_float(e.gamma, hidden, arena, run);
  const float* beta = as_float(e.beta, hidden, arena, run);
  const Scratch scratch = take_scratch(arena, threads, hidden * 4);
  if (!run) return;
  const EmbedRows rows{&e, hidden, gamma, beta, out, out_dtype, hidden, nullptr, 0};
  for_rows(threads, tokens, kRowsPerTask, [&](int64_t m0, int64_t m1, int worker) {
    kernels().embed(rows, m0, m1, scratch.of<float>(worker));
  });
}

}  // namespace

int64_t embedding_workspace(int64_t hidden, const Threads& threads) {
  return 2 * aligned(hidden * 4) + threads.count * (aligned(hidden * 4) + 2 * kAlign);
}

void embedding_layer_norm(const Embeddings& e, int64_t tokens, int64_t hidden, DType out_dtype,
                          void* out, void* workspace, const Threads& threads) {
  Arena arena(workspace);
  embedding_plan(e, tokens, hidden, out_dtype, out, arena, true, threads);
}

int64_t linear_workspace(const void* blob, int64_t tokens, const Threads& threads) {
  const int64_t n = header(blob).n;
  Arena quantised(nullptr);
  take_quantised(quantised, tokens, {header(blob).k});
  return aligned(n * 4) + aligned(tokens * n * 4) + quantised.used() +
         threads.count * (aligned(kernels().gemm_scratch()) + 2 * kAlign);
}

void linear(const Linear& op, int64_t tokens, void* out, void* workspace, const Threads& threads) {
  const Kernels& isa = kernels();
  const BlobHeader& h = header(op.blob);
  Arena arena(workspace);
  Gemm g{};
  g.weight = layer_of(op.blob, op.layer);
  g.n = h.n;
  g.k = h.k;
  g.a = op.input;
  g.lda = h.k;
  g.bias = as_float(op.bias, h.n, arena, true);
  g.residual = as_float(op.residual, tokens * h.n, arena, true);
  g.ldr = h.n;
  g.activation = op.activation;
  g.out = out;
  g.out_type = op.out_dtype;
  g.ldo = h.n;
  const QuantisedRows quantised = take_quantised(arena, tokens, {h.k});
  run_gemm(g, tokens, quantised, take_scratch(arena, threads, isa.gemm_scratch()), threads);
}

int64_t attention_workspace(int64_t longest, int64_t heads, int64_t head_dim,
                            const RelativeBias& bias, const Threads& threads) {
  Arena arena(nullptr);
  spread_bias(bias, heads, longest, arena, false);
  take_scratch(arena, threads, kernels().attention_scratch(longest, head_dim));
  return arena.used();
}

void varlen_attention(Operand qkv, const RelativeBias& bias, const int32_t* cu_seqlens,
                      int64_t batch, int64_t longest, int64_t heads, int64_t head_dim,
                      DType out_dtype, void* out, void* workspace, const Threads& threads) {
  Arena arena(workspace);
  const int64_t hidden = heads * head_dim, es = size_of(qkv.dtype);
  Attention a{};
  a.q = qkv.data;
  a.k = static_cast<const char*>(qkv.data) + hidden * es;
  a.v = static_cast<const char*>(qkv.data) + 2 * hidden * es;
  a.type = qkv.dtype;
  a.ld = 3 * hidden;
  a.head_dim = head_dim;
  a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  a.out = out;
  a.out_type = out_dtype;
  a.ldo = hidden;
  const Distances distances = spread_bias(bias, heads, longest, arena, true);
  const int64_t bytes = kernels().attention_scratch(longest, head_dim);
  run_attention(a, distances, cu_seqlens, batch, heads, take_scratch(arena, threads, bytes),
                threads);
}

int64_t layer_norm_workspace(int64_t hidden, const Threads& threads) {
  return 3 * aligned(hidden * 4) + threads.count * (aligned(hidden * 4) + 2 * kAlign);
}

void residual_layer_norm(Operand input, Operand bias, Operand residual, Operand gamma, Operand beta,
                         float eps, int64_t tokens, int64_t hidden, DType out_dtype, void* out,
                         void* workspace, const Threads& threads) {
  Arena arena(workspace);
  LayerNormRows l{};
  l.input = input;
  l.bias = bias;
  l.residual = residual;
  l.ld_input = l.ld_residual = l.ldo = l.hidden = hidden;
  l.gamma = as_float(gamma, hidden, arena, true);
  l.beta = as_float(beta, hidden, arena, true);
  l.eps = eps;
  l.out = out;
  l.out_type = out_dtype;
  const Scratch scratch = take_scratch(arena, threads, hidden * 4);
  for_rows(threads, tokens, kRowsPerTask, [&](int64_t m0, int64_t m1, int worker) {
    kernels().layer_norm(l, m0, m1, scratch.of<float>(worker));
  });
}

int64_t bias_activation_workspace(int64_t n, const Threads&) { return aligned(n * 4); }

void bias_activation(Operand input, Operand bias, Activation activation, int64_t tokens, int64_t n,
                     void* out, void* workspace, const Threads& threads) {
  Arena arena(workspace);
  const float* b = as_float(bias, n, arena, true);
  for_rows(threads, tokens, kRowsPerTask, [&](int64_t m0, int64_t m1, int) {
    kernels().activate(input, b, activation, n, out, m0, m1);
  });
}

void segment_pool(Operand input, const int32_t* cu_seqlens, int64_t batch, int64_t hidden,
                  Pooling pooling, float* out, const Threads& threads) {
  const PoolRows rows{input, hidden, pooling};
  for_tasks(threads, batch, [&](int64_t b, int) {
    kernels().pool(rows, cu_seqlens[b], cu_seqlens[b + 1], out + b * hidden);
  });
}

namespace {

// With `run` false, only counts the workspace.
void encoder_plan(const Encoder& op, void* out, Arena& arena, bool run, const Threads& threads) {
  const Kernels& isa = kernels();
  const int64_t t = op.tokens, h = op.hidden, e = op.embedding, i = op.intermediate;
  const int64_t head_dim = h / op.heads;
  const DType f32 = DType::kFloat32;
  // Inputs of GEMMs are kept in the type that they are multiplied in; sums and residuals in
  // float32.
  bool pairs = isa.bf16_dot;
  std::vector<int64_t> depths;  // of what is quantised
  for (const void* blob : {op.projection, op.qkv, op.out, op.up, op.down}) {
    for (int64_t layer = 0; blob && layer < header(blob).layers; ++layer) {
      const DType dtype = blob_layers(blob)[layer].dtype;
      pairs = pairs && (dtype == DType::kBFloat16 || dtype == DType::kInt8);
      if (dtype == DType::kInt8) depths.push_back(header(blob).k);
    }
  }
  const DType act = pairs ? DType::kBFloat16 : f32;
  const int64_t es = size_of(act);
  const int64_t ldh = leading(h), lde = leading(e), ldq = leading(3 * h), ldi = leading(i);
  float* x = arena.take<float>(t * ldh * 4);
  float* y = arena.take<float>(t * ldh * 4);
  char* context = arena.take<char>(t * ldh * es);
  // The embeddings where they are projected, then qkv and the intermediate of each layer.
  char* wide = arena.take<char>(t * std::max({op.projection ? lde : 0, ldq, ldi}) * es);
  void* narrow = pairs ? arena.take(t * ldh * es) : nullptr;  // x once more, for the GEMMs
  const void* input = pairs ? narrow : x;
  const auto vectors = [&](const Stack& stack, int64_t width) {
    return Vectors{as_float(stack.first, stack.layers * width, arena, run), stack.layers, width};
  };
  const Vectors qkv_bias = vectors(op.qkv_bias, 3 * h), out_bias = vectors(op.out_bias, h);
  const Vectors up_bias = vectors(op.up_bias, i), down_bias = vectors(op.down_bias, h);
  const Vectors g1 = vectors(op.ln1_gamma, h), b1 = vectors(op.ln1_beta, h);
  const Vectors g2 = vectors(op.ln2_gamma, h), b2 = vectors(op.ln2_beta, h);
  const float* eg = as_float(op.embeddings.gamma, e, arena, run);
  const float* eb = as_float(op.embeddings.beta, e, arena, run);
  const float* projection_bias = as_float(op.projection_bias, h, arena, run);
  const Distances distances = spread_bias(op.relative_bias, op.heads, op.longest, arena, run);
  const QuantisedRows quantised = take_quantised(arena, t, depths);
  const int64_t bytes =
      std::max({h * 4, e * 4, isa.gemm_scratch(), isa.attention_scratch(op.longest, head_dim)});
  const Scratch scratch = take_scratch(arena, threads, bytes);
  if (!run) return;

  const Activation none = Activation::kNone;
  const auto gemm = [&](const void* a, int64_t lda, const void* blob, int64_t layer,
                        const float* bias, const float* residual, Activation activation, void* c,
                        DType type, int64_t ldc) {
    const BlobHeader& b = header(blob);
    Gemm g{};
    g.a = {a, act};
    g.lda = lda;
    g.weight = layer_of(blob, layer);
    g.n = b.n;
    g.k = b.k;
    g.bias = bias;
    g.residual = residual;
    g.ldr = ldh;
    g.activation = activation;
    g.out = c;
    g.out_type = type;
    g.ldo = ldc;
    run_gemm(g, t, quantised, scratch, threads);
  };
  const auto norm = [&](const float* gamma, const float* beta, void* to, DType type, int64_t ld,
                        void* copy) {
    LayerNormRows l{};
    l.input = {y, f32};
    l.ld_input = ldh;
    l.hidden = h;
    l.gamma = gamma;
    l.beta = beta;
    l.eps = op.eps;
    l.out = to;
    l.out_type = type;
    l.ldo = ld;
    l.out_bf16 = copy;
    l.ld_bf16 = ldh;
    for_rows(threads, t, kRowsPerTask, [&](int64_t m0, int64_t m1, int worker) {
      isa.layer_norm(l, m0, m1, scratch.of<float>(worker));
    });
  };
  const auto embed = [&](void* to, DType type, int64_t ld, void* copy) {
    const EmbedRows rows{&op.embeddings, e, eg, eb, to, type, ld, copy, ldh};
    for_rows(threads, t, kRowsPerTask, [&](int64_t m0, int64_t m1, int worker) {
      isa.embed(rows, m0, m1, scratch.of<float>(worker));
    });
  };
  // x as it is, into another type.
  const auto copy = [&](void* to, DType type, int64_t ld) {
    for_rows(threads, t, kRowsPerTask, [&](int64_t m0, int64_t m1, int) {
      for (int64_t m = m0; m < m1; ++m) {
        isa.convert(x + m * ldh, f32, static_cast<char*>(to) + m * ld * size_of(type), type, h);
      }
    });
  };
  const bool no_layers = op.layers == 0;
  if (op.projection) {
    embed(wide, act, lde, nullptr);
    gemm(wide, lde, op.projection, 0, projection_bias, nullptr, none, x, f32, ldh);
    if (no_layers) {
      copy(out, op.out_dtype, h);
    } else if (pairs) {
      copy(narrow, act, ldh);
    }
  } else if (no_layers) {
    embed(out, op.out_dtype, h, nullptr);
  } else {
    embed(x, f32, ldh, narrow);
  }
  for (int64_t layer = 0; layer < op.layers; ++layer) {
    gemm(input, ldh, op.qkv, layer, qkv_bias.of(layer), nullptr, none, wide, act, ldq);
    Attention a{};
    a.q = wide;
    a.k = wide + h * es;
    a.v = wide + 2 * h * es;
    a.type = act;
    a.ld = ldq;
    a.head_dim = head_dim;
    a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
    a.out = context;
    a.out_type = act;
    a.ldo = ldh;
    run_attention(a, distances, op.cu_seqlens, op.batch, op.heads, scratch, threads);
    gemm(context, ldh, op.out, layer, out_bias.of(layer), x, none, y, f32, ldh);
    norm(g1.of(layer), b1.of(layer), x, f32, ldh, narrow);
    gemm(input, ldh, op.up, layer, up_bias.of(layer), nullptr, op.activation, wide, act, ldi);
    gemm(wide, ldi, op.down, layer, down_bias.of(layer), x, none, y, f32, ldh);
    if (layer + 1 < op.layers) {
      norm(g2.of(layer), b2.of(layer), x, f32, ldh, narrow);
    } else {
      norm(g2.of(layer), b2.of(layer), out, op.out_dtype, h, nullptr);
    }
  }
}

}  // namespace

int64_t encoder_workspace(const Encoder& op, const Threads& threads) {
  Arena arena(nullptr);
  encoder_plan(op, nullptr, arena, false, threads);
  return arena.used();
}

void encoder(const Encoder& op, void* out, void* workspace, const Threads& threads) {
  Arena arena(workspace);
  encoder_plan(op, out, arena, true, threads);
}

}  // namespace ft::cpu
