// Kernels for the CPU, called through ctypes with plain pointers: no torch, no Python headers.
//
// Compiled for the machine it runs on (-march=native), so loops over `float` become its widest
// vectors. Not with -ffast-math: NaN must stay NaN, the engine looks for it.
//
// bf16 is the upper half of a float. A packed weight interleaves 32 outputs, two inputs at a time,
// which is how the bf16 instructions read it, and one stream for the memory:
//
//     weight [N, K]  ─▶  packed [N / 32][K / 2][32][2]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  to->bits = uint16_t((x != x ? bits | 0x400000 : rounded) >> 16);
}
template <typename T>
inline float round_to(float x) {
  T y;
  store(&y, x);
  return load(y);
}

// exp without a call, so that loops over it become vectors; 2 ulp, NaN stays NaN.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// ---------------------------------------------------------------------------- attention

constexpr int BLOCK = 16;

struct Layer {
  int64_t kv_heads, group, head_dim, value_dim, num_slots, window;  // window 0: none
  float scaling, softcap;                                           // softcap 0: none
};

struct Batch {
  int64_t num_rows, num_threads;
  const int64_t* offsets;        // first token of a row in the ragged batch
  const int64_t* starts;         // its position in the text
  const int64_t* lengths;        // new tokens of a row
  const int32_t* const* tables;  // block ids
  const uint8_t* attended;       // 0: only the row's keys and values are written
};

struct Strided {
  const void* data;
  int64_t token, head;  // strides in elements; the last dimension is dense
};

template <typename T>
void write_row(const Layer& l, const Batch& b, int64_t row, int64_t head, T* keys, T* values,
               const Strided& k, const Strided& v) {
  for (int64_t i = 0; i < b.lengths[row]; i++) {
    const int64_t position = b.starts[row] + i, token = b.offsets[row] + i;
    const int64_t slot = int64_t(b.tables[row][position / BLOCK]) * BLOCK + position % BLOCK;
    const int64_t at = head * l.num_slots + slot;
    std::memcpy(keys + at * l.head_dim, (const T*)k.data + token * k.token + head * k.head,
                l.head_dim * sizeof(T));
    std::memcpy(values + at * l.value_dim, (const T*)v.data + token * v.token + head * v.head,
                l.value_dim * sizeof(T));
  }
}

