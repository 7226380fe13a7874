"""A callback of Lightning's; importing this module imports Lightning."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from fisherkern.errors import InputError
from fisherkern.training.kept_fishers import KeptFishers

# A trainer of one of these takes no callback of the other.
_INSTALLED = [
    importlib.import_module(f"{name}.callbacks")
    for name in ("lightning.pytorch", "pytorch_lightning")
    if find_spec(name.partition(".")[0])
]
if not _INSTALLED:
    raise ImportError("Lightning is not installed: pip install lightning")


class LightningFishers(KeptFishers, *(own.Callback for own in _INSTALLED)):  # type: ignore[misc]
    """`KeptFishers` of a module that one optimizer trains: `Trainer(callbacks=[...])`."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Try after the first step of the optimizer."""
        if trainer.global_step:
            self.try_once(_only_optimizer(trainer), pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the Fishers beside the checkpoints, or into `default_root_dir`."""
        saved = getattr(trainer.checkpoint_callback, "dirpath", None)
        self.write(_only_optimizer(trainer), pl_module, saved or trainer.default_root_dir)


def _only_optimizer(trainer: Any) -> Any:
    if len(trainer.optimizers) != 1:
        raise InputError(f"trainer: it has {len(trainer.optimizers)} optimizers; one was expected")
    return trainer.optimizers[0]
