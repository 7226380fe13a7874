"""DuoRec: dropout views, and sequences that lead to the same item, attract each other."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fisherkern.checks import check_choice
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives.base import Objective, TrainingSequences, no_loss
from fisherkern.objectives.contrast import ContrastiveLoss, NTXent, check_loss
from fisherkern.objectives.same_target import SameTarget
from fisherkern.objectives.views import encode_views

MODES = ("unsupervised", "supervised", "both", "us_x")


@dataclasses.dataclass(frozen=True)
class DuoRec(Objective):
    """The contrastive part of DuoRec, to be added to another objective.

    The target of a window is its last item, s its items before. With h and h' two passes over s
    that differ by dropout, and h+ a pass over another training sequence, drawn uniformly, with the
    same target (s itself where there is none):

        "unsupervised"  loss(h, h')                   the model-level augmentation, eq. 9
        "supervised"    loss(h, h+)                   the semantic augmentation, eq. 10
        "both"          loss(h, h') + loss(h, h+)     eq. 12 with both weights equal
        "us_x"          loss(h', h+)                  what the released code runs by default

    The released code takes h from the main objective's pass where its mode is "supervised" and a
    pass of its own where it is "us_x". Here the main objective is another term of the sum and every
    pass is this one's own, so the two names mean one computation. All passes are one batch of 2N
    rows, 3N for "both". All but "unsupervised" need `bind`, which `train` calls. A window of one
    item has no history and is left out; a batch of nothing else has loss 0.

    Args:
        mode: one of the names above.
        loss: the contrastive loss, `NTXent` or `SymmetricNoiseTolerant`.
        mask_same_target: keep rows with the same target out of each other's negatives, which the
            released code does not.

    Raises:
        InputError: an unknown mode, or an objective that is not bound.

    Source:
        Qiu et al., WSDM 2022.
    """

    mode: str = "us_x"
    loss: ContrastiveLoss = NTXent()
    mask_same_target: bool = False
    same_target: SameTarget | None = dataclasses.field(default=None, repr=False, compare=False)

    contiguous = True
    needs = "a next item"

    def __post_init__(self) -> None:
        check_loss("DuoRec", self.loss)
        check_choice("DuoRec: mode", self.mode, MODES)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0."""
        tokens = tokens[(tokens[:, :-1] != 0).any(dim=1)]
        if not len(tokens):
            return no_loss(model)
        history, target = tokens[:, :-1], tokens[:, -1]
        rows = [history] if self.mode in ("supervised", "us_x") else [history, history]
        if self.mode != "unsupervised":
            if self.same_target is None:
                raise InputError(
                    f"DuoRec({self.mode!r}) must be bound first: objective.bind(data, max_len)"
                )
            rows.append(self.same_target.draw(history, target, generator))
        first, *others = encode_views(model, torch.cat(rows)).chunk(len(rows))
        same = target[:, None] == target if self.mask_same_target else None
        return torch.stack([self.loss(first, other, same) for other in others]).sum()

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return the number of rows with a history."""
        return int((tokens[:, :-1] != 0).any(dim=1).sum())

    def bind(self, data: TrainingSequences, max_len: int) -> DuoRec:
        """With the training samples grouped by target: 8 bytes an action, user and item."""
        if self.mode == "unsupervised":
            return self
        return dataclasses.replace(self, same_target=SameTarget.of(data))
