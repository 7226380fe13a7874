"""Alignment by what the channels of two encoders do on the same histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.adapters.batches import sequence_lengths
from fisherkern.alignment.assignment import best_transform
from fisherkern.encoders.base import prediction_tokens
from fisherkern.encoders.symmetry import AxisLabels, AxisSpec, Symmetries, SymmetryGroup
from fisherkern.errors import InputError
from fisherkern.members.catalogue import CatalogueUnion
from fisherkern.members.symmetries import Transforms, apply_transforms
from fisherkern.modes import eval_mode

# By name: the labels of an activation's axes, and its values at the real positions, (n, *axes).
Observations = dict[str, tuple[AxisLabels, Tensor]]
# Of a label: (n, n) correlations from the weights, other axes transformed; None without any.
OfWeights = Callable[[str, Transforms], Tensor | None]

# A channel whose variance is a smaller share of its mean square is constant up to rounding.
CONSTANT = 1e-12
# The weights' say beside the activations' correlations, which are at most 1 a channel: enough
# for what the histories do not show, too little to overrule them.
TIE_BREAK = 1e-6


@torch.no_grad()
def record_activations(model: Any, symmetries: Symmetries, tokens: Tensor) -> Observations:
    """Record activations with labelled axes at the positions of `tokens` (N, T) with an item.

    Those are what linear layers read and write, what layer norms read, embedded items, the states
    of recurrent layers, and h; as far as there is one for each column of `tokens`.
    """
    real = tokens != 0
    found: Observations = {}

    def keep(name: str, labels: AxisLabels, x: Tensor, where: Tensor = real) -> None:
        """x: an activation for each of `where`, selected there, so that others may be anything."""
        axes = x.shape[x.dim() - len(labels) :]
        if any(labels) and x.numel() == where.numel() * axes.numel():
            found[name] = labels, x.reshape(-1, *axes)[where.flatten()]

    handles = []
    for name, part in model.named_modules():
        hook = _hook(name, part, model, symmetries, keep, real)
        if hook is not None:
            handles.append(part.register_forward_hook(hook))
    try:
        with eval_mode(model):
            h = model.transform(model.states(tokens))
    finally:
        for handle in handles:
            handle.remove()
    tables = ("output_embedding", "item_embedding.weight")
    table = next((name for name in tables if name in symmetries.axes), None)
    if table is not None:
        keep("h", symmetries.axes[table][0].labels[1:], h)
    return found


Hook = Callable[[nn.Module, Any, Tensor], None]


def _hook(
    name: str,
    part: nn.Module,
    model: Any,
    symmetries: Symmetries,
    keep: Callable[..., None],
    real: Tensor,
) -> Hook | None:
    """Return a hook that gives a module's labelled activations to `keep`; None if it has none."""
    axes = symmetries.axes.get(f"{name}.weight", ())
    if isinstance(part, nn.LayerNorm) and axes:
        return lambda _, inputs, output: keep(name, axes[0].labels, inputs[0])
    if isinstance(part, nn.Linear) and axes:
        return lambda _, inputs, output: _linear(name, axes, inputs[0], output, keep)
    first = model.item_parameters().get(f"{name}.weight")
    if isinstance(part, nn.Embedding) and axes and first is not None:
        # By its own tokens, which need not be laid out as the histories are.
        return lambda _, ids, output: keep(name, axes[0].labels[1:], output, ids[0] >= first)
    if isinstance(part, nn.GRU):
        gru = part
        labels = [
            symmetries.axes[f"{name}.weight_hh_l{layer}"][-1].labels[:1]
            for layer in range(gru.num_layers)
        ]

        def states(_: nn.Module, inputs: Any, output: Any) -> None:
            # Items stand at the left of what it reads, padding after them.
            items = torch.arange(inputs[0].shape[1], device=real.device) < real.sum(1)[:, None]
            for layer, state in enumerate(_states(gru, inputs[0])):
                keep(f"{name}.{layer}", labels[layer], state, items)

        return states
    return None


def _linear(
    name: str, axes: Sequence[AxisSpec], x: Tensor, y: Tensor, keep: Callable[..., None]
) -> None:
    """Keep what a linear layer reads, by the axes its weight consists of, and writes."""
    # Of more dimensions it is no activation of a position: Caser's windows, channel by channel.
    if x.dim() > 3 or any(spec.length is not None and spec.dim != 1 for spec in axes):
        return
    for number, spec in enumerate(axes):
        part = x if spec.length is None else x.narrow(-1, spec.start, spec.length)
        if spec.shape is not None:
            part = part.unflatten(-1, spec.shape[1:])
        keep(f"{name} reads {number}", spec.labels[1:], part)
    keep(f"{name} writes", axes[0].labels[:1], y)


