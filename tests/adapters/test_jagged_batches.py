"""TorchRec's collections and jagged batches, and a skeleton of their calls, against brute force."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.batches import batch_size, batch_take, sequence_lengths, to_device

DATA = fk.synthetic(30, 16, max_length=9, min_length=4, seed=0)
ITEMS, USERS, WIDTH, T = DATA.num_items, 4, 5, 5


@dataclasses.dataclass
class Looked:
    """What a collection gives for a key: a JaggedTensor."""

    values: Tensor
    lengths: Tensor

    def to_padded_dense(self, width: int) -> Tensor:
        rows = nn.utils.rnn.pad_sequence(self.values.split(self.lengths.tolist()), True)
        return F.pad(rows, (0, 0, 0, width - rows.shape[1]))


class Jagged:
    """A KeyedJaggedTensor: neither a mapping nor a tensor, all values of all keys in one row."""

    def __init__(
        self, keys: list[str], values: Tensor, weights: Tensor | None = None, lengths: Any = None
    ) -> None:
        self._parts = keys, values, weights, lengths

    def keys(self) -> list[str]:
        return self._parts[0]

    def values(self) -> Tensor:
        return self._parts[1]

    def weights_or_none(self) -> Tensor | None:
        return self._parts[2]

    def lengths(self) -> Tensor:
        return self._parts[3]

    def stride(self) -> int:
        return len(self.lengths()) // len(self.keys())

    def to(self, device: Any, non_blocking: bool = False) -> Jagged:
        return self

    def of(self, key: str) -> tuple[Tensor, Tensor]:
        lengths = self.lengths().view(len(self.keys()), -1)
        values = self.values().split(lengths.sum(1).tolist())
        number = self.keys().index(key)
        return values[number], lengths[number]


class Sequences(nn.Module):
    """An EmbeddingCollection."""

    def __init__(self, tables: dict[str, int]) -> None:
        super().__init__()
        made = {name: nn.Embedding(rows, WIDTH) for name, rows in tables.items()}
        self.embeddings = nn.ModuleDict(made)

    def forward(self, batch: Jagged) -> dict[str, Looked]:
        found = {}
        for name, table in self.embeddings.items():
            values, lengths = batch.of(name)
            found[name] = Looked(table(input=values).float(), lengths)
        return found


class Bags(nn.Module):
    """An EmbeddingBagCollection."""

    def __init__(self, tables: dict[str, int]) -> None:
        super().__init__()
        made = {
            name: nn.EmbeddingBag(rows, WIDTH, mode="sum", include_last_offset=True)
            for name, rows in tables.items()
        }
        self.embedding_bags = nn.ModuleDict(made)

    def forward(self, batch: Jagged) -> Any:
        pooled = []
        for name, table in self.embedding_bags.items():
            values, lengths = batch.of(name)
            pooled.append(table(values, F.pad(lengths.cumsum(0), (1, 0))))
        joined = torch.cat(pooled, dim=1)
        return types.SimpleNamespace(values=lambda: joined)


def from_torchrec() -> Any:
    """The same three of TorchRec."""
    pytest.importorskip("torchrec", reason="TorchRec is not installed")
    from torchrec.modules import embedding_configs as configs
    from torchrec.modules import embedding_modules as modules
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    def made(collection: Any, config: Any) -> Any:
        def make(tables: dict[str, int]) -> nn.Module:
            own = [
                config(name=name, embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
                for name, rows in tables.items()
            ]
            return collection(tables=own)

        return make

    return types.SimpleNamespace(
        Jagged=KeyedJaggedTensor,
        Sequences=made(modules.EmbeddingCollection, configs.EmbeddingConfig),
        Bags=made(modules.EmbeddingBagCollection, configs.EmbeddingBagConfig),
    )


@pytest.fixture(params=["skeleton", "torchrec"])
def library(request: pytest.FixtureRequest) -> Any:
    if request.param == "torchrec":
        return from_torchrec()
    return types.SimpleNamespace(Jagged=Jagged, Sequences=Sequences, Bags=Bags)


class Recurrent(nn.Module):
    """Looks items up in a collection, whose table is the output layer too."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.items = library.Sequences({"item": ITEMS + 1})
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, batch: Any) -> Tensor:
        looked = self.items(batch)["item"]
        lengths = looked.lengths if isinstance(looked.lengths, Tensor) else looked.lengths()
        states, _ = self.gru(looked.to_padded_dense(T))
        last = states[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)]
        return last @ self.items.embeddings["item"].weight[1:].T


