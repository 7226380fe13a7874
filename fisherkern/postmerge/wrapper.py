"""The frozen encoder that the methods of this room put small trainable parts into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fisherkern.encoders import ENCODERS, MODELS, Batch, SequenceEncoder
from fisherkern.encoders.base import prediction_tokens
from fisherkern.errors import InputError, shown


class FrozenEncoderWrapper(SequenceEncoder):
    """A `SequenceEncoder` with the catalogue, tokens and output layer of its `network`.

    The network is frozen; what a subclass adds is not. A registered subclass is rebuilt
    from its `config`: the network's class and config, and the subclass's `arguments`.
    """

    one_network = False
    arguments: dict[str, Any]

    def __init__(self, network: SequenceEncoder) -> None:
        super().__init__(network.num_items, network.max_len, network.dim)
        self.network = network.requires_grad_(False)
        self.first_item = network.first_item
        self.item_ids = network.item_ids
        if hasattr(network, "mask_token"):
            self.mask_token = network.mask_token

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """See `SequenceEncoder`; InputError where the network is of a class of the user's own."""
        name = type(self.network).__name__
        if ENCODERS.get(name) is not type(self.network):
            raise InputError(f"{name} is not an encoder that a model file can hold")
        return {"network": {"class": name, **self.network.config}, **self.arguments}

    def transform(self, states: Tensor) -> Tensor:  # type: ignore[override]
        """Return h (.., D) of states (.., D)."""
        return self.network.transform(states)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `SequenceEncoder.states`."""
        return self.network.states(tokens, positions)

    def encode(self, batch: Batch) -> Tensor:
        """Return h (N, D) at the prediction position, as `SequenceEncoder.encode`."""
        return self.transform(self.states(prediction_tokens(self, batch))[:, -1])

    def head(self) -> tuple[Tensor, Tensor | None]:
        """See `SequenceEncoder`."""
        return self.network.head()

    def item_parameters(self) -> dict[str, int]:
        """See `SequenceEncoder`."""
        return {f"network.{name}": row for name, row in self.network.item_parameters().items()}

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        """See `SequenceEncoder`."""
        return self.network.mask_items(tokens, positions, chosen)

    @property
    def append_mask(self) -> Callable[[Tensor], Tensor]:
        """The network's `append_mask`, where it has a mask token."""
        if not hasattr(self, "mask_token"):
            raise AttributeError("append_mask")
        return cast(Any, self.network).append_mask


WrapperT = TypeVar("WrapperT", bound=type[FrozenEncoderWrapper])


def register_checkpoint_class(kind: WrapperT) -> WrapperT:
    """Class decorator: `save_model` and `load_model` take it, by the name of the class."""
    MODELS[kind.__name__] = kind
    return kind


def network_of(network: SequenceEncoder | Mapping[str, Any], owner: str) -> SequenceEncoder:
    """`network`, or a new one of the class and the arguments that a `config` has of it."""
    if isinstance(network, SequenceEncoder):
        return network
    if not isinstance(network, Mapping):
        raise InputError(f"{owner}: network is a {type(network).__name__}, not a class's config")
    arguments = dict(network)
    name = arguments.pop("class", None)
    if not isinstance(name, str) or name not in ENCODERS:
        raise InputError(f"{owner}: the network has the unknown class {shown(name)}")
    return ENCODERS[name](**arguments)


def real_positions(tokens: Tensor) -> Tensor:
    """Bool (N, T): no padding. The last column always counts, so that no row is empty."""
    real = tokens != 0
    real[:, -1] = True
    return real


def mean_over(x: Tensor, real: Tensor) -> Tensor:
    """Return the mean of x (N, T, C) over the positions where `real` (N, T): (N, C)."""
    # Selected, not multiplied: what stands at padding may be anything.
    kept = torch.where(real[:, :, None], x, 0.0)
    return kept.sum(1) / real.sum(1, keepdim=True)
