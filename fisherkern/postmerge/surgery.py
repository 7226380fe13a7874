"""representation_surgery(): low-rank corrections of a merged model's representation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.encoders import Batch, SequenceEncoder
from fisherkern.encoders.base import prediction_tokens
from fisherkern.encoders.transformer import Block
from fisherkern.errors import InputError, shown
from fisherkern.members import checks
from fisherkern.members.checks import check_encoders
from fisherkern.members.fitting import collect_batches, minimize
from fisherkern.members.options import Choice, Integer, Number, check_option
from fisherkern.modes import eval_mode
from fisherkern.postmerge.wrapper import (
    FrozenEncoderWrapper,
    mean_over,
    network_of,
    real_positions,
    register_checkpoint_class,
)

VERSIONS = Choice((1, 2))


class Surgery(nn.Module):
    """h - U relu(D h): D (rank, width) from U(-1/sqrt(width), 1/sqrt(width)), U = 0, no bias."""

    def __init__(self, width: int, rank: int, generator: torch.Generator | None = None) -> None:
        """Without a generator, of no values: a file's are to come."""
        super().__init__()
        # Drawn in float64 on the CPU, so that they are the same for any dtype and device.
        device = torch.get_default_device() if generator is None else "cpu"
        dtype = None if generator is None else torch.float64
        linear = partial(nn.utils.skip_init, nn.Linear, bias=False, device=device, dtype=dtype)
        self.down, self.up = linear(width, rank), linear(rank, width)
        if generator is not None:
            with torch.no_grad():
                self.down.weight.uniform_(-(width**-0.5), width**-0.5, generator=generator)
                self.up.weight.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """(.., width) to (.., width)."""
        return h - self.up(F.relu(self.down(h)))