def _states(gru: nn.GRU, x: Tensor) -> Iterator[Tensor]:
    """Every layer's states (N, T, H); torch gives those of the last."""
    for layer in range(gru.num_layers):
        # On the meta device nothing is drawn; its weights are the layer's.
        one = nn.GRU(x.shape[2], gru.hidden_size, bias=False, batch_first=True, device="meta")
        for kind in ("ih", "hh"):
            setattr(one, f"weight_{kind}_l0", getattr(gru, f"weight_{kind}_l{layer}"))
        x, _ = one(x)
        yield x


class Correlations:
    """Correlations of the channels of a reference and a member, label by label.

    Of an activation a and b with an axis of the label, over n positions and its other axes, the
    member's transformed: C = sum (a - mean a)(b - mean b)ᵀ, divided by the roots of the two sums
    of squares: of each channel where channels may be permuted, of each head for heads, and of all
    channels where they may be turned, which alone leave it as it is under the group. The mean
    over the activations that have no other labelled axis, if there is one.
    """

    def __init__(self, symmetries: Symmetries, transforms: Transforms) -> None:
        self.symmetries, self.transforms = symmetries, transforms
        self.kinds = {
            label: group
            for name, group in symmetries.groups.items()
            for label in symmetries.labels(name)
        }
        self.count: dict[str, int] = {}
        self._labels: dict[str, AxisLabels] = {}
        self._sums: dict[str, list[Tensor]] = {}

    @property
    def coupled(self) -> set[str]:
        """The labels that stand only beside others, which must be matched first."""
        alone = {str(own[_labelled(own)[0]]) for own in self._labels.values() if _alone(own)}
        return {str(label) for own in self._labels.values() for label in own if label} - alone

    def add(self, reference: Observations, member: Observations) -> None:
        """Add the observations of a batch."""
        for name, (labels, own) in reference.items():
            a, b = own.double(), member[name][1].to(own.device, torch.float64)
            new = [a.sum(0), b.sum(0)]
            for dim in _labelled(labels):
                new += self._products(labels, dim, a, b)
            old = self._sums.get(name)
            self._labels[name] = labels
            self._sums[name] = (
                new if old is None else [x + y for x, y in zip(old, new, strict=True)]
            )
            self.count[name] = self.count.get(name, 0) + len(a)

    def join(self, device: torch.device) -> None:
        """Add up what several processes have observed, in their order; all have it afterwards."""
        own = {
            name: (labels, self.count[name], [x.shape for x in self._sums[name]])
            for name, labels in self._labels.items()
        }
        every = processes.gathered(own)
        about = {name: told for found in every for name, told in found.items()}
        for name, (labels, _, shapes) in about.items():
            none = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
            self._labels[name] = labels
            self._sums[name] = [processes.joined_sum(x) for x in self._sums.get(name, none)]
            self.count[name] = sum(found[name][1] for found in every if name in found)

    def of(self) -> dict[str, Tensor]:
        """(n, n) float64 for every label that has been observed."""
        found: dict[str, list[Tensor]] = {}
        coupled = self.coupled
        for name, labels in self._labels.items():
            first, second, *rest = self._sums[name]
            means = [x[None] / max(1, self.count[name]) for x in (first, second)]
            for place, dim in enumerate(_labelled(labels)):
                if not _alone(labels) and labels[dim] not in coupled:
                    continue
                sums = rest[3 * place : 3 * place + 3]
                of_means = self._products(labels, dim, *means)
                centred = [x - self.count[name] * y for x, y in zip(sums, of_means, strict=True)]
                for number in (1, 2):  # what rounding leaves of a constant channel is no variance
                    noise = centred[number] <= CONSTANT * sums[number]
                    centred[number] = centred[number].masked_fill(noise, 0.0)
                label = str(labels[dim])
                found.setdefault(label, []).append(_normalised(self.kinds[label], *centred))
        return {label: torch.stack(each).mean(0) for label, each in found.items()}

    def _products(self, labels: AxisLabels, dim: int, a: Tensor, b: Tensor) -> list[Tensor]:
        """(n, n) sums of a bᵀ over positions and other axes, and (n,) of a² and b²."""
        others = [None if place == dim else label for place, label in enumerate(labels)]
        b = apply_transforms(b, (None, *others), self.transforms)
        one, two = (x.movedim(dim + 1, 0).flatten(1) for x in (a, b))
        return [one @ two.t(), one.square().sum(1), two.square().sum(1)]


def _labelled(labels: AxisLabels) -> list[int]:
    return [dim for dim, label in enumerate(labels) if label is not None]


def _alone(labels: AxisLabels) -> bool:
    return len(_labelled(labels)) == 1


