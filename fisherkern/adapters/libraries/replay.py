"""RePlay's SasRec and Bert4Rec, of `replay.nn` and of `replay.models.nn`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import field
from fisherkern.adapters.libraries.base import Library, shifted_left, token_ids


class SasRec(Library):
    """Knows `replay.nn`'s SasRec by `forward_inference` and `body`."""

    name = "RePlay SasRec"

    def fits(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("forward_inference", "body", "get_logits"))

    def logits(self, module: Any, batch: Any) -> Tensor:
        scores: Tensor = module.get_logits(
            module.body(batch["feature_tensors"], batch["padding_mask"])
        )
        return scores

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        found, mask = field(batch, ("positive_labels",)), field(batch, ("target_padding_mask",))
        return _labels(found, mask)

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        labels = self.labels(module, batch)
        return None if labels is None else labels[:, -1]

    def first_token(self, module: Any) -> int:
        return 0

    def make_batch(self, module: Any, items: Tensor) -> Any:
        return {
            "feature_tensors": {_item_name(module): token_ids(items, 0)},
            "padding_mask": items != 0,
        }

    def max_len(self, module: Any) -> int | None:
        positions = getattr(module.body.embedding_aggregator, "pe", None)
        return positions.num_embeddings if isinstance(positions, nn.Embedding) else None


class SasRecModel(SasRec):
    """Knows the older SasRecModel by `forward_step` and its two arguments."""

    name = "RePlay SasRecModel"

    def fits(self, module: nn.Module) -> bool:
        return _steps(module) == ["feature_tensor", "padding_mask"]

    def logits(self, module: Any, batch: Any) -> Tensor:
        scores: Tensor = module(_features(batch), _part(batch, "padding_mask"))
        return scores

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        masks = ("labels_padding_mask", "target_padding_mask")
        return _labels(field(batch, ("labels", "positive_labels")), field(batch, masks))

    def num_items(self, module: Any) -> int | None:
        return int(module.item_count) if hasattr(module, "item_count") else None

    def max_len(self, module: Any) -> int | None:
        return int(module.max_len)

    def make_batch(self, module: Any, items: Tensor) -> Any:
        name = getattr(module.masking, "item_feature_name", "item_id")
        return {"features": {name: token_ids(items, 0)}, "padding_mask": items != 0}


class Bert4RecModel(SasRecModel):
    """Knows the older Bert4RecModel by `forward_step` and its token mask."""

    name = "RePlay Bert4RecModel"

    def fits(self, module: nn.Module) -> bool:
        return _steps(module) == ["inputs", "pad_mask", "token_mask"]

    def prepared(self, module: Any, batch: Any) -> Any:
        features, mask = _features(batch), _part(batch, "padding_mask")
        shown = _part(batch, "tokens_mask")
        if not bool(shown[:, -1].any()):
            return {"features": features, "padding_mask": mask, "tokens_mask": shown}
        # Training hides items anywhere; the next item is asked for by a mask after the last.
        return {
            "features": {name: shifted_left(value, 0) for name, value in features.items()},
            "padding_mask": shifted_left(mask, True),
            "tokens_mask": shifted_left(torch.ones_like(shown), False),
        }

    def logits(self, module: Any, batch: Any) -> Tensor:
        scores: Tensor = module(batch["features"], batch["padding_mask"], batch["tokens_mask"])
        return scores

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        return None

    def max_len(self, module: Any) -> int | None:
        return int(module.max_len) - 1

    def make_batch(self, module: Any, items: Tensor) -> Any:
        missing = module.max_len - items.shape[1]
        padded = nn.functional.pad(items, (max(missing - 1, 0), 0))
        mask = nn.functional.pad(padded != 0, (0, 1), value=True)
        shown = nn.functional.pad(torch.ones_like(padded, dtype=torch.bool), (0, 1), value=False)
        names = list(module.schema.categorical_features)
        tokens = nn.functional.pad(token_ids(padded, 0), (0, 1))
        return {
            "features": dict.fromkeys(names, tokens),
            "padding_mask": mask,
            "tokens_mask": shown,
        }


def _steps(module: nn.Module) -> list[str]:
    """Return the arguments of `forward_step`."""
    step = getattr(module, "forward_step", None)
    return list(inspect.signature(step).parameters) if callable(step) else []


def _features(batch: Any) -> Mapping[str, Tensor]:
    for name in ("features", "feature_tensor", "feature_tensors", "inputs"):
        found: Mapping[str, Tensor] | None = _part(batch, name)
        if found is not None:
            return found
    raise KeyError("features")


def _part(batch: Any, name: str) -> Any:
    aliases = {"tokens_mask": ("tokens_mask", "token_mask"), "padding_mask": (name, "pad_mask")}
    for alias in aliases.get(name, (name,)):
        value = batch.get(alias) if isinstance(batch, Mapping) else getattr(batch, alias, None)
        if value is not None:
            return value
    return None


def _labels(found: Any, mask: Any) -> Tensor | None:
    if found is None:
        return None
    labels: Tensor = found[1]
    if mask is not None:
        labels = labels.masked_fill(~mask[1].reshape(labels.shape), -100)
    return labels[..., 0] if labels.dim() == 3 else labels


def _item_name(module: Any) -> str:
    return str(getattr(module.body.embedder, "_item_feature_name", "item_id"))
