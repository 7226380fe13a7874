"""What a training loop asks of an objective, and how objectives are added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fisherkern.checks import check_not_negative
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown

Self = TypeVar("Self", bound="Objective")


class TrainingSequences(Protocol):
    """What `bind` may read of a data set; `SequenceDataset` has it."""

    items: Any
    offsets: Any
    item_ids: Any
    attributes: Any

    @property
    def train_ends(self) -> Any:
        """(num_users,) int64: where in `items` each user's training part ends."""

    def popularity(self) -> Any:
        """(V,) int64: how often items 1..V occur in the training parts."""

    @property
    def num_items(self) -> int:
        """V, the size of the catalogue."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a loss: `weight` times `loss`, 0-dim, a mean over `targets` of them."""

    loss: Tensor
    targets: int
    weight: float = 1.0


class Objective:
    """A loss of a model on a batch of windows: subclass it as a frozen dataclass.

    `objective(model, tokens, generator)` is the loss, 0-dim, of `tokens` (N, T + lookahead)
    int64, left-padded with 0; every random draw of its own comes from the CPU `generator`. It is
    a mean over targets: a subclass says in `targets` how many, where they are not the rows.
    Objectives of one loop add up: `MaskedItems() + 0.1 * CL4SRec()`.
    """

    #: Columns that the windows need beyond the model's `max_len`, 0 or 1.
    lookahead: int = 0
    #: Whether a row's items must stand side by side, without the delimiters of `RepPad`.
    contiguous: bool = False
    #: What a user must have for there to be something to learn, as an error says it.
    needs: str = "an item"

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim; see the class."""
        raise NotImplementedError

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """How many targets the loss of `tokens` is the mean over, as far as no draw decides.

        0 says that there is nothing to learn from. Here: rows that hold an item.
        """
        return int((tokens != 0).any(dim=1).sum())

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return the loss as terms that add up to it, each a mean over targets of its own."""
        return [Term(self(model, tokens, generator), self.targets(model, tokens))]

    def settings(self) -> dict[str, Any]:
        """Name and arguments as JSON values; a resumed run must have the same.

        A field that the printed form leaves out (`repr=False`) is what `bind` found, and left
        out here as well. `from_settings` gives the objective back, unbound.
        """
        return {"name": type(self).__name__, **_arguments(self)}

    def bind(self: Self, data: TrainingSequences, max_len: int) -> Self:
        """Return the objective with what it needs of the data; called once, before training."""
        return self

    def modules(self) -> Mapping[str, nn.Module]:
        """Trainable parts of a bound objective, by name.

        The loop moves them to the model's device, gives them to the optimizer and keeps them
        in the state of the run; they are no part of the model.
        """
        return {}

    def columns(self, tokens: Tensor, extra: int) -> Tensor:
        """Which columns this part of a sum reads where another made windows `extra` wider.

        The last ones: all parts see the newest item.
        """
        return tokens[:, extra:]

    def __add__(self, other: Objective) -> WeightedSum:
        if not isinstance(other, Objective):
            return NotImplemented
        (weights, parts), (others, more) = _terms(self), _terms(other)
        return WeightedSum(weights + others, parts + more)

    def __mul__(self, weight: float) -> WeightedSum:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        weights, parts = _terms(self)
        return WeightedSum(tuple(weight * own for own in weights), parts)

    __rmul__ = __mul__


class OverObjective(Objective):
    """An objective made of another, its field `objective`, whose windows and targets it has."""

    objective: Objective

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        """The other's."""
        return self.objective.lookahead

    @property
    def needs(self) -> str:  # type: ignore[override]
        """The other's."""
        return self.objective.needs

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return the other's."""
        return self.objective.targets(model, tokens)


def total_loss(terms: list[Term]) -> Tensor:
    """Return the sum of terms, weighted, 0-dim."""
    return torch.stack([term.weight * term.loss for term in terms]).sum()


@dataclasses.dataclass(frozen=True)
class WeightedSum(Objective):
    """Σ_i weights_i parts_i: what `+` and `*` make, flat however they are nested.

    The parts draw from the generator in their order, so one added at the end changes none
    before it. Where they ask for different windows, each gets the width it asked for, and its
    `columns` says which. Raises InputError for a weight that is negative or not finite, for
    more or fewer weights than parts, and for a part that is no objective.
    """

    weights: tuple[float, ...]
    parts: tuple[Objective, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.parts) or not self.parts:
            raise InputError(
                f"WeightedSum: {len(self.weights)} weights do not fit {len(self.parts)} parts"
            )
        for part in self.parts:
            if not isinstance(part, Objective):
                raise InputError(f"WeightedSum: {shown(part)} is not an objective")
        for weight in self.weights:
            check_not_negative("the weight of an objective", weight)

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        """The widest part's."""
        return max(part.lookahead for part in self.parts)

    @property
    def contiguous(self) -> bool:  # type: ignore[override]
        """Whether any part needs contiguous rows."""
        return any(part.contiguous for part in self.parts)

    @property
    def needs(self) -> str:  # type: ignore[override]
        """The first part's."""
        return self.parts[0].needs

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the weighted sum of the parts' losses, 0-dim."""
        return total_loss(self.terms(model, tokens, generator))

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return the sum over the parts whose weight is not 0."""
        return sum(
            part.targets(model, columns)
            for weight, part, columns in self._columns_of_parts(tokens)
            if weight
        )

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return the parts' terms, weighted."""
        return [
            dataclasses.replace(term, weight=weight * term.weight)
            for weight, part, columns in self._columns_of_parts(tokens)
            for term in part.terms(model, columns, generator)
        ]

    def _columns_of_parts(self, tokens: Tensor) -> Iterator[tuple[float, Objective, Tensor]]:
        for weight, part in zip(self.weights, self.parts, strict=True):
            yield weight, part, part.columns(tokens, self.lookahead - part.lookahead)

    def bind(self, data: TrainingSequences, max_len: int) -> WeightedSum:
        """Bind every part."""
        bound = tuple(part.bind(data, max_len) for part in self.parts)
        return dataclasses.replace(self, parts=bound)

    def modules(self) -> dict[str, nn.Module]:
        """Return the parts' modules as part0_NAME, part1_NAME, ..."""
        return {
            f"part{index}_{name}": module
            for index, part in enumerate(self.parts)
            for name, module in part.modules().items()
        }


def same_draws(generator: torch.Generator) -> torch.Generator:
    """Return a generator that draws what `generator` will."""
    return torch.Generator().set_state(generator.get_state())


def no_loss(model: SequenceEncoder) -> Tensor:
    """Return a zero that can be differentiated, for a batch with nothing to learn from."""
    return model.head()[0].sum() * 0.0


def _terms(objective: Objective) -> tuple[tuple[float, ...], tuple[Objective, ...]]:
    if isinstance(objective, WeightedSum):
        return objective.weights, objective.parts
    return (1.0,), (objective,)


def _arguments(value: Any) -> dict[str, Any]:
    return {
        field.name: _json(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.repr
    }


def _json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"name": type(value).__name__, **_arguments(value)}
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return value
