"""Columns of a labeled dataset: one row per generated position, in the order of the response.

A row is the SLM's row that predicts `token` at `position`: its features are known before the token
is written. Features are observations (`r2r_glimp.routing.features`); hidden states are stored as
bfloat16 bits, which `datasets` has no type for and float16 would overflow.

    question_id  response_id  source  position  phase  step_start
    token  slm_token  label  step_label
    hidden [H]  top_logits [K]  entropy  margin
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from r2r_glimp.routing.features import Observation


class Label(IntEnum):
    """Of a token, or of the step that starts at a row."""

    UNLABELED = -1  # of steps alone: no step starts here, or it was not labeled
    IDENTICAL = 0  # both models agree
    NEUTRAL = 1  # they differ, the path does not
    DIVERGENT = 2  # the path changes


class Phase(IntEnum):
    """Where in the response a position lies."""

    THINKING = 0
    ANSWER = 1


def labeled_features(hidden_size: int, top_k: int) -> "Features":
    """The schema for an SLM of this hidden size, with `top_k` logits kept.

    Args:
        hidden_size: H, of the SLM.
        top_k: K, values alone, descending.
    """
    from datasets import Features, List, Value

    return Features(
        {
            "question_id": Value("string"),
            "response_id": Value("string"),
            "source": Value("string"),  # where the question comes from, or who wrote the response
            "position": Value("int32"),  # among the generated tokens, from 0
            "phase": Value("int8"),  # Phase
            "step_start": Value("bool"),  # a step starts with this token
            "token": Value("int32"),  # what the response has
            "slm_token": Value("int32"),  # the SLM's candidate
            "label": Value("int8"),  # Label of the SLM's candidate
            "step_label": Value("int8"),  # Label of the SLM's own step from here, -1 without
            "hidden": List(
                Value("uint16"), length=hidden_size
            ),  # bfloat16 bits, after the final norm
            "top_logits": List(Value("float32"), length=top_k),
            "entropy": Value("float32"),  # nats, full vocabulary, temperature 1
            "margin": Value("float32"),  # 1 - (p1 - p2)
        }
    )


def observation_columns(observation: "Observation") -> dict[str, Any]:
    """Feature columns of N rows as numpy arrays: hidden [N, H], top_logits [N, K], others [N]."""
    import torch

    o = observation
    assert o.hidden_NH is not None and o.top_logits_NK is not None
    assert o.candidates_N is not None and o.entropy_N is not None and o.margin_N is not None
    return {
        "slm_token": o.candidates_N.int().cpu().numpy(),
        "hidden": o.hidden_NH.contiguous().view(torch.uint16).cpu().numpy(),
        "top_logits": o.top_logits_NK.cpu().numpy(),
        "entropy": o.entropy_N.cpu().numpy(),
        "margin": o.margin_N.cpu().numpy(),
    }


def labeled_dataset(columns: Mapping[str, Any]) -> "Dataset":
    """A dataset from whole columns: numpy arrays or lists, `hidden` [N, H] and `top_logits` [N, K].

    Nothing is converted value by value, so a million rows take as long as copying them.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo
    from datasets.table import InMemoryTable

    features = labeled_features(columns["hidden"].shape[1], columns["top_logits"].shape[1])
    arrays = []
    for field in features.arrow_schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    table = InMemoryTable(pa.Table.from_arrays(arrays, schema=features.arrow_schema))
    return Dataset(table, info=DatasetInfo(features=features))