def _normalised(group: SymmetryGroup, products: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`products` over the roots of the squares of each block of channels; 0 for constant ones."""
    blocks = blocks_of(group)
    scales = [
        x.reshape(blocks, -1).sum(1).sqrt().repeat_interleave(len(x) // blocks)
        for x in (own, other)
    ]
    scale = scales[0][:, None] * scales[1]
    return torch.where(scale > 0, products / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)


def blocks_of(group: SymmetryGroup) -> int:
    """How many parts of the channels are normalised each by itself: the largest sum of <T, C>."""
    return {"permutation": group.size, "signed": group.size, "heads": group.heads}.get(
        group.kind, 1
    )


def match_activations(
    symmetries: Symmetries,
    observations: Callable[[], Iterator[tuple[Observations, Observations]]],
    of_weights: OfWeights,
    sweeps: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], int, dict[str, list[float]]]:
    """Return the transforms, passes over the batches, and agreement before and after by group.

    observations: gives the reference's and the member's, of this process's batches, one by one,
        anew at every call; they are on `device`.
    """
    transforms: dict[str, Tensor] = {}
    before: dict[str, float] = {}
    found: dict[str, Tensor] = {}
    rounds, settled = 0, False
    while not settled and rounds < sweeps:
        rounds += 1
        sums = Correlations(symmetries, transforms)
        with processes.together():
            for reference, member in observations():
                sums.add(reference, member)
        sums.join(device)
        if not any(sums.count.values()):
            raise InputError("loader: its histories hold no items")
        found = sums.of()
        new = _solve_all(symmetries, found, of_weights, transforms)
        before = before or {n: _agreement(symmetries, n, found, {}) for n in symmetries.groups}
        settled = not sums.coupled or all(
            label in transforms and torch.allclose(value.double(), transforms[label].double())
            for label, value in new.items()
        )
        transforms = new
    after = {name: _agreement(symmetries, name, found, transforms) for name in symmetries.groups}
    return transforms, rounds, {name: [before[name], after[name]] for name in after}


def _solve_all(
    symmetries: Symmetries, found: Mapping[str, Tensor], of_weights: OfWeights, start: Transforms
) -> dict[str, Tensor]:
    """Return the best element of every group; what the activations leave open, by the weights."""
    transforms = dict(start)
    # The weights see the other groups moved: the first round moves them by activations alone.
    for share in (0.0, TIE_BREAK, TIE_BREAK):
        for name, group in symmetries.groups.items():
            own: dict[str, Tensor | None] = {}
            for label in symmetries.labels(name):
                total = found.get(label)
                theirs = of_weights(label, transforms) if share else None
                if theirs is not None:
                    scale = share / max(float(theirs.abs().max()), torch.finfo(theirs.dtype).tiny)
                    total = scale * theirs if total is None else total + scale * theirs
                own[label] = total
            if any(c is not None for c in own.values()):
                transforms |= best_transform(group, own)
    return transforms


def _agreement(
    symmetries: Symmetries, name: str, found: Mapping[str, Tensor], transforms: Transforms
) -> float:
    """Return the mean over blocks and observed labels of <T, C>: 1 where the two do the same."""
    group = symmetries.groups[name]
    values = []
    for label in symmetries.labels(name):
        if label in found:
            moved = apply_transforms(found[label], (None, label), transforms)
            values.append(float(moved.diagonal().sum()) / blocks_of(group))
    return sum(values) / max(1, len(values))


def paired_activations(
    models: tuple[Any, Any], symmetries: Symmetries, batches: Sequence[Any], items: Tensor | None
) -> Callable[[], Iterator[tuple[Observations, Observations]]]:
    """Pair the observations of a reference and a member on the same histories of own batches.

    items: the member's item of each of the reference's, (V + 1,) with padding first, 0 where it
    has none: such items are taken out of the histories of both. None where all are the same.
    """
    reference, member = models
    own_numbers = processes.own_numbers([int(sequence_lengths(own).sum()) for own in batches])

    def run() -> Iterator[tuple[Observations, Observations]]:
        for batch in (batches[number] for number in own_numbers):
            own = other = reference.read_history(batch)
            if items is not None:
                own = own.masked_fill(items.to(own.device)[own] == 0, 0)
                order = (own != 0).int().argsort(dim=1, stable=True)
                own = own.gather(1, order)
                other = items.to(own.device)[own]
            yield tuple(  # type: ignore[misc]
                record_activations(model, symmetries, prediction_tokens(model, history))
                for model, history in ((reference, own), (member, other))
            )

    return run


def item_map(catalogue: CatalogueUnion, reference: int, member: int) -> Tensor | None:
    """Return `items` as `paired_activations` takes it."""
    if catalogue.positions is None:
        return None
    own, other = catalogue.positions[reference], catalogue.positions[member]
    items = torch.zeros(catalogue.sizes[reference] + 1, dtype=torch.int64)
    has = own >= 0
    items[own[has] + 1] = other[has] + 1
    return items
