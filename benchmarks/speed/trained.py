"""The model that an estimate is made of: a file, or one trained here and kept, on the device."""

from __future__ import annotations

from pathlib import Path

import torch

import fisherkern as fk
from benchmarks.common import device


def trained_model(
    data: fk.SequenceDataset,
    checkpoint: Path | None,
    folder: Path,
    *,
    max_len: int = 50,
    dim: int = 64,
    epochs: int = 16,
    batch_size: int = 64,
) -> fk.BERT4Rec:
    """The BERT4Rec in `checkpoint`, or one trained for `epochs` and kept in `folder`.

    Its file is named by its settings; an interrupted training goes on. Raises InputError for
    a model of another kind or catalogue.
    """
    if checkpoint is None:
        name = f"bert4rec-{data.name}-T{max_len}-D{dim}-B{batch_size}-E{epochs}"
        checkpoint = folder / f"{name}.safetensors"
        if not checkpoint.exists():
            print(f"training {name}", flush=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = fk.BERT4Rec(data.num_items, max_len=max_len, dim=dim)
            state = folder / f"{name}.state.safetensors"
            model.to(device())
            fk.train(model, data, epochs=epochs, batch_size=batch_size, state=state)
            fk.save_model(model, checkpoint)
            state.unlink(missing_ok=True)
    model = fk.load_model(checkpoint).to(device())
    if not isinstance(model, fk.BERT4Rec):
        raise fk.InputError(f"{checkpoint}: a {type(model).__name__}; the rivals take a BERT4Rec")
    if model.num_items != data.num_items:
        raise fk.InputError(
            f"{checkpoint}: has {model.num_items} items, the data {data.name} {data.num_items}"
        )
    return model
