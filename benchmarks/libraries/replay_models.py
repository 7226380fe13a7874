"""RePlay 0.22.0: nested dicts (replay.nn) and named tuples (the old models), left padding."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.libraries.architecture import (
    MAX_LEN,
    NUM_ITEMS,
    WIDTH,
    Histories,
    Member,
    architecture,
    histories,
    padded,
    shaken,
)


def schema() -> Any:
    """Item ids 0 to 39; 40 is the padding."""
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema

    return TensorSchema(
        [
            TensorFeatureInfo(
                "item_id",
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=WIDTH,
                padding_value=NUM_ITEMS,
                cardinality=NUM_ITEMS,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            )
        ]
    )


def item_rows(histories: Histories) -> Tensor:
    return padded(histories, MAX_LEN, padding=NUM_ITEMS, shift=-1)


def next_items(histories: Histories) -> tuple[Tensor, Tensor]:
    """The items, and those one place later."""
    ids = item_rows([history[:-1] for history in histories])
    return ids, torch.cat([ids[:, 1:], item_rows([h[-1:] for h in histories])[:, -1:]], dim=1)


def halves() -> tuple[list[list[int]], list[list[int]]]:
    users = histories()
    return users[:4], users[4:6]


def nested(histories: Histories) -> dict[str, Any]:
    """As the transforms of `make_default_sasrec_transforms` give it for prediction."""
    ids = item_rows(histories)
    return {"feature_tensors": {"item_id": ids}, "padding_mask": ids != NUM_ITEMS}


def nested_training(histories: Histories) -> dict[str, Any]:
    ids, labels = next_items(histories)
    return {
        "feature_tensors": {"item_id": ids},
        "padding_mask": ids != NUM_ITEMS,
        "positive_labels": labels[:, :, None],
        "target_padding_mask": (labels != NUM_ITEMS)[:, :, None],
    }


def last_labels(histories: Histories) -> Tensor:
    return torch.tensor([history[-1] - 1 for history in histories])


@architecture("RePlay SasRec", "replay")
def replay_sasrec(seed: int) -> Member:
    warnings.simplefilter("ignore")
    from replay.nn.sequential import SasRec

    torch.manual_seed(seed)
    model = SasRec.from_params(
        schema(), embedding_dim=WIDTH, num_heads=2, num_blocks=1, max_sequence_length=MAX_LEN
    )
    model = shaken(model, seed)
    return Member(
        model=model,
        module=model,
        batches=[nested_training(part) for part in halves()],
        logits=sasrec_logits,
        columns=torch.arange(NUM_ITEMS),
        make_batch=nested,
        targets=torch.cat([last_labels(part) for part in halves()]),
        more_batches={"prediction": [nested(part) for part in halves()]},
    )


def sasrec_logits(model: Any, batch: Any) -> Tensor:
    state = model.body(batch["feature_tensors"], batch["padding_mask"])[:, -1]
    return state @ model.body.embedder.get_item_weights().T


@architecture("RePlay SasRecModel (old)", "replay")
def replay_old_sasrec(seed: int) -> Member:
    warnings.simplefilter("ignore")
    from replay.models.nn.sequential.sasrec.dataset import SasRecTrainingBatch
    from replay.models.nn.sequential.sasrec.model import SasRecModel

    torch.manual_seed(seed)
    model = SasRecModel(schema(), num_blocks=1, num_heads=2, hidden_size=WIDTH, max_len=MAX_LEN)
    model = shaken(model, seed)
    named = [SasRecTrainingBatch(query_ids(part), *training_part(part)) for part in halves()]
    return Member(
        model=model,
        module=model,
        batches=[batch.convert_to_dict() for batch in named],
        logits=old_sasrec_logits,
        columns=torch.arange(NUM_ITEMS),
        make_batch=old_sasrec_batch,
        targets=torch.cat([last_labels(part) for part in halves()]),
        more_batches={
            "named tuples": named,
            "prediction": [old_sasrec_batch(part) for part in halves()],
        },
    )


def query_ids(histories: Histories) -> Tensor:
    return torch.arange(len(histories))[:, None]


def training_part(histories: Histories) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    ids, labels = next_items(histories)
    return ids != NUM_ITEMS, {"item_id": ids}, labels, labels != NUM_ITEMS


def old_sasrec_batch(histories: Histories) -> dict[str, Any]:
    """As `SasRecPredictionDataset` collates."""
    ids = item_rows(histories)
    query = query_ids(histories)
    return {"query_id": query, "padding_mask": ids != NUM_ITEMS, "feature_tensor": {"item_id": ids}}


def old_sasrec_logits(model: Any, batch: Any) -> Tensor:
    if isinstance(batch, tuple):
        batch = batch.convert_to_dict()
    state = model.forward_step(dict(batch["feature_tensor"]), batch["padding_mask"])[:, -1]
    return state @ model.item_embedder.item_emb.weight[:-1].T


def old_bert4rec(seed: int, tied: bool) -> Member:
    warnings.simplefilter("ignore")
    from replay.models.nn.sequential.bert4rec.model import Bert4RecModel

    torch.manual_seed(seed)
    model = Bert4RecModel(
        schema(),
        max_len=MAX_LEN,
        hidden_size=WIDTH,
        num_blocks=1,
        num_heads=2,
        enable_embedding_tying=tied,
    )
    model = shaken(model, seed)
    batches = [old_bert4rec_batch(part) for part in halves()]
    return Member(
        model=model,
        module=model,
        batches=batches,
        logits=functools.partial(old_bert4rec_logits, tied=tied),
        columns=torch.arange(NUM_ITEMS),
        make_batch=old_bert4rec_batch,
        more_batches={"named tuples": [named(batch) for batch in batches]},
    )


def old_bert4rec_batch(histories: Histories) -> dict[str, Any]:
    """As `Bert4RecPredictionDataset` collates: shifted by one, the last place masked, pads 0."""
    ids = padded(histories, MAX_LEN, padding=1, shift=-1).roll(-1, dims=1)
    lengths = torch.tensor([len(history) for history in histories])[:, None]
    real = torch.arange(MAX_LEN) >= MAX_LEN - 1 - lengths
    known = real & (torch.arange(MAX_LEN) < MAX_LEN - 1)
    ids = torch.where(known, ids, 0)
    query = query_ids(histories)
    return {"query_id": query, "pad_mask": real, "inputs": {"item_id": ids}, "token_mask": known}


def named(batch: dict[str, Any]) -> Any:
    """The named tuple of the same library."""
    from replay.models.nn.sequential.bert4rec.dataset import Bert4RecPredictionBatch

    names = ("query_id", "pad_mask", "inputs", "token_mask")
    return Bert4RecPredictionBatch(*(batch[name] for name in names))


def old_bert4rec_logits(model: Any, batch: Any, tied: bool) -> Tensor:
    if isinstance(batch, tuple):
        batch = dict(zip(("query_id", "pad_mask", "inputs", "token_mask"), batch, strict=True))
    states = model.forward_step(dict(batch["inputs"]), batch["pad_mask"], batch["token_mask"])
    if tied:
        table = model.item_embedder.item_embeddings
        return states[:, -1] @ table.T + model._head.out_bias
    return model._head.linear(states[:, -1])


@architecture("RePlay Bert4RecModel (old), tied", "replay")
def replay_old_bert4rec_tied(seed: int) -> Member:
    return old_bert4rec(seed, tied=True)


@architecture("RePlay Bert4RecModel (old), untied", "replay")
def replay_old_bert4rec(seed: int) -> Member:
    return old_bert4rec(seed, tied=False)
