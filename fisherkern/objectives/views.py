"""Hidden states of whole sequences, as contrastive objectives compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.encoders import SequenceEncoder
from fisherkern.encoders.base import trim_padding

_GROUPS = 3


def encode_views(model: SequenceEncoder, tokens: Tensor) -> Tensor:
    """Encode histories `tokens` (N, T) int64, which may hold the mask token, to h (N, D).

    Rows go through the encoder in three groups by length, each without the padding it shares:
    cropped views are short, and so are most sequences of many data sets. To rounding, and but
    for what dropout draws, it is `encode`, which takes no mask tokens.
    """
    order = (tokens != 0).sum(dim=1).argsort(stable=True)
    groups = [_encode(model, trim_padding(tokens[rows])) for rows in order.chunk(_GROUPS)]
    return torch.cat(groups)[order.argsort()]


def _encode(model: SequenceEncoder, tokens: Tensor) -> Tensor:
    append_mask = getattr(model, "append_mask", None)
    if append_mask is None:
        return model.encode(tokens)
    tokens = append_mask(tokens)
    last = tokens.new_full((len(tokens), 1), tokens.shape[1] - 1)
    return model.transform(model.states(tokens, last).squeeze(1))
