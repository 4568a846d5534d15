"""lm-eval against a running server, on a task that lies on this machine."""

import json
from pathlib import Path

import pytest

from tests.serve.conftest import Live

lm_eval = pytest.importorskip("lm_eval")

TASK = """\
task: cups
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parametrize("kind", ["local-chat-completions", "local-completions"])
def test_lm_eval(live: Live, tmp_path: Path, kind: str) -> None:
    rows = [{"question": f"Say hats {i}. How many hats?", "answer": str(i)} for i in range(6)]
    data = tmp_path / "cups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cups.yaml").write_text(TASK.format(data=data))
    is_chat = "chat" in kind
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args={
            "model": "pair", "base_url": live.url + path, "num_concurrent": 3, "max_retries": 1,
            "tokenizer_backend": None, "tokenized_requests": False,
        },
        tasks=["cups"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=is_chat,
        bootstrap_iters=0,
    )  # fmt: skip
    samples = results["samples"]["cups"]
    assert len(samples) == 6 and "exact_match,none" in results["results"]["cups"]
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples)
    if not is_chat:
        assert any(sample["resps"][0][0] for sample in samples)
