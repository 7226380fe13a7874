"""What counts steps of training may differ between members; what a prediction may use may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.members.checks import is_counter


class Normed(nn.Module):
    """A batch norm that has seen so many batches."""

    def __init__(self, batches: int, buffer: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(batches)
        self.items = nn.Embedding(NUM_ITEMS + 1, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, NUM_ITEMS + 1)
        if buffer is not None:
            self.register_buffer(buffer, torch.tensor(batches))
        for _ in range(batches):
            self(HISTORIES)
        self.eval()

    def forward(self, history: Tensor) -> Tensor:
        return self.out(self.norm(self.items(history).sum(1)))


@pytest.mark.parametrize("buffer", [None, "n_averaged", "num_updates"])
@pytest.mark.parametrize("method", ["uniform", "fisher"])
def test_counters_that_differ(method: str, buffer: str | None) -> None:
    """Member 0's are kept, and the report names them."""
    models = [Normed(3, buffer), Normed(5, buffer)]
    fishers = None
    if method == "fisher":
        fishers = [fk.diag_fisher(model, [HISTORIES], progress=False) for model in models]
    merged = fk.merge(models, method=method, fishers=fishers)
    assert int(merged.norm.num_batches_tracked) == 3
    expected = {"norm.num_batches_tracked"} | ({buffer} if buffer else set())
    assert set(merged.merge_report["counters"]) == expected
    mean = (models[0].norm.running_mean + models[1].norm.running_mean) / 2
    torch.testing.assert_close(merged.norm.running_mean, mean)
    same = fk.merge([models[0], models[0]], method="uniform")
    assert same.merge_report["counters"] == []


@pytest.mark.parametrize("buffer", ["heads", "pad_id", "discount"])
def test_numbers_that_a_prediction_may_use(buffer: str) -> None:
    with pytest.raises(fk.InputError, match=f"'{buffer}' of member 1 differs"):
        fk.merge([Normed(3, buffer), Normed(5, buffer)], method="uniform")


def test_counters_are_single_numbers() -> None:
    """A row of counts is data, such as the popularity of items."""
    assert is_counter("norm.num_batches_tracked", ()) and is_counter("steps", ())
    assert not is_counter("counts", (3,)) and not is_counter("discount", ())


def test_counters_of_files(tmp_path: Path) -> None:
    """The first file's are kept."""
    paths = []
    for batches in (3, 5):
        paths.append(tmp_path / f"{batches}.pt")
        torch.save(Normed(batches).state_dict(), paths[-1])
    fk.merge_files(paths, tmp_path / "merged.pt", method="uniform")
    merged = fk.load_tensors(tmp_path / "merged.pt")
    assert int(merged["norm.num_batches_tracked"]) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("options", [None, {"factors": True}])
def test_old_norms_of_weights_are_refused_in_a_line(norm: object, options: dict | None) -> None:
    models = [Normed(3), Normed(5)]
    for model in models:
        norm(model.out)
        model(HISTORIES)
    with pytest.raises(fk.InputError, match=r"is a factor of a weight|remove_weight_norm"):
        fk.merge(models, method="uniform", options=options)
