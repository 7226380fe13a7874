"""What other people's models do: recomputation, complex views, autocast, compiled parts."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal
from helpers.layers import Recommender, assert_right
from helpers.strangers import Body
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fisherkern as fk
from fisherkern.errors import InputError

WIDTH = 4


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class LastOutput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class OwnFunction(nn.Module):
    """A user's autograd function between layers."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * delta

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.Cube.apply(self.first(x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear, relu": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "wide": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
    "gelu": lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
    "norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()),
    "attention": Attended,
    "gru": lambda: LastOutput(nn.GRU(4, 4, batch_first=True)),
    "lstm": lambda: LastOutput(nn.LSTM(4, 4, batch_first=True)),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu"),
    "own function": OwnFunction,
}


class Checkpointed(nn.Module):
    """Two blocks, of which nothing is kept but the input."""

    def __init__(self, block: str, pooled: bool, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(BLOCKS[block](), BLOCKS[block]())
        self.pooled, self.options = pooled, options

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        x = torch.tanh(x.sum(1) if self.pooled else x)
        if not self.options:
            x = self.blocks(x)
        elif "segments" in self.options:
            x = checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)
        else:
            for block in self.blocks:
                x = checkpoint(block, x, **self.options)
        return torch.tanh(x if self.pooled else x.sum(1))


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"segments": 2}],
    ids=["plain", "reentrant", "sequential"],
)
@pytest.mark.parametrize(
    ("block", "pooled"),
    [(name, False) for name in BLOCKS] + [("linear, relu", True), ("norm", True), ("gelu", True)],
)
def test_checkpoints(
    block: str, pooled: bool, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As the model without them: reentrant checkpoints have no gradients to inputs at all."""
    model = shaken(Recommender(Checkpointed(block, pooled, **options)))
    plain = shaken(Recommender(Checkpointed(block, pooled)))
    plain.load_state_dict(model.state_dict())
    p, gradients = brute.all_gradients(plain, HISTORIES)
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    keys = {n for n in gradients if "in_proj_bias" in n}  # a third of it is 0
    expected = brute.fisher(gradients, p)
    for name in keys:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-9, atol=1e-12)
    kept = {n: v for n, v in fisher.items() if n not in keys}
    assert_equal(fk.DiagFisher(kept, {}), {n: v for n, v in expected.items() if n not in keys})
    assert not caplog.records


def test_checkpoints_work_again_afterwards() -> None:
    import torch.utils.checkpoint as module

    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    model = shaken(Recommender(Checkpointed("gelu", False, use_reentrant=False)))
    for batch in (HISTORIES, HISTORIES[:, :0]):
        with contextlib.suppress(InputError, RuntimeError):
            fk.diag_fisher(model, [batch], progress=False, k=3)
        now = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
        assert now == before


class Filter(nn.Module):
    """FMLP-Rec's: a learned filter of frequencies, stored as real numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3, WIDTH, 2))
        self.how = how

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight)
        f = torch.fft.rfft(x, dim=1, norm="ortho")
        if self.how == "times":
            f = f * weight
        elif self.how == "plus":
            f = f + weight
        elif self.how == "scaled":
            f = f * self.weight[..., 0]
        elif self.how == "first":
            f = weight * f
        return torch.tanh(torch.fft.irfft(f, n=x.shape[1], dim=1, norm="ortho")).sum(1)


@pytest.mark.parametrize("size", [5, 3, 2, 1])
@pytest.mark.parametrize("how", ["times", "first", "plus"])
def test_complex_views(how: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Filter(how)), caplog, history=HISTORIES[:size])


def test_a_real_factor_of_complex_numbers(caplog: pytest.LogCaptureFixture) -> None:
    model = Recommender(Filter("scaled"))
    assert_right(model, caplog, fallback=["body.weight"], history=HISTORIES[:3])


