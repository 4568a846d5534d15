"""One alignment: arguments, checks before any work, Lightning's trainer, the adapter, the last
lines.

<default_root_dir>/responses.jsonl                    what the LLM wrote, where it wrote for this
<default_root_dir>/checkpoints/last.ckpt, best.ckpt   private state of the run, to resume from
<default_root_dir>/summary.json                       what it came to
<export_dir>/                                         the product: a PEFT adapter, safetensors
"""

import json
import logging
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer import Trainer

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.hub.checkpoint import to_json
from r2r_glimp.hub.config import command_line, library_versions
from r2r_glimp.hub.files import check_writable, writing_folder
from r2r_glimp.models.pair import LoadedModel
from training.callbacks import EpochLines, StopOnSignal
from training.export import load_weights
from training.interrupt import SignalWatch
from training.lora import AlignModule, measure
from training.response_data import ResponseData
from training.run import TRAINER_DEFAULTS, _find_checkpoint, parse_arguments
from training.tracking import Mode, finish, make_logger

MONITOR = "selection/loss"
ADAPTER = "adapter_config.json"  # tells an adapter's folder
# What must agree between a run and the checkpoint it resumes from.
SHAPE = ("rank", "alpha", "targets")
Results = dict[str, dict[str, float]]


class AlignCLI(LightningCLI):
    """LightningCLI with the arguments of an alignment."""

    def __init__(self, argv: list[str], prog: str) -> None:
        super().__init__(
            AlignModule,
            ResponseData,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={
                "prog": prog,
                "description": "Align the SLM with the LLM by LoRA.",
                "exit_on_error": False,
            },
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add("--export_dir", type=str, required=True, help="Folder of the adapter.")
        add("--overwrite", action="store_true", help="Replace an adapter in export_dir.")
        add("--ckpt_path", type=str | None, default=None, help="Resume: last, best or a file.")
        add("--patience", type=int, default=3, help=f"Epochs without a better {MONITOR}.")
        add("--wandb", type=Mode, default="auto", help="Where curves go.")
        add("--json", action="store_true", help="Print the summary as JSON on stdout.")
        add("--debug", action="store_true", help="Tracebacks, and Lightning's own messages.")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Everything that can be refused before any work."""
        config = self.config
        self.export_dir = Path(config.export_dir)
        check_writable(self.export_dir, config.overwrite, is_ours=ADAPTER)
        if config.patience < 1:
            raise UsageError(f"patience={config.patience} is out of range: 1 or more")
        root = config.trainer.default_root_dir or f"runs/{self.export_dir.name}"
        config.trainer.default_root_dir = root
        self.root = Path(root)
        self.resume_from = _find_checkpoint(config.ckpt_path, self.root / "checkpoints")
        self.training_config = self.parser.dump(config)
        folder = self.root / "checkpoints"
        self.best = ModelCheckpoint(
            folder,
            filename="best",
            monitor=MONITOR,
            mode="min",
            save_last=True,
            enable_version_counter=False,
        )
        self.watch = SignalWatch()
        self.trainer_defaults["callbacks"] = [
            StopOnSignal(self.watch, folder / "last.ckpt"),
            EpochLines(),
            EarlyStopping(MONITOR, mode="min", patience=config.patience),
            self.best,
        ]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config.trainer.logger is None:
            kwargs["logger"] = make_logger(self.config.wandb, self.root, self.export_dir.name)
        return super().instantiate_trainer(**kwargs)


def run(argv: list[str], prog: str) -> int:
    """Parse, train, export, report; raises what `training.align.main` turns into one line."""
    started = time.monotonic()
    if "--debug" not in argv:
        for library in ("lightning", "transformers"):
            warnings.filterwarnings("ignore", module=library)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    cli = AlignCLI(argv, prog)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(module, AlignModule) and isinstance(data, ResponseData)
    if cli.resume_from is not None:
        _check_resumable(cli.resume_from, module)
    results: Results | None = None
    try:
        with cli.watch:
            data.folder = cli.root
            slm = data.load()
            module.prepare(slm)
            before = measure(module, data.batches("test"))
            trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from, weights_only=True)
            if trainer.is_global_zero:
                if cli.best.best_model_path:
                    load_weights(module, cli.best.best_model_path)  # type: ignore[arg-type]
                results = {"before": before, "after": measure(module, data.batches("test"))}
                export(module, data, slm, results, cli)
    finally:
        finish(exit_code=0 if results is not None else 1)
    if results is not None:
        _report(results, data, cli, time.monotonic() - started)
    return 0


def _check_resumable(path: str, module: AlignModule) -> None:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        raise CheckpointError(f"{path}: truncated, or no checkpoint of an alignment") from None
    for name in SHAPE:
        if saved.get(name) != module.hparams[name]:
            raise UsageError(
                f"{path} was made with model.{name}={saved.get(name)}, not {module.hparams[name]}"
            )


def export(
    module: AlignModule, data: ResponseData, slm: LoadedModel, results: Results, cli: AlignCLI
) -> None:
    """Write the adapter's folder, whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    assert module.slm is not None
    facts = {
        "slm": slm.fingerprint.to_dict(),
        "llm": data.llm and data.llm.to_dict(),
        "responses": {name: len(split.rows) for name, split in data.splits.items()},
        "test": results,
        "command": command_line("training.align"),
        "versions": {**library_versions(), "lightning": L.__version__},
    }
    with writing_folder(cli.export_dir, cli.config.overwrite, is_ours=ADAPTER) as folder:
        # Embeddings are never trained, and looking for whether they were asks the Hub.
        module.slm.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "alignment.json").write_text(to_json(facts), encoding="utf-8")
        (folder / "training_config.yaml").write_text(cli.training_config, encoding="utf-8")
        (folder / "README.md").write_text(_card(slm, data, results), encoding="utf-8")


