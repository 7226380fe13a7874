"""RecTools 0.19: one sample a user, his last items; logits of all positions.

    pip install 'rectools[torch]==0.19.0' torch==2.13.0

SASRec predicts every next item. BERT4Rec is asked for a fifth of the items. The steps of its
Lightning module are taken one by one, without Lightning's loop around them: what that costs is
not counted against it.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

from benchmarks.speed.trainers.protocol import Trainer, serve


def prepare(options: dict[str, Any]) -> Trainer:
    name = options["data"]
    frame = pd.read_csv(Path(options["folder"]) / name / f"{name}.inter", sep="\t")
    frame.columns = [Columns.User, Columns.Item, Columns.Datetime]
    # The last two items of a user are held out.
    from_end = frame.groupby(Columns.User).cumcount(ascending=False)
    frame = frame[from_end >= 2].copy()
    frame[Columns.Weight] = 1
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    sizes = {
        "n_blocks": options["layers"],
        "n_heads": 2,
        "n_factors": options["dim"],
        "dropout_rate": 0.2,
        "session_max_len": options["max_len"],
        "batch_size": options["batch"],
        "loss": "softmax",
        "lr": 1e-3,
        "recommend_torch_device": "cpu",
    }
    if options["model"] == "BERT4Rec":
        model: Any = BERT4RecModel(**sizes, mask_prob=0.2)
    else:
        model = SASRecModel(**sizes)
    model._build_model_from_dataset(Dataset.construct(frame))
    module = model.lightning_model
    module.on_train_start()
    module.train()
    module.log = lambda *_, **__: None  # it has no trainer to log to
    optimizer = module.configure_optimizers()
    loader = model.data_preparator.get_dataloader_train()

    def step(batch: Any) -> float:
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        return loss.item()

    def targets(batch: Any) -> int:
        return int((batch["y"] != 0).sum())

    version = importlib.metadata.version("rectools")
    return Trainer(version, len(loader), lambda: iter(loader), step, targets)


if __name__ == "__main__":
    serve(prepare)
