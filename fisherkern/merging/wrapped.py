"""What the methods share that put small trainable parts into a merged encoder."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fisherkern.encoders import ENCODERS, MODELS, Batch, ParallelEncoders, SequenceEncoder
from fisherkern.encoders.base import trim_padding
from fisherkern.errors import InputError
from fisherkern.merging.rules.base import Option


class Wrapped(SequenceEncoder):
    """A `SequenceEncoder` with the catalogue, tokens and output layer of its `network`.

    The network is frozen; what a subclass adds is not. A subclass that is a `model_file` is
    rebuilt from its `config`: the network's class and config, and the subclass's `arguments`.
    """

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
        """h (.., D) of states (.., D)."""
        return self.network.transform(states)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `SequenceEncoder.states`."""
        return self.network.states(tokens, positions)

    def encode(self, batch: Batch) -> Tensor:
        """h (N, D) at the prediction position, as `SequenceEncoder.encode`."""
        return self.transform(self.states(prediction_tokens(self, batch))[:, -1])

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.network.head()

    def item_parameters(self) -> dict[str, int]:
        return {f"network.{name}": row for name, row in self.network.item_parameters().items()}

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        return self.network.mask_items(tokens, positions, chosen)

    @property
    def append_mask(self) -> Callable[[Tensor], Tensor]:
        """The network's `append_mask`, where it has a mask token."""
        if not hasattr(self, "mask_token"):
            raise AttributeError("append_mask")
        return cast(Any, self.network).append_mask


WrappedT = TypeVar("WrappedT", bound=type[Wrapped])


def model_file(kind: WrappedT) -> WrappedT:
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
        raise InputError(f"{owner}: the network has the unknown class {name!r}")
    return ENCODERS[name](**arguments)


def check_encoders(models: Sequence[Any], what: str) -> None:
    """Raise InputError unless all are encoders of one network."""
    for number, model in enumerate(models):
        if not isinstance(model, SequenceEncoder) or isinstance(model, ParallelEncoders | Wrapped):
            raise InputError(
                f"{what} {number} is a {type(model).__name__}, not an encoder of one network"
            )


def check_option(name: str, value: Any, option: Option) -> None:
    """Raise InputError unless `option` allows `value`."""
    if not option.allows(value):
        raise InputError(f"{name} is {value!r} where {option.expected} was expected")


def prediction_tokens(model: SequenceEncoder, batch: Batch) -> Tensor:
    """(N, T) int64 of which `states` gives the state that predicts in its last column."""
    history = model.read_history(batch)
    if hasattr(model, "mask_token"):
        history = cast(Any, model).append_mask(history)
    return trim_padding(history)


def real_positions(tokens: Tensor) -> Tensor:
    """Bool (N, T): no padding. The last column always counts, so that no row is empty."""
    real = tokens != 0
    real[:, -1] = True
    return real


def mean_over(x: Tensor, real: Tensor) -> Tensor:
    """The mean of x (N, T, C) over the positions where `real` (N, T): (N, C)."""
    # Selected, not multiplied: what stands at padding may be anything.
    kept = torch.where(real[:, :, None], x, 0.0)
    return kept.sum(1) / real.sum(1, keepdim=True)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; after, every submodule is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches_of(loader: Any, model: nn.Module) -> list[Any]:
    """The loader's batches (of a function of the model: those it gives), at least one."""
    found = loader(model) if callable(loader) else loader
    if not isinstance(found, Iterable) or isinstance(found, Tensor | str | dict):
        raise InputError(f"loader is a {type(found).__name__}, not an iterable of batches")
    found = list(found)
    if not found:
        raise InputError("loader gives no batch")
    return found


def descend(
    parameters: Sequence[Tensor],
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    lr: float,
) -> list[float]:
    """`steps` steps of Adam, one batch each, around and around; the loss before each step."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for _, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        with torch.enable_grad():
            loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise InputError("loader: the loss of a batch is not finite")
        optimizer.zero_grad()
        loss.backward(inputs=list(parameters))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
