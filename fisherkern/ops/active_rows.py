"""The few rows of output gradients that are not zero, where the others need no arithmetic.

A model that predicts at its last position sends nothing back through the other positions of its
last block but by attention, whoever wrote it.
"""

from __future__ import annotations

from torch import Tensor

from fisherkern.ops.backend import on_gpu


def active_rows(delta: Tensor) -> Tensor | None:
    """Rows (K,) int64 of (R, P, D) that are not zero in every probe; None where half or more are.

    Also None on a GPU, which would be waited for.
    """
    return None if (active := _active(delta)) is None else active.nonzero()[:, 0]


def active_positions(delta: Tensor) -> Tensor | None:
    """Positions (N, K) int64 of (R, N, T, ...) outside of which every probe is zero.

    Each sequence has K, the most that one needs. None as in `active_rows`.
    """
    n, positions = delta.shape[1:3]
    if positions == 1 or not delta.numel():
        return None
    if (active := _active(delta.reshape(len(delta), n * positions, -1))) is None:
        return None
    active = active.view(n, positions)
    most = max(1, int(active.sum(dim=1).max()))
    if 2 * most >= positions:
        return None
    return active.int().argsort(dim=1, descending=True, stable=True)[:, :most]


def _active(delta: Tensor) -> Tensor | None:
    """Which rows of (R, P, D) some probe needs, (P,) bool; None where that is half of them."""
    if on_gpu(delta) or not delta.numel():
        return None
    # Most gradients are dense, which one column shows, or else one probe.
    for probes in (delta[:1, :, :1], delta[:1], delta):
        active = ((probes.amax(dim=2) != 0) | (probes.amin(dim=2) != 0)).any(dim=0)
        if 2 * int(active.sum()) >= len(active):
            return None
    return active
