"""Benches run and say what they ran; nothing here looks at a clock."""

import json
from pathlib import Path

import pytest
import torch

from r2r_glimp.bench import setting
from r2r_glimp.bench.measure import Clock, Sample, interleave
from r2r_glimp.bench.shapes import SHAPES, make_model, make_tokenizer, read_shape
from r2r_glimp.cli.main import main
from r2r_glimp.core import UsageError

TINY = ["--slm_shape", "tiny", "--llm_shape", "tiny", "--device", "cpu"]
QUICK = [*TINY, "--repeats", "2", "--tokens", "4", "--context", "5", "--json"]


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["bench", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_decode_is_held_against_bandwidth_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "decode", *QUICK)
    assert [line["name"] for line in found["lines"]] == ["r2r_glimp", "HF generate"]
    assert all(0 < line["of_bandwidth"] for line in found["lines"])
    assert "the time of r2r_glimp" in found["lines"][1]["ratios"]
    assert found["machine"]["read_bandwidth"] > 0 and "attention" in found["paths"]["slm"]


def test_prefill_knows_the_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "prefill", *QUICK)
    names = [line["name"] for line in found["lines"]]
    assert names == ["r2r_glimp, cold", "r2r_glimp, prefix known", "HF forward"]


@pytest.mark.parametrize("granularity", ["token", "step"])
def test_route_says_where_the_time_goes(
    granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(
        capsys, "route", *QUICK, "--granularity", granularity, "--share", "0.5", "--no_peers"
    )
    routed, ideal, *alone = found["lines"]
    assert set(routed["parts"]) == {"SLM", "LLM", "router", "sampling", "scheduler, text", "idle"}
    assert abs(sum(routed["parts"].values()) - 1) < 1e-6 and min(routed["parts"].values()) >= 0
    assert all(line["bytes_per_s"] > 0 for line in found["lines"])
    assert routed["ratios"]["of ideal"] == ideal["median"] / routed["median"]
    assert [line["name"] for line in alone] == ["SLM alone", "LLM alone"]


def test_a_routed_batch_is_compared_with_one_after_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = report(capsys, "route", *QUICK, "--batch", "3")
    assert found["lines"][-1]["name"] == "routed, one after another"


def test_a_real_pair_is_measured_like_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--device", "cpu", "--repeats", "1", "--tokens", "4", "--context", "5", "--json"]
    for bench in ("decode", "route"):
        found = report(capsys, bench, "--pair", "abacus", "--dtype", "auto", *quick)
        assert "abacus" in found["what"]
        assert any(line["name"].startswith("HF generate") for line in found["lines"])


def test_speculation_is_held_against_the_llm_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "speculate", *QUICK, "--batch", "2", "--tokens", "8")
    names = [line["name"] for line in found["lines"]]
    assert names[0] == "LLM alone" and names[-1] == "drafts right 95%"


def test_label(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "label", *QUICK, "--batch", "2")
    assert [line["name"].split(":")[0] for line in found["lines"]][:2] == ["respond", "compare"]


@pytest.mark.parametrize("models", [("--pair", "abacus"), TINY])
def test_serve_is_compared_with_the_offline_engine(
    capsys: pytest.CaptureFixture[str], models: tuple[str, ...]
) -> None:
    few = ("--requests", "3", "--clients", "2", "--tokens", "4", "--repeats", "1")
    found = report(capsys, "serve", *few, *models, "--device", "cpu", "--json")
    offline, streamed, whole, *times = found["lines"]
    assert offline["tokens_per_s"] > 0
    for line in (streamed, whole):
        assert line["ratios"]["the offline engine's tokens/s"] > 0
    names = [f"{what}, p{p}" for what in ("first token", "between tokens") for p in (50, 90, 99)]
    assert [line["name"] for line in times] == names


def test_people_get_a_table_and_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "decode.svg"
    options = [*QUICK[:-1], "--no_peers", "--plot", str(plot), "--kernels", "torch"]
    assert main(["bench", "decode", *options]) == 0
    text = capsys.readouterr().out
    assert "gathered attention, plain torch" in text and "tokens/s" in text
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["sing"], "no bench 'sing'"),
        (["decode", "--slm_shape", "qwen9"], "no shape 'qwen9'"),
        (["decode", "--repeats", "0"], "repeats=0 is out of range"),
        (["route", "--share", "2"], "share=2.0 is out of range"),
        (["decode", "--dtype", "auto"], "name one"),
        (["serve", "--requests", "1"], "serve needs 2 requests"),
        (["decode", "--dtype", "int8"], "dtype='int8' is not to be had"),
        (["decode", "--device", "cuda:99"], "device='cuda:99' was asked for, but"),
        (["decode", "--pair", "nobody"], "no pair is named 'nobody'"),
        (["decode", *TINY, "--kernels", "amx", "--dtype", "float16"], "kernels='amx' is for bf"),
        (["decode", *TINY, "--batch", "100000000"], "free: --batch"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_what_is_more_than_the_memory_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setting, "free_bytes", lambda device: 50 * 2**30)
    for more in ([], ["--no_peers"]):
        assert main(["bench", "decode", "--slm_shape", "qwen3-32b", "--device", "cpu", *more]) == 2
        error = capsys.readouterr().err
        assert "qwen3-32b in bfloat16 take 61.0 GiB" in error and error.count("\n") == 1
        assert ("peers" in error) is not bool(more)


def test_random_models_are_the_same_every_time() -> None:
    first, second = (make_model("tiny", torch.float32, torch.device("cpu")) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_a_shape_may_be_a_config_file(tmp_path: Path) -> None:
    read_shape("tiny").save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)).hidden_size == SHAPES["tiny"]["hidden_size"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not a model's config"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize("size", [300, 5000])
def test_the_tokenizer_has_a_text_for_every_id(size: int) -> None:
    tokenizer = make_tokenizer(size)
    assert len(tokenizer) == size
    assert all(tokenizer.decode([i]) for i in range(0, size, 7))


def test_interleaved_repeats() -> None:
    order: list[str] = []
    found = interleave({n: lambda n=n: order.append(n) or 1.0 for n in "ab"}, 2)  # type: ignore[misc]
    assert order == ["a", "b", "a", "b"] and found["a"].values == (1.0, 1.0)
    assert Sample((1.0, 2.0, 9.0)).median == 2.0 and Sample((3.0,)).spread == 0.0


def test_the_clock_leaves_nothing_behind() -> None:
    class Thing:
        def work(self) -> int:
            return 7

    thing = Thing()
    clock = Clock({"work": [(thing, "work")]})
    with clock.running():
        assert thing.work() == 7
    assert clock.calls == {"work": 1} and clock.seconds["work"] > 0
    assert "work" not in vars(thing)
