"""weight_ensemble(): feed-forward layers whose merge is chosen anew for every sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.encoders import SequenceEncoder
from fisherkern.encoders.base import take
from fisherkern.encoders.transformer import FeedForward
from fisherkern.errors import InputError
from fisherkern.members.checks import check_encoders, compared, listed
from fisherkern.members.fitting import collect_batches, minimize
from fisherkern.members.options import Choice, Integer, Number, check_option, options_of
from fisherkern.merging.merge import merge
from fisherkern.objectives.targets import next_item_cross_entropy
from fisherkern.postmerge.wrapper import (
    FrozenEncoderWrapper,
    mean_over,
    network_of,
    real_positions,
    register_checkpoint_class,
)

ROUTER_LAYERS = Choice((1, 2))
SHARE = Number(0.0, 1.0, above=True)


class Router(nn.Module):
    """r = mean_t(B relu(A x_t + a) + b), or mean_t(B x_t + b) with one layer, over no padding."""

    def __init__(self, width: int, members: int, layers: int) -> None:
        super().__init__()
        linear = partial(nn.utils.skip_init, nn.Linear, device=torch.get_default_device())
        self.inner = linear(width, width) if layers == 2 else None
        self.outer = linear(width, members)

    def draw(self, scale: float, generator: torch.Generator) -> None:
        """First values, those of the paper's code: A and B from N(0, 0.01²), a = 0, b = `scale`."""
        for layer, bias in ((self.inner, 0.0), (self.outer, scale)):
            if layer is not None:
                # Drawn in float64 on the CPU, so that they are the same for any dtype and device.
                drawn = torch.empty(layer.weight.shape, dtype=torch.float64)
                with torch.no_grad():
                    layer.weight.copy_(drawn.normal_(0, 0.01, generator=generator))
                    layer.bias.fill_(bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(N, M) coefficients from x (N, T, D) and where it is no padding, (N, T) bool."""
        if self.inner is not None:
            x = F.relu(self.inner(x))
        return mean_over(self.outer(x), real)


class TaskVectors(nn.Module):
    """One tensor of the base and its M task vectors, whole or only their largest entries."""

    base: Tensor
    values: Tensor
    places: Tensor | None

    def __init__(self, like: Tensor, members: int, density: float | None) -> None:
        """`like`: the base's tensor, or one of its shape, dtype and device."""
        super().__init__()
        like = like.detach()
        # A number of entries, not a quantile: torch.quantile stops at 16.8 million.
        kept = like.numel() if density is None else max(1, round(density * like.numel()))
        self.register_buffer("base", torch.zeros_like(like))
        self.register_buffer("values", like.new_zeros(members, kept))
        places = None if density is None else torch.zeros_like(self.values, dtype=torch.int64)
        self.register_buffer("places", places)

    def fill(self, base: Tensor, members: Sequence[Tensor]) -> None:
        """Take the values of a base and its members."""
        base = base.detach()
        values = torch.stack([own.detach().double() - base.double() for own in members]).flatten(1)
        if self.places is not None:
            places = values.abs().topk(self.places.shape[1], dim=1).indices.sort(dim=1).values
            self.places.copy_(places)
            values = values.gather(1, places)
        self.base.copy_(base)
        self.values.copy_(values)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        places = state_dict.get(f"{prefix}places")
        if places is not None and places.numel():
            size = self.base.numel()
            if places.dtype != torch.int64:
                raise InputError(f"tensor '{prefix}places' is {places.dtype}, not int64")
            low, high = (int(bound) for bound in torch.aminmax(places))
            if not 0 <= low <= high < size:
                odd = low if low < 0 else high
                raise InputError(f"tensor '{prefix}places' names entry {odd} of {size}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, r: Tensor) -> Tensor:
        """Return base + sum_m r_nm tau_m for each row of r (N, M): (N, *shape of base)."""
        flat = self.base.flatten()
        if self.places is None:
            found = torch.addmm(flat, r, self.values)
        else:
            found = flat.repeat(len(r), 1)
            for share, place, value in zip(r.t(), self.places, self.values, strict=True):
                found.index_add_(1, place, share[:, None] * value)
        return found.unflatten(1, self.base.shape)


class WeightEnsemblingFeedForward(nn.Module):
    """outer(activation(inner(x))) with weights W_0 + sum_m r_m tau_m of the sequence's own.

    `real` (N, T) bool, where x is no padding, is set by the encoder before a call.
    """

    real: Tensor | None = None

    router: Router

    def __init__(
        self, like: FeedForward, members: int, router: Router, density: float | None, shared: bool
    ) -> None:
        """`shared`: the router is part of another layer, and in its state."""
        super().__init__()
        if shared:
            object.__setattr__(self, "router", router)
        else:
            self.router = router
        self.activation: Callable[[Tensor], Tensor] = like.activation
        self.tensors = nn.ModuleDict(
            {
                name.replace(".", "_"): TaskVectors(value, members, density)
                for name, value in like.named_parameters()
            }
        )

    def fill(self, base: FeedForward, members: Sequence[FeedForward]) -> None:
        """Take the weights of a base and its members."""
        own = [dict(member.named_parameters()) for member in members]
        for name, value in base.named_parameters():
            vectors = cast(TaskVectors, self.tensors[name.replace(".", "_")])
            vectors.fill(value, [one[name] for one in own])

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) to (N, T, D)."""
        real = torch.ones_like(x[:, :, 0], dtype=torch.bool) if self.real is None else self.real
        r = self.router(x, real)
        return self._linear("outer", self.activation(self._linear("inner", x, r)), r)

    def _linear(self, name: str, x: Tensor, r: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}_weight"](r), self.tensors[f"{name}_bias"](r)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


@register_checkpoint_class
class WeightEnsemble(FrozenEncoderWrapper):
    """An encoder of which the routers alone are trainable; `weight_ensemble` makes it.

    Not `causal`: a router reads the whole sequence, so the state at a position depends on the items
    after it. `encode` equals `transform(states(tokens)[:, -1])`; as the last block's router reads
    all positions too, all of them are computed there. The layers' values are those that a file or
    `weight_ensemble` puts there.

    Args:
        network: An encoder with `FeedForward` layers, which are replaced, or a mapping of its
            "class" and arguments.
        members: Number of task vectors of a layer.
        router_layers: See `weight_ensemble`.
        density: One router and pruned task vectors of this density. None: a router for each layer
            and whole task vectors.
    """

    def __init__(
        self,
        network: SequenceEncoder | Mapping[str, Any],
        members: int,
        router_layers: int = 2,
        density: float | None = None,
    ) -> None:
        check_option("members", members, Integer(1))
        check_option("router_layers", router_layers, ROUTER_LAYERS)
        if density is not None:
            check_option("density", density, SHARE)
        network = network_of(network, type(self).__name__)
        names = feed_forwards(network)
        router = None
        for name in names:
            like = cast(FeedForward, network.get_submodule(name))
            shared = router is not None and density is not None
            if not shared:
                router = Router(like.inner.in_features, members, router_layers)
                router = router.to(like.inner.weight)
            assert router is not None
            layer = WeightEnsemblingFeedForward(like, members, router, density, shared)
            network.set_submodule(name, layer)
        super().__init__(network)
        self.arguments = {"members": members, "router_layers": router_layers, "density": density}
        for own in self.routers():
            own.requires_grad_(True)

    def routers(self) -> list[Router]:
        """Return the routers, one for all layers where they share it."""
        return [module for module in self.network.modules() if isinstance(module, Router)]

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `SequenceEncoder.states`, but all positions are computed, whichever are asked for."""
        modules = self.network.modules()
        layers = [part for part in modules if isinstance(part, WeightEnsemblingFeedForward)]
        real = real_positions(tokens)
        for layer in layers:
            layer.real = real
        try:
            return take(self.network.states(tokens), positions)
        finally:
            for layer in layers:
                layer.real = None


def weight_ensemble(
    models: Sequence[SequenceEncoder],
    *,
    base: SequenceEncoder,
    loader: Iterable[Any] | Callable[[Any], Iterable[Any]] | None = None,
    objective: Literal["cross_entropy", "entropy"] = "cross_entropy",
    efficient: bool = False,
    density: Annotated[float, SHARE] = 0.1,
    scale: Annotated[float, Number(0.0)] = 0.3,
    router_layers: Annotated[int, ROUTER_LAYERS] = 2,
    steps: int = 1000,
    lr: Annotated[float, Number(0.0, above=True)] = 1e-4,
    seed: int = 0,
) -> WeightEnsemble:
    """Merge encoders into one with feed-forward layers mixed anew for every sequence (WEMoE).

        everything else   theta* = theta_0 + scale sum_m tau_m,    tau_m = theta_m - theta_0
        feed-forward      theta_n = theta_0 + sum_m r_nm tau_m,    r_n = mean_t router(x_nt)

    x_nt: the layer's input at position t of sequence n, padding left out of the mean; theta: its
    two weights and two biases; router: B relu(A x + a) + b (`router_layers` 2) or B x + b (1),
    width D, with weights from N(0, 0.01²) and b = scale, so that training starts within noise of
    task arithmetic. r is not normalised and may be negative. Only the routers are trained, in eval
    mode (no dropout), r_n being the sequence's own then as later: the released code averages it
    over the batch while it trains.

    It costs more than a merged model at inference: an N x inner_dim x D tensor of weights per layer
    and batch, M multiplications for each of its entries, and the last block at all positions; a
    file holds M + 1 times the feed-forward layers. Several processes share every batch.

    Args:
        models: Encoders with `FeedForward` layers (BERT4Rec, SASRec); left as they are. Members
            with other item_ids are united as in `merge`.
        base: The encoder that they were trained from; left as it is.
        loader: Batches of histories, or a function of the new encoder that returns them; gone
            through once and kept. None leaves the routers as they were drawn.
        objective: "cross_entropy", the mean over sequences of -log p(next item), for batches with a
            "target" (validation data: our choice for recommenders); or "entropy", the mean of
            -sum_v p(v) log p(v) over items, for unlabelled batches (test-time adaptation, the
            papers' choice; it rewards confidence, right or wrong).
        efficient: E-WEMoE: one router for all layers, applied to each layer's own input, and of
            every tau_m the largest entries of each tensor alone, kept as indices and values: 12
            bytes each in float32 where a whole tau has 4.
        density: Share of the entries that E-WEMoE keeps of each tensor, at least one.
        scale: See above.
        router_layers: See above.
        steps: Steps of Adam, one batch each, around and around.
        lr: Learning rate.
        seed: Seed of the routers' first values.

    Returns:
        A `WeightEnsemble` in eval mode, for `evaluate`, `save_model` and `load_model`. Its
        `merge_report` is that of the static merge with method "wemoe" or "e_wemoe", the arguments,
        and the loss before each step.

    Raises:
        InputError: Encoders have no feed-forward layers, `merge` refuses them, or arguments do not
            fit.

    Source: Tang et al., arXiv 2402.00433 (WEMoE); Shen et al., arXiv 2410.21804 (E-WEMoE); numerics
    from their released code.
    """
    models = listed(models)
    # Without a loader nothing is trained, and no other process asked.
    with processes.together(loader is not None) as same:
        check_encoders([*models, base], "model")
        given = {
            "objective": objective,
            "density": density,
            "router_layers": router_layers,
            "lr": lr,
        }
        for name, value in given.items():
            check_option(name, value, OPTIONS[name].domain)
        check_option("steps", steps, Integer(0))
        settings: dict[str, Any] = {
            "efficient": efficient,
            "density": density if efficient else None,
        }
        settings |= {"router_layers": router_layers, "objective": objective, "lr": lr, "seed": seed}
        network = merge(models, method="task_arithmetic", base=base, options={"scale": scale})
        report = dict(network.merge_report or {})
        names = feed_forwards(network)
        ensemble = WeightEnsemble(network, len(models), router_layers, settings["density"]).eval()
        generator = torch.Generator().manual_seed(seed)
        for router in ensemble.routers():
            router.draw(scale, generator)
        for name in names:
            start, *own = (cast(FeedForward, one.get_submodule(name)) for one in (base, *models))
            cast(WeightEnsemblingFeedForward, network.get_submodule(name)).fill(start, own)
        if loader is not None:
            same |= compared([base, *models], settings=(settings, scale, steps))
    losses: list[float] = []
    if loader is not None:
        batches = collect_batches(loader, ensemble)
        routers = [value for router in ensemble.routers() for value in router.parameters()]

        def loss(batch: Any) -> Tensor:
            if objective == "cross_entropy":
                return next_item_cross_entropy(ensemble, batch, "loader")
            return _entropy(ensemble, batch)

        losses = minimize(routers, batches, loss, steps=steps, lr=lr)
    method = "e_wemoe" if efficient else "wemoe"
    ensemble.merge_report = report | {"method": method} | settings | {"losses": losses}
    return ensemble


#: Arguments of `weight_ensemble` that are settings of the method, as the options of a merge method.
OPTIONS = options_of(weight_ensemble)


def feed_forwards(network: nn.Module) -> list[str]:
    """Names of the layers that are ensembled; InputError where there is none."""
    names = [name for name, part in network.named_modules() if isinstance(part, FeedForward)]
    if not names:
        raise InputError(f"{type(network).__name__} has no feed-forward layer to ensemble")
    return names


def _entropy(model: WeightEnsemble, batch: Any) -> Tensor:
    log_p = model(batch).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()
