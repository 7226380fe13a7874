"""Several encoders side by side: an ensemble whose logits are averaged."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fisherkern.checks import check_not_negative
from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.registry import ENCODERS
from fisherkern.errors import InputError, shown


class ParallelEncoders(SequenceEncoder):
    """N networks with one catalogue, whose logits are averaged: EMKD's inference.

        logits(s) = (1/N) Σ_n logits_n(s)

    It is one `SequenceEncoder` whose state is its members' laid side by side: h = [h_1; ..; h_N] of
    width Σ D_n, W = [W_1, .., W_N] / N and b the mean bias (0 where there is none), so that W h + b
    are those logits. Objectives, `evaluate` and model files take it as any other. `split` gives the
    members' parts of a state. To merge the networks: `fk.merge(model.members)` with a Fisher of
    each, which is fast; that of the ensemble is right, but takes the slow path.

    In `states` the token V + 1 = `mask_id` hides an item: it is the mask token of members that have
    one, and padding to the others. `mask_token` and what goes with it exist where all members have
    one; `causal` is true where all are. `item_ids` are the members' too.

    Args:
        members: encoders of ours, or mappings of "class" and its arguments, as in `config`; they
            are not copied.

    Raises:
        InputError: no members, one that is named twice or no encoder of ours, or members that
            differ in num_items, max_len or item_ids (None differs from nothing).

    Source:
        Du et al., EMKD, SIGIR 2023, arXiv 2304.14668, whose code adds the logits up.
    """

    one_network = False

    def __init__(self, members: Sequence[SequenceEncoder | Mapping[str, Any]]) -> None:
        networks = [_member(index, member) for index, member in enumerate(members)]
        if not networks:
            raise InputError("ParallelEncoders: no members")
        for index, network in enumerate(networks):
            if any(network is other for other in networks[:index]):
                raise InputError(f"ParallelEncoders: member {index} is named twice; copy it")
            for name in ("num_items", "max_len"):
                first, own = getattr(networks[0], name), getattr(network, name)
                if own != first:
                    raise InputError(
                        f"ParallelEncoders: {name} is {own} in member {index}, "
                        f"but {first} in member 0"
                    )
        item_ids = _agreed_ids(networks)
        first = networks[0]
        super().__init__(first.num_items, first.max_len, sum(own.dim for own in networks))
        self.config = {"members": [{"class": type(own).__name__, **own.config} for own in networks]}
        self.members = nn.ModuleList(networks)
        self.item_ids = item_ids
        self.mask_id = self.num_items + 1
        if all(hasattr(own, "mask_token") for own in networks):
            self.mask_token = self.mask_id

    @classmethod
    def seeded(
        cls, make: Callable[[], SequenceEncoder], networks: int, seed: int = 0
    ) -> ParallelEncoders:
        """`networks` results of `make()`, each drawn from a seed of its own, (`seed`, n).

        The caller's generators are left untouched. Raises InputError if `make` gives two networks
        the same values in any matrix, which it does when it seeds torch itself: the released
        code of EMKD does, so all its networks' blocks start alike.
        """
        made = []
        for index in range(networks):
            state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
            with torch.random.fork_rng():
                torch.manual_seed(int(state[0]))
                made.append(make())
        for (i, one), (j, other) in itertools.combinations(enumerate(made), 2):
            theirs = dict(other.named_parameters())
            for name, own in one.named_parameters():
                drawn = own.ndim >= 2 and bool((own != own.flatten()[0]).any())
                if drawn and torch.equal(own, theirs[name]):
                    raise InputError(f"make: {name} is the same in networks {i} and {j}")
        return cls(made)

    @classmethod
    def copies(
        cls, model: SequenceEncoder, networks: int, noise: float = 0.0, seed: int = 0
    ) -> ParallelEncoders:
        """`networks` branches of one model, whose weights can be merged again after training.

        θ_n = θ + noise · rms(θ) · ε per parameter tensor, ε standard normal from (`seed`, n);
        padding's embedding stays. Without noise they part by dropout alone. Raises InputError for
        a noise that is negative.
        """
        check_not_negative("ParallelEncoders: noise", noise)
        branches = [copy.deepcopy(model) for _ in range(networks)]
        for index, branch in enumerate(branches if noise else ()):
            state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0]))
            with torch.no_grad():
                for own in branch.parameters():
                    draw = torch.randn(own.shape, generator=generator, dtype=torch.float64)
                    scale = noise * own.double().square().mean().sqrt()
                    own.add_((scale * draw.to(own.device)).to(own.dtype))
                branch.item_embedding.weight[0] = model.item_embedding.weight[0]
        return cls(branches)

    @property
    def networks(self) -> list[SequenceEncoder]:
        """The members, as a list."""
        return [cast(SequenceEncoder, member) for member in self.members]

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether all members are causal."""
        return all(member.causal for member in self.networks)

    @property
    def item_ids(self) -> list[str] | None:
        """The external ids, which are the members' too."""
        return self._item_ids

    @item_ids.setter
    def item_ids(self, item_ids: list[str] | None) -> None:
        self._item_ids = item_ids
        if "members" in self._modules:  # not yet when the base class sets it
            for member in self.networks:
                member.item_ids = item_ids

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return the members' parts of a state or h (.., Σ D_n): N views (.., D_n)."""
        return h.split([member.dim for member in self.networks], dim=-1)

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the members' states side by side, (N, T or Q, Σ D_n); Q with `positions`."""
        unmasked = tokens.masked_fill(tokens == self.mask_id, 0)
        found = []
        for member in self.networks:
            own = tokens if hasattr(member, "mask_token") else unmasked
            found.append(member.states(own, positions))
        return torch.cat(found, dim=-1)

    def transform(self, states: Tensor) -> Tensor:  # type: ignore[override]
        """Return h (.., Σ D_n) of states (.., Σ D_n): every member's transform of its part."""
        parts = zip(self.networks, self.split(states), strict=True)
        return torch.cat([member.transform(part) for member, part in parts], dim=-1)

    def encode(self, batch: Batch) -> Tensor:
        """Encode the members' h side by side, (N, Σ D_n). Raises as their `encode`."""
        return torch.cat([member.encode(batch) for member in self.networks], dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean of the members' logits, (N, V); column c is item c + 1."""
        logits = self.networks[0](batch)
        for member in self.networks[1:]:
            logits = logits + member(batch)
        return logits / len(self.members)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """W (V, Σ D_n) and b (V,) or None, as in the class's docstring: new tensors."""
        heads = [member.head() for member in self.networks]
        weight = torch.cat([weight for weight, _ in heads], dim=1) / len(heads)
        biases = [bias for _, bias in heads if bias is not None]
        return weight, torch.stack(biases).sum(dim=0) / len(heads) if biases else None

    def item_parameters(self) -> dict[str, int]:
        """Return the members' item parameters under their names here."""
        return {
            f"members.{index}.{name}": row
            for index, member in enumerate(self.networks)
            for name, row in member.item_parameters().items()
        }

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        """Hide items behind the mask token, where all members have one."""
        if not hasattr(self, "mask_token"):
            return super().mask_items(tokens, positions, chosen)
        return self.networks[0].mask_items(tokens, positions, chosen)

    @property
    def append_mask(self) -> Callable[[Tensor], Tensor]:
        """The members' `append_mask`, where all have a mask token."""
        if not hasattr(self, "mask_token"):
            raise AttributeError("append_mask")
        return cast(Any, self.networks[0]).append_mask


def _member(index: int, member: SequenceEncoder | Mapping[str, Any]) -> SequenceEncoder:
    if isinstance(member, Mapping):
        arguments = dict(member)
        name = arguments.pop("class", None)
        if not isinstance(name, str) or name not in ENCODERS:
            raise InputError(
                f"ParallelEncoders: member {index} has the unknown class {shown(name)}"
            )
        return ENCODERS[name](**arguments)
    if ENCODERS.get(type(member).__name__) is not type(member):
        raise InputError(
            f"ParallelEncoders: member {index} is a {type(member).__name__}, "
            f"not one of {', '.join(ENCODERS)}"
        )
    return member


def _agreed_ids(networks: Sequence[SequenceEncoder]) -> list[str] | None:
    known = [(i, own.item_ids) for i, own in enumerate(networks) if own.item_ids is not None]
    for index, item_ids in known:
        if list(item_ids) != list(known[0][1]):
            raise InputError(
                f"ParallelEncoders: members {known[0][0]} and {index} differ in item_ids"
            )
    return known[0][1] if known else None
