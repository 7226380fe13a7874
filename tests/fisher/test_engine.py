"""What the engine does about models it was not written for, and about bad input."""

from __future__ import annotations

import logging
from pathlib import Path

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from models import HISTORIES, NUM_ITEMS, Foreign, bert, shaken
from torch import Tensor, nn

import fisherkern as fk


class Recurrent(nn.Module):
    """A GRU, a convolution, a Linear called twice, and a scale used as no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.twice = nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(()))
        self.decoder = nn.Linear(4, NUM_ITEMS + 1)

    def forward(self, history: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.items(history))))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.decoder(torch.hypot(self.gru(x)[0][:, -1], self.scale))


class Transformer(nn.Module):
    """torch's own encoder layer, time first: functional attention with sliced weights."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.Linear(4, NUM_ITEMS + 1)

    def forward(self, history: Tensor) -> Tensor:
        x = self.items(history)
        if self.batch_first:
            return self.decoder(self.encoder(x)[:, -1])
        return self.decoder(self.encoder(x.transpose(0, 1))[-1])


class Chunked(nn.Module):
    """One parameter used through slices, in place, flattened, and by an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.both = nn.Parameter(torch.zeros(8, 4))
        self.flat = nn.Linear(4, 4)
        self.relu = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, NUM_ITEMS + 1, bias=False)

    def forward(self, history: Tensor) -> Tensor:
        x = self.items(history)
        query, value = self.both.chunk(2)
        x = F.linear(x, query) * F.linear(x, value)
        x = self.flat(x.reshape(-1, 4)).reshape(x.shape)
        return self.decoder(self.relu(x).relu_().sum(1))


MODELS = {
    "gru, convolution, Linear called twice": Recurrent,
    "attention, batch first": lambda: Transformer(True),
    "attention, time first": lambda: Transformer(False),
    "sliced, flattened, in place": Chunked,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_any_model_is_right(name: str) -> None:
    """Five sequences of five positions: the two dimensions cannot be told apart by size."""
    model = shaken(MODELS[name]())
    p, gradients = brute.all_gradients(model, HISTORIES)
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))


class TimeFirst(nn.Module):
    """Positions in the first dimension, and only one of them used at the end."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, NUM_ITEMS + 1)

    def forward(self, history: Tensor) -> Tensor:
        x = self.items(history.t())
        x = self.mix(x + x.mean(0, keepdim=True))
        return self.decoder(torch.tanh(x)[self.position])


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("size", [2, 3])
def test_time_is_not_taken_for_sequences(position: int, size: int) -> None:
    """As many sequences as positions, and the others' gradient is zero at all but one."""
    model = shaken(TimeFirst(position))
    history = HISTORIES[-size:, -size:]
    p, gradients = brute.all_gradients(model, history)
    fisher = fk.diag_fisher(model, [history], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))


class Matrices(nn.Module):
    """Weights applied with @, as they stand and transposed; the output tied by a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.into = nn.Parameter(torch.zeros(4, 6))
        self.back = nn.Parameter(torch.zeros(4, 6))

    def forward(self, history: Tensor) -> Tensor:
        x = torch.tanh(self.items(history) @ self.into)
        return torch.matmul(x, self.back.t()).sum(1) @ self.items.weight.T


def test_matrix_products_need_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    model = shaken(Matrices())
    p, gradients = brute.all_gradients(model, HISTORIES)
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))
    assert not caplog.records


def test_fallback_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = shaken(Recurrent())
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fk.diag_fisher(model, [HISTORIES[:2], HISTORIES[2:]], k=2, progress=False)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("no rule for scale: ")


def test_head_that_is_used_otherwise_goes_through_the_logits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An output weight computed from parameters: the factored path would miss them."""
    model = shaken(Foreign("none"))
    model.decoder.bias.requires_grad_(False)
    head = model.decoder.weight
    model.mix = nn.Parameter(torch.eye(6, dtype=torch.float64) + 0.1)
    model.forward = lambda batch: F.linear(model.hidden(batch), head @ model.mix)
    adapted = fk.adapt(
        model,
        encode=lambda model, batch: model.hidden(batch),
        head=lambda model: (head @ model.mix, None),
    )
    p, gradients = brute.all_gradients(model, HISTORIES)
    fisher = fk.diag_fisher(adapted, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))
    assert "computed from parameters" in caplog.text


def test_parameter_without_gradient_is_an_error_that_names_it() -> None:
    model = bert()
    model.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(fk.InputError, match="unused received no gradient"):
        fk.diag_fisher(model, [HISTORIES], k=2, progress=False)
    model.unused.requires_grad_(False)
    assert "unused" not in fk.diag_fisher(model, [HISTORIES], k=2, progress=False)


