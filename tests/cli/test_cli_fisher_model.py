"""`fisherkern fisher --model`: the Fisher of a model that only code can build."""

import itertools
import textwrap

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.fisher import DiagFisher

COUNT = itertools.count()

MODULE = """
import torch
from torch import nn

import fisherkern as fk

class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(11, 4)
        self.dense = nn.Linear(4, 4)

    def forward(self, batch):
        return self.dense(self.items(batch).mean(1)).tanh() @ self.items.weight.T

def build():
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return Scorer(), [torch.randint(0, 11, (6, 5), generator=draw) for draw in draws]

def encoder():
    torch.manual_seed(0)
    return fk.SASRec(fk.load("synthetic").num_items, max_len=5, dim=4, layers=1)

def broken():
    return 1 / 0

nothing = 3

def number():
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current folder, another for each test."""
    name = f"built_by_code_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_model_and_batches_of_a_function(module, tmp_path):
    words = ["fisher", "--model", f"{module}:build", "--k", "7", "--quiet", "--out", "out"]
    assert main(words) == 0
    found = DiagFisher.load(tmp_path / "out" / "build.fisher.safetensors")
    model, batches = __import__(module).build()
    expected = fk.diag_fisher(model, batches, k=7, progress=False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert (tmp_path / "out" / "result.json").is_file()


def test_an_encoder_takes_the_data(module, tmp_path):
    words = ["fisher", "--model", f"{module}:encoder", "--data", "synthetic", "--limit", "20"]
    words += ["--quiet", "--out", "out", "--k", "5", "--device", "cpu"]
    assert main(words) == 0
    found = DiagFisher.load(tmp_path / "out" / "encoder.fisher.safetensors")
    model, data = __import__(module).encoder(), fk.load("synthetic")
    loader = data.loader(max_len=5, split="train", batch_size=256, limit=20)
    expected = fk.diag_fisher(model, loader, k=5, progress=False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a checkpoint, or a --model module:function"),
        (["x.safetensors", "--model", "{}:build"], "name a checkpoint, or a --model"),
        (["--model", "{}"], "is not like module:function"),
        (["--model", "no_such_module_here:f"], "No module named 'no_such_module_here'"),
        (["--model", "{}:missing"], "has no function 'missing'"),
        (["--model", "{}:nothing"], "has no function 'nothing'"),
        (["--model", "{}:broken"], "failed at {}.py:26: ZeroDivisionError: division by zero"),
        (["--model", "{}:number"], "returned a int, and not (model, batches)"),
        (["--model", "{}:build", "--limit", "3"], "--limit: the batches of"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, module, capsys):
    given = [word.format(module) for word in words]
    assert main(["fisher", *given, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fisherkern fisher: ") and "\n" not in error
    assert message.format(module) in error
