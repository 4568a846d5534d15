"""A labeling run as a dataset of the Hub: what goes up can be trained on again."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from labeling.card import export_run, is_run
from labeling.run import run
from r2r_glimp.cli.main import main
from r2r_glimp.core import DataError
from training.rows import LabeledRows


def test_an_exported_run_holds_the_same_rows(pair, make_config, tmp_path, capsys) -> None:
    config = make_config()
    run(config, pair)
    assert is_run(config.out_dir) and not is_run(tmp_path)
    folder = tmp_path / "published"
    export_run(config.out_dir, folder)
    card = (folder / "README.md").read_text()
    assert "# Where abacus-slm would leave the path of abacus-llm" in card
    assert "6 questions, 6 responses by llm" in card
    before, after = LabeledRows(str(config.out_dir / "dataset")), LabeledRows(str(folder))
    everything = np.arange(len(before.label))
    assert np.array_equal(before.label, after.label)
    assert np.array_equal(before.hidden.take(everything), after.hidden.take(everything))
    # The whole of it by the command line, without a network.
    assert main(["push", str(config.out_dir), "me/labels", "--dry_run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [file["name"] for file in json.loads(out)["files"]] == [
        "README.md", "data/train-00000-of-00001.parquet", "info.json", "summary.json",
    ]  # fmt: skip
    assert "would push the dataset me/labels" in err
    assert main(["push", str(config.out_dir), "me+labels", "--dry_run"]) == 2


def test_a_broken_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "dataset"))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="not a whole labeling run"):
        export_run(tmp_path, tmp_path / "out")
