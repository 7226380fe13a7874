"""The score ensemble: what a merged model is measured against, at M times the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.errors import InputError
from fisherkern.evaluation.scores import ScoringLayer, rounds


class ScoreEnsemble(nn.Module):
    """The members' scores averaged: what a merged model is measured against, at M times the cost.

        score(s) = (1/M) Σ_m log softmax(z_m(s))

    the normalised geometric mean, up to a constant. Softmax is over all V_out columns; -inf stays.

    Args:
        members: modules that map a batch, (N, T) int64 or a mapping with "history", to logits
            (N, V_out) as in `evaluate`; each gets the last `member.max_len` columns (50 without).

    Raises:
        InputError: no members, members that differ in first_item or item_ids, or, on a call,
            logits whose shapes differ.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if not members:
            raise InputError("ScoreEnsemble: no members")
        adapters = [ModelAdapter.of(member) for member in members]
        self.members = nn.ModuleList([adapter.module for adapter in adapters])
        self._adapters = adapters
        self.first_item: int = _agreed([member.first_item for member in adapters], "first_item")
        self.item_ids: list[str] | None = _agreed(
            [member.item_ids for member in adapters], "item_ids"
        )
        self.max_len = max(_max_len(member) for member in adapters)

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the mean of the log-probabilities, (N, V_out)."""
        total: Tensor | None = None
        for index, member in enumerate(self._adapters):
            scores = _logits(member, _last(batch, _max_len(member))).log_softmax(dim=-1)
            if total is not None and scores.shape != total.shape:
                raise InputError(
                    f"ScoreEnsemble: member {index} gives scores of shape {tuple(scores.shape)}, "
                    f"member 0 {tuple(total.shape)}"
                )
            total = scores if total is None else total + scores
        assert total is not None
        return total / len(self.members)


def _logits(member: ModelAdapter, batch: Any) -> Tensor:
    """Return a member's logits in fp32 or wider; see `evaluate`."""
    batch = member.prepared(batch)
    layer = ScoringLayer.of(member, batch) if rounds(member) else None
    if layer is not None:
        return layer.logits(batch)
    logits = member.logits(batch)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _max_len(member: ModelAdapter) -> int:
    return member.max_len or 50


def _last(batch: Tensor | Mapping[str, Tensor], length: int) -> Tensor | dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return batch[:, -length:]
    return {**batch, "history": batch["history"][:, -length:]}


def _agreed(values: Sequence[Any], attribute: str) -> Any:
    for index, value in enumerate(values):
        if value != values[0]:
            raise InputError(f"ScoreEnsemble: members 0 and {index} differ in {attribute}")
    return values[0]
