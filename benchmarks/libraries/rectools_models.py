"""RecTools 0.19.0: models fitted for a moment, dict batches of their loaders, left padding."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.libraries.architecture import (
    MAX_LEN,
    NUM_ITEMS,
    Histories,
    Member,
    architecture,
    histories,
    padded,
    shaken,
)

DAY = 86400
# A model knows the items of users' last T (BERT4Rec) or T + 1 actions; here all 40.
LENGTHS = {"SASRecModel": MAX_LEN, "BERT4RecModel": MAX_LEN + 2, "HSTUModel": MAX_LEN}


def quiet_trainer() -> Any:
    from pytorch_lightning import Trainer

    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def dataset() -> Any:
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    rows = [
        (f"u{user}", f"i{item}", 1.0, pd.Timestamp(DAY * (30 + time) + 977 * user, unit="s"))
        for user, items in enumerate(histories())
        for time, item in enumerate(items)
    ]
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    return Dataset.construct(pd.DataFrame(rows, columns=names))


def fitted(name: str, seed: int) -> Any:
    """A model object after one epoch; every parameter moved and in float64."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    from rectools import models

    torch.manual_seed(seed)
    model = getattr(models, name)(
        n_factors=8,
        n_blocks=1,
        n_heads=2,
        session_max_len=LENGTHS[name],
        batch_size=4,
        get_trainer_func=quiet_trainer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(dataset())
    shaken(model.torch_model, seed)
    return model


def recommend_batches(model: Any, data: Any) -> list[Any]:
    """What `model.recommend` scores: users' whole histories; [MASK] last for BERT4Rec."""
    users = data.user_id_map.external_ids[:6]
    context = None
    if getattr(model.data_preparator, "add_unix_ts", False):
        import pandas as pd
        from rectools import Columns

        when = pd.Timestamp(DAY * 60, unit="s")
        context = pd.DataFrame({Columns.User: users, Columns.Datetime: when})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = model.data_preparator.transform_dataset_u2i(data, users, context)
    return list(model.data_preparator.get_dataloader_recommend(seen, 4))


def build(name: str, seed: int, part: str = "model") -> Member:
    model = fitted(name, seed)
    data = dataset()
    recommend = recommend_batches(model, data)
    torch.manual_seed(0)
    train = list(model.data_preparator.get_dataloader_train())[:2]
    masked = name == "BERT4RecModel"
    first = 2 if masked else 1
    parts = {
        "model": model,
        "lightning": model.lightning_model,
        "torch_model": model.torch_model,
    }
    return Member(
        model=parts[part],
        module=model.torch_model,
        # A training batch of BERT4Rec asks for other places than the last.
        batches=recommend if masked else train,
        logits=cosine if name == "HSTUModel" else product,
        columns=torch.arange(first, NUM_ITEMS + first),
        make_batch=None
        if name == "HSTUModel"
        else functools.partial(left_padded, mask=1 if masked else None),
        item_ids=None
        if part == "torch_model"
        else list(model.data_preparator.item_id_map.external_ids)[first:],
        targets=None if masked else torch.cat([batch["y"][:, -1] for batch in train]),
        more_batches={} if masked else {"recommend loader": recommend},
    )


def left_padded(histories: Histories, mask: int | None) -> dict[str, Tensor]:
    if mask is None:
        return {"x": padded(histories, MAX_LEN)}
    rows = padded([[i + 1 for i in h] for h in histories], LENGTHS["BERT4RecModel"] - 1)
    return {"x": torch.cat([rows, torch.full((len(rows), 1), mask)], dim=1)}


def last_state(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    table = module.item_model.get_all_embeddings()
    return module.encode_sessions(batch, table)[:, -1], table


def product(module: Any, batch: Any) -> Tensor:
    state, table = last_state(module, batch)
    return state @ table.T


def cosine(module: Any, batch: Any) -> Tensor:
    """The HSTU model's default similarity."""
    state, table = last_state(module, batch)
    return unit(state) @ unit(table).T


def unit(rows: Tensor) -> Tensor:
    return rows / (rows.square().sum(1, keepdim=True) + 1e-8).sqrt()


@architecture("RecTools SASRec", "rectools")
def rectools_sasrec(seed: int) -> Member:
    return build("SASRecModel", seed)


@architecture("RecTools SASRec, Lightning module", "rectools")
def rectools_lightning(seed: int) -> Member:
    return build("SASRecModel", seed, "lightning")


@architecture("RecTools SASRec, torch_model", "rectools")
def rectools_torch_model(seed: int) -> Member:
    return build("SASRecModel", seed, "torch_model")


@architecture("RecTools BERT4Rec", "rectools")
def rectools_bert4rec(seed: int) -> Member:
    return build("BERT4RecModel", seed)


@architecture("RecTools HSTU", "rectools", tolerance=1e-6)
def rectools_hstu(seed: int) -> Member:
    return build("HSTUModel", seed)
