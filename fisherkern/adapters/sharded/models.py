"""Models whose parameters are `DTensor`s: item tables by rows, everything else gathered.

A table, whose rows lie on the processes of a mesh, is never gathered. Of its rows those that a
batch names are fetched, and a lookup in the table is one in these: what they are worth by row is
what a gradient of the table is worth. All other `DTensor`s are gathered once.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fisherkern.adapters.batches import leaves
from fisherkern.adapters.sharded.stand_ins import StandIns
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint, json_sha256
from fisherkern.processes import gathered, joined_sum, rank, world

# Rows of a table that are no items, as padding and masks, up to which all are fetched.
_MOST_OTHER_ROWS = 1024


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is a `DTensor`."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def check_whole(module: nn.Module, what: str) -> None:
    """Raise InputError for a model of which each process holds a part."""
    if is_sharded(module):
        raise InputError(f"model: each process holds a part of it, and {what} takes a whole one")


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`; without the import of torch.distributed.tensor."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def gathered_whole(tensor: Any) -> Tensor:
    """All of a `DTensor`, in every process."""
    whole: Tensor = tensor.full_tensor()
    return whole


def local_part(tensor: Any) -> Tensor:
    """Return what this process has of a tensor: of a `DTensor` its shard, else all."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part


def laid_out(whole: Tensor, like: Any) -> Tensor:
    """Return a tensor that all processes have whole as a `DTensor`, laid out as `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = spread.redistribute(mesh, like.placements)
    return part


@dataclasses.dataclass(frozen=True)
class TableShard:
    """This process's rows, from `first` on, of a table of `shape`: `rows` (n, ...).

    `starts` (P + 1): where the rows of each process begin.
    """

    name: str
    shape: tuple[int, ...]
    rows: Tensor
    starts: tuple[int, ...]
    first: int

    @staticmethod
    def of(name: str, parameter: Any) -> TableShard:
        """Return the shard of a `DTensor` with its rows over all processes.

        Raises:
            InputError: Its mesh is not that of all processes in their order, or shards lack.
        """
        mesh = parameter.device_mesh
        if mesh.ndim != 1:
            raise InputError(
                f"model: '{name}' lies on a mesh of {mesh.ndim} dimensions; the rows of an item "
                "table lie on a mesh of one, which all processes are in"
            )
        if mesh.mesh.flatten().tolist() != list(range(world())):
            raise InputError(
                f"model: '{name}' lies on a mesh of {mesh.size()} processes, and {world()} work "
                "together; make its mesh with init_device_mesh over all of them"
            )
        rows = parameter.to_local().detach()
        counts = gathered(len(rows))
        if sum(counts) != parameter.shape[0]:
            raise InputError(
                f"model: the shards of '{name}' have {sum(counts)} rows together, and the table "
                f"{parameter.shape[0]}"
            )
        starts = tuple(sum(counts[:number]) for number in range(len(counts) + 1))
        return TableShard(name, tuple(parameter.shape), rows, starts, starts[mesh.get_rank()])

    def moved(self, values: Tensor, first: int) -> Tensor:
        """Return the process's rows of values (n, ...) that it has of rows `first` + 0 … n − 1.

        All rows go through all processes: for what is done once.
        """
        found = values
        for number, (start, stop) in enumerate(itertools.pairwise(self.starts)):
            part = exchanged(values, first, start, stop)
            found = part if number == rank() else found
        return found

    def between(self, start: int, stop: int) -> Tensor:
        """Return the rows start … stop − 1, others for each process; as `moved`."""
        found = self.rows
        for number, (low, high) in enumerate(gathered((start, stop))):
            part = exchanged(self.rows, self.first, low, high)
            found = part if number == rank() else found
        return found

    def owns(self, rows: Tensor) -> Tensor:
        """Which rows (U,) of the table this process has, (U,) bool."""
        return (rows >= self.first) & (rows < self.first + len(self.rows))

    def fetched(self, rows: Tensor) -> Tensor:
        """Rows (U,) of the table, the same in all processes, from those that own them: (U, ...)."""
        own = self.owns(rows)
        found = self.rows.new_zeros(len(rows), *self.shape[1:])
        found[own] = self.rows[rows[own] - self.first]
        return joined_sum(found)


def exchanged(values: Tensor, first: int, start: int, stop: int) -> Tensor:
    """Rows start … stop − 1 of which every process has some, values (n, ...) from `first` on."""
    found = values.new_zeros(stop - start, *values.shape[1:])
    low, high = max(start, first), min(stop, first + len(values))
    if low < high:
        found[low - start : high - start] = values[low - first : high - first]
    return joined_sum(found)


@dataclasses.dataclass(frozen=True)
class ShardedHead:
    """The output layer: the rows of `table` from `first` on, `num_items` of them, and its bias."""

    table: str
    first: int
    num_items: int
    bias: Any


class ShardedModel:
    """What stands in the place of a module's `DTensor`s while it runs.

    Args:
        module: The bare module.
        known: Names of the tables with a row for each item, where the model says so.
        num_items: V, where it is known.

    Raises:
        InputError: An item table's mesh does not fit, or FSDP2 keeps other parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        known: Collection[str] | None = None,
        num_items: int | None = None,
    ) -> None:
        self.module = module
        named = {
            name: tensor
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if is_dtensor(tensor)
        }
        by_rows = {name: tensor for name, tensor in named.items() if _by_rows(tensor)}
        self.tables = {
            name: TableShard.of(name, tensor)
            for name, tensor in by_rows.items()
            if _is_table(name, tensor, module, by_rows, known, num_items)
        }
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self.whole: dict[str, Tensor] = {
            name: gathered_whole(tensor).detach().requires_grad_(tensor.requires_grad)
            for name, tensor in named.items()
            if name not in self.tables
        }
        _check_unwrapped(module, list(self.whole))
        # Without memory: they say which part of a table a call is given.
        self._placeholders = {
            name: torch.empty(shard.shape, dtype=shard.rows.dtype, device="meta")
            for name, shard in self.tables.items()
        }
        # Rows at hand of each table, ascending, and their values.
        self.rows: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.fetch({name: torch.zeros(0, dtype=torch.int64) for name in self.tables})

    def stand_ins(self) -> dict[str, Tensor]:
        """By name, what stands in a parameter's place."""
        return self.whole | self.values

    def fetch(self, rows: Mapping[str, Tensor]) -> None:
        """Have some rows of each table at hand, the same in all processes, and no others."""
        for name, asked in rows.items():
            shard = self.tables[name]
            asked = asked.to(shard.rows.device).unique()
            inside = asked[(asked >= 0) & (asked < shard.shape[0])]
            self.rows[name] = inside
            # A copy is no view, as a parameter is none.
            self.values[name] = shard.fetched(inside).clone().requires_grad_(name in self._trained)

    def fetch_for(self, batch: Any, head: ShardedHead | None) -> Tensor:
        """Have at hand the rows that a batch names, and those of no items; gives the ids."""
        device = next(iter(self.tables.values())).rows.device
        ids = [torch.zeros(1, dtype=torch.int64)]
        for _, value in leaves(batch):
            if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
                ids.append(value.flatten().cpu().long())
        named: Tensor = torch.cat(ids).unique().to(device)
        wanted = {}
        for name, shard in self.tables.items():
            rows, first, items = shard.shape[0], 0, 0
            if head is not None:
                first, items = (head.first if name == head.table else 0), head.num_items
            if len(shard.shape) == 1:
                continue  # biases are looked up nowhere
            before = torch.arange(min(first, _MOST_OTHER_ROWS), device=device)
            past = torch.arange(max(first + items, rows - _MOST_OTHER_ROWS), rows, device=device)
            wanted[name] = torch.cat([named, before, past])
        self.fetch(wanted)
        return named

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the model that sees what stands in for its `DTensor`s."""

        def call(*args: Any) -> Any:
            with StandIns(self):
                return tree_map(self.substitute, function(*args))

        return call

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of a `DTensor` of the module."""
        return self._names.get(id(tensor))

    def substitute(self, tensor: Any) -> Any:
        """Return what a call is given for an argument."""
        name = self.name_of(tensor)
        if name is None:
            return tensor
        return self._placeholders[name] if name in self.tables else self.whole[name]

    def part_of_table(self, tensor: Any) -> tuple[str, int] | None:
        """Return the table and the first row of which a placeholder's view is made."""
        if not isinstance(tensor, Tensor) or not tensor.is_meta or not tensor.is_contiguous():
            return None
        base = tensor if tensor._base is None else tensor._base
        for name, own in self._placeholders.items():
            if own is base:
                width = max(own[:1].numel(), 1)
                return name, int(tensor.storage_offset()) // width
        return None

    def looked_up(self, name: str, ids: Tensor) -> Tensor:
        """Return the places of rows among those at hand."""
        rows = self.rows[name]
        place = torch.searchsorted(rows, ids.contiguous()).clamp(max=max(len(rows) - 1, 0))
        if ids.numel() and not (len(rows) and bool((rows[place] == ids).all())):
            raise InputError(
                f"model: it looks up rows of '{name}' that no id of the batch names, which a "
                "sharded table cannot serve"
            )
        return place

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's parameters, as calls are given them."""
        for name, parameter in self.module.named_parameters():
            yield name, self.substitute(parameter)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's buffers, as calls are given them."""
        for name, buffer in self.module.named_buffers():
            yield name, self.substitute(buffer)

    def head(self, take_head: Callable[[], tuple[Any, Any]]) -> ShardedHead:
        """Return what an output layer's W and b are.

        Raises:
            InputError: W is not rows of a sharded table.
        """
        weight, bias = self.wrapped(take_head)()
        part = self.part_of_table(weight)
        if part is None:
            raise InputError(
                "model: its output layer is no part of a table with rows over the processes, "
                "though another one is; shard both or none"
            )
        return ShardedHead(*part, len(weight), bias)


