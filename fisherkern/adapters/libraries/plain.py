"""Any module: our own protocol where a module has it, its forward where it has not."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import batch_size, field, model_input
from fisherkern.adapters.files.item_ids import id_list
from fisherkern.adapters.libraries.base import Library, config_of
from fisherkern.adapters.wrappers import held_modules
from fisherkern.errors import InputError

_NEXT_ITEM = ("target", "targets", "next_item", "item_id")
_LABELS = ("labels", "label", "y")
# Second parts of a pair that are no next items, by the name of the parameter they are for.
_BESIDE = ("mask", "len", "time", "pos", "user", "segment")


class PlainModule(Library):
    """A module that is called with a batch, with a pair's history, or with a mapping's entries.

    It may describe itself as our encoders do, by `first_item`, `max_len`, `num_items`,
    `item_ids`, `item_parameters()`, `config`, `encode(batch)` and `head()`.
    """

    def fits(self, module: nn.Module) -> bool:
        return True

    def logits(self, module: Any, batch: Any) -> Tensor:
        return logits_in(_called(module, batch))

    def hidden_states(self, module: Any) -> Callable[[Any], Tensor] | None:
        if not all(hasattr(module, name) for name in ("states", "transform", "read_history")):
            return None
        if not getattr(module, "causal", False):
            raise InputError(
                f"positions: a {type(module).__name__} predicts after the last item only"
            )

        def hidden(batch: Any) -> Tensor:
            tokens = module.read_history(model_input(batch), least=1)
            states: Tensor = module.transform(module.states(tokens))
            return states

        return hidden

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            return _second(batch)
        if (found := field(batch, _NEXT_ITEM)) is not None and found[1].dim() == 1:
            return found[1]
        if (found := field(batch, _LABELS)) is not None and found[1].dim() == 1:
            return found[1]
        return None

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        found = field(batch, _LABELS)
        if found is None or found[1].dim() != 2:
            return None
        pad = self.pad_id(module)  # of masked items, many loaders label the others with it
        return found[1] if pad is None else found[1].masked_fill(found[1] == pad, -100)

    def pad_id(self, module: Any) -> int | None:
        if describes_itself(module):
            return 0
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        padded = [part for part in tables if part.padding_idx is not None]
        return max(padded, key=lambda part: part.num_embeddings).padding_idx if padded else None

    def first_column(self, module: Any) -> int:
        return int(_declared(module, "first_item", 0))

    def num_items(self, module: Any) -> int | None:
        number = _declared(module, "num_items", None)
        return number if isinstance(number, int) else None

    def item_ids(self, source: Any, module: Any) -> list[Any] | None:
        own = _declared(module, "item_ids", None)
        return None if own is None or callable(own) or isinstance(own, Tensor) else id_list(own)

    def max_len(self, module: Any) -> int | None:
        value = _declared(module, "max_len", None)
        return value if isinstance(value, int) else None

    def skips_padding(self, module: Any) -> bool:
        return bool(_declared(module, "skips_padding", False))

    def settings(self, module: Any) -> Mapping[str, Any] | None:
        found = (config_of(part) for _, part in held_modules(module))
        return next((config for config in found if config is not None), None)

    def make_batch(self, module: Any, items: Tensor) -> Any:
        return {"history": items}

    def item_tables(self, module: Any) -> dict[str, int] | None:
        for prefix, part in held_modules(module):
            if callable(own := getattr(part, "item_parameters", None)):
                return {prefix + name: row for name, row in own().items()}
        return None


def _declared(module: Any, name: str, default: Any) -> Any:
    """Return an attribute of a module, or of the one that it holds and nothing else."""
    for _, part in held_modules(module):
        if (value := getattr(part, name, None)) is not None:
            return value
    return default


def describes_itself(module: nn.Module) -> bool:
    """Whether a module has something of our protocol, and so is a recommender in itself."""
    if factored(module):
        return True
    own = {**vars(type(module)), **vars(module)}
    return any(name in own for name in ("first_item", "max_len", "item_ids", "item_parameters"))


def factored(module: nn.Module) -> bool:
    """Whether a module has encode(batch) and head() as our encoders do."""
    encode, head = getattr(module, "encode", None), getattr(module, "head", None)
    if not callable(encode) or not callable(head) or isinstance(head, nn.Module):
        return False
    return len(_required(encode)) == 1 and not _required(head)


def logits_in(output: Any) -> Tensor:
    """Return the logits in a model's result: a tensor, or an object or mapping with them.

    Raises:
        InputError: There are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else None
    if found is None:
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"model: it returned a {type(output).__name__}, in which no logits are found; give "
            "fk.adapt(model, logits=...)"
        )
    return found


def _called(module: Any, batch: Any) -> Any:
    """Return what a module gives for a batch, handed over as its `forward` takes it."""
    forward = module.forward if isinstance(module, nn.Module) else module
    required, names = _required(forward), _positional(forward)
    if isinstance(batch, Mapping):
        keys = [name for name in names if name in batch]
        if names and names[0] in batch and all(name in batch for name in required):
            return module(**{name: batch[name] for name in keys})
        return _mapping_or_history(module, batch)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if len(required) > 1 or (len(names) > 1 and not _holds_next_items(names, batch)):
            return module(*batch[: max(len(required), min(len(batch), len(names)))])
        return module(model_input(batch))
    return module(batch)


# Whether a module takes the history of a mapping, in place of the mapping, once that is known.
_takes_history: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _mapping_or_history(module: Any, batch: Mapping[Any, Any]) -> Any:
    """Call a module with a mapping or, where that is nothing to it, its history alone."""
    known = _takes_history.get(module)
    if known is not None or not isinstance(batch.get("history"), Tensor):
        return module(batch["history"] if known else batch)
    try:
        result = module(batch)
    except Exception as error:  # whatever a module raises that wants a tensor
        try:
            result = module(batch["history"])
        except Exception as second:
            raise (second if isinstance(error, (TypeError, AttributeError)) else error) from None
        _takes_history[module] = True
        return result
    _takes_history[module] = False
    return result


def _holds_next_items(names: list[str], batch: Any) -> bool:
    """Whether the second part of a pair is the next items, for a forward with more arguments."""
    if len(batch) != 2 or _second(batch) is None:
        return False
    return not any(part in names[1].lower() for part in _BESIDE)


def _second(batch: Any) -> Tensor | None:
    """Return the next items of a (history, target) pair."""
    if len(batch) != 2:
        return None
    try:
        items = torch.as_tensor(batch[1])
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not items.is_floating_point() and items.dtype != torch.bool
    return items if whole and items.dim() == 1 and len(items) == batch_size(batch[0]) else None


def _positional(function: Any) -> list[str]:
    """Names of the positional parameters of a function, `self` left out."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def _required(function: Any) -> list[str]:
    """Those without a default."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    empty = inspect.Parameter.empty
    return [name for name in _positional(function) if parameters[name].default is empty]
