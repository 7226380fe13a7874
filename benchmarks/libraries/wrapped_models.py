"""One small network in what people wrap around networks: names stay the bare module's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.architecture import (
    MAX_LEN,
    NUM_ITEMS,
    WIDTH,
    Member,
    architecture,
    histories,
    padded,
    shaken,
)


class NextItem(nn.Module):
    """Logits (N, V + 1) of histories (N, T) padded on the left by 0, or of mappings with one."""

    max_len = MAX_LEN

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(MAX_LEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(MAX_LEN, MAX_LEN)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Any) -> Tensor:
        history = batch["history"] if isinstance(batch, dict) else batch
        states = self.norm(self.items(history) + self.positions.weight)
        states = states + self.mix(states.transpose(1, 2)).transpose(1, 2)
        return (states + torch.tanh(self.layer(states)))[:, -1] @ self.items.weight.T


class AroundModel(nn.Module):
    """A Lightning module in what matters: a network, a loss, and hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["history"]), batch["target"])


def batches() -> list[dict[str, Tensor]]:
    users = histories()
    return [
        {
            "history": padded([h[:-1] for h in part], MAX_LEN),
            "target": torch.tensor([h[-1] for h in part]),
        }
        for part in (users[:4], users[4:6])
    ]


def member(model: Any, module: nn.Module) -> Member:
    return Member(
        model=model,
        module=module,
        batches=batches(),
        logits=lambda module, batch: module(batch),
        columns=torch.arange(1, NUM_ITEMS + 1),
        make_batch=lambda histories: padded(histories, MAX_LEN),
        targets=torch.cat([batch["target"] for batch in batches()]),
        more_batches={"histories": [batch["history"] for batch in batches()]},
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return shaken(NextItem(), seed)


def one_process() -> None:
    """A process group of one, on gloo; left as it is, for more members."""
    if not torch.distributed.is_initialized():
        path = Path(tempfile.mkdtemp()) / "store"
        torch.distributed.init_process_group("gloo", f"file://{path}", rank=0, world_size=1)


@architecture("plain module", "torch")
def plain(seed: int) -> Member:
    module = network(seed)
    return member(module, module)


@architecture("torch.compile, eager backend", "torch")
def compiled(seed: int) -> Member:
    module = network(seed)
    return member(torch.compile(module, backend="eager"), module)


@architecture("DistributedDataParallel, gloo", "torch")
def ddp(seed: int) -> Member:
    one_process()
    module = network(seed)
    return member(nn.parallel.DistributedDataParallel(module), module)


@architecture("DataParallel", "torch")
def data_parallel(seed: int) -> Member:
    module = network(seed)
    return member(nn.DataParallel(module), module)


@architecture("Lightning module", "torch")
def lightning(seed: int) -> Member:
    module = network(seed)
    return member(AroundModel(module), module)


@architecture("AveragedModel", "torch")
def averaged(seed: int) -> Member:
    model = torch.optim.swa_utils.AveragedModel(network(seed))
    return member(model, model.module)
