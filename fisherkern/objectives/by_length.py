"""States of a batch's sequences, without most of the padding between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.encoders import SequenceEncoder

# Rows of one group at least. Fewer have no padding left to save, and leave cores idle.
_ROWS = 64
# Different numbers of columns that groups have at most, the faster products want few shapes.
_WIDTHS = 16


def states_by_length(
    model: SequenceEncoder,
    tokens: Tensor,
    positions: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """`model.states(tokens, positions)`, which only holds where there is something to score.

    That is at items or, with `positions` (N, Q) int64, where `chosen` (N, Q) bool; a row's chosen
    positions stand first and none is padding. Elsewhere it is 0 or a state that is of no use.
    `tokens` is (N, T) int64, left-padded with 0; the result is (N, T or Q, D).

    On a CPU, rows go through the encoder in groups of like length, each without the columns that
    all its rows pad: an encoder's states do not depend on padding. Work is what a CPU is short of;
    a GPU gets the batch whole.
    """
    groups = len(tokens) // _ROWS
    if groups < 2 or tokens.device.type != "cpu":
        return model.states(tokens, positions)
    lengths = (tokens != 0).sum(dim=1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.tensor_split(groups):
        first = tokens.shape[1] - _rounded(int(lengths[rows[-1]]), tokens.shape[1])
        own = tokens[rows, first:]
        if positions is None or chosen is None:
            parts.append(F.pad(model.states(own), (0, 0, first, 0)))
            continue
        most = _rounded(int(chosen[rows].sum(dim=1).max()), positions.shape[1])
        # Those that are not chosen may lie in what is cut off.
        places = (positions[rows, :most] - first).clamp(min=0)
        missing = positions.shape[1] - most
        parts.append(F.pad(model.states(own, places), (0, 0, 0, missing)))
    return torch.cat(parts)[order.argsort()]


def _rounded(width: int, most: int) -> int:
    """At least `width`, at least 1, at most `most`: one of few numbers."""
    step = -(-most // _WIDTHS)
    return min(-(-max(1, width) // step) * step, most)
