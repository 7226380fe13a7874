"""Meta's generative-recommenders, the research models (HSTU and SASRec)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, right_padded
from fisherkern.errors import InputError


class GenerativeRecommender(Library):
    """Knows a model by `generate_user_embeddings`, `encode` and `get_item_embeddings`."""

    name = "generative-recommenders"

    def fits(self, module: nn.Module) -> bool:
        names = ("generate_user_embeddings", "encode", "get_item_embeddings")
        return all(hasattr(module, name) for name in names)

    def prepared(self, module: Any, batch: Any) -> Any:
        if isinstance(batch, Mapping) and "historical_ids" in batch:
            return _of_row(module, batch)
        if isinstance(batch, (tuple, list)) and hasattr(batch[0], "past_ids"):
            # (features, target ids, target ratings)
            return {**batch[0]._asdict(), "target_ids": batch[1]}
        return batch if isinstance(batch, Mapping) else batch._asdict()

    def logits(self, module: Any, batch: Any) -> Tensor:
        lengths, ids = batch["past_lengths"], batch["past_ids"]
        payloads = batch["past_payloads"]
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
        if any(name.endswith("_ts_w") for name, _ in module.named_parameters()):
            raise InputError(
                "model: its attention takes the times of actions, which a history has none of; "
                "give fk.adapt(model, make_batch=...)"
            )
        tokens, lengths = right_padded(items, 0)
        return {"past_lengths": lengths.clamp(min=1), "past_ids": tokens, "past_payloads": {}}


def _of_row(module: Any, row: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what models take of the data's batch: places for next items at the end."""
    ids, lengths = row["historical_ids"], row["history_lengths"].reshape(-1)
    width = max(ids.shape[1], len(module._attn_mask))
    after = (0, width - ids.shape[1])
    payloads = {
        name: F.pad(row[f"historical_{name}"], after)
        for name in ("timestamps", "ratings")
        if f"historical_{name}" in row
    }
    if after[1] and "timestamps" in payloads and "target_timestamps" in row:
        times = row["target_timestamps"].reshape(-1, 1)
        payloads["timestamps"] = payloads["timestamps"].scatter(1, lengths[:, None], times)
    return {
        "past_lengths": lengths,
        "past_ids": F.pad(ids, after),
        "past_payloads": payloads,
        "target_ids": row["target_ids"],
    }


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
