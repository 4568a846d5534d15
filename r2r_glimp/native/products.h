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

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512BF16__)
#define HAS_VECTORS
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#endif
#endif

namespace {

// Large pages: a pass over weights or keys touches each 4 KiB page once, and would miss the TLB on
// each. Before the memory is first written.
inline void use_large_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  const uintptr_t page = 1 << 21, from = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)memory + bytes) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

#ifdef HAS_VECTORS
constexpr int64_t PANEL = 32;

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

// M rows of x times the panel of 32 outputs from n on.
template <int M>
void vector_panel(const bf16* x, const Linear& l, int64_t n, bf16* out, bool fetch) {
  const int64_t K = l.inputs;
  const bf16* packed = l.packed + n * K;
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
    write_sums(sums, l, n, out + m * l.outputs);
  }
}

using VectorPanel = void (*)(const bf16*, const Linear&, int64_t, bf16*, bool);
constexpr int MAX_ROWS = 12;  // of one pass over a panel: 24 sums fit the 32 registers
const VectorPanel VECTOR_PANELS[MAX_ROWS + 1] = {
    nullptr,         vector_panel<1>, vector_panel<2>, vector_panel<3>,  vector_panel<4>,  vector_panel<5>, vector_panel<6>,
    vector_panel<7>, vector_panel<8>, vector_panel<9>, vector_panel<10>, vector_panel<11>, vector_panel<12>};

inline void vector_multiply(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M) {
  // Rows in equal parts, so that no part is left with one.
  const int64_t parts = (M + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t p = team.first(l.panels()); p < team.last(l.panels()); p++)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = M * part / parts, rows = M * (part + 1) / parts - m;
      VECTOR_PANELS[rows](x + m * l.inputs, l, p * PANEL, out + m * l.outputs, part == 0);
    }
}

// ---------------------------------------------------------------------------- tiles (AMX)

#ifdef HAS_TILES
// A tile holds 16 rows of 64 bytes. 16 outputs of a panel are a tile of 16 pairs of inputs, as they
// lie; two tiles of x and two of the panel make four tiles of sums.
constexpr int64_t TILE_K = 32;       // inputs of a tile
constexpr int64_t TILE_ROWS = 32;    // rows of x in one pass over a panel
constexpr int64_t FEW_ROWS = 4;      // so many, vectors multiply as fast as memory is read
constexpr int64_t CACHED = 1 << 20;  // bytes of x that stay in the second level cache

// Gives this thread its tiles: sums of the first 16 rows in 0 1, of the others in 2 3; x in 4 5, a
// panel in 6 7.
inline void configure_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const uint8_t first = uint8_t(std::min<int64_t>(rows, 16)), second = uint8_t(rows - first);
  const uint8_t heights[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; i++)
    if ((config.rows[i] = heights[i])) config.bytes[i] = 64;
  _tile_loadconfig(&config);
}

// A block of up to 32 rows times one panel, to sums [rows, PANEL]. With each 32 inputs, `lines`
// cache lines from `next` on are fetched: of this pass where there is one block, else of the next
// panel.
template <bool SECOND, bool ONE_BLOCK>
void tile_panel(const bf16* x, int64_t row, int64_t step, const bf16* packed, int64_t K, float* sums,
                const char* next, int lines) {
  _tile_zero(0);
  _tile_zero(1);
  if (SECOND) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += TILE_K, x += step) {
    const bf16* w = packed + k * PANEL;
    for (int i = 0; i < (ONE_BLOCK ? 32 : lines); i++, next += 64)
      _mm_prefetch(next, ONE_BLOCK ? _MM_HINT_T0 : _MM_HINT_T1);
    _tile_loadd(6, w, 4 * PANEL);
    _tile_loadd(4, x, 2 * row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + PANEL, 4 * PANEL);
    _tile_dpbf16ps(1, 4, 7);
    if (SECOND) {
      _tile_loadd(5, x + 16 * row, 2 * row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + 16, 4 * PANEL);
  if (SECOND) {
    _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
  }
}

using TilePanel = void (*)(const bf16*, int64_t, int64_t, const bf16*, int64_t, float*, const char*, int);

// Many rows are laid out tile by tile first, in `tiles`. The last block repeats some rows of the one
// before it.
inline void tile_multiply(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M, bf16* tiles) {
  const int64_t K = l.inputs, rows = std::min(M, TILE_ROWS), blocks = (M + rows - 1) / rows;
  const bool many = blocks > 1;
  if (many) {
    for (int64_t b = team.first(blocks); b < team.last(blocks); b++) {
      const bf16* from = x + std::min(b * rows, M - rows) * K;
      bf16* to = tiles + b * rows * K;
      for (int64_t k = 0; k < K; k += TILE_K)
        for (int64_t i = 0; i < rows; i++, to += TILE_K) std::memcpy(to, from + i * K + k, 2 * TILE_K);
    }
    wait(team);
  }
  const int64_t row = many ? TILE_K : K, step = many ? TILE_K * rows : TILE_K;
  const int64_t chunk = std::max<int64_t>(1, CACHED / (2 * K * rows));  // blocks that stay cached
  const TilePanel times = many ? tile_panel<true, false> : rows > 16 ? tile_panel<true, true> : tile_panel<false, true>;
  alignas(64) float sums[TILE_ROWS * PANEL];
  configure_tiles(rows);
  for (int64_t first = 0; first < blocks; first += chunk) {
    const int64_t last = std::min(blocks, first + chunk), count = last - first;
    const int lines = int((32 + count - 1) / count);
    for (int64_t p = team.first(l.panels()); p < team.last(l.panels()); p++) {
      const bf16* packed = l.packed + p * PANEL * K;
      const char* next = (const char*)(packed + (many ? PANEL * K : 1024));
      for (int64_t b = first; b < last; b++, next += 64 * lines * (K / TILE_K)) {
        times(many ? tiles + b * rows * K : x, row, step, packed, K, sums, next, lines);
        for (int64_t i = 0; i < rows; i++)
          write_sums(sums + i * PANEL, l, p * PANEL, out + (std::min(b * rows, M - rows) + i) * l.outputs);
      }
    }
  }
  _tile_release();
}
#endif

// ---------------------------------------------------------------------------- either

// Elements of `tiles` that `multiply` needs for M rows; shared by the team.
inline int64_t tiles_size(const Linear& l, int64_t M) {
#ifdef HAS_TILES
  return M > TILE_ROWS ? (M + TILE_ROWS) * l.inputs : 0;
#else
  return 0;
#endif
}

// x [M, inputs] @ weight.T + bias to out [M, outputs]; each thread of the team gives some outputs.
inline void multiply(Team team, const bf16* x, const Linear& l, bf16* out, int64_t M, bf16* tiles) {
#ifdef HAS_TILES
  if (M > FEW_ROWS && l.inputs % TILE_K == 0) return tile_multiply(team, x, l, out, M, tiles);
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
