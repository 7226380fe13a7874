"""Merging by the whole Fisher matrix, against the system solved directly."""

import brute
import pytest
import torch
from helpers.merging import Toy, encoder, matrix_product, random_fisher
from models import HISTORIES, Foreign, shaken

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.merging import merge


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def matrix_of(model, history):
    p, gradients = brute.all_gradients(model, history)
    every = torch.cat([g.flatten(2) for g in gradients.values()], dim=2)
    return torch.einsum("nv,nvi,nvj->ij", p, every, every) / len(history)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.8]])
def test_against_the_direct_solve(weights):
    """Everything explicit: matrices of all gradients, one dense linear system."""
    models = [shaken(Foreign("none", width=3), seed, 0.5) for seed in range(2)]
    fishers = [fk.diag_fisher(m, [HISTORIES], sampler="exact", progress=False) for m in models]
    products = [fk.fisher_product(m, [HISTORIES]) for m in models]
    floor = 0.05
    merged = merge(
        models, method="full_fisher", fishers=fishers, products=products, weights=weights,
        floor=floor, steps=400, options={"tol": 1e-11},
    )  # fmt: skip
    lam = [w / sum(weights) for w in weights]
    left, right = 0, 0
    for model, weight in zip(models, lam, strict=True):
        matrix = matrix_of(model, HISTORIES)
        whole = matrix / matrix.diagonal().mean() + floor * torch.eye(len(matrix)).double()
        left, right = left + weight * whole, right + weight * whole @ flat(model)
    expected = torch.linalg.solve(left, right)
    torch.testing.assert_close(flat(merged), expected, rtol=1e-6, atol=1e-7)
    residuals = merged.merge_report["residuals"]
    assert residuals[0] == 1.0 and residuals[-1] < 1e-10
    # And it is not the diagonal's answer.
    diagonal = merge(models, fishers=fishers, weights=weights, floor=floor)
    assert (flat(diagonal) - expected).abs().max() > 0.01


def test_diagonal_matrices_give_the_fisher_average_in_one_step():
    """The preconditioner is then the inverse."""
    models = [encoder("abc", seed).double() for seed in range(3)]
    fishers = [
        {n: v.double() for n, v in random_fisher(m, seed).items()} for seed, m in enumerate(models)
    ]

    def product_of(fisher):
        return lambda v: {name: fisher[name] * v[name] for name in v}

    products = [product_of(fisher) for fisher in fishers]
    weights = [0.5, 0.3, 0.2]
    expected = merge(models, fishers=fishers, weights=weights)
    merged = merge(
        models, method="full_fisher", fishers=fishers, products=products, weights=weights, steps=1
    )
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-9, atol=1e-9)


def test_diagonal_matrices_and_other_catalogues():
    models = [encoder("abc", 1).double(), encoder("bde", 2).double(), encoder("a", 3).double()]
    fishers = [
        {n: v.double() for n, v in random_fisher(m, seed).items()} for seed, m in enumerate(models)
    ]
    products = [lambda v, f=f: {name: f[name] * v[name] for name in v} for f in fishers]
    weights = [0.4, 0.6, 0.0]
    expected = merge(models, fishers=fishers, weights=weights)
    merged = merge(
        models, method="full_fisher", fishers=fishers, products=products, weights=weights, steps=3
    )
    assert merged.item_ids == expected.item_ids
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-9, atol=1e-9)


def test_steps_lower_the_objective_and_zero_is_the_average():
    models = [encoder("abcd", seed).double() for seed in range(2)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    products = [matrix_product(seed) for seed in range(2)]
    means = [
        float(sum(v.double().sum() for v in f.values()) / sum(v.numel() for v in f.values()))
        for f in fishers
    ]

    def objective(model):
        total = 0.0
        for member, product, mean in zip(models, products, means, strict=True):
            d = {
                n: p.detach() - member.get_parameter(n).detach()
                for n, p in model.named_parameters()
            }
            image = product(d)
            total += sum(float((d[n] * (image[n] / mean + 0.1 * d[n])).sum()) for n in d)
        return total

    def at(steps):
        return merge(models, method="full_fisher", fishers=fishers, products=products, steps=steps)

    plain = merge(models)
    assert torch.equal(at(0).dense.weight, plain.dense.weight)
    values = [objective(at(steps)) for steps in (0, 1, 2, 4, 8, 30)]
    assert all(a > b or a == pytest.approx(b) for a, b in zip(values, values[1:], strict=False))
    assert values[-1] < 0.999 * values[0]
    best = at(200)
    for name, parameter in best.named_parameters():
        nudged = at(200)
        nudged.get_parameter(name).data += 1e-3 * torch.randn(parameter.shape).double()
        assert objective(nudged) > objective(best)


def test_what_the_fisher_cannot_decide_is_averaged():
    models = [
        Toy(key=torch.tensor([x]), f=torch.tensor([x]), w=torch.tensor([x])) for x in (0.0, 4.0)
    ]
    for model in models:
        model.f.requires_grad_(False)
    fishers = [{"key": torch.tensor([1e-16]), "w": torch.tensor([x])} for x in (3.0, 1.0)]
    products = [lambda v, f=f: {n: f[n] * v[n] for n in v} for f in fishers]
    merged = merge(
        models, method="full_fisher", fishers=fishers, products=products, floor=0.0, normalize=None
    )
    assert merged.key.item() == 2.0 and merged.f.item() == 2.0
    assert merged.w.item() == pytest.approx(1.0)


def test_bad_input():
    models = [encoder("abc", 1), encoder("abc", 2)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    good = [matrix_product(0), matrix_product(1)]

    def lacking(v):
        return {n: x for n, x in v.items() if n != "dense.bias"}

    def odd(v):
        return {n: x / 0 for n, x in v.items()}

    for products, message in [
        (good[:1], "there are 1 products for 2 members"),
        ([good[0], lacking], "the product of member 1 has no tensor 'dense.bias'"),
        ([odd, good[1]], "the product of member 0 gives a tensor .* that is not finite"),
        ([good[0], 3], "the product of member 1 is a int, not a function"),
    ]:
        with pytest.raises(InputError, match=message):
            merge(models, method="full_fisher", fishers=fishers, products=products)
    for missing in ("fishers", "products"):
        given = {"fishers": fishers, "products": good}
        del given[missing]
        with pytest.raises(InputError, match=f"method 'full_fisher' needs {missing}"):
            merge(models, method="full_fisher", **given)
    with pytest.raises(InputError, match="takes numbers as weights, not 'search'"):
        merge(
            models, method="full_fisher", fishers=fishers, products=good, weights="search",
            score=lambda m: 0.0,
        )  # fmt: skip
    other = fk.fisher_product(shaken(Foreign("none")), [HISTORIES])
    with pytest.raises(InputError, match="the product of member 0 was computed on another model"):
        merge(models, method="full_fisher", fishers=fishers, products=[other, other])
