"""The report: shares, examples, and the same again from the folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from labeling.card import export_run
from labeling.config import LabelingConfig
from labeling.progress import Meter
from labeling.report import CLASSES, load_summary, render_text
from labeling.report_html import render_html
from labeling.run import run
from labeling.sections import SourceConfig
from r2r_glimp.cli.inspect import run as inspect
from r2r_glimp.core import DataError, UsageError
from r2r_glimp.models import ModelPair
from tests.labeling.conftest import read


def test_summary_adds_up(pair: ModelPair, make_config: Callable[..., LabelingConfig]) -> None:
    config = make_config(source=SourceConfig(count=6, split="validation", name="<mine>"))
    summary = run(config, pair)
    assert summary is not None
    rows = read(config.out_dir).values()
    tokens, steps = summary["tokens"], summary["steps"]
    assert tokens["total"] == len(rows)
    for i, name in enumerate(CLASSES):
        assert tokens["counts"][name] == sum(row["label"] == i for row in rows)
        assert steps["counts"][name] == sum(row["step_label"] == i for row in rows)
    for part in (tokens, steps):
        for shares in (part["by_position"], part["by_phase"].values(), part["by_source"].values()):
            assert sum(share["total"] for share in shares) == part["total"]
    assert list(tokens["by_source"]) == ["<mine>"]
    assert tokens["mean_entropy"]["divergent"] > tokens["mean_entropy"]["identical"]
    for kind in ("token", "step"):
        for name in CLASSES[1:]:
            for example in summary["examples"][kind][name]:
                assert example["slm"] != example["llm"]
    for example in summary["examples"]["token"]["neutral"]:
        assert example["slm_answer"] == example["llm_answer"]
    for example in summary["examples"]["token"]["divergent"]:
        assert example["slm_answer"] != example["llm_answer"]
    assert load_summary(config.out_dir) == load_summary(config.out_dir / "dataset") == summary

    text = render_text(summary, num_examples=1)
    assert "6 questions, 6 responses" in text and "divergent token, " in text
    page = (config.out_dir / "report.html").read_text(encoding="utf-8")
    assert page == render_html(summary)
    assert "&lt;mine&gt;" in page and "<mine>" not in page
    assert not re.search(r"https?://|<script", page)


def test_inspect_shows_it_again(
    pair: ModelPair,
    make_config: Callable[..., LabelingConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    with pytest.raises(DataError, match="is not finished, run the same command again"):
        (config.out_dir / "shards").mkdir(parents=True)
        inspect([str(config.out_dir)])
    summary = run(config, pair)
    page, published = tmp_path / "page.html", tmp_path / "published"
    export_run(config.out_dir, published)
    for folder in (config.out_dir, config.out_dir / "dataset", published):
        assert inspect([str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"kind": "labels", **(summary or {})}
    assert inspect([str(published), "--show", "1", "--html", str(page)]) == 0
    assert capsys.readouterr().out.count("divergent token, ") == 1
    assert page.read_bytes() == (config.out_dir / "report.html").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        inspect([str(published), "--html", str(page)])


def test_a_folder_without_a_summary(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=r"summary.json: no such file"):
        load_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="summary.json cannot be read"):
        load_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"recall": 1}')
    with pytest.raises(DataError, match="it is not of labels"):
        load_summary(tmp_path)


def test_progress_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import labeling.progress as progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter(100, 20)
    assert meter.line() == "20/100 questions, 0.00/s, 0 tokens/s, starting"
    now[0] = 10.0
    meter.update(30, 5000)
    assert meter.line() == "50/100 questions, 3.00/s, 500 tokens/s, 17 s left"
    meter.finish_shard()
    now[0] = 4000.0
    meter.update(50, 5000)
    assert meter.line() == "100/100 questions, 0.02/s, 2 tokens/s, 1 h 6 min in all"
    assert json.dumps(meter.line())
