"""SASRec.pytorch and gSASRec, each one file that many projects copied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.adapters.batches import field, model_input
from fisherkern.adapters.libraries.base import Library, history_of, token_ids


class SASRecPyTorch(Library):
    """Knows a model by `log2feats` and `item_emb`."""

    name = "SASRec.pytorch"

    def fits(self, module: nn.Module) -> bool:
        return hasattr(module, "log2feats") and hasattr(module, "item_emb")

    def logits(self, module: Any, batch: Any) -> Tensor:
        # Its code takes NumPy arrays, and moves them to its device itself.
        states = module.log2feats(history_of(batch).cpu().numpy())
        # `predict` scores items; the padding is none.
        return F.linear(states, module.item_emb.weight[1:])

    def first_column(self, module: Any) -> int:
        return 1

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        # Its sampler gives users, sequences, positive and negative items.
        if not isinstance(batch, (tuple, list)):
            return None
        if len(batch) == 2:
            items = torch.as_tensor(batch[1])
            return items if items.dim() == 1 else items[:, -1]
        return torch.as_tensor(batch[2])[:, -1] if len(batch) == 4 else None

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        if not isinstance(batch, (tuple, list)) or len(batch) != 4:
            return None
        positive = torch.as_tensor(batch[2]).long()
        return positive.masked_fill(positive == 0, -100)

    def num_items(self, module: Any) -> int | None:
        return int(module.item_emb.weight.shape[0]) - 1

    def max_len(self, module: Any) -> int | None:
        table = getattr(module, "pos_emb", None)
        if not isinstance(table, nn.Embedding):
            return None
        # Position 0 is padding's in later versions.
        return table.num_embeddings - (table.padding_idx is not None)


class GSASRec(Library):
    """Knows a model by `get_predictions` and `get_output_embeddings`."""

    name = "gSASRec"

    def fits(self, module: nn.Module) -> bool:
        names = ("get_predictions", "get_output_embeddings", "num_items")
        return all(hasattr(module, name) for name in names)

    def prepared(self, module: Any, batch: Any) -> Any:
        # Its loaders give [histories, negatives], next items included, and
        # [histories, sets of seen items, next items].
        if not isinstance(batch, (tuple, list)) or not isinstance(batch[-1], Tensor):
            return batch
        if len(batch) == 2 and batch[1].dim() == 3:
            return {"history": batch[0][:, :-1], "target": batch[0][:, -1]}
        return {"history": batch[0], "target": batch[-1]} if len(batch) == 3 else batch

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        found = field(batch, ("target",))
        return None if found is None else found[1]

    def logits(self, module: Any, batch: Any) -> Tensor:
        states = module(history_of(model_input(batch)))
        states = states[0] if isinstance(states, tuple) else states
        table = module.get_output_embeddings().weight
        return F.linear(states, table[1 : module.num_items + 1])

    def pad_id(self, module: Any) -> int | None:
        return int(module.num_items) + 1

    def first_column(self, module: Any) -> int:
        return 1

    def num_items(self, module: Any) -> int | None:
        return int(module.num_items)

    def max_len(self, module: Any) -> int | None:
        value = getattr(module, "sequence_length", None)
        return value if isinstance(value, int) else None

    def make_batch(self, module: Any, items: Tensor) -> Any:
        return token_ids(items, 1, int(module.num_items) + 1)
