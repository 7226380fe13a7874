"""The figures' numbers: errors against the exact Fisher, and the plane through three models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.experiments.fisher_cost import best_scaled_error, relative_error
from fisherkern.report.plane import weight_plane


def test_errors_against_the_exact_fisher() -> None:
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    double = {name: 2 * value for name, value in exact.items()}
    assert relative_error(double, exact) == pytest.approx(1)
    assert best_scaled_error(double, exact) == pytest.approx(0, abs=1e-7)
    across = {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([0.0])}
    assert best_scaled_error(across, exact) == pytest.approx(1)


def test_plane_holds_its_members() -> None:
    """Three linear models at known distances; the score is what is asked for at each point."""
    members = []
    for weights in ([0.0, 0.0], [3.0, 0.0], [0.0, 4.0]):
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.data[:] = torch.tensor(weights)
        members.append(model)
    named = {f"member {number}": member for number, member in enumerate(members, start=1)}
    plane = weight_plane(named, {"mean": members[0]}, lambda m: float(m.weight.detach().sum()))
    assert plane["points"]["member 2"] == pytest.approx([3, 0])
    assert plane["points"]["member 3"] == pytest.approx([0, 4])
    expected = np.array(plane["x"])[None, :] + np.array(plane["y"])[:, None]
    np.testing.assert_allclose(plane["values"], expected, atol=1e-5)
