"""Reparametrisations that leave an encoder's function as it is, and the axes they act on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError

# What a label's axis is multiplied by: int64 (n,), new[i] = old[index[i]], or an orthogonal
# float64 (n, n). A label that is missing stays as it is.
Transforms = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A freedom of an encoder: orthogonal n x n matrices, and the labels of the axes they act on.

    kind: "permutation"; "signed", permutations with signs for the first label, and without them
    for the others; "orthogonal"; "rotation", orthogonal Q with Q 1 = 1, which a layer norm
    without gain commutes with (its mean and variance stay); or "heads", where every label has
    the same permutation of blocks of n / heads, times any orthogonal matrix within each block,
    another for each label.
    """

    size: int
    kind: str = "permutation"
    labels: tuple[str, ...] = ()
    heads: int = 1


@dataclass(frozen=True)
class Piece:
    """Part of a tensor and the label of each of its dimensions, None where nothing acts.

    The part is `length` entries of dimension `dim` from `start` (None: the whole tensor), viewed
    as `shape` (None: its own): a GRU's (3 D, D) weight is ("hidden", twice) as (3, D, D).
    """

    labels: tuple[str | None, ...]
    shape: tuple[int, ...] | None = None
    dim: int = 0
    start: int = 0
    length: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, a view where the layout allows."""
        if self.length is not None:
            tensor = tensor.narrow(self.dim, self.start, self.length)
        return tensor if self.shape is None else tensor.reshape(self.shape)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Write the part back."""
        if self.length is not None:
            tensor = tensor.narrow(self.dim, self.start, self.length)
        tensor.copy_(part.reshape(tensor.shape))


@dataclass(frozen=True)
class Symmetries:
    """The freedoms of one encoder.

    groups: by name; a group without labels acts on the axes labelled with its name.
    pieces: for every parameter, the parts it consists of.
    idle: parameters that the function does not depend on.
    folds: layer norm -> (weight, bias or None) of the linear maps that alone read it, so that its
        gain can move into them, and its bias if all have one. It must, before a "rotation" acts.
    """

    groups: dict[str, Group]
    pieces: dict[str, tuple[Piece, ...]]
    idle: frozenset[str] = frozenset()
    folds: dict[str, tuple[tuple[str, str | None], ...]] = field(default_factory=dict)

    def labels(self, name: str) -> tuple[str, ...]:
        """The labels that group `name` acts on."""
        return self.groups[name].labels or (name,)

    def check(self, model: nn.Module) -> None:
        """Raise InputError unless every parameter is described, in parts that fit its shape."""
        sizes = {
            label: group.size for name, group in self.groups.items() for label in self.labels(name)
        }
        for name, parameter in model.named_parameters():
            if name not in self.pieces:
                raise InputError(f"the symmetries of {type(model).__name__} lack tensor {name!r}")
            covered = torch.zeros(parameter.shape, dtype=torch.int64)
            for piece in self.pieces[name]:
                part = piece.of(covered)
                wanted = [sizes.get(label, -1) if label else None for label in piece.labels]
                if len(wanted) != part.dim() or any(
                    size not in (None, have) for size, have in zip(wanted, part.shape, strict=True)
                ):
                    raise InputError(
                        f"tensor {name!r} has a part of shape {tuple(part.shape)}, which the "
                        f"labels {piece.labels} do not fit"
                    )
                piece.put(covered, part + 1)
            if not bool((covered == 1).all()):
                raise InputError(f"the parts of tensor {name!r} do not cover it once")


def act(part: Tensor, labels: tuple[str | None, ...], transforms: Transforms) -> Tensor:
    """`part` with every labelled dimension transformed."""
    for dim, label in enumerate(labels):
        transform = transforms.get(label) if label is not None else None
        if transform is None:
            continue
        if transform.dim() == 1:
            part = part.index_select(dim, transform.to(part.device))
        else:
            matrix = transform.to(part.device, part.dtype)
            part = torch.tensordot(matrix, part, dims=([1], [dim])).movedim(0, dim)
    return part


def moved(tensor: Tensor, pieces: Sequence[Piece], transforms: Transforms) -> Tensor:
    """A new tensor: `tensor`, which consists of `pieces`, with its labelled axes transformed."""
    new = tensor.clone()
    for piece in pieces:
        if any(label in transforms for label in piece.labels if label):
            piece.put(new, act(piece.of(tensor), piece.labels, transforms))
    return new


def transformed(model: nn.Module, symmetries: Symmetries, transforms: Transforms) -> Any:
    """A new model with the same function, whose labelled axes are transformed.

    The arithmetic is float64; permutations move values without changing a bit.
    """
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.copy_(moved(parameter.double(), symmetries.pieces[name], transforms))
    return new


