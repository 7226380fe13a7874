"""The engine's F.layer_norm against PyTorch's, and where it stands aside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.layouts import layouts
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.forward.fast_ops import _LayerNorm, layer_norm
from fisherkern.fisher.layers import HANDLERS


def used(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_LayerNormBackward"


def affine(width: int, how: str, dtype: torch.dtype) -> list[nn.Parameter | None]:
    g = torch.Generator().manual_seed(1)
    weight, bias = (nn.Parameter(torch.randn(width, generator=g, dtype=dtype)) for _ in "wb")
    return [weight if "w" in how else None, bias if "b" in how else None]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 11, 16), (2, 3, 5, 7), (0, 4, 6)], ids=str)
@pytest.mark.parametrize("how", ["wb", "w", "b", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_input_gradient(shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    size, parameters = shape[-1:], affine(shape[-1], how, dtype)
    wide = [None if t is None else t.double() for t in parameters]
    for x, delta in zip(layouts(shape), layouts(shape), strict=True):
        x, delta = x.to(dtype).requires_grad_(), delta.to(dtype)
        found = layer_norm(x, size, *parameters, eps=0.1)
        assert used(found) == (0 not in shape)
        assert torch.equal(found, F.layer_norm(x, size, *parameters, eps=0.1))
        (gradient,) = torch.autograd.grad(found, x, delta)
        exact = x.detach().double().requires_grad_()
        output = F.layer_norm(exact, size, *wide, eps=0.1)
        (expected,) = torch.autograd.grad(output, exact, delta.double())
        torch.testing.assert_close(gradient, expected.to(dtype))


@pytest.mark.filterwarnings("error")
def test_many_output_gradients_at_once() -> None:
    """With what comes before and after, where the gradients' first dimension is not in sight."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=g, requires_grad=True)
    hidden = layer_norm(x.transpose(0, 1), [7], *affine(7, "wb", x.dtype))
    output = hidden.transpose(1, 2) * 3
    deltas = torch.randn(6, *output.shape, generator=g)
    # What has no rule of torch.vmap warns.
    back = torch.vmap(lambda delta: torch.autograd.grad(output, x, delta, retain_graph=True)[0])
    together = back(deltas)
    (batched,) = torch.autograd.grad(output, x, deltas, retain_graph=True, is_grads_batched=True)
    for r, delta in enumerate(deltas):
        (alone,) = torch.autograd.grad(output, x, delta, retain_graph=True)
        assert torch.equal(together[r], alone) and torch.equal(batched[r], alone)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_computed_parameter_gets_its_gradient(name: str) -> None:
    norm, x = nn.LayerNorm(4), torch.randn(2, 4, requires_grad=True)
    raw = getattr(norm, name)
    with Capture(Parameters(norm), len(x), HANDLERS):
        assert used(F.layer_norm(x, (4,), **{name: raw}))
        output = F.layer_norm(x, (4,), **{name: raw.exp()})
    assert not used(output)
    output.square().sum().backward()
    assert raw.grad is not None and x.grad is not None


def test_the_capture_computes_by_it() -> None:
    norm, x = nn.LayerNorm(4), torch.randn(3, 4, requires_grad=True)
    with Capture(Parameters(norm), len(x), HANDLERS) as capture:
        assert used(norm(x)) and used(F.layer_norm(x, (4,), bias=norm.bias))
    assert [len(site.uses) for site in capture.ops] == [2, 1]


def test_an_input_without_gradient() -> None:
    weight, _ = affine(4, "w", torch.float32)
    output = layer_norm(torch.randn(3, 4), [4], weight)
    assert used(output)
    output.sum().backward()
    assert weight is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    assert not used(layer_norm(x, [4]))


def test_several_dimensions_are_left_to_pytorch() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert not used(layer_norm(x, [3, 4]))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer_norm(x, [3])


def test_autocast_and_no_grad_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_LayerNorm, "forward")
    x, parameters = torch.randn(2, 4, requires_grad=True), affine(4, "wb", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not used(layer_norm(x, [4], *parameters))
    with torch.no_grad():
        assert layer_norm(x, [4], *parameters).grad_fn is None


class Normed(nn.Module):
    """Normalised with and without parameters, overwritten and shared by two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.norm = nn.LayerNorm(6)

    def forward(self, batch: Tensor) -> Tensor:
        x = F.relu(self.norm(self.table(batch)), inplace=True)
        x = F.layer_norm(x + self.norm(x), (6,)).mul_(2)
        return self.last(x.mean(dim=1))


def test_the_output_may_be_overwritten() -> None:
    torch.manual_seed(0)
    model = Normed()
    batches = [torch.randint(0, 7, (4, 3))]
    narrow = fk.diag_fisher(model, batches, sampler="topk", k=7, progress=False)
    wide = fk.diag_fisher(model.double(), batches, sampler="topk", k=7, progress=False)
    for name in wide:
        torch.testing.assert_close(narrow[name], wide[name].float(), rtol=1e-4, atol=1e-7)
