"""Attributes: predict what the hidden items are like, beside which they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_choice, check_count, check_unit
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.objectives.base import Objective, Term, TrainingSequences, no_loss, same_draws
from fisherkern.objectives.masked_items import MaskedItems


@dataclasses.dataclass(frozen=True, eq=False)
class AttributeTable:
    """CSR from internal item id to its attributes: columns[starts[v]:starts[v+1]], 0..A-1."""

    starts: Tensor  # (V + 2,) int64
    columns: Tensor  # (entries,) int64
    width: int  # A

    @classmethod
    def of(cls, data: TrainingSequences) -> AttributeTable:
        """Attribute numbers become columns in their order; raises InputError as `bind` says."""
        if not data.attributes:
            raise InputError("Attributes: the data set has no attributes")
        internal = {item: v for v, item in enumerate(data.item_ids, start=1)}
        unknown = [item for item in data.attributes if item not in internal]
        if unknown:
            raise InputError(
                f"Attributes: item {shown(unknown[0])} is not in the data set's item_ids"
            )
        numbers = sorted({number for own in data.attributes.values() for number in own})
        if not numbers:
            raise InputError("Attributes: no item of the data set has an attribute")
        column = {number: index for index, number in enumerate(numbers)}
        rows: list[list[int]] = [[] for _ in range(data.num_items + 1)]
        for item, own in data.attributes.items():
            rows[internal[item]] = [column[number] for number in own]
        counts = np.array([len(row) for row in rows])
        return cls(
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            torch.tensor([index for row in rows for index in row], dtype=torch.int64),
            len(numbers),
        )

    def known(self, items: Tensor) -> Tensor:
        """Whether each of `items` (P,) has any attribute, (P,) bool; on the CPU."""
        return self.starts[items + 1] > self.starts[items]

    def rows(self, items: Tensor) -> Tensor:
        """1 where an item has an attribute, (P, A) float32, of `items` (P,); on the CPU."""
        start = self.starts[items]
        count = self.starts[items + 1] - start
        row = torch.repeat_interleave(torch.arange(len(items)), count)
        within = torch.arange(len(row)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        labels = torch.zeros(len(items), self.width)
        labels[row, self.columns[start[row] + within]] = 1.0
        return labels


@dataclasses.dataclass(frozen=True)
class Attributes(Objective):
    """Multi-label prediction of item attributes, EMKD's auxiliary task, to be added to another.

        -(1/PA) Σ_p Σ_a [ y_pa log σ(z_pa) + (1 - y_pa) log(1 - σ(z_pa)) ],  z_p = U h_p + c

    over P positions, of whose items y_pa says whether they have attribute a; a mean, where the
    paper sums over positions and attributes. Items are hidden as `MaskedItems(ratio)` does. Items
    without any attribute are left out. U and c belong to the objective, not to the model: `bind`
    makes them, U from Xavier's uniform distribution, c zero. Holds P x A logits.

    Args:
        dim: width of the model's h.
        ratio: share of a sequence's items that is masked, in (0, 1].
        positions: "all", P are the items at all positions, as in the paper, or "masked", the hidden
            ones, as in its code.
        seed: of U.

    Raises:
        InputError: a ratio outside (0, 1], an unknown `positions`, a model of another width or
            without a mask token, or an objective that is not bound.

    Source:
        Du et al., EMKD, SIGIR 2023, arXiv 2304.14668.
    """

    dim: int = 64
    ratio: float = 0.2
    positions: str = "all"
    seed: int = 0
    table: AttributeTable | None = dataclasses.field(default=None, repr=False, compare=False)
    head: nn.Linear | None = dataclasses.field(default=None, repr=False, compare=False)

    needs = "an item with attributes"

    def __post_init__(self) -> None:
        check_count("Attributes: dim", self.dim)
        check_unit("Attributes: ratio", self.ratio, "(0, 1]")
        check_choice("Attributes: positions", self.positions, ("all", "masked"))

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0."""
        if self.table is None or self.head is None:
            raise InputError("Attributes must be bound first: objective.bind(data, max_len)")
        if self.dim != model.dim:
            raise InputError(f"Attributes: dim = {self.dim}, but the model's is {model.dim}")
        places, chosen = MaskedItems(self.ratio).draw(tokens, generator)
        hidden_items = model.mask_items(tokens, places, chosen)
        if self.positions == "masked":
            states = model.states(hidden_items, places)[chosen]
            items = tokens.gather(1, places)[chosen].cpu()
        else:
            states = model.states(hidden_items)[tokens != 0]
            items = tokens[tokens != 0].cpu()
        known = self.table.known(items)
        if not known.any():
            return no_loss(model)
        logits = self.head(model.transform(states[known.to(states.device)]))
        labels = self.table.rows(items[known]).to(logits)
        return F.binary_cross_entropy_with_logits(logits, labels)

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return P of all positions: the items that have an attribute."""
        return 0 if self.table is None else int(self.table.known(tokens[tokens != 0].cpu()).sum())

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return the loss with P."""
        hidden = tokens
        if self.positions == "masked":
            places, chosen = MaskedItems(self.ratio).draw(tokens, same_draws(generator))
            hidden = tokens.gather(1, places) * chosen
        return [Term(self(model, tokens, generator), self.targets(model, hidden))]

    def bind(self, data: TrainingSequences, max_len: int) -> Attributes:
        """With the attribute table of `data` and a head for it.

        Raises InputError if there are no attributes, or some of an item that is unknown.
        """
        table = AttributeTable.of(data)
        head = nn.utils.skip_init(nn.Linear, self.dim, table.width)
        generator = torch.Generator().manual_seed(self.seed)
        nn.init.xavier_uniform_(head.weight, generator=generator)
        nn.init.zeros_(head.bias)
        return dataclasses.replace(self, table=table, head=head)

    def modules(self) -> dict[str, nn.Module]:
        """Return the linear layer of a bound objective."""
        return {} if self.head is None else {"attributes": self.head}
