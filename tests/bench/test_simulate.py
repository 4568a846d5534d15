"""Simulated capacity: exact where it can be; nothing here looks at a real clock but one run."""

import json
from typing import Any

import pytest

from r2r_glimp.bench.options import BenchOptions, SimulateOptions
from r2r_glimp.bench.remote import shared_seconds, total, union
from r2r_glimp.bench.setting import Setting
from r2r_glimp.bench.simulate import _tiny_pair, foretell
from r2r_glimp.bench.steptime import StepTime
from r2r_glimp.cli.main import main


@pytest.fixture(scope="module", autouse=True)
def no_bandwidth() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr("r2r_glimp.bench.setting.read_bandwidth", lambda device: 1e9)
    yield
    patch.undo()


def outcome(users: int, llm_min_batch: int = 1, **changes: Any) -> Any:
    given = {"slm_ms": 6.0, "llm_ms": 28.0, **changes}
    names = {"share", "tokens", "granularity", "step_tokens"}
    options = BenchOptions(
        tokens=changes.pop("tokens", 40), **{k: v for k, v in changes.items() if k in names}
    )
    simulate = SimulateOptions(**{k: v for k, v in given.items() if k not in names})
    setting = Setting(options, simulate)
    times = (
        StepTime.stated(simulate.slm_ms or 0, simulate.slm_token_us),
        StepTime.stated(simulate.llm_ms or 0, simulate.llm_token_us),
    )
    return foretell(setting, _tiny_pair(setting), times, users, llm_min_batch)


def test_one_user_takes_both_times() -> None:
    found = outcome(1, share=0.25)
    # 40 tokens, 10 of them by the LLM.
    assert found.seconds == pytest.approx(40 * 0.006 + 10 * 0.028)
    assert found.share == 0.25 and found.busy == pytest.approx((0.24, 0.28))
    assert outcome(1, share=0.25, overlap=True).seconds == pytest.approx(found.seconds)


def test_a_batch_costs_a_pass() -> None:
    alone = outcome(8, share=0.0)
    assert alone.seconds == pytest.approx(40 * 0.006)  # eight users, one pass a token
    # The first pass reads the last block of each prompt: 16 tokens in place of one.
    assert outcome(8, share=0.0, slm_token_us=100.0).seconds == pytest.approx(
        40 * 0.0067 + 0.0008 * 15
    )


def test_overlap_hides_the_llm_and_waiting_fills_its_batch() -> None:
    serial, delayed = outcome(8, share=0.35), outcome(8, 4, share=0.35)
    overlapped = outcome(8, share=0.35, overlap=True)
    assert overlapped.seconds < delayed.seconds < serial.seconds
    assert sum(overlapped.busy) > overlapped.seconds  # both worked at once


def test_a_step_is_many_passes_of_the_llm() -> None:
    for overlap in (False, True):
        found = outcome(
            1, share=0.5, granularity="step", step_tokens=10, overlap=overlap, llm_token_us=0.0
        )
        # Two of four steps are the LLM's. The SLM proposes their first tokens, in vain.
        assert found.share == 0.5
        assert found.busy == pytest.approx((22 * 0.006, 20 * 0.028))


def test_little_kv_memory_makes_users_wait() -> None:
    assert outcome(8, share=0.1, kv_tokens=200).seconds > 1.5 * outcome(8, share=0.1).seconds


def test_step_times_between_points() -> None:
    step = StepTime(((1, 1.0), (4, 2.5), (8, 2.5)))
    assert [step.seconds(n) for n in (1, 2, 4, 6, 8, 80)] == [1.0, 1.5, 2.5, 2.5, 2.5, 2.5]


def test_intervals() -> None:
    some = union([(5.0, 6.0), (0.0, 1.0), (0.5, 2.0)])
    assert some == [(0.0, 2.0), (5.0, 6.0)] and total(some) == 3.0
    assert shared_seconds(some, [(1.0, 5.5)]) == 1.5


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["bench", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_published_table_stands_beside(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "--slm_ms", "6", "--llm_ms", "27.9", "--share", "0.35", "--tokens", "16"]
    found = report(capsys, *argv, "--users", "1", "--users", "8", "--token_ms", "20")
    names = [line["name"] for line in found["lines"]]
    assert names[1] == "1 in TokenRouter's table" and names[3] == "8 in TokenRouter's table"
    assert found["lines"][3]["tokens_per_s"] == pytest.approx(372)
    assert "at 20 ms a token: " in found["what"]


def test_foretold_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--slm_shape", "tiny", "--llm_shape", "small", "--device", "cpu", "--share", "0.3"]
    found = report(
        capsys, "simulate", *options, "--batch", "2", "--tokens", "24", "--dtype", "float32"
    )
    [ratio] = found["lines"][1]["ratios"].values()
    assert 0.3 < ratio < 3  # 0.9 to 1.1 on a machine that does nothing else


def test_a_deferral_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(
        capsys, "remote", "--slm_shape", "tiny", "--batch", "8", "--tokens", "6",
        "--share", "0.3", "--llm_ms", "5", "--repeats", "1", "--device", "cpu",
    )  # fmt: skip
    routed, own, more, _ = found["lines"]
    assert set(routed["parts"]) == {"SLM passes", "an answer was out", "both at once"}
    assert own["median"] == 0.005 and 0 < more["median"]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--slm_ms", "6"], "slm_ms and llm_ms go together"),
        (["--slm_ms", "0", "--llm_ms", "1"], "slm_ms=0.0 is out of range"),
        (["--users", "4"], "users goes with stated step times"),
        (["--slm_ms", "1", "--llm_ms", "1", "--users", "0"], "is out of range: 1 or more"),
    ],
)
def test_what_makes_no_sense(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "simulate", *argv]) == 2
    assert complaint in capsys.readouterr().err
