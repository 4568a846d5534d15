// Attention from the block tables in bf16: by vectors for few queries, by tiles for more.
#pragma once

#include "attention.h"

#ifdef HAS_VECTORS
namespace {

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

// A block's values two rows in turn, which is what the products add in pairs: [BLOCK / 2][V up to 32s][2].
// Rows from n on are no keys yet, and no numbers either: zeros.
inline void pair_values(const bf16* values, int64_t n, int64_t V, bf16* pairs) {
  alignas(64) uint16_t turns[2][32];
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 32; i++) turns[half][i] = uint16_t(half * 16 + i / 2 + (i % 2) * 32);
  const __m512i low_turn = _mm512_load_si512(turns[0]), high_turn = _mm512_load_si512(turns[1]);
  for (int64_t j = 0; j < BLOCK; j += 2)
    for (int64_t v = 0; v < V; v += 32, pairs += 64) {
      const __mmask32 mask = mask_of(V - v);
      const __m512i a = _mm512_maskz_loadu_epi16(j < n ? mask : 0, values + j * V + v);
      const __m512i z = _mm512_maskz_loadu_epi16(j + 1 < n ? mask : 0, values + (j + 1) * V + v);
      _mm512_store_si512(pairs, _mm512_permutex2var_epi16(a, low_turn, z));
      _mm512_store_si512(pairs + 32, _mm512_permutex2var_epi16(a, high_turn, z));
    }
}

// `attend_row` in bf16 products: queries as they are, weights rounded to bf16. While a block is multiplied
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
  const int64_t first = l.window ? std::max<int64_t>(0, start - l.window + 1) : 0;
  for (int64_t from = first / BLOCK * BLOCK; from < end; from += BLOCK) {
    const auto slot_of = [&](int64_t position) { return int64_t(b.tables[row][position / BLOCK]) * BLOCK; };
    const int64_t slot = slot_of(from), next = slot_of(std::min(from + BLOCK, end - 1)), n = std::min<int64_t>(BLOCK, end - from);
    const bf16* block_keys = keys + (head * l.num_slots + slot) * D;
    const bf16* block_values = values + (head * l.num_slots + slot) * V;
    const bf16* next_keys = keys + (head * l.num_slots + next) * D;
    const bf16* next_values = values + (head * l.num_slots + next) * V;
    pair_values(block_values, n, V, pairs);
    for (int64_t at = 0; at < BLOCK * V; at += 32) _mm_prefetch((const char*)(next_values + at), _MM_HINT_T0);
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
          if (i == 0) _mm_prefetch((const char*)(next_keys + j * D + 32 * c), _MM_HINT_T0);
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

#ifdef HAS_TILES
inline __m512 fast_exp_16(__m512 x) {  // fast_exp; NaN stays NaN
  x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ), _mm512_set1_ps(-87.0f));
  alignas(64) float values[16];
  _mm512_store_ps(values, x);
  for (int i = 0; i < 16; i++) values[i] = fast_exp(values[i]);
  return _mm512_load_ps(values);
}