// Attention of one row and one key/value head over its blocks, by online softmax. The queries are
// the row's new tokens times the heads of the group.
template <typename T>
void attend_row(const Layer& l, const Batch& b, int64_t row, int64_t head, const T* keys,
                const T* values, const Strided& q, const float* sinks, T* out) {
  const int64_t D = l.head_dim, V = l.value_dim, G = l.group, S = b.lengths[row];
  const int64_t Q = G * S, heads = l.kv_heads * G, start = b.starts[row], end = start + S;
  static thread_local std::vector<float> scratch;
  const int64_t needed = Q * (D + V + BLOCK + 2) + BLOCK * (D + V);
  if (int64_t(scratch.size()) < needed) scratch.resize(needed);
  float* query = scratch.data();  // [Q, D], scaled
  float* acc = query + Q * D;     // [Q, V]
  float* probs = acc + Q * V;     // [Q, BLOCK]
  float* top = probs + Q * BLOCK;
  float* total = top + Q;
  float* key = total + Q;       // [BLOCK, D]
  float* value = key + BLOCK * D;  // [BLOCK, V]

  for (int64_t s = 0; s < S; s++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t i = s * G + g;
      const T* from = (const T*)q.data + (b.offsets[row] + s) * q.token + (head * G + g) * q.head;
      for (int64_t d = 0; d < D; d++) query[i * D + d] = load(from[d]) * l.scaling;
      // A sink is one more key that takes probability and gives nothing.
      top[i] = sinks ? sinks[head * G + g] : -std::numeric_limits<float>::infinity();
      total[i] = sinks ? 1.0f : 0.0f;
      std::fill(acc + i * V, acc + (i + 1) * V, 0.0f);
    }

  const int64_t first = l.window ? std::max<int64_t>(0, start - l.window + 1) : 0;
  for (int64_t from = first / BLOCK * BLOCK; from < end; from += BLOCK) {
    const int64_t slot = int64_t(b.tables[row][from / BLOCK]) * BLOCK, n = std::min<int64_t>(BLOCK, end - from);
    const T* block_keys = keys + (head * l.num_slots + slot) * D;
    const T* block_values = values + (head * l.num_slots + slot) * V;
    for (int64_t i = 0; i < n * D; i++) key[i] = load(block_keys[i]);
    for (int64_t i = 0; i < n * V; i++) value[i] = load(block_values[i]);
    for (int64_t i = 0; i < Q; i++) {
      const int64_t position = start + i / G;
      const int64_t low = l.window ? std::max<int64_t>(0, position - l.window + 1 - from) : 0;
      const int64_t high = std::min<int64_t>(n, position + 1 - from);
      if (low >= high) continue;
      float* p = probs + i * BLOCK;
      const float* x = query + i * D;
      for (int64_t j = 0; j < n; j++) {
        const float* y = key + j * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; d++) sum += x[d] * y[d];
        p[j] = sum;
      }
      if (l.softcap != 0.0f)
        for (int64_t j = low; j < high; j++) p[j] = l.softcap * std::tanh(p[j] / l.softcap);
      float most = top[i];
      for (int64_t j = low; j < high; j++) most = p[j] > most ? p[j] : most;
      if (most > top[i]) {
        const float shrink = fast_exp(top[i] - most);
        total[i] *= shrink;
        for (int64_t d = 0; d < V; d++) acc[i * V + d] *= shrink;
        top[i] = most;
      }
      for (int64_t j = 0; j < BLOCK; j++)
        p[j] = j >= low && j < high ? fast_exp(p[j] - most) : 0.0f;
      float sum = 0.0f;
      for (int64_t j = 0; j < n; j++) sum += p[j];
      total[i] += sum;
      float* a = acc + i * V;
      for (int64_t j = low; j < high; j++) {
        const float weight = p[j];
        const float* y = value + j * V;
        for (int64_t d = 0; d < V; d++) a[d] += weight * y[d];
      }
    }
  }
  for (int64_t s = 0; s < S; s++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t i = s * G + g;
      T* to = out + ((b.offsets[row] + s) * heads + head * G + g) * V;
      const float scale = 1.0f / total[i];
      for (int64_t d = 0; d < V; d++) store(to + d, acc[i * V + d] * scale);
    }
}

template <typename T>
void attend(const Layer& l, const Batch& b, T* keys, T* values, const Strided& q, const Strided& k,
            const Strided& v, const float* sinks, T* out) {
  const int64_t items = b.num_rows * l.kv_heads;
#pragma omp parallel for num_threads(b.num_threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < items; item++) {
    // An item reads only what it wrote itself or what earlier passes wrote, so there is no barrier.
    const int64_t row = item / l.kv_heads, head = item % l.kv_heads;
    write_row(l, b, row, head, keys, values, k, v);
    if (b.attended[row]) attend_row(l, b, row, head, keys, values, q, sinks, out);
  }
}

// ---------------------------------------------------------------------------- elementwise

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; fewer are done before a thread wakes up

template <typename T>
void rms_norm(const T* inputs, const T* weight, T* outputs, int64_t rows, int64_t width, float eps,
              int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows * width > WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++) {
    const T* x = inputs + row * width;
    T* out = outputs + row * width;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += load(x[i]) * load(x[i]);
    const float scale = 1.0f / std::sqrt(sum / width + eps);
    // Rounded twice, as the models do.
    for (int64_t i = 0; i < width; i++)
      store(out + i, load(weight[i]) * round_to<T>(load(x[i]) * scale));
  }
}

template <typename T>
void silu_mul(const T* gates_ups, T* outputs, int64_t rows, int64_t width, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows * width > WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gates_ups + row * 2 * width, *ups = gates + width;
    T* out = outputs + row * width;
    for (int64_t i = 0; i < width; i++) {
      const float gate = load(gates[i]);
      const float silu = gate / (1.0f + fast_exp(-gate));
      store(out + i, round_to<T>(silu) * load(ups[i]));
    }
  }
}

// ---------------------------------------------------------------------------- bf16 products

