"""What a router sees: the same numbers whoever builds them."""

import pytest
import torch

from labeling.schema import observation_columns
from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.routing.features import FeatureSpec, Observation, observe
from r2r_glimp.routing.signals import Signals, entropy_nats, margin

N, H, V, K = 6, 8, 20, 5
SPEC = FeatureSpec(hidden_size=H, top_k_logits=K)


def signals(dtype: torch.dtype = torch.float32) -> Signals:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    logits = 3 * torch.randn(N, V, generator=generator).to(dtype)
    return Signals(hidden, logits, logits.argmax(-1), list(range(N)), [0.5] * N)


def embedding() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1))


def test_widths_and_dim():
    assert SPEC.widths == {"hidden": H, "top_logits": K, "candidate": H, "entropy": 1, "margin": 1}
    assert SPEC.dim == 2 * H + K + 2
    few = FeatureSpec(hidden_size=H, hidden=False, top_k_logits=0, candidate=False, margin=False)
    assert few.widths == {"entropy": 1}


def test_inputs_are_what_they_say():
    s, table = signals(), embedding()
    inputs = SPEC.inputs(observe(s, SPEC), table)
    assert list(inputs) == list(SPEC.widths)
    assert all(value.dtype == torch.float32 for value in inputs.values())
    assert torch.equal(inputs["hidden"], s.hidden_NH.bfloat16().float())
    assert torch.equal(inputs["top_logits"], s.logits_NV.sort(descending=True).values[:, :K])
    assert torch.equal(inputs["candidate"], table[s.candidates_N].bfloat16().float())
    assert torch.equal(inputs["entropy"][:, 0], entropy_nats(s.logits_NV))
    assert torch.equal(inputs["margin"][:, 0], margin(s.logits_NV))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_through_a_dataset(dtype):
    direct = observe(signals(dtype), SPEC)
    columns = {name: torch.from_numpy(v) for name, v in observation_columns(direct).items()}
    stored = Observation(
        columns["hidden"].view(torch.bfloat16),
        columns["top_logits"],
        columns["slm_token"].long(),
        columns["entropy"],
        columns["margin"],
    )
    ours, theirs = (SPEC.inputs(o, embedding()) for o in (direct, stored))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_is_computed_that_is_not_looked_at():
    spec = FeatureSpec(hidden_size=H, top_k_logits=0, candidate=False, entropy=False, margin=False)
    seen = observe(signals(), spec)
    assert [seen.top_logits_NK, seen.candidates_N, seen.entropy_N, seen.margin_N] == [None] * 4
    assert list(spec.inputs(seen)) == ["hidden"]


def test_a_dataset_with_more_logits_serves_fewer():
    fewer = FeatureSpec(hidden_size=H, top_k_logits=2)
    inputs = fewer.inputs(observe(signals(), SPEC), embedding())
    assert torch.equal(inputs["top_logits"], observe(signals(), SPEC).top_logits_NK[:, :2])


def test_what_does_not_fit_is_refused():
    seen = observe(signals(), SPEC)
    with pytest.raises(UsageError, match="candidate is missing, the router wants 8"):
        SPEC.inputs(seen)
    with pytest.raises(UsageError, match="hidden is 8 wide, the router wants 9"):
        FeatureSpec(hidden_size=9).inputs(seen, embedding())
    with pytest.raises(UsageError, match="top_logits is 5 wide, the router wants 6"):
        FeatureSpec(hidden_size=H, top_k_logits=6).inputs(seen, embedding())
    with pytest.raises(UsageError, match="top_k_logits=21, but the vocabulary has 20 tokens"):
        observe(signals(), FeatureSpec(hidden_size=H, top_k_logits=21))
    with pytest.raises(UsageError, match="at least one of"):
        FeatureSpec(
            hidden_size=H,
            hidden=False,
            top_k_logits=0,
            candidate=False,
            entropy=False,
            margin=False,
        )
    with pytest.raises(UsageError, match="hidden_size=0 is out of range"):
        FeatureSpec(hidden_size=0)


def test_json_round_trip():
    assert FeatureSpec.from_dict(SPEC.to_dict()) == SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"hidden": 1}, "hidden=1 is not true or false"),
        ({"hidden_size": "8"}, "hidden_size='8' is not an integer"),
        ({"top_k_logits": True}, "top_k_logits=True is not an integer"),
    ],
)
def test_json_is_read_strictly(change, message):
    with pytest.raises(CheckpointError, match=message):
        FeatureSpec.from_dict(SPEC.to_dict() | change)


def test_missing_key_and_no_object():
    values = SPEC.to_dict()
    del values["margin"]
    with pytest.raises(CheckpointError, match="features: missing key 'margin'"):
        FeatureSpec.from_dict(values)
    with pytest.raises(CheckpointError, match="expected an object, found list"):
        FeatureSpec.from_dict([])
