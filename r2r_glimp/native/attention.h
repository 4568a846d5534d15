// Attention from the block tables: keys and values are read where they lie.
#pragma once

#include "common.h"

namespace {

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

// Online softmax: one block's scores p become weights; what was summed before shrinks. Scores outside
// [low, high) are no keys of this query.
inline void soften(const Layer& l, float* p, int64_t low, int64_t high, float& top, float& total, float* acc) {
  if (l.softcap != 0.0f)
    for (int64_t j = low; j < high; j++) p[j] = l.softcap * std::tanh(p[j] / l.softcap);
  float most = top;
  for (int64_t j = low; j < high; j++) most = p[j] > most ? p[j] : most;
  if (most > top) {
    const float shrink = fast_exp(top - most);
    total *= shrink;
    for (int64_t d = 0; d < l.value_dim; d++) acc[d] *= shrink;
    top = most;
  }
  for (int64_t j = 0; j < BLOCK; j++) p[j] = j >= low && j < high ? fast_exp(p[j] - most) : 0.0f;
  for (int64_t j = 0; j < BLOCK; j++) total += p[j];
}

// Attention of one row and one key/value head over its blocks. The queries are the row's new tokens
// times the heads of the group.
template <typename T>
void attend_row(const Layer& l, const Batch& b, int64_t row, int64_t head, const T* keys,
                const T* values, const Strided& q, const float* sinks, T* out) {
  const int64_t D = l.head_dim, V = l.value_dim, G = l.group, S = b.lengths[row];
  const int64_t Q = G * S, heads = l.kv_heads * G, start = b.starts[row], end = start + S;
  float* query = scratch<float, 0>(Q * (D + V + BLOCK + 2) + BLOCK * (D + V));  // [Q, D], scaled
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
      soften(l, p, low, high, top[i], total[i], acc + i * V);
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

#ifdef HAS_VECTORS
// The sum of each of 16 vectors.
inline __m512 sums_of_16(const __m512* v) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto lanes = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return lanes(lanes(fours[0], fours[1]), lanes(fours[2], fours[3]));
}

inline __mmask32 mask_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// The same in bf16 products: queries as they are, weights rounded to bf16. While a block is multiplied
// the next one is fetched.
//
// DIM: the size of heads, where it is known to the compiler, else 0.
template <int DIM>
void attend_row_bf16(const Layer& l, const Batch& b, int64_t row, int64_t head, const bf16* keys, const bf16* values,
                     const Strided& q, const float* sinks, bf16* out) {
  const int64_t D = DIM ? DIM : l.head_dim, V = DIM ? DIM : l.value_dim, G = l.group, S = b.lengths[row];
  const int64_t Q = G * S, heads = l.kv_heads * G, start = b.starts[row], end = start + S;
  const int64_t DC = (D + 31) / 32, VC = (V + 31) / 32;  // chunks of 32
  bf16* query = scratch<bf16, 1>(32 * (Q * DC + BLOCK * VC));  // [Q, DC, 32]
  bf16* pairs = query + 32 * Q * DC;                           // [BLOCK / 2, VC, 2, 16, 2]
  float* acc = scratch<float, 0>(Q * (VC * 32 + 2));           // [Q, VC, 32]
  float *top = acc + Q * VC * 32, *total = top + Q;
  for (int64_t s = 0; s < S; s++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t i = s * G + g;
      const bf16* from = (const bf16*)q.data + (b.offsets[row] + s) * q.token + (head * G + g) * q.head;
      for (int64_t c = 0; c < DC; c++)
        _mm512_store_si512(query + (i * DC + c) * 32, _mm512_maskz_loadu_epi16(mask_of(D - 32 * c), from + 32 * c));
      // A sink is one more key that takes probability and gives nothing.
      top[i] = sinks ? sinks[head * G + g] : -std::numeric_limits<float>::infinity();
      total[i] = sinks ? 1.0f : 0.0f;
    }
  std::fill(acc, acc + Q * VC * 32, 0.0f);
  // Columns 0 to 15, and 16 to 31, of two rows of values in turn: what the products add in pairs.
  alignas(64) uint16_t turns[2][32];
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 32; i++) turns[half][i] = uint16_t(half * 16 + i / 2 + (i % 2) * 32);
  const __m512i low_turn = _mm512_load_si512(turns[0]), high_turn = _mm512_load_si512(turns[1]);