#ifdef __AVX512BF16__
constexpr int64_t PANEL = 32;

// M rows of x times one panel of 32 outputs.
template <int M>
void panel(const bf16* x, const bf16* packed, const bf16* bias, bf16* out, int64_t K, int64_t N,
           int64_t num_outputs, bool fetch) {
  __m512 low[M], high[M];
  for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
  // Few rows leave few sums under way: unroll over K to hide the latency of the products.
  constexpr int U = M == 1 ? 4 : M <= 3 ? 2 : 1;
  __m512 more_low[U][M], more_high[U][M];
  for (int u = 1; u < U; u++)
    for (int m = 0; m < M; m++) more_low[u][m] = more_high[u][m] = _mm512_setzero_ps();
  int64_t k = 0;
  auto step = [&](int64_t at, __m512* a, __m512* b) {
    const bf16* w = packed + at * PANEL;
    const __m512bh first = (__m512bh)_mm512_loadu_si512(w);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(w + PANEL);
    if (fetch) {
      _mm_prefetch((const char*)(w + 1024), _MM_HINT_T0);
      _mm_prefetch((const char*)(w + 1024 + PANEL), _MM_HINT_T0);
    }
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * K + at, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      a[m] = _mm512_dpbf16_ps(a[m], both, first);
      b[m] = _mm512_dpbf16_ps(b[m], both, second);
    }
  };
  for (; k + 2 * U <= K; k += 2 * U) {
    step(k, low, high);
    for (int u = 1; u < U; u++) step(k + 2 * u, more_low[u], more_high[u]);
  }
  for (; k < K; k += 2) step(k, low, high);
  for (int m = 0; m < M; m++) {
    for (int u = 1; u < U; u++) {
      low[m] = _mm512_add_ps(low[m], more_low[u][m]);
      high[m] = _mm512_add_ps(high[m], more_high[u][m]);
    }
    alignas(64) float sums[PANEL];
    _mm512_store_ps(sums, low[m]);
    _mm512_store_ps(sums + 16, high[m]);
    if (bias)
      for (int64_t n = 0; n < num_outputs; n++) sums[n] += load(bias[n]);
    if (num_outputs == PANEL)
      _mm512_storeu_si512(out + m * N, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)));
    else
      for (int64_t n = 0; n < num_outputs; n++) store(out + m * N + n, sums[n]);
  }
}

using Panel = void (*)(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t, bool);
constexpr int MAX_ROWS = 12;  // of one pass over a panel: 24 sums fit the 32 registers
const Panel PANELS[MAX_ROWS + 1] = {nullptr,  panel<1>, panel<2>, panel<3>,  panel<4>,  panel<5>, panel<6>,
                                    panel<7>, panel<8>, panel<9>, panel<10>, panel<11>, panel<12>};

// x [M, K] @ packed + bias, to out [M, N]
void multiply(const bf16* x, const bf16* packed, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
              int64_t num_threads) {
  const int64_t panels = (N + PANEL - 1) / PANEL;
  // Rows in equal parts, so that no part is left with one.
  const int64_t parts = (M + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    const int64_t n = p * PANEL;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = M * part / parts, rows = M * (part + 1) / parts - m;
      PANELS[rows](x + m * K, packed + n * K, bias ? bias + n : nullptr, out + m * N + n, K, N,
                   std::min(PANEL, N - n), part == 0);
    }
  }
}

// ---------------------------------------------------------------------------- decoder layer

// h = x + o(attention(rope(norm(qkv(norm(x)))))), out = h + down(silu(gate(norm(h))) * up(norm(h)))
struct Decoder {
  const bf16 *norm_1, *norm_2, *q_norm, *k_norm;  // the latter two may be null
  const bf16 *qkv, *qkv_bias, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias;  // packed
  int64_t hidden, heads, kv_heads, head_dim, inner;
  float eps_1, eps_2, q_eps, k_eps;
};