def test_complex_parameters_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, WIDTH, dtype=torch.complex64))

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weight, n=5, dim=1).sum(1)

    with pytest.raises(InputError, match=r"'body.weight' is complex; make it a real parameter"):
        fk.diag_fisher(Recommender(Complex()), [HISTORIES], progress=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised_layers_are_refused(tied: bool) -> None:
    """They have no derivative; scales found for a batch make sequences depend on each other."""
    model = Recommender(nn.Identity())

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return self.dense(x.sum(1))

    model.body = torch.ao.quantization.quantize_dynamic(Body(), {nn.Linear})
    if tied:
        model.decoder.weight = model.items.weight
    with pytest.raises(InputError, match="no gradient comes back to items|depend on the other"):
        fk.diag_fisher(model, [HISTORIES], progress=False, k=3)


def test_a_function_without_a_derivative_is_refused() -> None:
    """As the kernels of quantised layers are, of each sequence alone."""
    library = torch.library.Library("fisherkern_tests", "FRAGMENT")
    library.define("halved(Tensor x) -> Tensor")
    library.impl("halved", lambda x: x.detach() / 2, "CPU")

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return torch.ops.fisherkern_tests.halved(x.sum(1)) * self.gain

    model = Recommender(Body())
    model.decoder.weight = model.items.weight  # whose own gradient is not all of it
    with pytest.raises(InputError, match=r"no gradient comes back to items\.weight through"):
        fk.diag_fisher(model, [HISTORIES], progress=False, k=3)


def test_a_gradient_that_never_comes_is_missed() -> None:
    """The graph touches a parameter whose gradient a function withholds."""

    class Withheld(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return x * weight

        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
            return delta, None

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return Withheld.apply(x.sum(1), self.gain)

    with pytest.raises(InputError, match=r"body\.gain received no gradient"):
        fk.diag_fisher(Recommender(Body()), [HISTORIES], progress=False, k=3)


@pytest.mark.parametrize("kind", ["embedding", "bag"])
@pytest.mark.parametrize("tied", [True, False])
def test_max_norm(kind: str, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Rows within the norm are plain; others would be changed, and are refused as they are."""

    class Normed(nn.Module):
        def __init__(self, max_norm: float | None) -> None:
            super().__init__()
            make = nn.EmbeddingBag if kind == "bag" else nn.Embedding
            self.items = make(NUM_ITEMS + 1, WIDTH, max_norm=max_norm)
            self.other = nn.Linear(WIDTH, NUM_ITEMS + 1, bias=False)
            if tied:
                self.other.weight = self.items.weight

        def forward(self, history: Tensor) -> Tensor:
            x = self.items(history)
            return self.other(torch.tanh(x if kind == "bag" else x.sum(1)))

    model, plain = shaken(Normed(100.0)), shaken(Normed(None))
    plain.load_state_dict(model.state_dict())
    p, gradients = brute.all_gradients(plain, HISTORIES)
    before = copy.deepcopy(model.state_dict())
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))
    for module in model.modules():
        if hasattr(module, "max_norm"):
            module.max_norm = 0.1
    with pytest.raises(InputError, match="an embedding with max_norm would change its weights"):
        fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_inference_mode_is_refused() -> None:
    model = Recommender(Checkpointed("norm", False))
    with torch.inference_mode(), pytest.raises(InputError, match="torch.inference_mode forbids"):
        fk.diag_fisher(model, [HISTORIES], progress=False, k=3)
    with torch.inference_mode():
        made = nn.Linear(WIDTH, NUM_ITEMS + 1)
    model.decoder = made
    with pytest.raises(InputError, match=r"'decoder.weight' was made under torch.inference_mode"):
        fk.diag_fisher(model, [HISTORIES], progress=False, k=3)


class Autocast(nn.Module):
    """GPT-2 as it is trained: a tied table, and bf16 inside the model's own forward pass."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, 8)
        self.body = nn.GRU(8, 8, batch_first=True) if body == "gru" else nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.full((8,), 0.1))  # small logits, little rounding
        self.wide = False

    def forward(self, history: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.items(history)
            if isinstance(self.body, nn.GRU):
                x = self.body(x.to(torch.bfloat16))[0]
            else:
                x = F.gelu(self.body(x))
            x = self.norm(x).sum(1) * self.gain
            logits = F.linear(x, self.items.weight)
        return logits.float() if self.wide else logits


@pytest.mark.parametrize("body", ["linear", "gru"])
@pytest.mark.parametrize("sampler", ["exact", "topk"])
def test_autocast_inside_the_model(body: str, sampler: str) -> None:
    """To the rounding of brute force in bf16, which is as far from float64."""
    torch.manual_seed(0)
    model = Autocast(body).eval()
    model.wide = True  # for the softmax of brute force
    p, gradients = brute.all_gradients(model, HISTORIES)
    model.wide = False
    fisher = fk.diag_fisher(model, [HISTORIES], sampler=sampler, k=NUM_ITEMS + 1, progress=False)
    for name, expected in brute.fisher(gradients, p).items():
        assert fisher[name].dtype == torch.float32
        assert float((fisher[name] - expected).norm()) <= 0.02 * float(expected.norm()), name


@pytest.mark.parametrize("part", ["model", "body", "in place"])
def test_compiled_parts(part: str, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo is not asked to trace the capture."""
    model = shaken(Recommender(Checkpointed("gelu", False)))
    p, gradients = brute.all_gradients(model, HISTORIES)
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    if part == "in place":
        model.body.compile(backend=backend)
    elif part == "body":
        model.body.blocks = torch.compile(model.body.blocks, backend=backend)
    subject = torch.compile(model, backend=backend) if part == "model" else model
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = fk.diag_fisher(subject, [HISTORIES], sampler="exact", progress=False)
    renamed = {name.replace("_orig_mod.", ""): value for name, value in fisher.items()}
    assert_equal(fk.DiagFisher(renamed, {}), brute.fisher(gradients, p))
    assert not traced
    assert not caplog.records


class Vmapped(Body):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.states(ids)
        attended = torch.vmap(lambda y: F.scaled_dot_product_attention(*[y[None, None]] * 3)[0, 0])
        return (torch.vmap(F.gelu)(x) + attended(x))[:, -1] @ self.items.weight.T


def test_vmap_inside_the_model() -> None:
    """No function of ours takes the place of one there."""
    model = shaken(Vmapped())
    p, gradients = brute.all_gradients(model, HISTORIES)
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))


def test_products_with_fused_attention() -> None:
    """The diagonal of F by products is that of `diag_fisher`."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.mix(x).chunk(3, dim=2))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).sum(1)

    model = shaken(Recommender(Fused()))
    product = fk.fisher_product(model, [HISTORIES])
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    zeros = {name: torch.zeros_like(value) for name, value in fisher.items()}
    for index in (0, 17, 40):
        vector = {name: value.clone() for name, value in zeros.items()}
        vector["body.mix.weight"].view(-1)[index] = 1.0
        found = product(vector)["body.mix.weight"].view(-1)[index]
        torch.testing.assert_close(found, fisher["body.mix.weight"].view(-1)[index])
