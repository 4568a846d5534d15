"""Answers are graded beside the engine's work; failed ones are tried again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from labeling.formats import Question
from r2r_glimp.core import DataError, Model, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.grading.grader import Verdict
from r2r_glimp.evaluation.run import Setting, answer_all
from r2r_glimp.evaluation.store import Sample, Store
from r2r_glimp.evaluation.system import System
from r2r_glimp.evaluation.task import Task
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.routers import named_router
from tests.engine.conftest import make_pair  # noqa: F401


class Moody:
    """Grades nothing of what it was told to stumble over."""

    workers = 2

    def __init__(self) -> None:
        self.stumbles: set[str] = set()

    def grade(self, question: Question, text: str) -> Verdict:
        if question.id in self.stumbles:
            raise DataError(f"{question.where}: broken")
        return Verdict("right", text[:3], "note")

    def close(self) -> None:
        pass


@pytest.fixture
def setup(make_pair: Callable[[], ModelPair], tmp_path: Path):  # noqa: F811
    engine = Engine(make_pair(), kv_memory="4MiB")
    questions = [
        Question(id=i, prompt=f"Say hats {i}.", source="t", where=f"x:{i}", answer="1")
        for i in "123"
    ]
    store = Store(tmp_path)
    store.start({}, overwrite=False)
    return engine, Task("t", questions, Moody()), store


def answer(setup, router: str = "slm", **routing: object) -> list[Sample]:
    engine, task, store = setup
    setting = Setting(SamplingParams(max_tokens=8), RoutingParams(**routing), templated=False)
    granularity = None if router in ("slm", "llm") else "token"
    system = System(router=router, granularity=granularity)
    return answer_all(engine, task, system, named_router(router), setting, store, lambda: None)


def test_a_grader_that_fails_costs_one_sample_and_is_tried_again(setup) -> None:
    _, task, store = setup
    task.grader.stumbles = {"2"}
    grades = {s.id: (s.grade, s.note, s.error) for s in answer(setup)}
    assert grades["1"] == grades["3"] == ("right", "note", None)
    assert grades["2"] == ("undecided", None, "not graded: x:2: broken")
    task.grader.stumbles = set()
    assert [s.error for s in answer(setup)] == [None] * 3
    (path,) = (store.out / "samples").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 4


def test_a_model_that_fails_is_not_graded(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = setup

    def fail(*args: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runners[Model.SLM], "forward", fail)
        assert {(s.grade, s.finish_reason) for s in answer(setup)} == {("unanswered", "error")}
    samples = answer(setup)
    assert [s.grade for s in samples] == ["right"] * 3
    assert all(s.elapsed_s > 0 and s.error is None for s in samples)


def test_a_baseline_is_one_model_whoever_answers_and_whatever_the_cap(setup) -> None:
    for router, other in (("slm", "llm_tokens"), ("llm", "slm_tokens")):
        samples = answer(setup, router, answer_by="llm", max_llm_share=0.1)
        assert all(getattr(sample, other) == 0 for sample in samples)
    assert any(s.slm_tokens for s in answer(setup, "random", max_llm_share=0.1))
