"""Ours, as `fisherkern.train` does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.speed.trainers.protocol import Trainer, serve
from fisherkern.training.loggers import RunScalars
from fisherkern.training.loop import CheckpointPolicy, TrainLoop, checked_settings


def model_and_objective(
    name: str, num_items: int, max_len: int, dim: int, layers: int, dropout: float = 0.2
) -> tuple[Any, Any]:
    """RecBole's network of that name and the objective that goes with it."""
    sizes = {"max_len": max_len, "dim": dim, "layers": layers, "heads": 2, "dropout": dropout}
    if name == "BERT4Rec":
        return fk.BERT4Rec(num_items, **sizes), fk.MaskedItems(0.2)
    network = {"norm": "post", "activation": "gelu", "inner_dim": 4 * dim, "scaled": False}
    return fk.SASRec(num_items, **sizes, **network), fk.NextItem()


def training_run(
    model: Any, objective: Any, data: fk.SequenceDataset, batch_size: int
) -> TrainLoop:
    settings = checked_settings(
        model, data, None, {"epochs": 1000, "batch_size": batch_size, "lr": 1e-3, "seed": 0}
    )
    saving = CheckpointPolicy(None, 1, None, None)
    run = TrainLoop(model, data, objective, settings, None, None, saving, RunScalars(None))
    run.trained.train()
    return run


def prepare(options: dict[str, Any]) -> Trainer:
    data = fk.load(options["data"])
    model, objective = model_and_objective(
        options["model"], data.num_items, options["max_len"], options["dim"], options["layers"]
    )
    run = training_run(model, objective, data, options["batch"])
    passes = iter(range(1, 1000))

    def batches() -> Iterator[Tensor]:
        return iter(run.windows(next(passes)))

    def step(tokens: Tensor) -> float:
        loss = run.step(tokens)
        run.progress.step += 1
        return loss

    def targets(tokens: Tensor) -> int:
        if options["model"] == "BERT4Rec":
            return int(objective.draw(tokens, torch.Generator())[1].sum())
        return int(((tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)).sum())

    return Trainer(fk.__version__, len(run.windows(1)), batches, step, targets)


if __name__ == "__main__":
    serve(prepare)
