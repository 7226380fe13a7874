"""Meta's generative-recommenders, the research models (HSTU and SASRec)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, right_padded


class GenerativeRecommender(Library):
    """Knows a model by `generate_user_embeddings`, `encode` and `get_item_embeddings`."""

    name = "generative-recommenders"

    def fits(self, module: nn.Module) -> bool:
        names = ("generate_user_embeddings", "encode", "get_item_embeddings")
        return all(hasattr(module, name) for name in names)

    def logits(self, module: Any, batch: Any) -> Tensor:
        lengths, ids = _lengths(batch), _ids(batch)
        payloads = batch.get("past_payloads", {}) if isinstance(batch, dict) else {}
        if not isinstance(batch, dict):
            payloads = getattr(batch, "past_payloads", {})
        states = module.encode(
            past_lengths=lengths,
            past_ids=ids,
            past_embeddings=module.get_item_embeddings(ids),
            past_payloads=payloads,
        )
        tokens = torch.arange(1, self.num_items(module) + 1, device=ids.device)
        items = module.get_item_embeddings(tokens)
        if _is_normalised(module):
            items = F.normalize(items, dim=-1, eps=1e-6)
        return F.linear(states, items)

    def places(self, module: Any, batch: Any) -> Tensor | None:
        return None

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        found = field(batch, ("target_ids", "target"))
        return None if found is None else found[1].reshape(-1)

    def first_column(self, module: Any) -> int:
        return 1

    def num_items(self, module: Any) -> int:
        table = getattr(module, "_embedding_module", None)
        for name in ("_num_items", "num_items"):
            if hasattr(table, name):
                return int(getattr(table, name))
        return int(_table(module).shape[0]) - 1

    def max_len(self, module: Any) -> int | None:
        value = getattr(module, "_max_sequence_length", None)
        return value if isinstance(value, int) else None

    def make_batch(self, module: Any, items: Tensor) -> Any:
        tokens, lengths = right_padded(items, 0)
        return {"past_lengths": lengths.clamp(min=1), "past_ids": tokens, "past_payloads": {}}


def _lengths(batch: Any) -> Tensor:
    found = field(batch, ("past_lengths", "history_lengths"))
    assert found is not None
    return found[1]


def _ids(batch: Any) -> Tensor:
    found = field(batch, ("past_ids", "historical_ids"))
    assert found is not None
    return found[1]


def _table(module: Any) -> Tensor:
    embedding = getattr(module, "_embedding_module", module)
    tables: list[Tensor] = [
        part.weight for part in embedding.modules() if isinstance(part, nn.Embedding)
    ]
    return max(tables, key=len)


def _is_normalised(module: Any) -> bool:
    """Whether users' embeddings are L2-normalised, and so items' are where they are scored."""
    last = getattr(module, "_output_postproc", None)
    return last is not None and "l2" in type(last).__name__.lower()
