"""Kernel launches and host synchronisations of `diag_fisher` on a GPU, counted on a CPU.

    python benchmarks/count_launches.py --sampler exact --sequences 6040 --batch-size 512

Runs the paths that a GPU takes with PyTorch's products, at the sizes that a GPU of --memory GiB
gets, and counts dispatched operators: one that is no view launches a kernel or more, so the count
is a lower bound. Operators inside ours are counted too. Reading a tensor's value waits for a GPU,
if the tensor is there: the loader's batches are not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkern as fk
from fisherkern.fisher.schedule import Schedule
from fisherkern.ops.backend import gpu_paths
from fisherkern.ops.library import IMPLEMENTATIONS

VIEWS = frozenset(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias split"
    " split_with_sizes unbind as_strided diagonal unfold _reshape_alias narrow empty new_empty"
    " empty_strided empty_like new_empty_strided lift_fresh is_same_size resize_ sym_size".split()
)
WAITS = frozenset(
    "_local_scalar_dense nonzero _unique2 unique_consecutive unique_dim masked_select is_nonzero"
    " equal".split()
)


class Counter(TorchDispatchMode):
    """Counts launches and waits; `places` says where in the package each wait is."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.outside = 0  # launches outside of our own ops
        self._inside = 0

    def reading(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, which reads a tensor by no operator, counted as a wait."""

        def counted(tensor: Tensor) -> Any:
            self.places[f"{method.__name__} at {_place()}"] += 1
            return method(tensor)

        return counted

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "fisherkern":
            # The implementation itself, so that this mode sees what it calls and not it again.
            self._inside += 1
            with self:
                found = IMPLEMENTATIONS[name](*args, **kwargs)
            self._inside -= 1
            return found
        if name in WAITS or _waits(name, args, kwargs):
            self.places[f"{name} at {_place()}"] += 1
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        if name not in VIEWS and not _is_view(name, found, args):
            self.launches[name] += 1
            self.outside += not self._inside
        return found


def _is_view(name: str, found: Any, args: tuple[Any, ...]) -> bool:
    """Whether a conversion had nothing to convert, inside an op where none is taken apart."""
    if name.endswith("_") or not isinstance(found, Tensor) or not isinstance(args[0], Tensor):
        return name == "promote_types"
    return found.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def _waits(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the shape of the result, and so the host, depends on values."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(t is not None and t.dtype == torch.bool for t in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/fisherkern/" in frame.filename:
            return f"{frame.filename.split('/fisherkern/')[-1]}:{frame.lineno}"
    return "?"


def histories(count: int, length: int, items: int) -> Tensor:
    """Lengths as ML-1M's, where most histories are long: (count, length) int64, padded left."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(count, generator=generator) ** 1.5 * (length * 1.2) + length * 0.075
    found = torch.zeros(count, length, dtype=torch.int64)
    for row, n in zip(found, lengths.long().clamp(min=1, max=length - 1).tolist(), strict=True):
        row[length - n :] = torch.randint(1, items + 1, (n,), generator=generator)
    return found


def count(options: argparse.Namespace) -> dict[str, Any]:
    """The counts of one call of `diag_fisher`."""
    torch.manual_seed(0)
    length = options.max_len // options.shrink
    model = fk.BERT4Rec(options.items, max_len=length, dim=options.width)
    loader = histories(options.sequences, length, options.items).split(options.batch_size)
    schedule = Schedule.of_memory(options.memory << 30)
    # As many passes, of as many sequences each, as with whole histories.
    schedule = dataclasses.replace(
        schedule,
        positions=schedule.positions // options.shrink,
        gradients=schedule.gradients // options.shrink,
    )
    counter = Counter()
    with (
        gpu_paths(),
        mock.patch.object(Schedule, "of", lambda device: schedule),
        mock.patch.object(Tensor, "tolist", counter.reading(Tensor.tolist)),
        counter,
    ):
        fk.diag_fisher(
            model, loader, sampler=options.sampler, backend="torch", progress=options.progress
        )
    return {
        "sampler": options.sampler,
        "sequences": options.sequences,
        "positions_of_a_pass": schedule.positions * options.shrink,
        "launches": sum(counter.launches.values()),
        "launches_outside_our_ops": counter.outside,
        "waits": sum(counter.places.values()),
        "waits_at": dict(counter.places.most_common()),
        "most_launched": dict(counter.launches.most_common(12)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sampler", default="exact")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--items", type=int, default=3706)
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--memory", type=int, default=78, help="free memory of the GPU in GiB")
    parser.add_argument("--shrink", type=int, default=10, help="histories shorter by this factor")
    parser.add_argument("--progress", action="store_true")
    print(json.dumps(count(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
