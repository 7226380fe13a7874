"""RecTools' transformer models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, shifted_left, token_ids
from fisherkern.errors import InputError

# Tokens before the first item: padding, and BERT4Rec's mask after it.
_MASK = 1


class RecTools(Library):
    """Knows a backbone by `encode_sessions`, `similarity_module` and `item_model`."""

    name = "RecTools"

    def fits(self, module: nn.Module) -> bool:
        names = ("encode_sessions", "similarity_module", "item_model")
        return all(hasattr(module, name) for name in names)

    def prepared(self, module: Any, batch: Any) -> Any:
        if not _is_masked(module):
            return batch
        tokens, labels = batch["x"], batch.get("y")
        if bool((tokens[:, -1] == _MASK).all()):
            return batch
        # Training hides items anywhere; the next item is asked for by a mask after the last.
        if labels is not None and labels.shape == tokens.shape:
            tokens = torch.where(labels != 0, labels, tokens)
        # Labels are those of the hidden places, and none of the next item.
        beside = {name: value for name, value in batch.items() if name not in ("x", "y")}
        return {**beside, "x": shifted_left(tokens, _MASK)}

    def logits(self, module: Any, batch: Any) -> Tensor:
        scores: Tensor = module(batch)
        return scores

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        if (found := field(batch, ("y",))) is None:
            return None
        return found[1].masked_fill(found[1] == 0, -100)

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        found = field(batch, ("y",))
        return None if found is None or _is_masked(module) else found[1][:, -1]

    def first_token(self, module: Any) -> int:
        return 2 if _is_masked(module) else 1

    def num_items(self, module: Any) -> int | None:
        return int(module.item_model.n_items) - self.first_token(module)

    def item_ids(self, source: Any, module: Any) -> list[Any] | None:
        preparator = getattr(source, "data_preparator", None)
        mapping = getattr(preparator, "item_id_map", None)
        if mapping is None:
            return None
        return list(mapping.external_ids)[self.first_token(module) :]

    def max_len(self, module: Any) -> int | None:
        table = getattr(getattr(module, "pos_encoding_layer", None), "pos_emb", None)
        length = None if table is None else int(table.weight.shape[0])
        return length if length is None or not _is_masked(module) else length - 1

    def make_batch(self, module: Any, items: Tensor) -> Any:
        if any(name.endswith("time_weights") for name, _ in module.named_parameters()):
            raise InputError(
                "model: its attention takes the times of actions, which a history has none of; "
                "give fk.adapt(model, make_batch=...)"
            )
        tokens = token_ids(items, self.first_token(module))
        if not _is_masked(module):
            return {"x": tokens}
        return {"x": nn.functional.pad(tokens, (0, 1), value=_MASK)}


def _is_masked(module: Any) -> bool:
    """Whether the backbone is BERT4Rec's, which is asked by a mask token."""
    return not module.use_causal_attn
