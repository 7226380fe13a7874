"""Models that projects copy as one file: skeletons of their calls, and their own batches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

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
from benchmarks.libraries.meta_skeletons import HSTU, SequentialFeatures
from benchmarks.libraries.meta_skeletons import SASRec as MetaSASRec
from benchmarks.libraries.skeletons import GSASRec, SASRec

ITEMS = torch.arange(1, NUM_ITEMS + 1)


def parts() -> list[list[list[int]]]:
    users = histories()
    return [users[:4], users[4:6]]


def last_items() -> Tensor:
    return torch.tensor([history[-1] for part in parts() for history in part])


def sampler_batch(histories: Histories) -> tuple[Any, ...]:
    """(users, histories, next items, negatives) as NumPy arrays, from SASRec.pytorch's sampler."""
    seen = padded([h[:-1] for h in histories], MAX_LEN)
    following = torch.cat([seen[:, 1:], torch.tensor([[h[-1]] for h in histories])], dim=1)
    following = following * (seen != 0)
    users = torch.arange(1, len(histories) + 1)
    negatives = (following + 6) % NUM_ITEMS + 1
    return tuple(t.numpy() for t in (users, seen, following, negatives * (seen != 0)))


def pmixer_logits(model: Any, batch: Any) -> Tensor:
    """`predict` of all items; the padding is none."""
    history = batch[1] if isinstance(batch, tuple) else batch
    return model.log2feats(history)[:, -1] @ model.item_emb.weight[1:].T


def pmixer(seed: int, norm_first: bool) -> Member:
    torch.manual_seed(seed)
    model = shaken(SASRec(NUM_ITEMS, MAX_LEN, WIDTH, norm_first), seed)
    return Member(
        model=model,
        module=model,
        batches=[sampler_batch(part) for part in parts()],
        logits=pmixer_logits,
        columns=ITEMS - 1,
        make_batch=lambda histories: padded(histories, MAX_LEN).numpy(),
        targets=last_items() - 1,
    )


@architecture("pmixer SASRec, pre-LN", "torch")
def pmixer_pre(seed: int) -> Member:
    return pmixer(seed, norm_first=True)


@architecture("pmixer SASRec, post-LN", "torch")
def pmixer_post(seed: int) -> Member:
    return pmixer(seed, norm_first=False)


def gsasrec_history(histories: Histories) -> Tensor:
    return padded(histories, MAX_LEN, padding=NUM_ITEMS + 1)


def gsasrec_batch(histories: Histories) -> list[Any]:
    """[history, sets of seen items, next items], as its validation loader collates."""
    seen = [history[:-1] for history in histories]
    return [
        gsasrec_history(seen),
        [set(history) for history in seen],
        torch.tensor([history[-1] for history in histories]),
    ]


def gsasrec_logits(model: Any, batch: Any) -> Tensor:
    history = batch[0] if isinstance(batch, (list, tuple)) else batch
    table = model.get_output_embeddings().weight
    return model(history)[0][:, -1] @ table[1 : model.num_items + 1].T


def gsasrec(seed: int, reuse: bool) -> Member:
    torch.manual_seed(seed)
    model = shaken(GSASRec(NUM_ITEMS, MAX_LEN, WIDTH, reuse), seed)
    return Member(
        model=model,
        module=model,
        batches=[gsasrec_batch(part) for part in parts()],
        logits=gsasrec_logits,
        columns=ITEMS - 1,
        make_batch=gsasrec_history,
        targets=last_items() - 1,
        more_batches={"tensors": [gsasrec_batch(part)[0] for part in parts()]},
    )


@architecture("gSASRec, one table", "torch")
def gsasrec_tied(seed: int) -> Member:
    return gsasrec(seed, reuse=True)


@architecture("gSASRec, two tables", "torch")
def gsasrec_untied(seed: int) -> Member:
    return gsasrec(seed, reuse=False)


def features(histories: Histories, times: bool) -> SequentialFeatures:
    """Lengths and ids padded on the right, with a place for the next item; times of actions."""
    lengths = torch.tensor([min(len(h), MAX_LEN) for h in histories])
    ids = padded(histories, MAX_LEN, side="right")
    stamps = 1000 * torch.arange(MAX_LEN + 1).expand(len(ids), -1) ** 2
    stamps = stamps * (torch.arange(MAX_LEN + 1) <= lengths[:, None])
    ids = nn.functional.pad(ids, (0, 1))
    return SequentialFeatures(lengths, ids, None, {"timestamps": stamps} if times else {})


def row(histories: Histories) -> dict[str, Tensor]:
    """What its data set gives, of which its trainer makes the features."""
    made = features([h[:-1] for h in histories], times=True)
    stamps = made.past_payloads["timestamps"]
    last = made.past_lengths[:, None]
    return {
        "history_lengths": made.past_lengths,
        "historical_ids": made.past_ids[:, :-1],
        "historical_timestamps": stamps.scatter(1, last, 0)[:, :-1],
        "target_ids": torch.tensor([h[-1] for h in histories]),
        "target_timestamps": stamps.gather(1, last)[:, 0],
    }


def meta_logits(model: Any, batch: Any) -> Tensor:
    """Both sides have length 1, as its samplers and its index make the items'."""
    if isinstance(batch, dict):
        batch = features([ids[ids != 0].tolist() for ids in batch["historical_ids"]], times=True)
    batch = batch[0] if len(batch) == 3 else batch
    states = model.encode(
        past_lengths=batch.past_lengths,
        past_ids=batch.past_ids,
        past_embeddings=model.get_item_embeddings(batch.past_ids),
        past_payloads=batch.past_payloads,
    )
    items = model.get_item_embeddings(ITEMS)
    return states @ (items / items.norm(dim=1, keepdim=True)).T


def meta(model: Any, seed: int, times: bool) -> Member:
    model = shaken(model, seed)
    batches = [features([h[:-1] for h in part], times) for part in parts()]
    ends = [torch.tensor([[h[-1]] for h in part]) for part in parts()]
    return Member(
        model=model,
        module=model,
        batches=batches,
        logits=meta_logits,
        columns=ITEMS - 1,
        # Without times HSTU has no bias: not the model that was trained.
        make_batch=None if times else functools.partial(features, times=False),
        more_batches={
            "features, target ids, ratings": [
                (batch, end, torch.ones_like(end)) for batch, end in zip(batches, ends, strict=True)
            ],
            "rows": [row(part) for part in parts()],
        },
    )


@architecture("Meta HSTU (research)", "torch")
def meta_hstu(seed: int) -> Member:
    torch.manual_seed(seed)
    return meta(HSTU(NUM_ITEMS, MAX_LEN + 1, WIDTH), seed, times=True)


@architecture("Meta SASRec (research)", "torch")
def meta_sasrec(seed: int) -> Member:
    torch.manual_seed(seed)
    return meta(MetaSASRec(NUM_ITEMS, MAX_LEN + 1, WIDTH), seed, times=False)
