// bf16 products: rows of x times a packed weight, by vectors for few rows and by tiles for more.
//
// A packed weight interleaves 32 outputs, two inputs at a time, which is how the bf16 instructions
// read it, and one stream for the memory:
//
//     weight [N, K]  ─▶  packed [N / 32][K / 2][32][2]
//
// 32 outputs are a panel. A thread owns panels, so that each reads its part of the weight once.
#pragma once

#include "common.h"

namespace {

#ifdef HAS_VECTORS
constexpr int64_t PANEL = 32;

constexpr int64_t AHEAD = 1024;  // numbers that are fetched ahead of their use,
constexpr int64_t FAR = 2560;    // and for tiles into the second level cache: 10% of their time

struct Linear {
  const bf16 *packed, *bias;  // the latter may be null
  int64_t outputs, inputs;
  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
};

inline void write_sums(float* sums, const Linear& l, int64_t n, bf16* out) {
  const int64_t count = std::min(PANEL, l.outputs - n);
  if (l.bias)
    for (int64_t i = 0; i < count; i++) sums[i] += load(l.bias[n + i]);
  if (count == PANEL)
    _mm512_storeu_si512(out + n, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)));
  else
    for (int64_t i = 0; i < count; i++) store(out + n + i, sums[i]);
}

// ---------------------------------------------------------------------------- vectors

// M rows of x times P panels from n on. Several panels at once are several streams of memory, which
// is more than one; few rows are unrolled over K, to hide the latency of the products.
template <int M, int P, int U>
void vector_panels(const bf16* x, const Linear& l, int64_t n, bf16* out, bool fetch) {
  const int64_t K = l.inputs;
  __m512 sums[U][P][2][M];
  for (int u = 0; u < U; u++)
    for (int p = 0; p < P; p++)
      for (int m = 0; m < M; m++) sums[u][p][0][m] = sums[u][p][1][m] = _mm512_setzero_ps();
  auto step = [&](int64_t k, int u) {
    __m512bh pairs[M];
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * K + k, 4);
      pairs[m] = (__m512bh)_mm512_set1_epi32(pair);
    }
    for (int p = 0; p < P; p++) {
      const bf16* w = l.packed + (n + p * PANEL) * K + k * PANEL;
      const __m512bh first = (__m512bh)_mm512_loadu_si512(w);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(w + PANEL);
      if (fetch) {
        _mm_prefetch((const char*)(w + AHEAD / P), _MM_HINT_T0);
        _mm_prefetch((const char*)(w + AHEAD / P + PANEL), _MM_HINT_T0);
      }
      for (int m = 0; m < M; m++) {
        sums[u][p][0][m] = _mm512_dpbf16_ps(sums[u][p][0][m], pairs[m], first);
        sums[u][p][1][m] = _mm512_dpbf16_ps(sums[u][p][1][m], pairs[m], second);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * U <= K; k += 2 * U)
    for (int u = 0; u < U; u++) step(k + 2 * u, u);
  for (; k < K; k += 2) step(k, 0);
  for (int p = 0; p < P; p++)
    for (int m = 0; m < M; m++) {
      for (int u = 1; u < U; u++)
        for (int half = 0; half < 2; half++)
          sums[0][p][half][m] = _mm512_add_ps(sums[0][p][half][m], sums[u][p][half][m]);
      alignas(64) float both[PANEL];
      _mm512_store_ps(both, sums[0][p][0][m]);
      _mm512_store_ps(both + 16, sums[0][p][1][m]);
      write_sums(both, l, n + p * PANEL, out + m * l.outputs);
    }
}

using VectorPanels = void (*)(const bf16*, const Linear&, int64_t, bf16*, bool);
constexpr int64_t MAX_ROWS = 12;  // of one pass over a panel: 24 sums fit the 32 registers
constexpr int64_t TWO_ROWS = 4;   // so many, over two
const VectorPanels ONE_PANEL[] = {
    nullptr, vector_panels<1, 1, 4>, vector_panels<2, 1, 2>, vector_panels<3, 1, 2>, vector_panels<4, 1, 1>,
    vector_panels<5, 1, 1>, vector_panels<6, 1, 1>, vector_panels<7, 1, 1>, vector_panels<8, 1, 1>,
    vector_panels<9, 1, 1>, vector_panels<10, 1, 1>, vector_panels<11, 1, 1>, vector_panels<12, 1, 1>};
const VectorPanels TWO_PANELS[] = {nullptr, vector_panels<1, 2, 2>, vector_panels<2, 2, 2>, vector_panels<3, 2, 1>,
                                   vector_panels<4, 2, 1>};

