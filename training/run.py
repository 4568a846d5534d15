"""One training run: arguments, checks before any work, Lightning's trainer, the last lines.

<default_root_dir>/checkpoints/last.ckpt, best.ckpt   private state of the run, to resume from
<default_root_dir>/summary.json                       what it came to
<export_dir>/                                         the product: a router checkpoint
"""

import json
import logging
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer import Trainer

from labeling.messages import explain
from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.hub.checkpoint import CONFIG, RouterCheckpoint, to_json
from r2r_glimp.hub.files import check_writable
from training.callbacks import EpochLines, StopOnSignal
from training.data import RouterData
from training.export import ExportRouter, Summary, make_checkpoint
from training.interrupt import SignalWatch
from training.module import RouterModule
from training.tracking import Mode, finish, make_logger

MONITOR = "selection/ap"
TRAINER_DEFAULTS = {
    "max_epochs": 20,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
# What must agree between a run and the checkpoint it resumes from.
SHAPE = (
    "granularity", "hidden", "top_k_logits", "candidate", "entropy", "margin", "hidden_size",
    "width", "blocks", "expansion",
)  # fmt: skip


def parse_arguments(parser: LightningArgumentParser, args: Any) -> Namespace:
    """The options of a command line; raises UsageError for one that is wrong."""
    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        raise UsageError(explain(str(error))) from None


class FitCLI(LightningCLI):
    """LightningCLI with the arguments of a router's training."""

    def __init__(self, argv: list[str], prog: str) -> None:
        super().__init__(
            RouterModule,
            RouterData,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={
                "prog": prog,
                "description": "Train a router on a labeled dataset.",
                "exit_on_error": False,
            },
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add("--export_dir", type=str, required=True, help="Folder of the router checkpoint.")
        add("--overwrite", action="store_true", help="Replace a router in export_dir.")
        add("--ckpt_path", type=str | None, default=None, help="Resume: last, best or a file.")
        add("--patience", type=int, default=5, help=f"Epochs without a better {MONITOR}.")
        add("--wandb", type=Mode, default="auto", help="Where curves go.")
        add("--dry_run", action="store_true", help="One batch, export untrained, exit.")
        add("--json", action="store_true", help="Print the summary as JSON on stdout.")
        add("--debug", action="store_true", help="Tracebacks, and Lightning's own messages.")
        parser.link_arguments("data.granularity", "model.granularity")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Everything that can be refused before any work."""
        config = self.config
        self.export_dir = Path(config.export_dir)
        check_writable(self.export_dir, config.overwrite, is_ours=CONFIG)
        if config.patience < 1:
            raise UsageError(f"patience={config.patience} is out of range: 1 or more")
        config.trainer.default_root_dir = (
            config.trainer.default_root_dir or f"runs/{self.export_dir.name}"
        )
        self.root = Path(config.trainer.default_root_dir)
        self.resume_from = _find_checkpoint(config.ckpt_path, self.root / "checkpoints")
        self.training_config = self.parser.dump(config)
        self.trainer_defaults["callbacks"] = self._callbacks()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config.dry_run:
            kwargs["logger"] = False
        elif self.config.trainer.logger is None:
            kwargs["logger"] = make_logger(self.config.wandb, self.root, self.export_dir.name)
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self) -> list[Any]:
        folder = self.root / "checkpoints"
        best = ModelCheckpoint(
            folder,
            filename="best",
            monitor=MONITOR,
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )
        self.watch = SignalWatch()
        stop = StopOnSignal(self.watch, folder / "last.ckpt")
        self.export = ExportRouter(
            self.export_dir, self.config.overwrite, best, self.training_config
        )
        early = EarlyStopping(MONITOR, mode="max", patience=self.config.patience)
        return [stop, EpochLines(), early, best, self.export]


def run(argv: list[str], prog: str) -> int:
    """Parse, train, export, report; raises what `training.fit.main` turns into one line."""
    started = time.monotonic()
    if "--debug" not in argv:
        warnings.filterwarnings("ignore", module="lightning")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    cli = FitCLI(argv, prog)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(module, RouterModule) and isinstance(data, RouterData)
    if cli.resume_from is not None:
        _check_resumable(cli.resume_from, module)
    checkpoint: RouterCheckpoint | None = None
    try:
        with cli.watch:
            data.setup()
            module.prepare(data)
            if cli.config.dry_run:
                checkpoint = _dry_run(module, data, cli)
            else:
                trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from, weights_only=True)
                checkpoint = cli.export.checkpoint
    finally:
        finish(exit_code=0 if checkpoint is not None else 1)
    if trainer.is_global_zero and checkpoint is not None:
        _report(cli, checkpoint, time.monotonic() - started)
    return 0


def _dry_run(module: RouterModule, data: RouterData, cli: FitCLI) -> RouterCheckpoint:
    """One batch forward and back, and an untrained router, to see that all fits together."""
    module.loss(module(next(data.batches("train"))), next(data.batches("train"))).backward()
    checkpoint = make_checkpoint(module, data, cli.training_config, untrained=True)
    checkpoint.save_pretrained(cli.export_dir, overwrite=cli.config.overwrite)
    return checkpoint


def _find_checkpoint(asked: str | None, folder: Path) -> str | None:
    """The file to resume from."""
    if asked is None:
        return None
    path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(asked)
    if not path.is_file():
        what = f"no {asked} checkpoint" if asked in ("last", "best") else "no checkpoint"
        raise UsageError(f"{what} at {path}: leave out --ckpt_path to start afresh")
    return str(path)


def _check_resumable(path: str, module: RouterModule) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content["hyper_parameters"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        raise CheckpointError(f"{path}: truncated, or no checkpoint of a training run") from None
    for name in SHAPE:
        if saved.get(name) != module.hparams[name]:
            raise UsageError(
                f"{path} was made with model.{name}={saved.get(name)}, not {module.hparams[name]}"
            )


def _report(cli: FitCLI, checkpoint: RouterCheckpoint, seconds: float) -> None:
    """The last lines, and `summary.json`."""
    config, threshold = checkpoint.config, checkpoint.config.threshold
    summary = Summary(
        path=str(cli.export_dir),
        granularity=config.model.granularity,
        threshold=threshold.value,
        llm_share=threshold.llm_share or 0.0,
        recall=threshold.recall or 0.0,
        test=dict(config.metrics),
        epoch=cli.export.epoch,
        seconds=round(seconds, 1),
    )
    cli.root.mkdir(parents=True, exist_ok=True)
    (cli.root / "summary.json").write_text(to_json(summary.to_dict()), encoding="utf-8")
    test = summary.test
    epoch = "untrained" if summary.epoch is None else f"epoch {summary.epoch}"
    lines: tuple[str, ...] = (
        f"test       AP {test['test/ap']:.4f}, AUROC {test['test/auroc']:.4f}, "
        f"calibration error {test['test/calibration_error']:.4f} ({epoch})",
        f"threshold  {threshold.value:.6g}: recall {summary.recall:.1%} on the selection split, "
        f"{test['test/recall']:.1%} on the test split",
        f"LLM share  {summary.llm_share:.2%} expected, "
        f"{test['test/llm_share']:.2%} on the test split",
        f"router     {summary.path}",
        f"next       r2r-glimp calibrate --router {summary.path}",
    )
    if config.slm is None:
        lines = ("note       no SLM is recorded: it will serve any SLM of its width", *lines)
    print("\n".join(lines), file=sys.stderr)
    if cli.config.json:
        print(json.dumps(summary.to_dict()))
