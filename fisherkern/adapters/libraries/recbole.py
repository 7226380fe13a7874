"""RecBole's sequential models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, config_of, right_padded


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
