// Kernels for the CPU, called through ctypes with plain pointers: no torch, no Python headers.
//
// Compiled for the machine it runs on (-march=native), so loops over `float` become its widest
// vectors. Not with -ffast-math: NaN must stay NaN, the engine looks for it.

#include "attention_bf16.h"
#include "decoder.h"
#include "products.h"
#include "rows.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; fewer are done before a thread wakes up

template <typename T>
void attend(const Layer& l, const Batch& b, T* keys, T* values, const Strided& q, const Strided& k, const Strided& v,
            const float* sinks, T* out) {
  together(b.num_threads, [&](Team team) {
    // An item reads only what it wrote itself or what earlier passes wrote, so nobody waits.
    for (int64_t item = team.rank; item < b.num_rows * l.kv_heads; item += team.size) {
      const int64_t row = item / l.kv_heads, head = item % l.kv_heads;
      write_row(l, b, row, head, keys, values, k, v);
      if (b.attended[row]) attend_row(l, b, row, head, keys, values, q, sinks, out);
    }
  });
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps, int64_t num_threads) {
  together(rows * width > WORTH_THREADS ? num_threads : 1, [&](Team team) {
    for (int64_t row = team.first(rows); row < team.last(rows); row++)
      norm_row(x + row * width, weight, out + row * width, width, eps);
  });
}

template <typename T>
void silu_mul_rows(const T* gates_ups, T* out, int64_t rows, int64_t width, int64_t num_threads) {
  together(rows * width > WORTH_THREADS ? num_threads : 1, [&](Team team) {
    for (int64_t row = team.first(rows); row < team.last(rows); row++)
      silu_mul(gates_ups + row * 2 * width, gates_ups + (row * 2 + 1) * width, out + row * width, width);
  });
}

}  // namespace

extern "C" {

// What these kernels multiply bf16 by: 0 nothing, 1 vectors, 2 tiles too.
int products() {
#if defined(HAS_TILES)
  return 2;
#elif defined(HAS_VECTORS)
  return 1;
#else
  return 0;
#endif
}

// Asks the system for this process's tiles, before the first product; 0: they are not to be had.
int request_tiles() {
#ifdef HAS_TILES
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return 0;
#endif
}

// Ends the threads that wait for this one's next call. With more of them than cores OpenMP no longer
// spins where a team meets, but sleeps, in every team of the process.
void end_team() { omp_pause_resource_all(omp_pause_hard); }

void advise_large_pages(void* memory, int64_t bytes) { use_large_pages(memory, bytes); }

// Reads memory once, by two streams a thread, which is the fastest way; returns nothing of meaning.
int64_t read_memory(const char* memory, int64_t bytes, int64_t num_threads) {
  constexpr int64_t PART = 1 << 16, LINE = 8, AHEAD_BYTES = 1024;
  std::vector<int64_t> sums(num_threads * LINE, 0);
  together(num_threads, [&](Team team) {
    int64_t sum[2 * LINE] = {};
    for (int64_t part = team.first(bytes / (2 * PART)); part < team.last(bytes / (2 * PART)); part++) {
      const char *first = memory + 2 * PART * part, *second = first + PART;
      for (int64_t at = 0; at < PART; at += 8 * LINE)
        for (const char* from : {first + at, second + at}) {
          __builtin_prefetch(from + AHEAD_BYTES);
          for (int64_t i = 0; i < LINE; i++) sum[(from >= second) * LINE + i] += ((const int64_t*)from)[i];
        }
    }
    for (int64_t i = 0; i < 2 * LINE; i++) sums[team.rank * LINE] += sum[i];
  });
  for (int64_t i = 1; i < num_threads; i++) sums[0] += sums[i * LINE];
  return sums[0];
}

void attend_f32(const Layer* l, const Batch* b, float* keys, float* values, const Strided* q, const Strided* k,
                const Strided* v, const float* sinks, float* out) {
  attend(*l, *b, keys, values, *q, *k, *v, sinks, out);
}
void attend_bf16(const Layer* l, const Batch* b, bf16* keys, bf16* values, const Strided* q, const Strided* k,
                 const Strided* v, const float* sinks, bf16* out) {
  attend(*l, *b, keys, values, *q, *k, *v, sinks, out);
}

void rms_norm_f32(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps, int64_t num_threads) {
  rms_norm(x, weight, out, rows, width, eps, num_threads);
}
void rms_norm_bf16(const bf16* x, const bf16* weight, bf16* out, int64_t rows, int64_t width, float eps, int64_t num_threads) {
  rms_norm(x, weight, out, rows, width, eps, num_threads);
}
void silu_mul_f32(const float* gate_up, float* out, int64_t rows, int64_t width, int64_t num_threads) {
  silu_mul_rows(gate_up, out, rows, width, num_threads);
}
void silu_mul_bf16(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int64_t num_threads) {
  silu_mul_rows(gate_up, out, rows, width, num_threads);
}

#ifdef HAS_VECTORS
void pack_linear(const bf16* weight, bf16* packed, int64_t N, int64_t K, int64_t num_threads) {
  together(num_threads, [&](Team team) { pack(team, weight, packed, N, K); });
}

void linear(const Linear* l, const bf16* x, bf16* out, int64_t M, int64_t num_threads) {
  bf16* tiles = scratch<bf16, 0>(tiles_size(*l, M));
  together(num_threads, [&](Team team) { multiply(team, x, *l, out, M, tiles); });
}

// `count` layers that follow each other, over all tokens of the batch, whose rows are all attended:
// x [T, hidden] becomes what the last layer gives. Planes are those of the layers.
void run_layers(const Decoder* decoders, const Layer* layers, bf16* const* keys, bf16* const* values, int64_t count,
                const Batch* b, bf16* x, const bf16* cos, const bf16* sin, int64_t T) {
  const Workspace w(*decoders, T);
  together(b->num_threads, [&](Team team) {
    for (int64_t i = 0; i < count; i++) {
      project(team, decoders[i], x, w.qkv, T, w);
      attend_turned(team, decoders[i], layers[i], *b, keys[i], values[i], w.qkv, cos, sin, w.attended);
      conclude(team, decoders[i], x, w.attended, T, w);
    }
  });
}

// A layer up to its attention: x to qkv [T, heads + 2 kv_heads, head_dim].
void before_attention(const Decoder* d, const bf16* x, const bf16* cos, const bf16* sin, bf16* qkv, int64_t T,
                      int64_t num_threads) {
  const Workspace w(*d, T);
  together(num_threads, [&](Team team) {
    project(team, *d, x, qkv, T, w);
    for (int64_t t = team.first(T); t < team.last(T); t++)
      for (int64_t head = 0; head < d->kv_heads; head++) turn_group(*d, qkv, head, t, t + 1, cos, sin);
  });
}

// And from it on: x and what was attended [T, heads * head_dim] to out [T, hidden].
void after_attention(const Decoder* d, const bf16* x, const bf16* attended, bf16* out, int64_t T, int64_t num_threads) {
  std::memcpy(out, x, T * d->hidden() * sizeof(bf16));
  const Workspace w(*d, T);
  together(num_threads, [&](Team team) { conclude(team, *d, out, attended, T, w); });
}
#endif
}
