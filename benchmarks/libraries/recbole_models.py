"""RecBole 1.2.1: Interaction batches of its own loaders, right padding, id 0 in the softmax."""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from pathlib import Path
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

SMALL = {
    "n_layers": 1,
    "n_heads": 2,
    "hidden_size": 8,
    "inner_size": 16,
    "embedding_size": 8,
    "num_layers": 1,
    "n_h": 2,
    "n_v": 2,
    "reg_weight": 1e-4,
}


@functools.cache
def prepared(name: str) -> tuple[Any, Any, Any, Any]:
    """RecBole's configuration, data set, training and test loader, from an .inter file."""
    warnings.simplefilter("ignore")
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp())
    (folder / "tiny").mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, items in enumerate(histories()):
        lines += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(items)]
    (folder / "tiny" / "tiny.inter").write_text("\n".join(lines) + "\n")
    settings = {
        "data_path": str(folder),
        "use_gpu": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": MAX_LEN,
        "train_batch_size": 3,
        "eval_batch_size": 4,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "eval_args": {
            "split": {"LS": "valid_and_test"},
            "order": "TO",
            "mode": "full",
            "group_by": "user",
        },
        "show_progress": False,
        "state": "CRITICAL",
        **SMALL,
    }
    config = Config(model=name, dataset="tiny", config_dict=settings)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    return config, dataset, train, test


def build(name: str, seed: int) -> Member:
    from recbole.utils import get_model

    config, _, train, test = prepared(name)
    torch.manual_seed(seed)
    model = shaken(get_model(name)(config, train.dataset), seed)
    torch.manual_seed(0)
    batches = [batch for batch, _ in zip(train, range(2), strict=False)]
    return Member(
        model=model,
        module=model,
        batches=batches,
        logits=LOGITS[name],
        columns=torch.arange(1, NUM_ITEMS + 1),
        make_batch=functools.partial(interaction, model),
        takes_users=True,
        targets=torch.cat([batch[model.ITEM_ID] for batch in batches]),
        more_batches={"test loader": list(test)},
    )


def interaction(model: Any, histories: Histories, users: list[int]) -> Any:
    from recbole.data.interaction import Interaction

    lengths = torch.tensor([min(len(h), MAX_LEN) for h in histories])
    rows = padded(histories, MAX_LEN, side="right")
    numbers = torch.tensor(users) + 1
    return Interaction({model.USER_ID: numbers, model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths})


def history(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """(N, T) items and (N,) lengths; the test loader gives (Interaction, ...) tuples."""
    batch = batch[0] if isinstance(batch, tuple) else batch
    return batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN]


def from_last_state(model: Any, batch: Any) -> Tensor:
    """SASRec and GRU4Rec: `forward` gives the state that scores the next item."""
    return model(*history(model, batch)) @ model.item_embedding.weight.T


def caser(model: Any, batch: Any) -> Tensor:
    """The user is a part of Caser's input."""
    users = (batch[0] if isinstance(batch, tuple) else batch)[model.USER_ID]
    return model(users, history(model, batch)[0]) @ model.item_embedding.weight.T


def bert4rec(model: Any, batch: Any) -> Tensor:
    """[MASK], the last row of the table, stands after the last item; a bias per item."""
    items, lengths = history(model, batch)
    masked = torch.cat([items, torch.zeros_like(items[:, :1])], dim=1)
    masked[torch.arange(len(items)), lengths] = model.n_items
    # One place is dropped at the front, so that the model sees its usual length.
    states = model(masked[:, 1:])[torch.arange(len(items)), lengths - 1]
    return states @ model.item_embedding.weight[: model.n_items].T + model.output_bias


LOGITS = {
    "SASRec": from_last_state,
    "GRU4Rec": from_last_state,
    "Caser": caser,
    "BERT4Rec": bert4rec,
}


@architecture("RecBole SASRec", "recbole")
def recbole_sasrec(seed: int) -> Member:
    return build("SASRec", seed)


@architecture("RecBole BERT4Rec", "recbole")
def recbole_bert4rec(seed: int) -> Member:
    return build("BERT4Rec", seed)


@architecture("RecBole GRU4Rec", "recbole")
def recbole_gru4rec(seed: int) -> Member:
    return build("GRU4Rec", seed)


@architecture("RecBole Caser", "recbole")
def recbole_caser(seed: int) -> Member:
    return build("Caser", seed)