inline void vector_multiply(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M) {
  int64_t p = team.first(l.panels());
  const int64_t end = team.last(l.panels());
  if (M <= TWO_ROWS)
    for (; p + 2 <= end; p += 2) TWO_PANELS[M](x, l, p * PANEL, out, true);
  // Rows in equal parts, so that no part is left with one.
  const int64_t parts = (M + MAX_ROWS - 1) / MAX_ROWS;
  for (; p < end; p++)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = M * part / parts, rows = M * (part + 1) / parts - m;
      ONE_PANEL[rows](x + m * l.inputs, l, p * PANEL, out + m * l.outputs, part == 0);
    }
}

// ---------------------------------------------------------------------------- tiles (AMX)

#ifdef HAS_TILES
// A tile holds 16 rows of 64 bytes. 16 outputs of a panel are a tile of 16 pairs of inputs, as they
// lie; two tiles of x and two of the panel make four tiles of sums.
constexpr int64_t TILE_K = 32;       // inputs of a tile
constexpr int64_t TILE_ROWS = 32;    // rows of a block, where there are many
constexpr int64_t FEW_ROWS = 4;      // so many, vectors multiply as fast as memory is read
constexpr int64_t STREAM_ROWS = 64;  // so many, what counts is reading the weight

// Gives this thread its tiles: sums in 0 1 2 3, x in 4 5, weights in 6 7, 16 rows each but those of
// sums and x where there are fewer.
inline void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.rows[i] = uint8_t(i < 6 ? std::min<int64_t>(rows, 16) : 16);
    config.bytes[i] = 64;
  }
  _tile_loadconfig(&config);
}

// Sums of two times 16 rows, or of 16 rows and two panels: [2][16][PANEL].
inline void store_tiles(float* sums) {
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + 16, 4 * PANEL);
  _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
  _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
}

inline void load_tiles(const float* sums) {
  _tile_loadd(0, sums, 4 * PANEL);
  _tile_loadd(1, sums + 16, 4 * PANEL);
  _tile_loadd(2, sums + 16 * PANEL, 4 * PANEL);
  _tile_loadd(3, sums + 16 * PANEL + 16, 4 * PANEL);
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Up to 16 rows times two panels, which are two streams of memory.
template <bool FETCH>
void tile_two_panels(const bf16* x, const bf16* packed, const bf16* other, int64_t K, float* sums) {
  zero_tiles();
  for (int64_t k = 0; k < K; k += TILE_K) {
    const bf16 *w = packed + k * PANEL, *v = other + k * PANEL;
    if (FETCH)
      for (int64_t i = 0; i < TILE_K * PANEL; i += 32) {
        _mm_prefetch((const char*)(w + AHEAD + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(v + AHEAD + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(w + FAR + i), _MM_HINT_T1);
        _mm_prefetch((const char*)(v + FAR + i), _MM_HINT_T1);
      }
    _tile_loadd(4, x + k, 2 * K);
    _tile_loadd(6, w, 4 * PANEL);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + PANEL, 4 * PANEL);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, v, 4 * PANEL);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, v + PANEL, 4 * PANEL);
    _tile_dpbf16ps(3, 4, 7);
  }
  store_tiles(sums);
}

// A block of 32 rows times one panel over part of the inputs; both as they lie in memory.
template <bool ADD>
void tile_block(const bf16* tiles, const bf16* w, int64_t inputs, float* sums) {
  if (ADD)
    load_tiles(sums);
  else
    zero_tiles();
  for (int64_t k = 0; k < inputs; k += TILE_K, tiles += TILE_ROWS * TILE_K, w += TILE_K * PANEL) {
    _tile_loadd(6, w, 4 * PANEL);
    _tile_loadd(4, tiles, 2 * TILE_K);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + PANEL, 4 * PANEL);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, tiles + 16 * TILE_K, 2 * TILE_K);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles(sums);
}

// Few rows: what counts is that the weight comes from memory once, by two streams. All but the first
// 16 rows find a pair of panels in the cache.
inline void tile_multiply_few(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M) {
  const int64_t K = l.inputs, end = team.last(l.panels()), parts = (M + 15) / 16, rows = (M + parts - 1) / parts;
  alignas(64) float sums[2 * 16 * PANEL];
  configure_tiles(rows);
  for (int64_t p = team.first(l.panels()); p < end; p += 2) {
    const int64_t pair = std::min<int64_t>(2, end - p);  // a last one alone is its own partner
    const bf16 *packed = l.packed + p * PANEL * K, *other = packed + (pair - 1) * PANEL * K;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = std::min(part * rows, M - rows);  // the last part repeats rows of the one before
      (part == 0 ? tile_two_panels<true> : tile_two_panels<false>)(x + m * K, packed, other, K, sums);
      for (int64_t i = 0; i < pair; i++)
        for (int64_t row = 0; row < rows; row++)
          write_sums(sums + (16 * i + row) * PANEL, l, (p + i) * PANEL, out + (m + row) * l.outputs);
    }
  }
  _tile_release();
}

