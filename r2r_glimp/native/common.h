// What all kernels share: numbers, and threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_VECTORS
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#endif
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
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

// A thread of those that work together, and its part of `count` things.
struct Team {
  int64_t rank, size;
  int64_t first(int64_t count) const { return count * rank / size; }
  int64_t last(int64_t count) const { return count * (rank + 1) / size; }
};

// Runs `work` in every thread of a team.
template <typename Work>
void together(int64_t num_threads, Work work) {
  if (num_threads == 1) {
    work(Team{0, 1});
  } else {
#pragma omp parallel num_threads(num_threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
  }
}

// Waits for the team: what the others wrote before can be read after it.
inline void wait(Team team) {
  if (team.size > 1) {
#pragma omp barrier
  }
}

#ifdef HAS_TILES
// What a thread's tiles hold: rows of so many bytes each.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
#endif

// Large pages for memory that is not yet written: what reads or writes it from end to end, or in long
// strides, touches many 4 KiB pages, and would miss the TLB on each. Only whole large pages are.
constexpr uintptr_t LARGE_PAGE = 1 << 21;
inline void use_large_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  const uintptr_t from = ((uintptr_t)memory + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const uintptr_t to = ((uintptr_t)memory + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Memory of this thread that is used again by the next call of the same purpose; what was in it is
// gone.
template <typename T, int PURPOSE>
T* scratch(int64_t size) {
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.bytes < size * sizeof(T)) {
    std::free(memory.data);
    memory.bytes = (size * sizeof(T) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    memory.data = std::aligned_alloc(LARGE_PAGE, memory.bytes);
    if (memory.bytes > LARGE_PAGE) use_large_pages(memory.data, memory.bytes);
  }
  return (T*)memory.data;
}

}  // namespace
