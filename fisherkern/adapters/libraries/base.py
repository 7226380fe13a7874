"""What the package asks of a kind of model, and the kinds that it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import histories, mapped, real_places
from fisherkern.errors import InputError


class Library:
    """How a kind of model is asked for its next item. Subclasses know it by what it has.

    Models count items by token ids of their own. `pad_id` is the token that is padding,
    `first_token` that of the first item, and `first_column` the token of logit column 0.
    """

    name: ClassVar[str] = "plain module"

    def fits(self, module: nn.Module) -> bool:
        """Whether a bare module is of this kind."""
        raise NotImplementedError

    def logits(self, module: Any, batch: Any) -> Tensor:
        """Next-item logits (N, V), or (N, T, V) of every position."""
        raise NotImplementedError

    def hidden_states(self, module: Any) -> Callable[[Any], Tensor] | None:
        """batch -> h (N, T, D) at every position, where `logits` gives the last one's only."""
        return None

    def prepared(self, module: Any, batch: Any) -> Any:
        """Return the batch as the question for the next item, where a native batch asks another."""
        return batch

    def places(self, module: Any, batch: Any) -> Tensor | None:
        """Which positions of the logits hold items, (N, T) bool; None where nothing says so."""
        return real_places(batch, self.pad_id(module))

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        """Return the token that each position's logits are trained on, (N, T), −100 for none."""
        return None

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        """Return the tokens of the next items, (N,); None where the batch has none."""
        return None

    def pad_id(self, module: Any) -> int | None:
        """Return the token that is padding."""
        return 0

    def first_token(self, module: Any) -> int:
        """Return the token of the first item."""
        return 1

    def first_column(self, module: Any) -> int:
        """Return the token of logit column 0."""
        return 0

    def num_items(self, module: Any) -> int | None:
        """How many items the model has; None where it does not say."""
        return None

    def item_ids(self, source: Any, module: Any) -> list[Any] | None:
        """External ids of the items, that of token `first_token` first."""
        return None

    def max_len(self, module: Any) -> int | None:
        """Return the most positions of a history."""
        return None

    def skips_padding(self, module: Any) -> bool:
        """Whether left columns that are padding in every row of a batch are not computed."""
        return False

    def settings(self, module: Any) -> Mapping[str, Any] | None:
        """Return what the model was built with."""
        return None

    def make_batch(self, module: Any, items: Tensor) -> Any:
        """Make a native batch of histories (N, T) int64, items 1..V, 0 on the left for none."""
        return items

    def with_users(self, module: Any, batch: Any, users: Tensor | None) -> Any:
        """Return a batch of `make_batch` with the data's users (N,), for models that take them."""
        return batch

    def item_tables(self, module: Any) -> dict[str, int] | None:
        """Parameter -> row of the first item; None: they are found by their sizes."""
        return None


_known: list[Library] = []


def register(library: Library) -> Library:
    """Add a kind of model; it is asked before those that are there.

    Args:
        library: An instance of a subclass of `Library`.

    Returns:
        The library.
    """
    _known.insert(0, library)
    return library


def recognised(module: nn.Module) -> Library | None:
    """Return the kind of a bare module; None for a plain one."""
    for library in _known:
        if library.fits(module):
            return library
    return None


def last_place(places: Tensor | None, length: int, rows: int) -> Tensor | None:
    """Return the index of every sequence's last real position, (N,); None for the last column.

    Args:
        places: (N, T) bool, or None.
        length: Positions of the logits.
        rows: Sequences N.
    """
    if places is None or bool(places[:, -1].all()):
        return None
    if places.shape != (rows, length):
        return None
    steps = torch.arange(length, device=places.device)
    return torch.where(places, steps, -1).amax(dim=1).clamp(min=0)


def last_label(labels: Tensor, places: Tensor | None) -> Tensor:
    """Return the label of each sequence's last real position, (N,).

    Args:
        labels: (N, T), −100 for none.
        places: (N, T) bool, which positions hold items; None for all.

    Raises:
        InputError: A sequence has none there, as labels that are the history itself.
    """
    index = last_place(places, labels.shape[1], len(labels))
    if index is None:
        index = torch.full_like(labels[:, 0], labels.shape[1] - 1)
    found = labels.gather(1, index[:, None].to(labels.device))[:, 0]
    if bool((found == -100).any()):
        raise InputError(
            "sampler 'target': a batch's labels name no item after the last of a sequence; give "
            "histories without their last item and fk.adapt(model, target=...)"
        )
    return found


def history_of(batch: Any) -> Tensor:
    """Return the history of a batch, which must hold one."""
    found = histories(mapped(batch, _as_tensor))
    assert found is not None
    return found


def _as_tensor(name: str, value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def shifted_left(tokens: Tensor, new: int) -> Tensor:
    """Tokens (N, T) without the first column, and `new` after the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], new)], dim=1)


def token_ids(items: Tensor, first_token: int, pad: int = 0) -> Tensor:
    """Return the tokens of items 1..V, and `pad` where there is none."""
    return torch.where(items > 0, items - 1 + first_token, pad)


def right_padded(history: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Histories padded on the left with 0, moved to the left end; and their lengths (N,)."""
    lengths = (history != 0).sum(dim=1)
    width = history.shape[1]
    steps = torch.arange(width, device=history.device)
    source = (steps + width - lengths[:, None]).clamp(max=width - 1)
    moved = history.gather(1, source)
    return moved.masked_fill(steps[None] >= lengths[:, None], pad), lengths


def config_of(module: Any) -> Mapping[str, Any] | None:
    """Return a model's configuration as a mapping, such as Hugging Face's and RecBole's."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return config
    for name in ("to_dict", "final_config_dict"):
        value = getattr(config, name, None)
        try:
            value = value() if callable(value) else value
        except Exception:  # somebody else's method
            continue
        if isinstance(value, Mapping):
            return value
    return None
