"""The trained router: the network's arithmetic, and what it refuses to be put on."""

import dataclasses

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models.pair import LoadedModel
from r2r_glimp.routing.features import FeatureSpec, observe
from r2r_glimp.routing.mlp import MLPConfig, MLPRouter, MLPRouterNet, MLPSize, Threshold
from r2r_glimp.routing.signals import Signals

H = 32
SPEC = FeatureSpec(hidden_size=H, top_k_logits=8)
CONFIG = MLPConfig(granularity="token", features=SPEC, size=MLPSize(width=16, blocks=2))


def make_net(config: MLPConfig = CONFIG, seed: int = 0) -> MLPRouterNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLPRouterNet(config)
        torch.nn.init.normal_(net.mean)
        torch.nn.init.uniform_(net.std, 0.5, 2.0)
    return net.eval()


def make_signals(num_rows: int = 7, vocab: int = 64) -> Signals:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    hidden = torch.randn(num_rows, H, generator=generator)
    return Signals(hidden, logits, logits.argmax(-1), list(range(num_rows)), [0.5] * num_rows)


def make_router(slm=None, config: MLPConfig = CONFIG) -> MLPRouter:
    thresholds = {"a": Threshold(value=0.25, calibrated_on="here")}
    return MLPRouter(make_net(config), thresholds, "a", slm)


@pytest.fixture(scope="module")
def slm(tiny_model, tokenizer) -> LoadedModel:
    return LoadedModel.from_model(tiny_model(), tokenizer, name="tiny")


def test_forward_is_the_drawn_network():
    net, table = make_net(), torch.randn(64, H)
    inputs = SPEC.inputs(observe(make_signals(), SPEC), table)
    w = dict(net.named_parameters())

    def affine(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"])

    whole = (torch.cat(list(inputs.values()), -1) - net.mean) / net.std
    parts = whole.split(list(SPEC.widths.values()), -1)
    named = zip(SPEC.widths, parts, strict=True)
    x = affine("merge", torch.cat([affine(f"project.{name}", part) for name, part in named], -1))
    for i in range(2):
        inner = gelu(affine(f"blocks.{i}.up", norm(f"blocks.{i}.norm", x)))
        x = x + affine(f"blocks.{i}.down", inner)
    expected = affine("head", norm("norm", x))[:, 0]
    assert torch.allclose(net(inputs), expected, atol=1e-6)
    assert net(inputs).shape == (7,) and net(inputs).dtype == torch.float32


def test_r2r_size_is_the_same_class():
    features = FeatureSpec(hidden_size=1536, top_k_logits=100, entropy=False, margin=False)
    size = MLPSize(width=1024, blocks=6)
    with torch.device("meta"):
        net = MLPRouterNet(MLPConfig(granularity="token", features=features, size=size))
    num_weights = sum(p.numel() for p in net.parameters())
    assert 56e6 < num_weights < 58e6  # R2R: 56.3 million


def test_config_round_trip_and_limits():
    assert MLPConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(UsageError, match="width=0 is out of range"):
        MLPSize(width=0)
    huge = CONFIG.to_dict() | {"network": CONFIG.to_dict()["network"] | {"blocks": 10**9}}
    with pytest.raises(CheckpointError, match="blocks=1000000000 is out of range"):
        MLPConfig.from_dict(huge)
    with pytest.raises(CheckpointError, match="granularity='word' is not token or step"):
        MLPConfig.from_dict(CONFIG.to_dict() | {"granularity": "word"})


def test_score_is_the_sigmoid_of_the_logit(slm):
    router, signals = make_router(), make_signals()
    router.bind(slm)
    table = slm.model.get_input_embeddings().weight
    expected = make_net()(SPEC.inputs(observe(signals, SPEC), table)).sigmoid()
    scores = router.score(signals)
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_a_row_scores_the_same_in_any_batch(slm):
    router, signals = make_router(), make_signals()
    router.bind(slm)
    together = router.score(signals)
    alone = torch.cat([router.score(signals.rows([i])) for i in range(len(signals))])
    assert torch.allclose(together, alone, atol=1e-6)


def test_the_wrong_slm_is_refused_by_name(slm, tiny_model, tokenizer):
    router = make_router(slm.fingerprint)
    router.bind(slm)
    other = LoadedModel.from_model(tiny_model(seed=1), tokenizer, name="other")
    with pytest.raises(CheckpointError, match="another SLM: .*other in place of tiny"):
        router.bind(other)


def test_an_adapter_makes_another_slm(slm):
    with_adapter = dataclasses.replace(slm.fingerprint, adapters=("lora",))
    with pytest.raises(CheckpointError, match="adapters is none, not lora"):
        make_router(with_adapter).bind(slm)


def test_without_a_fingerprint_the_width_must_fit(slm):
    features = FeatureSpec(hidden_size=H + 1, top_k_logits=8)
    router = make_router(config=dataclasses.replace(CONFIG, features=features))
    with pytest.raises(CheckpointError, match="embeddings 33 wide, this one has 32"):
        router.bind(slm)


def test_it_needs_its_slm_and_its_granularity(slm):
    router = make_router()
    with pytest.raises(UsageError, match="bind"):
        router.score(make_signals())
    assert router.threshold("token") == 0.25
    with pytest.raises(UsageError, match="granularity token, not step"):
        router.threshold("step")
