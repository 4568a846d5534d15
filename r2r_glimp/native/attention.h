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

}  // namespace
