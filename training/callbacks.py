"""What happens around the training loop: a line per epoch, and an orderly end on a signal."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from training.interrupt import Interrupted, SignalWatch


class EpochLines(L.Callback):
    """Prints the losses and the selection metrics after each epoch, on stderr."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = "  ".join(f"{k.removeprefix('selection/')} {v:.4f}" for k, v in values.items())
        seconds = time.monotonic() - self._started
        print(f"epoch {trainer.current_epoch:3d}  {shown}  ({seconds:.1f} s)", file=sys.stderr)


class StopOnSignal(L.Callback):
    """Ends a run at a batch boundary with a checkpoint, so that it resumes exactly.

    After the last batch of an epoch comes the validation, which saves; so the run goes on that far.

    Args:
        watch: who remembers the signal.
        checkpoint: where to save.
    """

    def __init__(self, watch: SignalWatch, checkpoint: Path) -> None:
        self.watch, self.checkpoint = watch, checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.deferring = True
        self.watch.install()  # back from Lightning, whose handler ends a run with exit code 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._asked(trainer):
            self._stop()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_last = batch_idx + 1 >= trainer.num_training_batches
        if not is_last and self._asked(trainer):
            trainer.save_checkpoint(self.checkpoint)
            self._stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.deferring = False
        if self.watch.signum is not None:
            self._stop()

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any process got a signal: all of them stop at the same batch."""
        asked = self.watch.signum is not None
        if trainer.world_size == 1:
            return asked
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _stop(self) -> None:
        raise Interrupted(self.watch.signum or signal.SIGTERM, self.checkpoint.exists())
