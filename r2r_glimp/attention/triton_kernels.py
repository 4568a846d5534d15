"""The Triton kernels: write keys and values into their slots, attend over block tables.

    planes         [K, slots, D]     slot = block * 16 + place in it
    query tile     new tokens x query heads of one key/value head (GQA), so that keys are read once
    splits         the context cut in parts that run side by side; `combine` weighs them

One program attends for a tile of one row, one key/value head and one split. All that varies from
batch to batch is read from tensors, so launches can be captured in a CUDA graph. Run on the CPU by
Triton's interpreter (TRITON_INTERPRET=1) they are checked against the gather backend.

Shape suffixes in comments: M queries of a tile, C context of a step, D head size.
"""

# Triton reads annotations as code of the kernel, so there are none.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)  # tokens of a KV block


@triton.jit
def store(
    key,  # [T, K, D]
    value,  # [T, K, DV]
    keys,
    values,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    num_slots,
    kv_heads,
    head_dim,
    value_dim,
    HEADS: tl.constexpr,  # the numbers above, rounded up to powers of two
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """One program writes one token's keys and values; a token with slot -1 is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        head = tl.arange(0, HEADS).to(tl.int64)[:, None]
        d = tl.arange(0, HEAD_DIM)[None, :]
        there = (head < kv_heads) & (d < head_dim)
        x = tl.load(key + token * key_token + head * key_head + d, mask=there)
        tl.store(keys + (head * num_slots + slot) * head_dim + d, x, mask=there)
        d = tl.arange(0, VALUE_DIM)[None, :]
        there = (head < kv_heads) & (d < value_dim)
        x = tl.load(value + token * value_token + head * value_head + d, mask=there)
        tl.store(values + (head * num_slots + slot) * value_dim + d, x, mask=there)


# Numbers that change from batch to batch, for which nothing is to be compiled anew.
@triton.jit(do_not_specialize=["num_tokens", "table_width"])
def attend(
    query,  # [T, Q, D]
    keys,
    values,
    out,  # [T, Q, DV], or [splits, T, Q, DV] float32
    lse,  # [splits, T, Q] float32, log of the sum of exponentials; unused without splits
    sinks,  # [Q] float32; unused without sinks
    first_of,
    room_of,
    new_of,
    length_of,
    tables,
    scaling,
    softcap,
    window,
    query_token,
    query_head,
    num_tokens,
    num_heads,
    num_slots,
    table_width,
    group,
    head_dim,
    value_dim,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products
    PRECISION: tl.constexpr,
):
    """Online softmax over a part of the context. Padding gives zeros."""
    tile, row = tl.program_id(0), tl.program_id(1)
    kv_head, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    room, new, length = tl.load(room_of + row), tl.load(new_of + row), tl.load(length_of + row)
    if tile * TILE >= room * group:
        return
    m = tile * TILE + tl.arange(0, TILE)
    step = m // group
    head = kv_head * group + m % group
    position = length - new + step
    real, inside = step < new, step < room
    token = (tl.load(first_of + row) + step).to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    dv = tl.arange(0, VALUE_DIM)
    query_MD = tl.load(
        query + token[:, None] * query_token + head[:, None] * query_head + d[None, :],
        mask=real[:, None] & (d < head_dim)[None, :],
        other=0.0,
    ).to(DOT)

    # What the tile's queries may look at, cut in `SPLITS` parts of whole steps.
    last = tl.minimum((tile * TILE + TILE - 1) // group, new - 1)
    end = length - new + last + 1
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - new + (tile * TILE) // group - window + 1, 0) // STEP * STEP
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), STEP), SPLITS) * STEP
    begin += split * part
    end = tl.minimum(end, begin + part)

    highest_M = tl.full([TILE], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE], tl.float32)
    if HAS_SINKS:  # one more column, that takes probability and gives nothing (gpt-oss)
        if split == 0:
            highest_M = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32)
            total_M += 1.0
    out_MD = tl.zeros([TILE, VALUE_DIM], tl.float32)
    keys += kv_head.to(tl.int64) * num_slots * head_dim
    values += kv_head.to(tl.int64) * num_slots * value_dim
    tables += row.to(tl.int64) * table_width
    for start in range(begin, end, STEP):
        c = start + tl.arange(0, STEP)
        known = c < end
        block = tl.load(tables + c // BLOCK, mask=known, other=0).to(tl.int64)
        slot = block * BLOCK + c % BLOCK
        key_DC = tl.load(
            keys + slot[None, :] * head_dim + d[:, None],
            mask=known[None, :] & (d < head_dim)[:, None],
            other=0.0,
        ).to(DOT)
        scores_MC = tl.dot(query_MD, key_DC, input_precision=PRECISION) * scaling
        if HAS_SOFTCAP:  # softcap * tanh(scores / softcap)
            scores_MC = softcap * (2 * tl.sigmoid(2 * scores_MC / softcap) - 1)
        visible = known[None, :] & (c[None, :] <= position[:, None]) & real[:, None]
        if HAS_WINDOW:
            visible &= c[None, :] > (position - window)[:, None]
        scores_MC = tl.where(visible, scores_MC, float("-inf"))
        above_M = tl.maximum(highest_M, tl.max(scores_MC, 1))
        base_M = tl.where(above_M == float("-inf"), 0.0, above_M)  # nothing seen yet
        probs_MC = tl.exp(scores_MC - base_M[:, None])
        fade_M = tl.exp(highest_M - base_M)
        total_M = total_M * fade_M + tl.sum(probs_MC, 1)
        value_CD = tl.load(
            values + slot[:, None] * value_dim + dv[None, :],
            mask=known[:, None] & (dv < value_dim)[None, :],
            other=0.0,
        ).to(DOT)
        seen_MD = tl.dot(probs_MC.to(DOT), value_CD, input_precision=PRECISION)
        out_MD = out_MD * fade_M[:, None] + seen_MD
        highest_M = above_M
    out_MD = out_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    to = (split.to(tl.int64) * num_tokens + token) * num_heads + head
    there = inside[:, None] & (dv < value_dim)[None, :]
    tl.store(out + to[:, None] * value_dim + dv[None, :], out_MD, mask=there)
    if SPLITS > 1:
        log_M = tl.log(tl.where(total_M == 0.0, 1.0, total_M))
        tl.store(lse + to, highest_M + log_M, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def combine(
    parts,  # [splits, T, Q, DV] float32
    lse,  # [splits, T, Q] float32
    out,  # [T, Q, DV]
    num_rows,  # T * Q
    value_dim,
    VALUE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program weighs the parts of one token and head by their share of the probability."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS).to(tl.int64)
    dv = tl.arange(0, VALUE_DIM)
    lse_S = tl.load(lse + s * num_rows + row)
    highest = tl.max(lse_S, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight_S = tl.exp(lse_S - base)
    total = tl.sum(weight_S, 0)
    parts_SD = tl.load(
        parts + (s[:, None] * num_rows + row) * value_dim + dv[None, :],
        mask=(dv < value_dim)[None, :],
        other=0.0,
    )
    out_D = tl.sum(parts_SD * weight_S[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * value_dim + dv, out_D, mask=dv < value_dim)
