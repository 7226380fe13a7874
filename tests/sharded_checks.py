"""What every process checks of Fishers from sharded tables."""

from __future__ import annotations

from typing import Any

import brute
import torch
import torch.distributed as dist
from models import NUM_ITEMS, shaken
from sharded_models import (
    CASES,
    SAMPLERS,
    WIDTH,
    batches,
    loader_of,
    refused,
    sasrec,
    sharded,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fisherkern as fk
from fisherkern import processes
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.sharded.table import ShardedItemTable


def check_case(name: str, mesh: Any) -> None:
    """Sharded equals unsharded, and the tables' Fishers stay sharded."""
    make, samplers = CASES[name]
    for settings in samplers if mesh.size() == 2 else samplers[::2]:
        with processes.alone():
            one = fk.diag_fisher(make(), loader_of(make()), progress=False, **settings)
        model = sharded(make(), mesh)
        many = fk.diag_fisher(model, loader_of(model), progress=False, **settings)
        parameters = dict(model.named_parameters())
        for key, value in one.items():
            assert isinstance(many[key], DTensor) == isinstance(parameters[key], DTensor)
            found = whole(many[key])
            # A key's bias has no Fisher but what rounding leaves.
            atol = 1e-12 * max(1e-18, float(value.max()))
            close = torch.allclose(found, value, rtol=0, atol=atol)
            assert close, (settings, key, float((found - value).abs().max()), float(value.max()))
        for key in ("num_sequences", "num_positions", "k", "probes"):
            assert one.meta[key] == many.meta[key]
        for key in ("captured_mass", "kept_energy"):
            assert (one.meta[key] is None) == (many.meta[key] is None)
            assert one.meta[key] is None or abs(one.meta[key] - many.meta[key]) < 1e-11


def check_bits(mesh: Any) -> None:
    """The same bits when repeated."""
    for settings in (SAMPLERS[2], SAMPLERS[5]):
        first, second = (
            fk.diag_fisher(sharded(sasrec(), mesh), batches(), progress=False, **settings)
            for _ in range(2)
        )
        assert all(torch.equal(whole(first[key]), whole(second[key])) for key in first)


def check_brute_force(mesh: Any) -> None:
    """Every gradient of every item by autograd."""
    history = batches()[0]["history"]
    gradients = brute.all_gradients(sasrec(), history)
    expected = brute.fisher(gradients[1], gradients[0])
    found = fk.diag_fisher(
        sharded(sasrec(), mesh), [{"history": history}], sampler="exact", progress=False
    )
    for key, value in expected.items():
        torch.testing.assert_close(whole(found[key]), value, rtol=1e-9, atol=1e-12)


def check_table(mesh: Any) -> None:
    """Tables of several ranges, cut within and between them, with impossible items."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    for items, cuts in ((700, (300, 700, 700)), (1500, (513, 513, 1024)), (5, (3, 3, 5))):
        weight = torch.randn(items, WIDTH, generator=generator, dtype=torch.float64)
        bias = torch.randn(items, generator=generator, dtype=torch.float64)
        bias[:3] = -torch.inf
        h = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
        ids = torch.arange(4) + 3
        ends = [0, *cuts[: world - 1], items]
        own = slice(ends[rank], ends[rank + 1])
        one = ItemTable(weight, bias)
        many = ShardedItemTable(items, own.start, weight[own], bias[own])
        lse, mean, ranges = one.mean(h)
        found = many.mean(h)
        pairs = [((lse, mean), found[:2])]
        # What bounds the largest probability, of ranges that a cut has made smaller. A product of
        # fewer rows may be rounded otherwise.
        rounding = 1e-12
        assert (many.largest(found[2]) <= one.largest(ranges) + rounding).all()
        assert (many.largest(found[2]) >= one.most_likely(h)[1] - rounding).all()
        pairs += [(one.topk(h, k), many.topk(h, k)) for k in (1, min(items, 40))]
        pairs += [((one.covariance(h, lse, mean),), (many.covariance(h, lse, mean),))]
        sketch = h, lse, mean, ids, 16, 4
        pairs += [(one.sketch(*sketch), many.sketch(*sketch))]
        for k in (1, 2, min(items, 30)):
            draws = [(t, h, lse, r, ids, k, 5) for t, r in ((one, ranges), (many, found[2]))]
            pairs += [tuple((t.draw(*rest),) for t, *rest in draws)]
            distinct = [t.draw_distinct(*rest) for t, *rest in draws]
            # Which of the impossible items fill up is nobody's concern.
            pairs += [tuple((o, torch.where(o > 0, i, -1)) for i, o in distinct)]
        for expected, given in pairs:
            for value, other in zip(expected, given, strict=True):
                torch.testing.assert_close(other, value, rtol=1e-11, atol=1e-12)


def check_given(mesh: Any) -> None:
    """A model that fk.adapt was told of, with a bias that every process has whole."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(NUM_ITEMS + 1, WIDTH)
            self.mix = nn.Linear(WIDTH, WIDTH)
            self.offset = nn.Parameter(torch.zeros(NUM_ITEMS))

    def adapted(model: nn.Module) -> Any:
        return fk.adapt(
            model,
            encode=lambda m, batch: torch.tanh(m.mix(m.items(batch))).sum(1),
            head=lambda m: (m.items.weight[1:], m.offset),
        )

    loader = [batch["history"] for batch in batches()]
    torch.manual_seed(0)
    model = Bag()
    torch.manual_seed(0)
    with processes.alone():
        one = fk.diag_fisher(adapted(shaken(Bag())), loader, sampler="exact", progress=False)
    model = sharded(shaken(model), mesh)
    many = fk.diag_fisher(adapted(model), loader, sampler="exact", progress=False)
    for key, value in one.items():
        torch.testing.assert_close(whole(many[key]), value, rtol=1e-11, atol=1e-13)


def check_gathered(mesh: Any) -> None:
    """`DTensor`s that are no item tables are gathered, and their Fishers laid out as they are."""

    def spread(model: nn.Module, tables: bool) -> nn.Module:
        if tables:
            model = sharded(model, mesh)
        layer: Any = model.blocks[0].feed_forward.inner
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Replicate()]))
        return model

    with processes.alone():
        one = fk.diag_fisher(sasrec(), batches(), sampler="topk", k=4, progress=False)
    for tables in (True, False):
        model = spread(sasrec(), tables)
        many = fk.diag_fisher(model, batches(), sampler="topk", k=4, progress=False)
        inner: Any = many["blocks.0.feed_forward.inner.weight"]
        assert inner.placements == (Shard(1),)
        for key, value in one.items():
            torch.testing.assert_close(whole(many[key]), value, rtol=1e-11, atol=1e-13)


