"""The Fisher matrix times a vector, against the matrix of all gradients, in float64."""

import brute
import pytest
import torch
from models import HISTORIES, NUM_ITEMS, Foreign, bert, shaken

import fisherkern as fk
from fisherkern.errors import InputError


def matrix_of(model, history):
    """(P, P): (1/N) sum_n sum_y p g g^T, and the names and sizes of its parts."""
    p, gradients = brute.all_gradients(model, history)
    flat = torch.cat([g.flatten(2) for g in gradients.values()], dim=2)
    return torch.einsum("nv,nvi,nvj->ij", p, flat, flat) / len(history)


def vector_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def flat(vector):
    return torch.cat([value.flatten() for value in vector.values()])


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_against_the_explicit_matrix(tied, chunk):
    model = bert(tied=tied, layers=1)
    product = fk.fisher_product(model, [HISTORIES[:3], HISTORIES[3:]], chunk=chunk)
    matrix = matrix_of(model, HISTORIES)
    for seed in range(2):
        vector = vector_of(model, seed)
        torch.testing.assert_close(
            flat(product(vector)), matrix @ flat(vector), rtol=1e-10, atol=1e-12
        )
    assert product.meta["num_sequences"] == len(HISTORIES)


@pytest.mark.parametrize("tie", ["matmul", "module", "alias", "none"])
def test_other_peoples_models_and_frozen_parameters(tie):
    model = shaken(Foreign(tie))
    model.position.requires_grad_(False)
    product = fk.fisher_product(model, [HISTORIES])
    matrix = matrix_of(model, HISTORIES)
    vector = vector_of(model, 0)
    found = product(vector)
    assert set(found) == set(vector) and "position" not in found
    torch.testing.assert_close(flat(found), matrix @ flat(vector), rtol=1e-10, atol=1e-12)


def test_its_diagonal_is_that_of_diag_fisher():
    model = bert(layers=1)
    product = fk.fisher_product(model, [HISTORIES])
    fisher = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    name = "blocks.0.feed_forward.inner.bias"
    for index in range(7):
        unit = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        unit[name][index] = 1
        torch.testing.assert_close(product(unit)[name][index], fisher[name][index])


def test_columns_that_are_never_predicted():
    class Masked(Foreign):
        def forward(self, history):
            logits = super().forward(history)
            return logits.masked_fill(torch.arange(logits.shape[1]) == 0, -torch.inf)

    model = shaken(Masked("none"))
    vector = vector_of(model, 0)
    found = fk.fisher_product(model, [HISTORIES])(vector)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert float(found["decoder.bias"][0]) == 0.0
    torch.testing.assert_close(found["decoder.bias"].sum(), torch.tensor(0.0).double())


def test_float32_and_training_mode():
    model = bert(layers=1).float().train()
    product = fk.fisher_product(model, [HISTORIES])
    vector = vector_of(model, 0)
    wide = fk.fisher_product(bert(layers=1), [HISTORIES])(vector)
    found = product(vector)
    assert model.training and found["output_bias"].dtype == torch.float32
    torch.testing.assert_close(flat(found).double(), flat(wide), rtol=1e-3, atol=1e-5)


def test_bad_input():
    model = bert(layers=1)
    with pytest.raises(InputError, match="loader: it gave no sequences"):
        fk.fisher_product(model, [])
    with pytest.raises(InputError, match="chunk: must be at least 1, got 0"):
        fk.fisher_product(model, [HISTORIES], chunk=0)
    with pytest.raises(InputError, match="vector: a NoneType is no mapping"):
        fk.fisher_product(model, [HISTORIES])(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="vector: it has no tensor 'output_bias'"):
        fk.fisher_product(model, [HISTORIES])(
            {n: p for n, p in vector_of(model, 0).items() if n != "output_bias"}
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        fk.fisher_product(model, [HISTORIES])


class Scored(torch.nn.Module):
    """Scores whose gradient, or value, is no function of each sequence alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.items = torch.nn.Embedding(NUM_ITEMS + 1, 4, scale_grad_by_freq=kind == "frequency")
        self.out = torch.nn.Linear(4, NUM_ITEMS)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        h = self.items(history).mean(1)
        if self.kind == "random":
            h = torch.nn.functional.dropout(h, 0.5, training=True)
        if self.kind == "batch":
            h = h * h.softmax(0)
        if self.kind == "distance":
            return -torch.cdist(h, self.out.weight)
        return self.out(h)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random", "two passes over one batch"),
        ("batch", "depend on the other sequences"),
        ("frequency", r"products of 'items\.weight' are .*scale_grad_by_freq"),
        ("distance", "cannot be derived twice"),
    ],
)
def test_what_has_no_product_is_refused(kind: str, message: str) -> None:
    model = Scored(kind).double()
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        fk.fisher_product(model, [HISTORIES])(vector)