  const int64_t first = l.window ? std::max<int64_t>(0, start - l.window + 1) : 0;
  for (int64_t from = first / BLOCK * BLOCK; from < end; from += BLOCK) {
    const auto slot_of = [&](int64_t position) { return int64_t(b.tables[row][position / BLOCK]) * BLOCK; };
    const int64_t slot = slot_of(from), next = slot_of(std::min(from + BLOCK, end - 1)), n = std::min<int64_t>(BLOCK, end - from);
    const bf16* block_keys = keys + (head * l.num_slots + slot) * D;
    const bf16* block_values = values + (head * l.num_slots + slot) * V;
    const char* next_keys = (const char*)(keys + (head * l.num_slots + next) * D);
    const char* next_values = (const char*)(values + (head * l.num_slots + next) * V);
    for (int64_t j = 0; j < BLOCK; j += 2)
      for (int64_t c = 0; c < VC; c++) {
        // What is not a key yet is no number either.
        const __mmask32 mask = mask_of(V - 32 * c);
        const __m512i a = _mm512_maskz_loadu_epi16(j < n ? mask : 0, block_values + j * V + 32 * c);
        const __m512i z = _mm512_maskz_loadu_epi16(j + 1 < n ? mask : 0, block_values + (j + 1) * V + 32 * c);
        bf16* to = pairs + ((j / 2) * VC + c) * 64;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low_turn, z));
        _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(a, high_turn, z));
        _mm_prefetch(next_values + (j * V + 32 * c) * 2, _MM_HINT_T0);
        _mm_prefetch(next_values + ((j + 1) * V + 32 * c) * 2, _MM_HINT_T0);
      }
    for (int64_t i = 0; i < Q; i++) {
      const int64_t position = start + i / G;
      const int64_t low = l.window ? std::max<int64_t>(0, position - l.window + 1 - from) : 0;
      const int64_t high = std::min<int64_t>(n, position + 1 - from);
      if (low >= high) continue;
      __m512 sums[BLOCK];
      for (int64_t j = 0; j < BLOCK; j++) sums[j] = _mm512_setzero_ps();
      for (int64_t c = 0; c < DC; c++) {
        const __m512i x = _mm512_load_si512(query + (i * DC + c) * 32);
#pragma GCC unroll 16
        for (int64_t j = 0; j < BLOCK; j++) {
          const __m512i y = _mm512_maskz_loadu_epi16(mask_of(D - 32 * c), block_keys + j * D + 32 * c);
          sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)x, (__m512bh)y);
          if (i == 0) _mm_prefetch(next_keys + (j * D + 32 * c) * 2, _MM_HINT_T0);
        }
      }
      alignas(64) float p[BLOCK];
      _mm512_store_ps(p, _mm512_mul_ps(sums_of_16(sums), _mm512_set1_ps(l.scaling)));
      soften(l, p, low, high, top[i], total[i], acc + i * VC * 32);
      alignas(32) int32_t weights[BLOCK / 2];
      _mm256_store_si256((__m256i*)weights, (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(p)));
      __m512bh both[BLOCK / 2];
      for (int64_t j = 0; j < BLOCK / 2; j++) both[j] = (__m512bh)_mm512_set1_epi32(weights[j]);
#pragma GCC unroll 8
      for (int64_t c = 0; c < 2 * VC; c++) {
        __m512 sum = _mm512_load_ps(acc + i * VC * 32 + c * 16);
#pragma GCC unroll 8
        for (int64_t j = 0; j < BLOCK / 2; j++)
          sum = _mm512_dpbf16_ps(sum, both[j], (__m512bh)_mm512_load_si512(pairs + (j * VC * 2 + c) * 32));
        _mm512_store_ps(acc + i * VC * 32 + c * 16, sum);
      }
    }
  }
  for (int64_t s = 0; s < S; s++)
    for (int64_t g = 0; g < G; g++) {
      const int64_t i = s * G + g;
      bf16* to = out + ((b.offsets[row] + s) * heads + head * G + g) * V;
      const float scale = 1.0f / total[i];
      for (int64_t d = 0; d < V; d++) store(to + d, acc[i * VC * 32 + d] * scale);
    }
}

template <>
inline void attend_row(const Layer& l, const Batch& b, int64_t row, int64_t head, const bf16* keys, const bf16* values,
                       const Strided& q, const float* sinks, bf16* out) {
  const int64_t dim = l.head_dim == l.value_dim ? l.head_dim : 0;
  const auto attend = dim == 128 ? attend_row_bf16<128> : dim == 64 ? attend_row_bf16<64> : attend_row_bf16<0>;
  attend(l, b, row, head, keys, values, q, sinks, out);
}
#endif

}  // namespace
