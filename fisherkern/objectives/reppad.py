"""RepPad: fill the padding of short sequences with the sequences themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherkern.checks import check_choice
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives.base import Objective, OverObjective, Term, TrainingSequences


@dataclasses.dataclass(frozen=True)
class RepPad(OverObjective):
    """An objective on windows whose padding is filled by repetition.

        0 0 0 0 0 0 a b c   becomes   b c 0 a b c 0 a b c   cut on the left to the same width

    with a 0 between the copies, which no objective predicts or predicts from. The released code
    repeats inputs and targets apart, so the newest item never is an input; here the copies are of
    the whole window, and it is.

    Args:
        objective: one over all or masked positions.
        repeats: "fill" goes on to the left end; "random" adds 1 to floor(T / n) copies, drawn for
            every row of n items, as the released code does.

    Raises:
        InputError: an objective that reads a row as a single sequence (`CL4SRec`, `DuoRec`), or an
            unknown `repeats`.

    Source:
        Dang et al., RecSys 2024.
    """

    objective: Objective
    repeats: str = "fill"

    def __post_init__(self) -> None:
        check_choice("RepPad: repeats", self.repeats, ("fill", "random"))
        if not isinstance(self.objective, Objective) or self.objective.contiguous:
            raise InputError(
                f"RepPad: {type(self.objective).__name__} cannot read repeated sequences"
            )

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of the repeated `tokens` (N, T) int64 left-padded with 0."""
        return self.objective(model, self.repeat(tokens, generator), generator)

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return the repeated objective's terms."""
        return self.objective.terms(model, self.repeat(tokens, generator), generator)

    def repeat(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """`tokens` (N, T) with the padding filled, a new tensor."""
        width = tokens.shape[1]
        length = (tokens != 0).sum(dim=1, keepdim=True)
        back = torch.arange(width - 1, -1, -1, device=tokens.device)  # columns from the right
        place = back % (length + 1)
        # Where place is n the column left of the sequence is read, which is padding: the delimiter.
        filled = tokens.gather(1, width - 1 - place)
        if self.repeats == "random":
            most = width // length.clamp(min=1)
            draws = torch.rand(length.shape, generator=generator, dtype=torch.float64)
            copies = 1 + (draws.to(tokens.device) * most).long().minimum(most - 1)
            filled = filled.masked_fill(back >= (copies + 1) * (length + 1), 0)
        return filled

    def bind(self, data: TrainingSequences, max_len: int) -> RepPad:
        """Bind the repeated objective."""
        return dataclasses.replace(self, objective=self.objective.bind(data, max_len))

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the repeated objective's modules."""
        return self.objective.modules()

    def columns(self, tokens: Tensor, extra: int) -> Tensor:
        """Return the repeated objective's columns."""
        return self.objective.columns(tokens, extra)