bf16* scratch(int64_t size) {
  static thread_local std::vector<bf16> memory;
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

void add(const bf16* x, const bf16* y, bf16* out, int64_t size, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (size > WORTH_THREADS)
  for (int64_t i = 0; i < size; i++) store(out + i, load(x[i]) + load(y[i]));
}

// A head's query or key: normed, then turned by its position; rounded where the models round.
void turn(bf16* x, const bf16* weight, float eps, const bf16* cos, const bf16* sin, int64_t D) {
  if (weight) rms_norm(x, weight, x, 1, D, eps, 1);
  for (int64_t i = 0; i < D / 2; i++) {
    const float a = load(x[i]), b = load(x[i + D / 2]);
    const float low = round_to<bf16>(a * load(cos[i])) + round_to<bf16>(-b * load(sin[i]));
    const float high = round_to<bf16>(b * load(cos[i + D / 2])) + round_to<bf16>(a * load(sin[i + D / 2]));
    store(x + i, low);
    store(x + i + D / 2, high);
  }
}
#endif

}  // namespace

extern "C" {

int has_linear() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
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
  silu_mul(gate_up, out, rows, width, num_threads);
}
void silu_mul_bf16(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int64_t num_threads) {
  silu_mul(gate_up, out, rows, width, num_threads);
}

#ifdef __AVX512BF16__
// weight [N, K] to packed; outputs beyond N are zeros. K is even.
void pack_linear(const bf16* weight, bf16* packed, int64_t N, int64_t K) {
  const int64_t panels = (N + PANEL - 1) / PANEL;
#ifdef __linux__
  // Large pages: a pass over the weights touches each 4 KiB page once, and would miss the TLB on each.
  const uintptr_t page = 1 << 21, from = ((uintptr_t)packed + page - 1) / page * page;
  const uintptr_t to = (uintptr_t)(packed + panels * PANEL * K) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t i = 0; i < PANEL; i++) {
        bf16* to = packed + (p * K + k) * PANEL + 2 * i;
        const int64_t n = p * PANEL + i;
        to[0] = n < N ? weight[n * K + k] : bf16{0};
        to[1] = n < N ? weight[n * K + k + 1] : bf16{0};
      }
}

// out [M, N] = x [M, K] @ weight.T + bias
void linear(const bf16* x, const bf16* packed, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
            int64_t num_threads) {
  multiply(x, packed, bias, out, M, N, K, num_threads);
}

// A decoder layer up to its attention: x [T, hidden] to qkv [T, heads + 2 kv_heads, head_dim].
void before_attention(const Decoder* d, const bf16* x, const bf16* cos, const bf16* sin, bf16* qkv, int64_t T,
                      int64_t num_threads) {
  const int64_t D = d->head_dim, turned = d->heads + d->kv_heads, width = (turned + d->kv_heads) * D;
  bf16* normed = scratch(T * d->hidden);
  rms_norm(x, d->norm_1, normed, T, d->hidden, d->eps_1, num_threads);
  multiply(normed, d->qkv, d->qkv_bias, qkv, T, width, d->hidden, num_threads);
#pragma omp parallel for num_threads(num_threads) if (T * width > WORTH_THREADS)
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < turned; h++) {
      const bool query = h < d->heads;
      turn(qkv + t * width + h * D, query ? d->q_norm : d->k_norm, query ? d->q_eps : d->k_eps, cos + t * D,
           sin + t * D, D);
    }
}

// And from it on: x and what was attended [T, heads * head_dim] to out [T, hidden].
void after_attention(const Decoder* d, const bf16* x, const bf16* attended, bf16* out, int64_t T,
                     int64_t num_threads) {
  const int64_t H = d->hidden, I = d->inner;
  bf16* part = scratch(T * (2 * H + 3 * I));
  bf16 *normed = part + T * H, *gate_up = normed + T * H, *product = gate_up + 2 * T * I;
  multiply(attended, d->o, d->o_bias, part, T, H, d->heads * d->head_dim, num_threads);
  add(x, part, out, T * H, num_threads);
  rms_norm(out, d->norm_2, normed, T, H, d->eps_2, num_threads);
  multiply(normed, d->gate_up, d->gate_up_bias, gate_up, T, 2 * I, H, num_threads);
  silu_mul(gate_up, product, T, I, num_threads);
  multiply(product, d->down, d->down_bias, part, T, H, I, num_threads);
  add(out, part, out, T * H, num_threads);
}
#endif
}
