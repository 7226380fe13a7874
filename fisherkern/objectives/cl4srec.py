"""CL4SRec: two random views of a sequence attract each other."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fisherkern.checks import check_unit
from fisherkern.encoders import SequenceEncoder
from fisherkern.objectives.augment import two_views
from fisherkern.objectives.base import Objective, no_loss
from fisherkern.objectives.contrast import ContrastiveLoss, NTXent, check_loss
from fisherkern.objectives.views import encode_views


@dataclasses.dataclass(frozen=True)
class CL4SRec(Objective):
    """The contrastive part of CL4SRec, to be added to another objective.

        loss(h(a(s)), h(b(s))),  a and b two different ones of crop, mask and reorder

    drawn for every sequence s of the batch; h is what the encoder scores items with. An
    augmentation of share x changes floor(x n) of n items. A sequence of one item is left as it is.
    Hidden items become the encoder's mask token; an encoder without one gets padding there, and
    then never for the newest item.

    Beside `NextItem` in a sum it reads the histories, without the item to be predicted. The views
    are new tensors: what the data set stores is never written to. Rows of padding alone are left
    out; a batch of nothing else has loss 0.

    Args:
        crop: η, share of consecutive items that is kept, in (0, 1].
        mask: γ, share of items that is hidden, in [0, 1].
        reorder: β, share of consecutive items that is shuffled, in [0, 1].
        loss: the contrastive loss, `NTXent` or `SymmetricNoiseTolerant`.

    Raises:
        InputError: a share outside its interval.

    Source:
        Xie et al., ICDE 2022, eq. 4.
    """

    crop: float = 0.6
    mask: float = 0.3
    reorder: float = 0.6
    loss: ContrastiveLoss = NTXent()

    contiguous = True

    def __post_init__(self) -> None:
        check_loss("CL4SRec", self.loss)
        check_unit("CL4SRec: crop", self.crop, "(0, 1]")
        check_unit("CL4SRec: mask", self.mask)
        check_unit("CL4SRec: reorder", self.reorder)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0; encodes 2N rows."""
        tokens = tokens[(tokens != 0).any(dim=1)]
        if not len(tokens):
            return no_loss(model)
        mask_token = getattr(model, "mask_token", None)
        views = two_views(tokens, self.crop, self.mask, self.reorder, generator, mask_token)
        first, second = encode_views(model, torch.cat(views)).chunk(2)
        return self.loss(first, second)

    def columns(self, tokens: Tensor, extra: int) -> Tensor:
        """Leave out the newest items, which another part of the sum predicts."""
        return tokens[:, : tokens.shape[1] - extra]
