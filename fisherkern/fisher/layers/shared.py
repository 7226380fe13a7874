"""Uses of a parameter through a tensor computed from it: the chain rule, sequence by sequence."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fisherkern.adapters.parameters import ParamView
from fisherkern.fisher.forward.capture import ParamUse
from fisherkern.fisher.forward.shared_tensors import Entries, SharedTensor
from fisherkern.fisher.layers.grads import EmbeddingGrad
from fisherkern.fisher.schedule import stored_sequences


@dataclasses.dataclass
class SharedGrad:
    """g_n of θ is Jᵀ times what `use` says is the gradient of S."""

    param: ParamView
    use: ParamUse
    tensor: SharedTensor

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        n = delta.shape[1]
        step = stored_sequences(max(fisher.numel(), self.tensor.numel))
        for probe in delta:
            for first in range(0, n, step):
                part = slice(first, min(first + step, n))
                fisher += self.per_sequence(probe, part).square_().sum(dim=0)

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        return self.tensor.pull(self.param.name, self.use.per_sequence(delta, part))


@dataclasses.dataclass
class EntriesGrad(SharedGrad):
    """The same where J is a list of entries."""

    entries: Entries

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        if not self.entries.once:
            super().add_square_(fisher, delta)
            return
        squares = fisher.new_zeros(self.use.param.shape)
        self.use.add_square_(squares, delta)
        weighted = squares.flatten() * self.entries.weight.to(fisher.dtype).square()
        fisher += self._placed(weighted[None])[0]

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        g = self.use.per_sequence(delta, part).flatten(1)
        return self._placed(g * self.entries.weight.to(g.dtype))

    def _placed(self, values: Tensor) -> Tensor:
        """(n, S) -> (n, *θ's shape), the entries that are one of θ summed."""
        entries, n = self.entries, len(values)
        g = values.new_zeros(n, self.tensor.parameters.named[self.param.name].numel())
        if entries.start is None:
            g.index_add_(1, entries.index, values)
        else:
            if entries.transposed:
                values = values.view(n, *self.tensor.view.shape).transpose(1, 2).flatten(1)
            g[:, entries.start : entries.start + values.shape[1]] = values
        return g.view(n, *self.param.shape)


def uses_of(use: ParamUse, tensor: SharedTensor) -> list[ParamUse]:
    """Return what a use of S is for the parameters that S is computed from."""
    uses: list[ParamUse] = []
    for name in tensor.names:
        param = ParamView(name, 0, tuple(tensor.parameters.named[name].shape))
        entries = tensor.entries(name)
        if entries is None:
            uses.append(SharedGrad(param, use, tensor))
            continue
        rows = None
        if isinstance(use, EmbeddingGrad):
            rows = entries.rows(use.param.shape[0], param.shape)
        if isinstance(use, EmbeddingGrad) and rows is not None:
            uses.append(use.through(param, rows))
        else:
            uses.append(EntriesGrad(param, use, tensor, entries))
    return uses