def folded(model: nn.Module, symmetries: Symmetries) -> Any:
    """A new model with the same function whose foldable layer norms have gain 1.

    W (g * n + b) + c = (W diag(g)) n + (W b + c), with n the normalised input of the norm; where
    there is no c, W (g * n + b) = (W diag(g)) (n + b / g).
    """
    new = copy.deepcopy(model)
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        for norm_name, readers in symmetries.folds.items():
            norm: Any = new.get_submodule(norm_name)
            gain, shift = norm.weight.double().clone(), norm.bias.double().clone()
            movable = all(bias is not None for _, bias in readers)
            for weight_name, bias_name in readers:
                weight = parameters[weight_name].double()
                if movable and bias_name is not None:
                    bias = parameters[bias_name]
                    bias.copy_(bias.double() + weight @ shift)
                parameters[weight_name].copy_(weight * gain)
            norm.weight.fill_(1)
            norm.bias.copy_(torch.zeros_like(shift) if movable else shift / gain)
    return new


def whole(*labels: str | None) -> tuple[Piece, ...]:
    """A tensor in one piece."""
    return (Piece(labels),)


def _block(symmetries: Symmetries, model: nn.Module, block: str, residual: str) -> None:
    """Add a Transformer block (`encoders.transformer.Block`) on the stream `residual`."""
    module: Any = model.get_submodule(block)
    attention, inner = f"{block}.attention", f"{block}.feed_forward"
    qk, vo = f"{attention}.qk", f"{attention}.vo"
    heads = module.attention.heads
    inner_dim, dim = module.feed_forward.inner.weight.shape
    # q·k stays when both turn alike; so does the output when the values turn one way and the
    # output weights the other. Heads are summed, so their order is free.
    symmetries.groups[attention] = Group(dim, "heads", (qk, vo), heads)
    symmetries.groups[inner] = Group(inner_dim)
    for name, label in (("query", qk), ("key", qk), ("value", vo)):
        symmetries.pieces[f"{attention}.{name}.weight"] = whole(label, residual)
        symmetries.pieces[f"{attention}.{name}.bias"] = whole(label)
    symmetries.pieces[f"{attention}.output.weight"] = whole(residual, vo)
    symmetries.pieces[f"{inner}.inner.weight"] = whole(inner, residual)
    symmetries.pieces[f"{inner}.inner.bias"] = whole(inner)
    symmetries.pieces[f"{inner}.outer.weight"] = whole(residual, inner)
    for name in (f"{attention}.output.bias", f"{inner}.outer.bias"):
        symmetries.pieces[name] = whole(residual)
    _norm(symmetries, f"{block}.attention_norm", residual)
    _norm(symmetries, f"{block}.feed_forward_norm", residual)
    if module.pre:
        names = [f"{attention}.{name}" for name in ("query", "key", "value")]
        symmetries.folds[f"{block}.attention_norm"] = tuple(_linear(name) for name in names)
        symmetries.folds[f"{block}.feed_forward_norm"] = (_linear(f"{inner}.inner"),)