def _by_rows(tensor: Any) -> bool:
    """Whether a `DTensor` has its rows over the processes of one dimension of its mesh."""
    sharded = [place for place in tensor.placements if place.is_shard()]
    return bool(sharded) and all(place.dim == 0 for place in sharded)


def _check_unwrapped(module: nn.Module, gathered_names: Sequence[str]) -> None:
    """Refuse parameters that FSDP2 gathers, and lets go of, whenever a part of the module runs."""
    library = sys.modules.get("torch.distributed.fsdp")
    if library is None or not gathered_names:
        return
    if any(isinstance(part, library.FSDPModule) for part in module.modules()):
        raise InputError(
            f"model: fully_shard keeps '{gathered_names[0]}' in parts; of every FSDPModule in it "
            "call set_reshard_after_forward(False), set_reshard_after_backward(False), "
            "set_requires_gradient_sync(False) and unshard() first"
        )


def _is_table(
    name: str,
    tensor: Tensor,
    module: nn.Module,
    by_rows: Mapping[str, Any],
    known: Collection[str] | None,
    num_items: int | None,
) -> bool:
    """Whether a tensor has a row for each item: by its name, else by how many rows it has."""
    if known is not None:
        return name in known
    if num_items is not None:
        return num_items <= tensor.shape[0] <= num_items + _MOST_OTHER_ROWS
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    most = max((t.shape[0] for t in by_rows.values() if id(t) in embeddings), default=0)
    return bool(most) and 2 * tensor.shape[0] > most


class _LocalParts:
    """A module's parameters as far as this process has them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            yield name, local_part(parameter)


def sharded_fingerprint(module: nn.Module) -> str:
    """`fingerprint` of a module; of one with `DTensor`s a hash of its parts', by process."""
    if not is_sharded(module):
        return fingerprint(module)
    own: Any = _LocalParts(module)
    return json_sha256(gathered(fingerprint(own))) or ""