def _card(slm: LoadedModel, data: ResponseData, results: Results) -> str:
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=slm.name if slm.name.count("/") == 1 and slm.name[0] not in "./~" else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "r2r_glimp"],
    )
    rows = "\n".join(
        f"| {name} | {results['before'][name]:.4f} | {results['after'][name]:.4f} |"
        for name in ("agreement", "loss")
    )
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {Path(slm.name).name}, aligned\n\n"
        f"A LoRA adapter that brings `{Path(slm.name).name}` nearer to what the large model of its "
        f"pair writes, trained by r2r_glimp on {len(data.splits['train'].rows):,} of its "
        "responses. Routers that were trained with it need it, and routers trained without it are "
        "refused with it.\n\n"
        "```python\nfrom r2r_glimp import ModelPair\n\n"
        'pair = ModelPair.from_pretrained(slm="SLM", llm="LLM", slm_adapters=["PATH"])\n```\n\n'
        "On responses it never saw (agreement: share of tokens that are the small model's own "
        "greedy choice; loss in nats per token):\n\n"
        f"| | before | after |\n|---|---|---|\n{rows}\n"
    )


def _report(results: Results, data: ResponseData, cli: AlignCLI, seconds: float) -> None:
    """The last lines, and `summary.json`."""
    summary = {
        "path": str(cli.export_dir),
        "responses": {name: len(split.rows) for name, split in data.splits.items()},
        "test": results,
        "seconds": round(seconds, 1),
    }
    (cli.root / "summary.json").write_text(to_json(summary), encoding="utf-8")
    before, after = results["before"], results["after"]
    lines = (
        f"test       {1 - before['agreement']:.2%} of the tokens differed from the LLM's before, "
        f"{1 - after['agreement']:.2%} now; loss {before['loss']:.4f}, now {after['loss']:.4f}",
        f"adapter    {cli.export_dir}",
        f"next       slm_adapters: [{cli.export_dir}] in the pair's preset, or --slm_adapters; "
        "then label and train a router again",
    )
    print("\n".join(lines), file=sys.stderr)
    if cli.config.json:
        print(json.dumps(summary))
