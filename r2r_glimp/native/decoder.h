// Decoder layers of the Llama kind, as many as follow each other in one call.
//
//     h = x + o(attention(rope(norm(qkv(norm(x)))))), out = h + down(silu(gate(norm(h))) * up(norm(h)))
//
// A team stays together through all layers; between two parts of a layer it waits once.
#pragma once

#include "attention_bf16.h"
#include "products.h"
#include "rows.h"

#ifdef HAS_VECTORS
namespace {

struct Decoder {
  const bf16 *norm_1, *norm_2, *q_norm, *k_norm;  // the latter two may be null
  Linear qkv, o, gate_up, down;
  int64_t heads, kv_heads, head_dim;
  float eps_1, eps_2, q_eps, k_eps;

  int64_t hidden() const { return qkv.inputs; }
  int64_t inner() const { return down.inputs; }
};

// Where the parts of a layer put what the next one reads, T tokens each; shared by the team.
struct Workspace {
  bf16 *normed, *qkv, *attended, *sum, *gate_up, *product, *tiles;

  Workspace(const Decoder& d, int64_t T) {
    const int64_t tiles_needed =
        std::max({tiles_size(d.qkv, T), tiles_size(d.o, T), tiles_size(d.gate_up, T), tiles_size(d.down, T)});
    const int64_t sizes[] = {T * d.hidden(),  T * d.qkv.outputs, T * d.o.inputs, T * d.hidden(),
                             2 * T * d.inner(), T * d.inner(),     tiles_needed};
    bf16** parts[] = {&normed, &qkv, &attended, &sum, &gate_up, &product, &tiles};
    int64_t total = 0;
    for (const int64_t size : sizes) total += (size + 31) / 32 * 32;
    bf16* memory = scratch<bf16, 0>(total);
    for (int i = 0; i < 7; i++) {
      *parts[i] = memory;
      memory += (sizes[i] + 31) / 32 * 32;
    }
  }
};

// A head's query or key: normed, then turned by its position; rounded where the models round.
inline void turn(bf16* x, const bf16* weight, float eps, const bf16* cos, const bf16* sin, int64_t D) {
  if (weight) norm_row(x, weight, x, D, eps);
  for (int64_t i = 0; i < D / 2; i++) {
    const float a = load(x[i]), b = load(x[i + D / 2]);
    const float low = round_to<bf16>(a * load(cos[i])) + round_to<bf16>(-b * load(sin[i]));
    const float high = round_to<bf16>(b * load(cos[i + D / 2])) + round_to<bf16>(a * load(sin[i + D / 2]));
    store(x + i, low);
    store(x + i + D / 2, high);
  }
}

// The queries of one group and its key, of tokens [first, last).
inline void turn_group(const Decoder& d, bf16* qkv, int64_t head, int64_t first, int64_t last, const bf16* cos,
                       const bf16* sin) {
  const int64_t D = d.head_dim, group = d.heads / d.kv_heads;
  for (int64_t t = first; t < last; t++) {
    bf16* token = qkv + t * d.qkv.outputs;
    for (int64_t g = 0; g < group; g++)
      turn(token + (head * group + g) * D, d.q_norm, d.q_eps, cos + t * D, sin + t * D, D);
    turn(token + (d.heads + head) * D, d.k_norm, d.k_eps, cos + t * D, sin + t * D, D);
  }
}

// x to queries, keys and values, not yet turned.
inline void project(Team team, const Decoder& d, const bf16* x, bf16* qkv, int64_t T, const Workspace& w) {
  for (int64_t t = team.first(T); t < team.last(T); t++)
    norm_row(x + t * d.hidden(), d.norm_1, w.normed + t * d.hidden(), d.hidden(), d.eps_1);
  wait(team);
  multiply(team, w.normed, d.qkv, qkv, T, w.tiles);
  wait(team);
}

// Turns, writes and attends: the rows that `attended` flags, to w.attended.
inline void attend_turned(Team team, const Decoder& d, const Layer& l, const Batch& b, bf16* keys, bf16* values,
                          bf16* qkv, const bf16* cos, const bf16* sin, bf16* attended) {
  const int64_t D = d.head_dim, token = d.qkv.outputs;
  const Strided q{qkv, token, D}, k{qkv + d.heads * D, token, D}, v{qkv + (d.heads + d.kv_heads) * D, token, D};
  for (int64_t item = team.rank; item < b.num_rows * d.kv_heads; item += team.size) {
    const int64_t row = item / d.kv_heads, head = item % d.kv_heads;
    turn_group(d, qkv, head, b.offsets[row], b.offsets[row] + b.lengths[row], cos, sin);
    write_row(l, b, row, head, keys, values, k, v);
    if (b.attended[row]) attend_row(l, b, row, head, keys, values, q, nullptr, attended);
  }
  wait(team);
}

// From what was attended on, in place: x is the layer's input and becomes its output.
inline void conclude(Team team, const Decoder& d, bf16* x, const bf16* attended, int64_t T, const Workspace& w) {
  const int64_t H = d.hidden(), I = d.inner();
  multiply(team, attended, d.o, w.sum, T, w.tiles);
  wait(team);
  for (int64_t t = team.first(T); t < team.last(T); t++) {
    add_row(x + t * H, w.sum + t * H, H);
    norm_row(x + t * H, d.norm_2, w.normed + t * H, H, d.eps_2);
  }
  wait(team);
  multiply(team, w.normed, d.gate_up, w.gate_up, T, w.tiles);
  wait(team);
  const int64_t width = I % 32 == 0 ? 32 : I;  // of a part: a single token is enough for a team
  for (int64_t part = team.first(T * I / width); part < team.last(T * I / width); part++) {
    const int64_t t = part * width / I, i = part * width % I;
    silu_mul(w.gate_up + t * 2 * I + i, w.gate_up + t * 2 * I + I + i, w.product + t * I + i, width);
  }
  wait(team);
  multiply(team, w.product, d.down, w.sum, T, w.tiles);
  wait(team);
  for (int64_t t = team.first(T); t < team.last(T); t++) add_row(x + t * H, w.sum + t * H, H);
}

}  // namespace
#endif