def _linear(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _norm(symmetries: Symmetries, name: str, label: str) -> None:
    symmetries.pieces[f"{name}.weight"] = whole(label)
    symmetries.pieces[f"{name}.bias"] = whole(label)


def _output(symmetries: Symmetries, model: Any, label: str) -> None:
    """The output matrix, where it is not the item table, and the output bias."""
    if not model.config["tied"]:
        symmetries.pieces["output_embedding"] = whole(None, label)
    symmetries.pieces["output_bias"] = whole(None)


def _transformer(model: Any, kind: str) -> Symmetries:
    """Embedding tables and blocks, which BERT4Rec and SASRec share."""
    tables = ("item_embedding.weight", "position_embedding.weight")
    # A key's bias adds the same number to all scores of a query, which the softmax ignores.
    idle = frozenset(f"blocks.{i}.attention.key.bias" for i in range(len(model.blocks)))
    groups = {"residual": Group(model.dim, kind)}
    symmetries = Symmetries(groups, {name: whole(None, "residual") for name in tables}, idle)
    for number in range(len(model.blocks)):
        _block(symmetries, model, f"blocks.{number}", "residual")
    return symmetries


def _constant(norm: Any) -> bool:
    """Whether all channels have the same gain, up to the rounding of an earlier rotation."""
    gain = norm.weight.detach().double()
    spread = float((gain - gain.mean()).abs().max())
    return spread <= 8 * torch.finfo(norm.weight.dtype).eps * float(gain.abs().max())


def bert4rec(model: Any) -> Symmetries:
    """BERT4Rec: what each space admits.

    The residual stream starts as g * LN(e + p) + b and goes on beside what reads it, so g cannot
    be folded away and a rotation Q would have to commute with diag(g): permutations only, unless
    g is constant. With norm="post" every later norm says the same. The space of h follows a
    GELU: permutations only; tied, it is the item table's space and thus the residual stream's.
    """
    pre, tied = model.config["norm"] == "pre", model.config["tied"]
    rotates = pre and not tied and _constant(model.embedding_norm)
    symmetries = _transformer(model, "rotation" if rotates else "permutation")
    hidden = "residual" if tied else "hidden"
    if not tied:
        symmetries.groups[hidden] = Group(model.dim)
    _norm(symmetries, "embedding_norm", "residual")
    if pre:
        _norm(symmetries, "final_norm", "residual")
        symmetries.folds["final_norm"] = (_linear("transform.0"),)
    symmetries.pieces["transform.0.weight"] = whole(hidden, "residual")
    symmetries.pieces["transform.0.bias"] = whole(hidden)
    _norm(symmetries, "transform.2", hidden)
    _output(symmetries, model, hidden)
    return symmetries


def sasrec(model: Any) -> Symmetries:
    """SASRec: the residual stream is the item table's space and that of h.

    With norm="pre" only layer norms read it. All but the last fold into linear layers. The last
    folds into an output matrix of its own (untied), and the stream may be rotated; tied, it
    may where the last gain is constant. With norm="post" it may be permuted.
    """
    pre, tied = model.config["norm"] == "pre", model.config["tied"]
    rotates = pre and tied and _constant(model.final_norm)
    if pre and not tied:
        norm = model.final_norm
        rotates = model.config["bias"] or not bool(((norm.weight == 0) & (norm.bias != 0)).any())
    symmetries = _transformer(model, "rotation" if rotates else "permutation")
    _norm(symmetries, "final_norm" if pre else "embedding_norm", "residual")
    if pre and not tied:
        bias = "output_bias" if model.config["bias"] else None
        symmetries.folds["final_norm"] = (("output_embedding", bias),)
    _output(symmetries, model, "residual")
    return symmetries


def gru4rec(model: Any) -> Symmetries:
    """GRU4Rec: the item table's space, and that of h, are between linear maps: any orthogonal one.

    A hidden unit may change places with another and, as tanh is odd and the state linear in the
    candidates, its sign; the gates' own rows have no sign to change.
    """
    tied, hidden_dim = model.config["tied"], model.config["hidden_dim"]
    hidden = "items" if tied else "hidden"
    symmetries = Symmetries({"items": Group(model.dim, "orthogonal")}, {})
    if not tied:
        symmetries.groups[hidden] = Group(model.dim, "orthogonal")
    symmetries.pieces["item_embedding.weight"] = whole(None, "items")
    below, below_dim = "items", model.dim
    for layer in range(model.config["layers"]):
        state, gates = f"gru.{layer}", f"gru.{layer}.gates"
        symmetries.groups[state] = Group(hidden_dim, "signed", (state, gates))
        for name, label, size in (("ih", below, below_dim), ("hh", state, hidden_dim)):
            symmetries.pieces[f"gru.weight_{name}_l{layer}"] = (
                Piece((None, gates, label), (2, hidden_dim, size), 0, 0, 2 * hidden_dim),
                Piece((state, label), None, 0, 2 * hidden_dim, hidden_dim),
            )
        below, below_dim = state, hidden_dim
    symmetries.pieces["dense.weight"] = whole(hidden, below)
    symmetries.pieces["dense.bias"] = whole(hidden)
    _output(symmetries, model, hidden)
    return symmetries


def caser(model: Any) -> Symmetries:
    """Caser: filters of one height may change places; vertical ones, read linearly, may be turned.

    So may the item table's space, unless it is tied to that of h, which follows a ReLU and
    admits permutations.
    """
    tied, dim = model.config["tied"], model.dim
    vertical, count = model.config["vertical"], model.config["horizontal"]
    hidden = "items" if tied else "hidden"
    symmetries = Symmetries({"items": Group(dim, "permutation" if tied else "orthogonal")}, {})
    if not tied:
        symmetries.groups[hidden] = Group(dim)
    symmetries.groups["vertical"] = Group(vertical, "orthogonal")
    symmetries.pieces["item_embedding.weight"] = whole(None, "items")
    symmetries.pieces["vertical.weight"] = whole("vertical", None)
    start = vertical * dim
    dense = [Piece((hidden, "vertical", "items"), (dim, vertical, dim), 1, 0, start)]
    for number in range(model.window):
        name = f"horizontal.{number}"
        symmetries.groups[name] = Group(count)
        symmetries.pieces[f"{name}.weight"] = (
            Piece((name, None, "items"), (count, number + 1, dim)),
        )
        symmetries.pieces[f"{name}.bias"] = whole(name)
        dense.append(Piece((hidden, name), None, 1, start, count))
        start += count
    symmetries.pieces["dense.weight"] = tuple(dense)
    symmetries.pieces["dense.bias"] = whole(hidden)
    _output(symmetries, model, hidden)
    return symmetries


#: Symmetries by class name; a model of another class brings its own as a method `symmetries()`.
SYMMETRIES: dict[str, Callable[[Any], Symmetries]] = {
    "BERT4Rec": bert4rec,
    "SASRec": sasrec,
    "GRU4Rec": gru4rec,
    "Caser": caser,
}


def symmetries_of(model: Any) -> Symmetries:
    """The model's own `symmetries()`, or those known for its class; checked against the model."""
    name = type(model).__name__
    if hasattr(model, "symmetries"):
        found = model.symmetries()
    elif name in SYMMETRIES:
        found = SYMMETRIES[name](model)
    else:
        raise InputError(
            f"no symmetries are known for {name}; give it a method symmetries() to align it"
        )
    found.check(model)
    return found
