"""A callback of Hugging Face's Trainer; importing this module imports transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fisherkern.training.kept_fishers import KeptFishers


class TrainerFishers(KeptFishers, TrainerCallback):
    """`KeptFishers` of a model of transformers: `Trainer(callbacks=[...])`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Try after the first step of the optimizer."""
        self.try_once(given["optimizer"], given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the Fishers into `output_dir`."""
        self.write(given["optimizer"], given["model"], args.output_dir)
