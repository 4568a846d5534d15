"""The pair as a model of lm-evaluation-harness, on a task that lies on this machine."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from r2r_glimp.abacus.problems import problems
from r2r_glimp.core import UsageError

lm_eval = pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
ARGS = {"pair": "abacus", "kv_memory": "32MiB", "max_tokens": 150, "dtype": "float32"}
TASK = """\
task: abacus
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "Answer {{{{answer}}}}."
generation_kwargs: {{until: ["Nobody"], max_gen_toks: 150{kwargs}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of eight questions."""
    return write_tasks(tmp_path)


def write_tasks(folder: Path, kwargs: str = "") -> Path:
    data = folder / "questions.jsonl"
    rows = islice(problems("test"), 8)
    lines = [json.dumps({"question": p.prompt(), "answer": str(p.answer)}) for p in rows]
    data.write_text("\n".join(lines) + "\n")
    (folder / "abacus.yaml").write_text(TASK.format(data=data, kwargs=kwargs))
    return folder


def evaluate(tasks: Path, **options: Any) -> dict[str, Any]:
    import r2r_glimp.lm_eval  # noqa: F401  (registers the model)

    results = lm_eval.simple_evaluate(
        model="r2r_glimp",
        model_args=ARGS | options,
        tasks=["abacus"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        device="cuda:0",  # lm-eval's default, whatever the machine has
    )
    assert results is not None
    return results


def test_a_task_that_generates(tasks: Path) -> None:
    llm = evaluate(tasks, router="llm")
    assert llm["results"]["abacus"]["exact_match,none"] == 1.0
    assert llm["config"]["llm_share"] == 1.0
    # The thinking is not the task's: it ends at no stop string, and is no part of the answer.
    assert all(s["resps"][0][0].startswith("Answer ") for s in llm["samples"]["abacus"])
    routed = evaluate(tasks, router="entropy", granularity="step", threshold=0.001)
    assert 0 < routed["config"]["llm_share"] < 0.9
    assert routed["config"]["slm"].endswith("abacus-slm")


def test_options_come_from_a_file_too(tasks: Path) -> None:
    preset = ROOT / "configs" / "routing" / "glimprouter.yaml"
    config = evaluate(tasks, config=str(preset), max_tokens=60)["config"]
    assert config["router"] == "entropy" and 0 < config["llm_share"] < 0.6


def test_what_cannot_be_done_is_named(tmp_path: Path) -> None:
    from r2r_glimp.lm_eval import R2RGlimpLM

    model = R2RGlimpLM(**ARGS)
    for name in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(UsageError, match=f"^{name}: two models write"):
            getattr(model, name)([])
    with pytest.raises(UsageError, match="begins the answer itself"):
        model.apply_chat_template([], add_generation_prompt=False)
    with pytest.raises(UsageError, match="'num_beams' is not known"):
        evaluate(write_tasks(tmp_path, ", num_beams: 4"))
    with pytest.raises(UsageError, match="unknown option --ruoter"):
        R2RGlimpLM(ruoter="entropy")