def check_fully_sharded(mesh: Any) -> None:
    """FSDP2's modules: refused with what to call first, and right when that is called."""
    with processes.alone():
        one = fk.diag_fisher(sasrec(), batches(), sampler="topk", k=4, progress=False)
    model: Any = sharded(sasrec(), mesh)
    apart = {model.item_embedding.weight, model.output_bias}
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, ignored_params=apart)
    with refused(r"call set_reshard_after_forward\(False\)"):
        fk.diag_fisher(model, batches(), progress=False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False)
            part.set_reshard_after_backward(False)
            part.set_requires_gradient_sync(False)
            part.unshard()
    many = fk.diag_fisher(model, batches(), sampler="topk", k=4, progress=False)
    for key, value in one.items():
        torch.testing.assert_close(whole(many[key]), value, rtol=1e-11, atol=1e-13)


def check_faults(mesh: Any) -> None:
    """One line each."""
    world = dist.get_world_size()
    loader = batches()

    def fisher(model: nn.Module, **settings: Any) -> None:
        fk.diag_fisher(model, loader, progress=False, **settings)

    flat = init_device_mesh("cpu", (1, world))
    table: Any = sasrec()
    rows = table.item_embedding.weight.detach()
    table.item_embedding.weight = nn.Parameter(
        DTensor.from_local(rows, flat, [Replicate(), Shard(0)], run_check=False)
    )
    with refused("lies on a mesh of 2 dimensions"):
        fisher(table)
    with refused("mesh of .* processes, and 1 work together"), processes.alone():
        fisher(sharded(sasrec(), mesh))
    lacking: Any = sasrec(bias=False)
    whole_table = distribute_tensor(lacking.item_embedding.weight.detach(), mesh, [Shard(0)])
    own = whole_table.to_local()
    short = own[: len(own) - 1] if dist.get_rank() == 1 else own
    lacking.item_embedding.weight = nn.Parameter(
        DTensor.from_local(
            short, mesh, [Shard(0)], run_check=False,
            shape=whole_table.shape, stride=whole_table.stride(),
        )
    )  # fmt: skip
    with refused("have 11 rows together, and the table 12"):
        fisher(lacking)
    with refused("'batchwise' needs all logits"):
        fisher(sharded(sasrec(), mesh), reduction="batchwise")
    partly: Any = sharded(sasrec(tied=False), mesh)
    partly.output_embedding = nn.Parameter(partly.output_embedding.full_tensor().detach())
    with refused("shard both or none"):
        fisher(partly)
    poisoned: Any = sasrec()
    with torch.no_grad():
        poisoned.item_embedding.weight[NUM_ITEMS] = torch.nan
    with refused("hold a NaN"):
        fisher(sharded(poisoned, mesh))
    for function in (fk.linear_grams, fk.fisher_product, fk.train):
        given = loader if function is not fk.train else fk.synthetic(40, 20, max_length=20)
        with refused("takes a whole one"):
            function(sharded(sasrec(), mesh), given)