// The same by tiles, 16 queries at a time: what a model catches up costs little more than one token.
//
//     scores [16 keys, 16 queries] = keys, as they lie, times queries [D / 32][16][16 queries][2]
//     sums [16 queries, V] += weights [16 queries, 16 keys] times pairs of values
//
// Sizes of heads are multiples of 32; no softcap.
inline void attend_row_tiles(const Layer& l, const Batch& b, int64_t row, int64_t head, const bf16* keys,
                             const bf16* values, const Strided& q, const float* sinks, bf16* out) {
  const int64_t D = l.head_dim, V = l.value_dim, G = l.group, S = b.lengths[row];
  const int64_t Q = G * S, heads = l.kv_heads * G, start = b.starts[row], end = start + S, groups = (Q + 15) / 16;
  bf16* query = scratch<bf16, 1>(16 * (groups * D + V));  // [groups][D / 32][16][16][2]
  bf16* pairs = query + 16 * groups * D;                  // [BLOCK / 2][V][2]
  float* acc = scratch<float, 0>(groups * 16 * (V + 2));  // [groups][16][V]
  float *top = acc + groups * 16 * V, *total = top + groups * 16;
  std::fill(query, query + 16 * groups * D, bf16{0});
  std::fill(acc, acc + groups * 16 * V, 0.0f);
  std::fill(total, total + groups * 16, sinks ? 1.0f : 0.0f);
  for (int64_t i = 0; i < groups * 16; i++)
    top[i] = sinks && i < Q ? sinks[head * G + i % G] : -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < Q; i++) {
    const bf16* from = (const bf16*)q.data + (b.offsets[row] + i / G) * q.token + (head * G + i % G) * q.head;
    for (int64_t d = 0; d < D; d += 2)
      std::memcpy(query + i / 16 * 16 * D + d * 16 + i % 16 * 2, from + d, 4);
  }
  alignas(64) uint16_t halves[32];  // two rows of 16 in turn
  for (int i = 0; i < 32; i++) halves[i] = uint16_t(i / 2 + (i % 2) * 16);
  // scores, keys, queries, weights, values, sums
  const TileConfig config{1, 0, {}, {64, 64, 64, 32, 64, 64}, {16, 16, 16, 16, 8, 16}};
  _tile_loadconfig(&config);
  const int64_t first = l.window ? std::max<int64_t>(0, start - l.window + 1) : 0;
  for (int64_t from = first / BLOCK * BLOCK; from < end; from += BLOCK) {
    const int64_t slot = int64_t(b.tables[row][from / BLOCK]) * BLOCK, n = std::min<int64_t>(BLOCK, end - from);
    const bf16* block_keys = keys + (head * l.num_slots + slot) * D;
    const bf16* block_values = values + (head * l.num_slots + slot) * V;
    pair_values(block_values, n, V, pairs);
    const int64_t next = int64_t(b.tables[row][std::min(from + BLOCK, end - 1) / BLOCK]) * BLOCK;
    for (int64_t at = 0; at < BLOCK * D; at += 32)
      _mm_prefetch((const char*)(keys + (head * l.num_slots + next) * D + at), _MM_HINT_T0);
    for (int64_t at = 0; at < BLOCK * V; at += 32)
      _mm_prefetch((const char*)(values + (head * l.num_slots + next) * V + at), _MM_HINT_T0);
    for (int64_t g = 0; g < groups; g++) {
      // Keys [low, high) of the block are those of a query.
      alignas(64) int32_t lows[16], highs[16];
      for (int64_t i = 0; i < 16; i++) {
        const int64_t position = start + (g * 16 + i) / G;
        lows[i] = int32_t(l.window ? std::max<int64_t>(0, position - l.window + 1 - from) : 0);
        highs[i] = g * 16 + i < Q ? int32_t(std::min<int64_t>(n, position + 1 - from)) : 0;
      }
      const __m512i low = _mm512_load_si512(lows), high = _mm512_load_si512(highs);
      alignas(64) float scores[BLOCK][16];
      _tile_zero(0);
      for (int64_t d = 0; d < D; d += 32) {
        _tile_loadd(1, block_keys + d, 2 * D);
        _tile_loadd(2, query + g * 16 * D + d * 16, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, scores, 64);
      __mmask16 masks[BLOCK];
      const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
      const __m512 before = _mm512_load_ps(top + g * 16);
      __m512 most = before;
      for (int j = 0; j < BLOCK; j++) {
        const __m512i key = _mm512_set1_epi32(j);
        masks[j] = _mm512_cmple_epi32_mask(low, key) & _mm512_cmplt_epi32_mask(key, high);
        const __m512 score = _mm512_mul_ps(_mm512_load_ps(scores[j]), _mm512_set1_ps(l.scaling));
        _mm512_store_ps(scores[j], score);
        most = _mm512_mask_max_ps(most, masks[j], score, most);
      }
      const __mmask16 seen = _mm512_cmp_ps_mask(most, nothing, _CMP_NEQ_UQ);
      if (!seen) continue;
      const __mmask16 grown = _mm512_cmp_ps_mask(most, before, _CMP_NEQ_UQ);
      __m512 sum = _mm512_load_ps(total + g * 16);
      if (grown) {
        alignas(64) float shrink[16];
        _mm512_store_ps(shrink, fast_exp_16(_mm512_mask_sub_ps(_mm512_setzero_ps(), grown, before, most)));
        sum = _mm512_mul_ps(sum, _mm512_load_ps(shrink));
        for (int i = 0; i < 16; i++)
          if (grown >> i & 1)
            for (int64_t v = 0; v < V; v++) acc[(g * 16 + i) * V + v] *= shrink[i];
        _mm512_store_ps(top + g * 16, most);
      }
      alignas(64) int32_t by_key[BLOCK / 2][16], by_query[16][BLOCK / 2];
      __m512 weights[2];
      for (int j = 0; j < BLOCK; j++) {
        weights[j % 2] = _mm512_maskz_mov_ps(masks[j], fast_exp_16(_mm512_sub_ps(_mm512_load_ps(scores[j]), most)));
        sum = _mm512_add_ps(sum, weights[j % 2]);
        if (j % 2)
          _mm512_store_si512(by_key[j / 2], _mm512_permutexvar_epi16(_mm512_load_si512(halves),
                                                                   (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0])));
      }
      _mm512_store_ps(total + g * 16, sum);
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < BLOCK / 2; j++) by_query[i][j] = by_key[j][i];
      _tile_loadd(3, by_query, 32);
      for (int64_t v = 0; v < V; v += 16) {
        _tile_loadd(5, acc + g * 16 * V + v, 4 * V);
        _tile_loadd(4, pairs + 2 * v, 4 * V);
        _tile_dpbf16ps(5, 3, 4);
        _tile_stored(5, acc + g * 16 * V + v, 4 * V);
      }
    }
  }
  _tile_release();
  for (int64_t i = 0; i < Q; i++) {
    bf16* to = out + ((b.offsets[row] + i / G) * heads + head * G + i % G) * V;
    const float scale = 1.0f / total[i];
    for (int64_t v = 0; v < V; v++) store(to + v, acc[i * V + v] * scale);
  }
}
#endif

template <>
inline void attend_row(const Layer& l, const Batch& b, int64_t row, int64_t head, const bf16* keys, const bf16* values,
                       const Strided& q, const float* sinks, bf16* out) {
#ifdef HAS_TILES
  constexpr int64_t FEW_QUERIES = 3;  // so many are faster by vectors
  if (l.group * b.lengths[row] > FEW_QUERIES && l.head_dim % 32 == 0 && l.value_dim % 32 == 0 && l.softcap == 0.0f)
    return attend_row_tiles(l, b, row, head, keys, values, q, sinks, out);
#endif
  const int64_t dim = l.head_dim == l.value_dim ? l.head_dim : 0;
  const auto attend = dim == 128 ? attend_row_bf16<128> : dim == 64 ? attend_row_bf16<64> : attend_row_bf16<0>;
  attend(l, b, row, head, keys, values, q, sinks, out);
}
}  // namespace
#endif
