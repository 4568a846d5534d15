"""A labeled dataset as a folder of the Hub: card, parquet files, what it was made of.

OUT/dataset/*.arrow, OUT/info.json, OUT/summary.json  ──▶  README.md, data/*.parquet, *.json
"""

import json
import shutil
from pathlib import Path
from typing import Any

from labeling.progress import no_bars
from labeling.report import CLASSES
from r2r_glimp.core import DataError

_ROWS_PER_FILE = 500_000
_COLUMNS = """\
| column | |
|---|---|
| `question_id`, `response_id`, `source` | where the row is from |
| `position` | of the token in the response |
| `token`, `slm_token` | what was written there, and what the small model proposed |
| `label` | per token: 0 identical, 1 neutral, 2 divergent, -1 none |
| `step_label` | per step, at its first token: the same classes |
| `hidden` | {hidden} of the small model's row that proposes the token, bfloat16 bits as uint16 |
| `top_logits`, `entropy`, `margin` | of the small model's distribution there |"""


def is_run(path: Path) -> bool:
    """Whether a folder is what `python -m labeling` makes."""
    return (path / "dataset" / "state.json").is_file() and (path / "summary.json").is_file()


def export_run(path: Path, target: Path) -> None:
    """Write a run as a folder that `publish_dataset` takes.

    Raises:
        DataError: the run is not complete.
    """
    import datasets

    try:
        info = json.loads((path / "info.json").read_bytes())
        summary = json.loads((path / "summary.json").read_bytes())
        dataset = datasets.load_from_disk(str(path / "dataset"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole labeling run ({error}): run it again") from None
    assert isinstance(dataset, datasets.Dataset)
    (target / "data").mkdir(parents=True)
    parts = max(1, -(-len(dataset) // _ROWS_PER_FILE))
    for index in range(parts):
        shard = dataset.shard(parts, index, contiguous=True)
        with no_bars():
            shard.to_parquet(str(target / "data" / f"train-{index:05d}-of-{parts:05d}.parquet"))
    for name in ("info.json", "summary.json"):
        shutil.copyfile(path / name, target / name)
    (target / "README.md").write_text(render_card(info, summary), encoding="utf-8")


def render_card(info: dict[str, Any], summary: dict[str, Any]) -> str:
    """The text of README.md."""
    from huggingface_hub import DatasetCardData

    models = [str((info.get(role) or {}).get("name_or_path", "")) for role in ("slm", "llm")]
    names = [Path(name).name if Path(name).exists() else name for name in models]
    metadata = DatasetCardData(
        pretty_name=f"Path-divergent tokens: {' and '.join(names)}",
        tags=["r2r_glimp", "path-divergent-tokens"],
        task_categories=["token-classification"],
        configs=[{"config_name": "default", "data_files": "data/*.parquet"}],
    )
    counts, config = info["counts"], info["config"]
    layer = config.get("hidden_layer")
    shares = [
        f"| {unit} | {part['total']:,} | "
        + " | ".join(f"{part['shares'][name]:.2%}" for name in CLASSES)
        + " |"
        for unit, part in (("tokens", summary["tokens"]), ("steps", summary["steps"]))
        if part["total"]
    ]
    return (
        "\n".join(
            [
                f"---\n{metadata.to_yaml()}\n---",
                f"# Where {names[0]} would leave the path of {names[1]}\n",
                f"{counts['questions']:,} questions, {counts['responses']:,} responses by "
                f"{config['responses']['by']}. Both models read the same text; where the small one "
                "would choose another token, the large one went on from that choice, and a "
                f"verifier ({config['verifier']['kind']}) compared where it led. Divergent: it led "
                "elsewhere. Made with r2r_glimp.\n",
                "| of | labeled | identical | neutral | divergent |\n|---|---|---|---|---|",
                *shares,
                "",
                _COLUMNS.format(
                    hidden=f"output of layer {layer}" if layer else "last hidden state"
                ),
                "\n```bash\nr2r-glimp fit --config configs/training/abacus-token.yaml "
                "--data.path THIS_DATASET\n```",
                "\nModels, configuration and counts are in `info.json`, class shares by position "
                "and source in `summary.json`.",
            ]
        )
        + "\n"
    )
