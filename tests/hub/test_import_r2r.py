"""R2R's router.pt, rebuilt here in its layout, against our network."""

import pickle

import pytest
import torch
from torch import nn

from r2r_glimp.core import CheckpointError
from r2r_glimp.hub import convert_r2r, load_router
from r2r_glimp.routing.features import Observation
from tests.hub.conftest import FINGERPRINT

H, K, W, BLOCKS = 8, 5, 12, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(W)
        self.mlp = nn.Sequential(
            nn.Linear(W, 4 * W), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * W, W), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.layer_norm(x))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_projection = nn.Linear(W, W)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.output_layer = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_projection(x)
        for block in self.blocks:
            x = block(x)
        return self.output_layer(x)


class Theirs(nn.Module):
    """The layout of R2R's published routers."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_projection = nn.Linear(K, H)
        self.combined_projection = nn.Linear(3 * H, W)
        self.backbone = Backbone()

    def forward(self, hidden, candidate, logits) -> torch.Tensor:
        inputs = torch.cat([hidden, candidate, self.logits_projection(logits)], -1)
        return self.backbone(self.combined_projection(inputs))


@pytest.fixture
def theirs() -> Theirs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Theirs().eval()


@pytest.fixture
def write(theirs, tmp_path):
    def write(**change):
        content = {
            "model_type": "HiddenStatesTokenLMHeadLogitsClassifier",
            "init_args": {
                "hidden_states_size": H,
                "logits_size": K,
                "hidden_dims": [W] * BLOCKS,
                "expansion_factor": 4,
                "dropout_rate": 0.1,
                "pretrained_model_name": "acme/small",
                "normalize_input": False,
            },
            "common_args": {"threshold": 0.41, "input_type": ["hidden_states"]},
            "model_specific_args": {},
            "state_dict": theirs.state_dict(),
        }
        path = tmp_path / "router.pt"
        torch.save(content | change, path)
        return path

    return write


def test_the_same_logits(write, theirs, tmp_path):
    checkpoint = convert_r2r(write(), slm=FINGERPRINT)
    assert checkpoint.config.threshold.value == 0.41
    checkpoint.save_pretrained(tmp_path / "router")
    router = load_router(tmp_path / "router")
    hidden, candidate = torch.randn(2, 9, H).bfloat16()
    logits = 5 * torch.randn(9, K).sort(descending=True).values
    seen = Observation(hidden, logits, torch.arange(9), None, None)
    inputs = router.config.features.inputs(seen, candidate)
    expected = theirs(hidden.float(), candidate.float(), logits)[:, 0]
    assert torch.allclose(router.net(inputs), expected, atol=1e-5)


def test_an_embedding_is_taken_only_if_frozen(write, theirs):
    state = theirs.state_dict() | {"token_embeddings.weight": torch.ones(20, H)}
    with pytest.raises(CheckpointError, match="holds its own token embeddings"):
        convert_r2r(write(state_dict=state))
    args = torch.load(write(), weights_only=True)["init_args"] | {"freeze_lm_head": True}
    assert convert_r2r(write(state_dict=state, init_args=args)).config.slm is None


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_code_is_refused(tmp_path, capsys):
    path = tmp_path / "router.pt"
    torch.save({"model_type": Evil(), "state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="refused: it holds more than weights"):
        convert_r2r(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="refused"):
        convert_r2r(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "LogitsClassifier"}, "only HiddenStatesTokenLMHeadLogitsClassifier"),
        ({"init_args": {"surprise": 1}}, "keys that this R2R layout does not know"),
        ({"init_args": {"hidden_dims": [256, 512, 256]}}, "only blocks of one width"),
        ({"init_args": {"hidden_dims": [W, W], "normalize_input": True}}, "no counterpart"),
        ({"init_args": {"hidden_dims": [W, W]}}, "logits_projection.weight has shape"),
        ({"init_args": {"hidden_dims": [W]}}, "state_dict does not match"),
        ({"state_dict": {}}, "state_dict does not match its init_args"),
        ({"state_dict": {"a": 1}}, "does not hold tensors"),
        ({"common_args": {"threshold": 7}}, "threshold 7 is out of range"),
    ],
)
def test_other_layouts_are_refused(write, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        convert_r2r(write(**change))
    assert "\n" not in str(error.value)


def test_bad_files(write, theirs, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        convert_r2r(tmp_path / "nothing.pt")
    path = write()
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="refused") as error:
            convert_r2r(path)
        assert "\n" not in str(error.value)
    state = theirs.state_dict()
    state["backbone.input_projection.bias"] = torch.full((W,), float("inf"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert_r2r(write(state_dict=state))