// More rows, in blocks of 32: what counts is that tiles come from near. The rows are laid out first, in
// `tiles` [inputs / DEPTH][blocks][DEPTH / 32][32][32]. DEPTH inputs of a panel stay in the first level
// cache while those of BLOCKS blocks go by, which stay in the second for PANELS panels, as do the sums.
constexpr int64_t DEPTH = 256, BLOCKS = 16, PANELS = 8;

inline void lay_out(Team team, const bf16* x, int64_t M, int64_t K, int64_t blocks, bf16* tiles) {
  for (int64_t b = team.first(blocks); b < team.last(blocks); b++) {
    const bf16* from = x + std::min(b * TILE_ROWS, M - TILE_ROWS) * K;  // the last may repeat rows
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k);
      bf16* to = tiles + TILE_ROWS * (blocks * k + b * depth);
      for (int64_t i = k; i < k + depth; i += TILE_K)
        for (int64_t row = 0; row < TILE_ROWS; row++, to += TILE_K) std::memcpy(to, from + row * K + i, 2 * TILE_K);
    }
  }
}

inline void tile_multiply_many(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M, bf16* tiles) {
  constexpr int64_t SIZE = TILE_ROWS * PANEL;  // sums of a block and a panel
  const int64_t K = l.inputs, blocks = (M + TILE_ROWS - 1) / TILE_ROWS, end = team.last(l.panels());
  lay_out(team, x, M, K, blocks, tiles);
  wait(team);
  float* all_sums = scratch<float, 1>(BLOCKS * PANELS * SIZE);
  configure_tiles(TILE_ROWS);
  for (int64_t b_0 = 0; b_0 < blocks; b_0 += BLOCKS)
    for (int64_t p_0 = team.first(l.panels()); p_0 < end; p_0 += PANELS)
      for (int64_t k = 0; k < K; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, K - k);
        for (int64_t p = p_0; p < std::min(end, p_0 + PANELS); p++)
          for (int64_t b = b_0; b < std::min(blocks, b_0 + BLOCKS); b++) {
            float* sums = all_sums + ((p - p_0) * BLOCKS + b - b_0) * SIZE;
            (k ? tile_block<true> : tile_block<false>)(tiles + TILE_ROWS * (blocks * k + b * depth),
                                                       l.packed + (p * K + k) * PANEL, depth, sums);
            if (k + depth < K) continue;
            bf16* to = out + std::min(b * TILE_ROWS, M - TILE_ROWS) * l.outputs;
            for (int64_t i = 0; i < TILE_ROWS; i++) write_sums(sums + i * PANEL, l, p * PANEL, to + i * l.outputs);
          }
      }
  _tile_release();
}
#endif

// ---------------------------------------------------------------------------- either

// Elements of `tiles` that `multiply` needs for M rows; shared by the team.
inline int64_t tiles_size(const Linear& l, int64_t M) {
#ifdef HAS_TILES
  return M > STREAM_ROWS ? (M + TILE_ROWS) * l.inputs : 0;
#else
  return 0;
#endif
}

// x [M, inputs] @ weight.T + bias to out [M, outputs]; each thread of the team gives some outputs.
inline void multiply(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M, bf16* tiles) {
#ifdef HAS_TILES
  if (M > FEW_ROWS && l.inputs % TILE_K == 0) {
    if (M <= STREAM_ROWS) return tile_multiply_few(team, x, l, out, M);
    return tile_multiply_many(team, x, l, out, M, tiles);
  }
#endif
  vector_multiply(team, x, l, out, M);
}

// weight [N, K] to packed; outputs beyond N are zeros. K is even.
inline void pack(Team team, const bf16* weight, bf16* packed, int64_t N, int64_t K) {
  const int64_t panels = (N + PANEL - 1) / PANEL;
  for (int64_t p = team.first(panels); p < team.last(panels); p++)
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t i = 0; i < PANEL; i++) {
        bf16* to = packed + (p * K + k) * PANEL + 2 * i;
        const int64_t n = p * PANEL + i;
        to[0] = n < N ? weight[n * K + k] : bf16{0};
        to[1] = n < N ? weight[n * K + k + 1] : bf16{0};
      }
}
#endif

}  // namespace
