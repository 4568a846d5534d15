// Work on single rows: norms, activations, sums.
#pragma once

#include "common.h"

namespace {

// weight * x / rms(x), rounded twice, as the models do; in place or not.
template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += load(x[i]) * load(x[i]);
  const float scale = 1.0f / std::sqrt(sum / width + eps);
  for (int64_t i = 0; i < width; i++) store(out + i, load(weight[i]) * round_to<T>(load(x[i]) * scale));
}

template <typename T>
void silu_mul(const T* gates, const T* ups, T* out, int64_t width) {
  for (int64_t i = 0; i < width; i++) {
    const float gate = load(gates[i]);
    const float silu = gate / (1.0f + fast_exp(-gate));
    store(out + i, round_to<T>(silu) * load(ups[i]));
  }
}

template <typename T>
void add_row(T* x, const T* y, int64_t width) {
  for (int64_t i = 0; i < width; i++) store(x + i, load(x[i]) + load(y[i]));
}

}  // namespace