class Pooled(nn.Module):
    """Sums of items and of users, beside each other."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.bags = library.Bags({"item": ITEMS + 1, "user": USERS})
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, batch: Any) -> Tensor:
        hidden = self.linear(self.bags(batch).values())
        return hidden @ self.bags.embedding_bags["item"].weight[1:].T


def jagged(library: Any, ids: Tensor, users: bool = False) -> Any:
    """A batch of padded histories, and a user for each."""
    keys, values, lengths = ["item"], [ids[ids != 0]], [(ids != 0).sum(1)]
    if users:
        keys.append("user")
        values.append(torch.arange(len(ids)) % USERS)
        lengths.append(torch.ones(len(ids), dtype=torch.int64))
    return library.Jagged(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))


# One item each; as many items as sequences, and not one each; duplicates; empty histories.
IDS = [
    torch.tensor([[0, 0, 0, 0, 7], [0, 0, 0, 0, 9], [0, 0, 0, 0, 3]]),
    torch.tensor([[0, 0, 0, 8, 7], [0, 0, 0, 0, 0], [0, 0, 0, 0, 3]]),
    torch.tensor([[0, 0, 3, 4, 1], [0, 0, 0, 0, 2], [0, 0, 5, 5, 6]]),
    torch.tensor([[0, 0, 0, 0, 0], [2, 2, 1, 2, 16]]),
]


def made(kind: Any, library: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(library)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


@pytest.mark.parametrize("kind", [Recurrent, Pooled])
def test_the_fisher_is_brute_force_s(kind: Any, library: Any) -> None:
    model = made(kind, library, 0)
    batches = [jagged(library, ids, kind is Pooled) for ids in IDS]
    expected = {name: torch.zeros_like(p).double() for name, p in model.named_parameters()}
    for log_p in (model(batch).log_softmax(1) for batch in batches):
        for entry in log_p.flatten():
            gradients = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
            for sums, gradient in zip(expected.values(), gradients, strict=True):
                sums += entry.exp().detach() * gradient.double() ** 2
    found = fk.diag_fisher(model, batches, sampler="exact", progress=False)
    assert found.meta["num_sequences"] == sum(map(len, IDS))
    for name, sums in expected.items():
        value = sums / sum(map(len, IDS))
        assert float((found[name] - value).abs().max()) <= 2e-6 * float(value.abs().max()), name


def test_batches_are_cut_and_measured(library: Any) -> None:
    ids = torch.cat(IDS[1:])
    batch = jagged(library, ids, users=True)
    weights = torch.arange(len(batch.values())).float()
    parts = {"keys": batch.keys(), "values": batch.values(), "lengths": batch.lengths()}
    batch = {"features": library.Jagged(**parts, weights=weights), "target": torch.arange(8)}
    assert batch_size(batch) == 8
    assert sequence_lengths(batch).tolist() == ((ids != 0).sum(1) + 1).tolist()
    assert to_device(batch, torch.device("cpu"))["features"].stride() == 8
    for index in (slice(2, 5), torch.tensor([7, 0, 4]), slice(4, 4)):
        part = batch_take(batch, index)
        rows = torch.arange(8)[index]
        assert torch.equal(part["target"], rows)
        cut = part["features"]
        assert cut.stride() == len(rows) and cut.keys() == batch["features"].keys()
        whole = [batch["features"], weights.split(batch["features"].lengths().tolist())]
        values = whole[0].values().split(whole[0].lengths().tolist())
        numbers = [*rows.tolist(), *(rows + 8).tolist()]
        assert cut.lengths().tolist() == [len(values[number]) for number in numbers]
        if numbers:
            assert torch.equal(cut.values(), torch.cat([values[number] for number in numbers]))
            own = torch.cat([whole[1][number] for number in numbers])
            assert torch.equal(cut.weights_or_none(), own)


def test_members_merge_and_are_ranked(library: Any) -> None:
    members = [made(Recurrent, library, seed) for seed in (1, 2)]
    loader = [jagged(library, b["history"]) for b in DATA.loader(batch_size=7, max_len=T)]
    settings = {"sampler": "topk", "k": 4, "progress": False}
    fishers = [fk.diag_fisher(member, loader, **settings) for member in members]
    merged = fk.merge(members, fishers=fishers)
    assert type(merged) is Recurrent
    weights = [f["items.embeddings.item.weight"].double() for f in fishers]
    weights = [
        own / (sum(v.double().sum() for v in f.values()) / sum(v.numel() for v in f.values())) + 0.1
        for own, f in zip(weights, fishers, strict=True)
    ]
    tables = [m.items.embeddings["item"].weight.double() for m in members]
    expected = sum(w * t for w, t in zip(weights, tables, strict=True)) / sum(weights)
    found = merged.items.embeddings["item"].weight
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
    adapted = fk.adapt(merged, make_batch=lambda ids: jagged(library, ids), max_len=T, first_item=1)
    report = fk.evaluate(adapted, DATA)
    rows = next(iter(DATA.loader(split="test", batch_size=30, max_len=T)))
    with torch.no_grad():
        scores = merged(jagged(library, rows["history"]))
    for user, (row, target) in enumerate(zip(scores, rows["target"].tolist(), strict=True)):
        seen = set(DATA.sequence(user)[:-1]) - {target}
        others = [v for v in range(ITEMS) if v + 1 not in seen and v + 1 != target]
        rank = 1 + sum(bool(row[v] >= row[target - 1]) for v in others)
        assert report.ranks[user] == rank