def test_frozen_parameters_are_left_out_and_change_nothing() -> None:
    model = bert()
    whole = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    frozen = ["item_embedding.weight", "blocks.0.attention.query.weight", "output_bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    part = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert set(whole) - set(part) == set(frozen)
    assert_equal(part, {name: whole[name] for name in part}, tolerance=1e-12)


def test_model_is_left_as_it_was() -> None:
    model = bert()
    model.train()
    model.blocks[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    fk.diag_fisher(model, [HISTORIES], sampler="model", k=3, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError):
        fk.diag_fisher(model, (1 / 0 for _ in range(1)), progress=False)
    assert [m.training for m in model.modules()] == modes


def test_batches_of_every_kind() -> None:
    model, targets = bert(), torch.tensor([1, 2, 3, 4, 5])
    reference = fk.diag_fisher(model, [HISTORIES], k=3, progress=False)
    pair = torch.utils.data.TensorDataset(HISTORIES, targets)
    loaders = {
        "mapping": [{"history": HISTORIES, "target": targets, "note": "text"}],
        "pairs": torch.utils.data.DataLoader(pair, batch_size=2),
        "tensors": torch.utils.data.DataLoader(HISTORIES, batch_size=3),
    }
    for kind, loader in loaders.items():
        found = fk.diag_fisher(model, loader, k=3, chunk=2, progress=False)
        assert_equal(found, dict(reference), tolerance=1e-12)
        if kind != "tensors":
            fk.diag_fisher(model, loader, sampler="target", progress=False)
    with pytest.raises(fk.InputError, match="holds no next items"):
        fk.diag_fisher(model, [HISTORIES], sampler="target", progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampler": "topp"}, "sampler: 'topp' is not one of exact, sketch"),
        ({"k": 0}, "k: must be at least 1"),
        ({"k": 12}, "k: 12 items of a catalogue of 11"),
        ({"sampler": "random", "k": 12}, "k: 12 items of a catalogue of 11"),
        ({"sampler": "topk", "replacement": False}, "replacement: False is for sampler 'model'"),
        ({"sampler": "exact", "tol": 1.0}, "tol: must be in"),
        ({"sampler": "exact", "reduction": "batchwise"}, "'batchwise' needs an item sampler"),
        ({"reduction": "mean"}, "reduction: 'mean'"),
        ({"backend": "tpu"}, "backend: 'tpu'"),
        ({"chunk": 0}, "chunk: must be at least 1"),
        ({"weight": "two"}, "weight: 'two'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(fk.InputError, match=message):
        fk.diag_fisher(bert(), [HISTORIES], progress=False, **arguments)


def test_bad_models_and_loaders() -> None:
    with pytest.raises(fk.InputError, match="expected a torch.nn.Module, got str"):
        fk.diag_fisher("model", [HISTORIES])
    with pytest.raises(fk.InputError, match="loader: it gave no sequences"):
        fk.diag_fisher(bert(), [], progress=False)
    for name, given, message in (
        ("logits", "x", "adapt: logits: a str is no function"),
        ("positions", 3, "adapt: positions: a int is no function"),
        ("first_item", "a", "adapt: first_item must be an integer"),
        ("max_len", 0, "adapt: max_len must be at least 1"),
    ):
        with pytest.raises(fk.InputError, match=message):
            fk.adapt(bert(), **{name: given})
    with pytest.raises(fk.InputError, match="encode and head belong together"):
        fk.adapt(bert(), encode=lambda model, batch: batch)
    with pytest.raises(fk.InputError, match="a target is not one of the model's 11 items"):
        batch = {"history": HISTORIES, "target": torch.tensor([1, 2, 3, 4, 12])}
        fk.diag_fisher(bert(), [batch], sampler="target", progress=False)
    model = bert()
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.query.weight")[0, 0] = torch.nan
    with pytest.raises(fk.InputError, match="hold a NaN"):
        fk.diag_fisher(model, [HISTORIES], k=2, progress=False)


def test_file_keeps_tensors_and_meta(tmp_path: Path) -> None:
    model = bert()
    found = fk.diag_fisher(model, [HISTORIES], k=3, seed=5, progress=False)
    found.save(tmp_path / "a.fisher.safetensors")
    loaded = fk.DiagFisher.load(tmp_path / "a.fisher.safetensors")
    assert loaded.meta == found.meta and set(loaded) == set(found)
    assert all(torch.equal(loaded[name], found[name]) for name in found)
    assert loaded.meta["sampler"] == "topk" and loaded.meta["num_sequences"] == 5
    assert "num_sequences=5" in repr(loaded)


def test_file_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.fisher.safetensors"
    with pytest.raises(fk.InputError, match="no such file"):
        fk.DiagFisher.load(path)
    found = fk.diag_fisher(bert(), [HISTORIES], k=3, progress=False)
    found.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fk.InputError, match="not a whole safetensors file"):
        fk.DiagFisher.load(path)
    fk.save_model(bert(), tmp_path / "model.safetensors")
    with pytest.raises(fk.InputError, match="not a Fisher file"):
        fk.DiagFisher.load(tmp_path / "model.safetensors")
    name = "output_bias"
    fk.DiagFisher({name: -found[name]}, found.meta).save(path)
    with pytest.raises(fk.InputError, match="'output_bias' has a negative"):
        fk.DiagFisher.load(path)