class CorrectedBlock(nn.Module):
    """A Transformer block and the surgery on its output, position by position."""

    def __init__(self, block: Block, surgery: Surgery) -> None:
        super().__init__()
        self.block, self.surgery = block, surgery

    def forward(self, x: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `Block`."""
        return self.surgery(self.block(x, hidden, positions))


@register_checkpoint_class
class SurgeryEncoder(FrozenEncoderWrapper):
    """A frozen encoder with trainable low-rank corrections; `representation_surgery` makes it.

    Args:
        network: An encoder, whose blocks are replaced in version 2, or a mapping of its "class"
            and arguments.
        version: See `representation_surgery`.
        rank: See `representation_surgery`.
        generator: Draws the corrections' first values. None: a file's values are to come.
    """

    def __init__(
        self,
        network: SequenceEncoder | Mapping[str, Any],
        version: int = 1,
        rank: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        check_option("version", version, VERSIONS)
        check_option("rank", rank, Integer(1))
        network = network_of(network, type(self).__name__)
        like = network.head()[0]
        if version == 2:
            parts = network.named_modules()
            blocks = [(name, part) for name, part in parts if isinstance(part, Block)]
            if not blocks:
                raise InputError(
                    f"version 2 needs Transformer blocks: {type(network).__name__} has none"
                )
            for name, block in blocks:
                surgery = Surgery(network.dim, rank, generator).to(like)
                network.set_submodule(name, CorrectedBlock(block, surgery))
        super().__init__(network)
        self.arguments = {"version": version, "rank": rank}
        self.surgery = Surgery(like.shape[1], rank, generator).to(like)
        self.losses: list[float] = []
        for part in self.modules():
            if isinstance(part, Surgery):
                part.requires_grad_(True)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """See `SequenceEncoder`."""
        return self.network.causal

    def transform(self, states: Tensor) -> Tensor:  # type: ignore[override]
        """Return h (.., D) of states (.., D)."""
        return self.surgery(self.network.transform(states))

    def encode(self, batch: Batch) -> Tensor:
        """Return h (N, D), computed at the prediction position alone where the network does so."""
        return self.surgery(self.network.encode(batch))


def representation_surgery(
    merged: SequenceEncoder,
    members: Sequence[SequenceEncoder],
    loader: Iterable[Any] | Callable[[Any], Iterable[Any]],
    *,
    version: int = 1,
    targets: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    seed: int = 0,
) -> SurgeryEncoder:
    """Train low-rank corrections that move a merged model's representation h to its members'.

        h' = h - U relu(D h),    U (D, rank) = 0 at the start,  D (rank, D)
        loss = (1/ND) sum_n |h'_n - h*_n|_1,    h*_n = sum_m lambda_m t_m(h_m,n)     version 1
        loss + sum_blocks (1/ND) sum_n |mean_t x'_nt - sum_m lambda_m mean_t x_m,nt|_1     version 2

    Version 2 has such a correction after every Transformer block as well, at all positions; x' and
    x_m are the corrected and the members' block outputs, padding left out of their means.

    The papers have one expert and one set of corrections per task. Here there is one task and
    several members, whose h mean something through their own item tables only. So each is first
    translated into the space of `merged`: t_m(h) is the h* that is nearest to h of those with

        W h* + b  =  W_m h + b_m    in least squares over all items, up to a constant per sequence,

    t_m(h) = h + C⁺((W_m - W) h + b_m - b), C the table W and all columns centred over the items.
    Where the output layers agree that is h itself and version 1 is the paper's; members whose space
    is `merged`'s turned come back turned. The target then is what averages the members' logits, as
    nearly as `merged`'s output layer can say it. For several domains call it once for each, with
    that domain's member in `targets` and its histories. Block outputs cannot be translated: version
    2 is sound only for members of one hidden space, branched from one model or aligned (`align`).

    The result costs 2 rank D multiplications more per h (version 2: also per position and block).
    Holds the targets of the batches used, and C in float64 while it makes them.

    Args:
        merged: An encoder; left as it is. Version 2 needs Transformer blocks (BERT4Rec, SASRec).
        members: Encoders of its class and catalogue; left as they are.
        loader: Unlabelled batches of histories, or a function of the new encoder that returns them;
            gone through once and kept.
        version: 1 or 2.
        targets: Numbers of the members to move towards. Default: all.
        weights: lambda over the members, rescaled to the sum 1 over the targets. Default: equal.
        rank: Rank of a correction.
        steps: Steps of Adam, one batch each, around and around, without dropout.
        lr: Learning rate.
        seed: Seed of D.

    Returns:
        A `SurgeryEncoder` in eval mode, for `evaluate`, objectives, `save_model` and `load_model`.
        Its `losses` are those before each step.

    Raises:
        InputError: Models are of other classes or catalogues, or arguments do not fit.

    Source: Yang et al., arXiv 2402.02705 (version 1) and arXiv 2410.14389 (version 2), numerics
    from their released code; the translation t_m is ours.
    """
    members = list(members)
    with processes.together() as same:
        _check(merged, members, targets)
        for name, value, domain in (
            ("version", version, VERSIONS),
            ("rank", rank, Integer(1)),
            ("steps", steps, Integer(0)),
            ("lr", lr, Number(0.0, above=True)),
        ):
            check_option(name, value, domain)
        lam = checks.check_weights(weights, len(members))
        if targets is not None:
            lam = [share if index in targets else 0.0 for index, share in enumerate(lam)]
            lam = checks.check_weights(lam, len(members))
        given = (version, rank, steps, lr, seed, lam)
        same |= checks.compared([merged, *members], settings=given)
    generator = torch.Generator().manual_seed(seed)
    corrected = SurgeryEncoder(copy.deepcopy(merged), version, rank, generator).eval()
    batches = collect_batches(loader, corrected)
    experts = [(share, member) for share, member in zip(lam, members, strict=True) if share]
    wanted = _targets(corrected, experts, batches[:steps], version)
    own = [parameter for parameter in corrected.parameters() if parameter.requires_grad]
    if version == 1:
        # The network below the one correction never changes.
        with torch.no_grad():
            h = [corrected.network.encode(batch) for batch in batches[:steps]]
        pairs = list(zip(h, wanted, strict=True))

        def loss_of(pair: Any) -> Tensor:
            return F.l1_loss(corrected.surgery(pair[0]), pair[1][0])
    else:
        pairs = list(zip(batches[:steps], wanted, strict=True))

        def loss_of(pair: Any) -> Tensor:
            found = _features(corrected, pair[0], CorrectedBlock)
            return torch.stack([F.l1_loss(x, y) for x, y in zip(found, pair[1], strict=True)]).sum()

    corrected.losses = minimize(own, pairs, loss_of, steps=steps, lr=lr)
    return corrected


def _check(
    merged: SequenceEncoder, members: Sequence[SequenceEncoder], targets: Sequence[int] | None
) -> None:
    if not members:
        raise InputError("there is no member to move towards")
    check_encoders([merged], "merged model")
    check_encoders(members, "member")
    for index, member in enumerate(members):
        if type(member) is not type(merged):
            raise InputError(
                f"member {index} is a {type(member).__name__}, "
                f"the merged model a {type(merged).__name__}"
            )
        for name in ("num_items", "max_len", "dim"):
            own, wanted = getattr(member, name), getattr(merged, name)
            if own != wanted:
                raise InputError(f"{name} is {own} in member {index}, {wanted} in the merged model")
        ids = [member.item_ids, merged.item_ids]
        if None not in ids and ids[0] != ids[1]:
            raise InputError(f"member {index} and the merged model differ in item_ids")
        with (
            checks.renamed("member 1", f"member {index}"),
            checks.renamed("member 0", "the merged model"),
        ):
            checks.check_config([merged, member])
    for index in targets or ():
        if isinstance(index, bool) or index not in range(len(members)):
            raise InputError(f"targets names member {shown(index)} of {len(members)}")


Target = list[Tensor]


@torch.no_grad()
def _targets(
    model: SurgeryEncoder,
    experts: Sequence[tuple[float, SequenceEncoder]],
    batches: Sequence[Batch],
    version: int,
) -> list[Target]:
    """For each batch sum_m lambda_m of the members' features, the last of them translated."""
    found: list[Target] = [[] for _ in batches]
    for share, member in experts:
        slope, offset = _translation(model.head(), member.head())
        with eval_mode(member):
            for target, batch in zip(found, batches, strict=True):
                own = [member.encode(batch)] if version == 1 else _features(member, batch, Block)
                h = own[-1].double()
                own[-1] = (h + h @ slope.t() + offset).to(own[-1].dtype)
                parts = [share * part for part in own]
                target[:] = [a + b for a, b in zip(target, parts, strict=True)] if target else parts
    return found


_OutputLayer = tuple[Tensor, Tensor | None]


def _translation(merged: _OutputLayer, member: _OutputLayer) -> tuple[Tensor, Tensor]:
    """Return A (D, D) and a (D,) float64 of t(h) = h + A h + a, as in `representation_surgery`."""
    (weight, bias), (own, own_bias) = merged, member
    own = own.to(weight.device)
    table, gap = _centred(weight), _centred(own.double() - weight.double())
    offset = torch.zeros(len(table), dtype=torch.float64, device=weight.device)
    for sign, values in ((1, own_bias), (-1, bias)):
        if values is not None:
            offset += sign * values.to(weight.device, torch.float64)
    inverse = torch.linalg.pinv(table.t() @ table, hermitian=True)
    return inverse @ (table.t() @ gap), inverse @ (table.t() @ _centred(offset))


def _centred(values: Tensor) -> Tensor:
    return values.double() - values.double().mean(0)


def _features(model: SequenceEncoder, batch: Batch, kind: type[nn.Module]) -> list[Tensor]:
    """Means over the positions of every `kind` of block's output, (N, D) each, and h last."""
    tokens = prediction_tokens(model, batch)
    real, found = real_positions(tokens), []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(mean_over(output, real))

    handles = [part.register_forward_hook(keep) for part in model.modules() if type(part) is kind]
    try:
        h = model.transform(model.states(tokens)[:, -1])
    finally:
        for handle in handles:
            handle.remove()
    return [*found, h]
