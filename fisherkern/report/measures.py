"""Numbers of a report: groups of users, and Fishers by layer, by head and as shares of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fisherkern.data import SequenceDataset
from fisherkern.errors import InputError
from fisherkern.evaluation import Report
from fisherkern.merging.fishers import Fishers

_PROJECTION = re.compile(r"(?:.*\.)?attention\.(?:query|key|value)\.(?:weight|bias)")


def user_groups(data: SequenceDataset, report: Report) -> dict[str, dict[str, np.ndarray]]:
    """Part the users of a report in three by history length, and by their target's popularity.

    Args:
        data: what the report was measured on, over the model's catalogue.
        report: of the split "test" or "validation".

    Returns:
        Title -> label -> (num_users,) bool; groups of fewer than two users, which have no interval,
        are left out.
    """
    user, position = data.targets(report.split)
    # A user's targets follow each other, in the report as in the data.
    new = np.diff(report.users, prepend=-1) != 0
    number = np.arange(len(new)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    targets = position[np.searchsorted(user, report.users) + number]
    lengths = targets - data.offsets[:-1][report.users]
    popularity = data.popularity()[data.items[targets] - 1]
    return {
        "history length": _thirds(lengths, "{} to {} actions before"),
        "popularity of the item to find": _thirds(popularity, "seen {} to {} times"),
    }


def _thirds(values: np.ndarray, label: str) -> dict[str, np.ndarray]:
    bounds = np.unique(np.quantile(values, [1 / 3, 2 / 3], method="lower"))
    third = np.searchsorted(bounds, values)  # 0 up to the first bound, that included
    masks = [third == number for number in range(len(bounds) + 1)]
    return {
        label.format(f"{values[mask].min():,}", f"{values[mask].max():,}"): mask
        for mask in masks
        if mask.sum() >= 2
    }


def of_users(report: Report, mask: np.ndarray) -> Report:
    """Return the report of some of its users, those where `mask` (num_users,) is true."""
    per_user = {metric: values[mask] for metric, values in report.per_user.items()}
    return Report(per_user, report.users[mask], report.ranks[mask], report.protocol)


def fisher_by_layer(fisher: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum a Fisher by layer, as shares of the whole sum.

    A layer is what comes before the first number in a name, with the number, or its first word.
    """
    sums: dict[str, float] = {}
    for name, value in fisher.items():
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        layer = numbered[0] if numbered else name.split(".")[0]
        sums[layer] = sums.get(layer, 0.0) + float(value.sum(dtype=torch.float64))
    total = sum(sums.values())
    return {layer: 0.0 if total == 0 else own / total for layer, own in sums.items()}


def fisher_by_head(fisher: Mapping[str, Tensor], heads: int) -> dict[str, list[float]]:
    """Sum the Fisher of queries, keys and values by attention head, as shares of the whole sum.

    Args:
        fisher: by the parameter names of our encoders.
        heads: of each attention.

    Returns:
        Name of the attention -> a share for each head; {} where the heads do not part a tensor.
    """
    total = sum(float(value.sum(dtype=torch.float64)) for value in fisher.values())
    sums: dict[str, np.ndarray] = {}
    for name, value in fisher.items():
        if not _PROJECTION.fullmatch(name):
            continue
        if heads < 1 or len(value) % heads:
            return {}
        own = value.double().reshape(heads, -1).sum(dim=1).numpy()
        layer = name.rsplit(".", 2)[0]
        sums[layer] = sums.get(layer, np.zeros(heads)) + own
    return {layer: (own / total).tolist() if total else own.tolist() for layer, own in sums.items()}


def fisher_shares(
    fishers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    floor: float,
    normalize: str | None,
) -> dict[str, list[float]]:
    """Compute each member's mean share in the entries of a merge by Fisher, tensor by tensor.

        mean over entries of  lambda_m (F_m/unit_m + floor) / sum_n lambda_n (F_n/unit_n + floor)

    Args:
        fishers: of the members, with the same shapes.
        weights: lambda.
        floor: see `merge`.
        normalize: see `merge`.

    Raises:
        InputError: Fishers of different shapes.
    """
    known = Fishers(fishers, normalize)
    shares = {}
    for name, first in fishers[0].items():
        if any(name in own and own[name].shape != first.shape for own in fishers[1:]):
            raise InputError("the Fishers have different shapes")
        scaled = known.scaled(name)
        if scaled is None:
            shares[name] = [weight / sum(weights) for weight in weights]
            continue
        parts = torch.stack(
            [lam * (v.double() / u + floor) for lam, (v, u) in zip(weights, scaled, strict=True)]
        )
        plain = torch.tensor(weights).double().view(-1, *[1] * first.dim())
        parts = torch.where(parts.sum(dim=0) > 0, parts, plain)
        shares[name] = (parts / parts.sum(dim=0)).flatten(1).mean(dim=1).tolist()
    return shares
