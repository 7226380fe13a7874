"""RecBole's sequential models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, config_of, right_padded
from fisherkern.errors import InputError

log = logging.getLogger("fisherkern")


class RecBole(Library):
    """Knows a model by `full_sort_predict` and the field names that RecBole gives it."""

    name = "RecBole"

    def fits(self, module: nn.Module) -> bool:
        names = ("full_sort_predict", "ITEM_SEQ", "ITEM_SEQ_LEN", "ITEM_ID")
        return all(hasattr(module, name) for name in names)

    def prepared(self, module: Any, batch: Any) -> Any:
        # Evaluation loaders give (interaction, history index, positive users, positive items).
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def logits(self, module: Any, batch: Any) -> Tensor:
        scores: Tensor = module.full_sort_predict(batch)
        return scores

    def places(self, module: Any, batch: Any) -> Tensor | None:
        return None

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        found = field(batch, (module.ITEM_ID,))
        return None if found is None else found[1]

    def num_items(self, module: Any) -> int | None:
        return int(module.n_items) - 1

    def max_len(self, module: Any) -> int | None:
        return int(module.max_seq_length) if hasattr(module, "max_seq_length") else None

    def settings(self, module: Any) -> Mapping[str, Any] | None:
        return config_of(module)

    def make_batch(self, module: Any, items: Tensor) -> Any:
        items, lengths = right_padded(items, 0)
        return {module.ITEM_SEQ: items, module.ITEM_SEQ_LEN: lengths.clamp(min=1)}

    def with_users(self, module: Any, batch: Any, users: Tensor | None) -> Any:
        table = getattr(module, "user_embedding", None)
        if not isinstance(table, nn.Embedding):
            return batch
        # Row 0 is padding's.
        rows = torch.ones_like(batch[module.ITEM_SEQ_LEN]) if users is None else users + 1
        if int(rows.max()) >= table.num_embeddings:
            raise InputError(
                f"model: {type(module).__name__} knows {table.num_embeddings - 1} users, and the "
                f"data have more: user number {int(rows.max()) - 1}"
            )
        if users is not None and int(users[0]) == 0:
            log.warning("%s: user i of the data is taken to be its i-th user", self.name)
        return {**batch, module.USER_ID: rows}
