"""Every rule against its paper's formula, transcribed number by number in loops of floats."""

import math

import pytest
import torch
from helpers.merging import Toy, encoder, random_fisher

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.merging import merge

T = torch.tensor
SHAPES = {"a": (), "b": (3,), "c": (5, 2), "d": (2, 3, 2)}


def toys(number, seed=0, dtype=torch.float64):
    """MemberSet with tensors of 0 to 3 dimensions, and a base."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Toy(**{n: torch.randn(s, generator=generator, dtype=dtype) for n, s in SHAPES.items()})
        for _ in range(number + 1)
    ]


def numbers(model, name):
    return model.get_parameter(name).detach().double().flatten().tolist()


def check(merged, expected, tol=1e-12):
    for name, values in expected.items():
        found = merged.get_parameter(name).detach().double().flatten()
        torch.testing.assert_close(
            found, torch.tensor(values, dtype=torch.float64), rtol=tol, atol=tol, msg=name
        )


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0]])
def test_task_arithmetic(weights):
    *models, base = toys(3)
    lam = [1 / 3] * 3 if weights is None else [1 / 3, 2 / 3, 0.0]
    merged = merge(
        models, method="task_arithmetic", base=base, weights=weights, options={"scale": 0.4}
    )
    expected = {}
    for name in SHAPES:
        start = numbers(base, name)
        expected[name] = [
            start[i] + 0.4 * sum(3 * lam[m] * (numbers(models[m], name)[i] - start[i])
                                 for m in range(3))
            for i in range(len(start))
        ]  # fmt: skip
    check(merged, expected)


def ties_by_hand(models, base, density, scale, lam, per):
    names = list(SHAPES)
    taus = [
        {n: [x - y for x, y in zip(numbers(m, n), numbers(base, n), strict=True)] for n in names}
        for m in models
    ]
    trimmed = []
    for tau in taus:
        kept = {}
        for group in [names] if per == "model" else [[n] for n in names]:
            sizes = sorted((abs(x) for n in group for x in tau[n]), reverse=True)
            last = sizes[max(1, round(density * len(sizes))) - 1]
            for n in group:
                kept[n] = [x if abs(x) >= last else 0.0 for x in tau[n]]
        trimmed.append(kept)
    merged = {}
    for n in names:
        start, merged[n] = numbers(base, n), []
        for i in range(len(start)):
            mass = sum(w * tau[n][i] for w, tau in zip(lam, trimmed, strict=True))
            agree = [
                (w, tau[n][i]) for w, tau in zip(lam, trimmed, strict=True) if tau[n][i] * mass > 0
            ]
            total = sum(w for w, _ in agree)
            mean = sum(w * x for w, x in agree) / total if total else 0.0
            merged[n].append(start[i] + scale * mean)
    return merged


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])
def test_ties(per, density, scale):
    *models, base = toys(4, seed=1)
    lam = [0.1, 0.2, 0.3, 0.4]
    options = {"density": density, "scale": scale, "per": per}
    merged = merge(models, method="ties", base=base, weights=lam, options=options)
    check(merged, ties_by_hand(models, base, density, scale, lam, per))


def test_ties_trims_exactly_where_magnitudes_are_equal_or_tiny():
    base = Toy(w=torch.zeros(6).double())
    tiny = [1e-300, -2e-300, 3e-300, 3e-300, 0.0, 5e-324]
    model = Toy(w=torch.tensor(tiny, dtype=torch.float64))
    merged = merge([model], method="ties", base=base, options={"density": 1 / 6})
    assert merged.w.tolist() == [0.0, 0.0, 3e-300, 3e-300, 0.0, 0.0]
    merged = merge([model], method="ties", base=base, options={"density": 5 / 6})
    assert merged.w.tolist() == model.w.tolist()


def test_ties_trims_more_entries_than_torch_quantile_takes():
    # The selection never holds the entries: checked on a count beyond 2^24.
    values = torch.linspace(1, 2, 17_000_000)
    base = Toy(w=torch.zeros_like(values))
    merged = merge([Toy(w=values)], method="ties", base=base, options={"density": 0.25})
    last = values.kthvalue(17_000_000 - 4_250_000 + 1).values
    assert torch.equal(merged.w.data, torch.where(values >= last, values, 0.0))


def test_ties_between_members_that_cancel_stays_at_the_base():
    base = Toy(w=T([1.0, 1.0]))
    models = [Toy(w=T([2.0, 3.0])), Toy(w=T([0.0, 0.0]))]
    merged = merge(models, method="ties", base=base, options={"density": 1.0})
    assert merged.w.tolist() == [1.0, 3.0]


def test_dare_keeps_the_expectation_and_drops_its_share():
    base, model = Toy(w=torch.zeros(200, 50)), Toy(w=torch.ones(200, 50))
    options = {"density": 0.25, "scale": 1.0}
    merged = merge([model], method="dare", base=base, options=options)
    assert set(merged.w.unique().tolist()) == {0.0, 4.0}
    # 10,000 draws: five standard errors.
    assert abs(float(merged.w.data.mean()) - 1.0) < 5 * 4 * math.sqrt(0.25 * 0.75 / 10_000)
    again = merge([model], method="dare", base=base, options=options)
    other = merge([model], method="dare", base=base, options=options, seed=1)
    assert torch.equal(merged.w, again.w) and not torch.equal(merged.w, other.w)


def test_dare_draws_for_members_and_tensors_apart_and_not_by_block(monkeypatch):
    from fisherkern.merging import blocks

    base = Toy(u=torch.zeros(64, 3), v=torch.zeros(64, 3))
    models = [Toy(u=torch.full((64, 3), x), v=torch.full((64, 3), x)) for x in (1.0, 10.0)]
    options = {"density": 0.5, "scale": 1.0}
    merged = merge(models, method="dare", base=base, options=options)
    assert set(merged.u.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}
    assert not torch.equal(merged.u, merged.v)
    monkeypatch.setattr(blocks, "BLOCK", 7)
    small = merge(models, method="dare", base=base, options=options)
    assert torch.equal(small.u, merged.u) and torch.equal(small.v, merged.v)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_two(t):
    *models, _ = toys(2, seed=2)
    merged = merge(models, method="slerp", weights=[1 - t, t])
    expected = {}
    for name in ("b", "c", "d"):
        x, y = numbers(models[0], name), numbers(models[1], name)
        size = [math.sqrt(sum(v * v for v in z)) for z in (x, y)]
        omega = math.acos(sum(p * q for p, q in zip(x, y, strict=True)) / size[0] / size[1])
        first, second = (math.sin(s * omega) / math.sin(omega) for s in (1 - t, t))
        length = (1 - t) * size[0] + t * size[1]
        expected[name] = [
            length * (first * p / size[0] + second * q / size[1]) for p, q in zip(x, y, strict=True)
        ]
    check(merged, expected)


def test_slerp_of_three_keeps_the_length_and_the_middle():
    models = [Toy(w=3 * row) for row in torch.eye(3).double()]
    merged = merge(models, method="slerp")
    torch.testing.assert_close(merged.w.data, torch.full((3,), math.sqrt(3)).double())
    # On one great circle three members are places on it: angles 0.1, 0.4 and 1.0.
    angles = [0.1, 0.4, 1.0]
    models = [Toy(w=T([math.cos(a), math.sin(a)]).double()) for a in angles]
    merged = merge(models, method="slerp", weights=[2, 1, 1])
    middle = 0.5 * 0.1 + 0.25 * 0.4 + 0.25 * 1.0
    expected = T([math.cos(middle), math.sin(middle)]).double()
    torch.testing.assert_close(merged.w.data, expected)


def test_slerp_where_there_is_no_angle():
    models = [Toy(u=T([1.0, 0.0]), v=T([0.0, 0.0]), w=T(2.0)) for _ in range(2)]
    models[1].u.data.neg_()
    models[1].v.data.fill_(4.0)
    models[1].w.data.fill_(3.0)
    merged = merge(models, method="slerp", weights=[1, 3])
    assert merged.u.tolist() == [-0.5, 0.0]
    assert merged.v.tolist() == [3.0, 3.0] and merged.w.item() == 2.75
    # One of three opposite to where the others meet: which way to it?
    models = [Toy(w=T(row)) for row in ([-1.0, 0.0], [0.6, 0.8], [0.6, -0.8])]
    merged = merge(models, method="slerp")
    torch.testing.assert_close(merged.w.data, T([0.2 / 3, 0.0]))


def test_slerp_leaves_rows_of_one_owner_alone():
    models = [encoder("abc", 1), encoder("bcd", 2)]
    merged = merge(models, method="slerp")
    table = dict(zip(merged.item_ids, merged.item_embedding.weight[1:-1], strict=True))
    assert torch.equal(table["a"], models[0].item_embedding.weight[1])
    assert torch.equal(table["d"], models[1].item_embedding.weight[3])
    shared = [
        torch.cat([m.item_embedding.weight.detach()[r] for r in rows]).double()
        for m, rows in zip(models, ((0, 2, 3, 4), (0, 1, 2, 4)), strict=True)
    ]
    size = [float(x.norm()) for x in shared]
    omega = math.acos(float(shared[0] @ shared[1]) / size[0] / size[1])
    unit = sum(math.sin(omega / 2) / math.sin(omega) * x / s
               for x, s in zip(shared, size, strict=True))  # fmt: skip
    expected = sum(size) / 2 * unit
    found = torch.cat([merged.item_embedding.weight.detach()[r] for r in (0, 2, 3, 5)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def entropy_by_hand(values, bins):
    low, high = min(values), max(values)
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(place, bins - 1)] += 1
    shares = [count / len(values) for count in counts]
    return -sum(p * math.log(p) for p in shares if p)


@pytest.mark.parametrize("weights", [None, [0.2, 0.8]])
@pytest.mark.parametrize("criterion", ["entropy", "l1"])
def test_pcrec(criterion, weights):
    *models, _ = toys(2, seed=3)
    options = {"criterion": criterion, "alpha": 7.0, "bins": 4}
    merged = merge(models, method="pcrec", options=options, weights=weights)
    expected, share = {}, None
    # a and b come before the first matrix and go with it.
    for name in ("c", "a", "b", "d"):
        if name in ("c", "d"):
            values = [numbers(model, name) for model in models]
            if criterion == "entropy":
                h = [entropy_by_hand(own, 4) for own in values]
            else:
                sums = [sum(map(abs, own)) for own in values]
                h = [one / sum(sums) for one in sums]
            odds = math.exp(-7.0 * (h[0] - h[1])) * (1.0 if weights is None else 4.0)
            share = 1 / (1 + odds)
        expected[name] = [
            share * x + (1 - share) * y
            for x, y in zip(numbers(models[0], name), numbers(models[1], name), strict=True)
        ]
    check(merged, expected)


def test_pcrec_vectors_follow_the_matrix_before_them():
    one = Toy(w=T([[0.0, 1.0, 2.0, 3.0]]), bias=T([0.0]), norm=T([0.0]))
    two = Toy(w=T([[0.0, 0.0, 0.0, 3.0]]), bias=T([1.0]), norm=T([1.0]))
    merged = merge([one, two], method="pcrec", options={"alpha": 1e4})
    assert merged.bias.tolist() == [0.0] and merged.norm.tolist() == [0.0]
    # Of constant tensors neither carries any.
    flat = [Toy(w=T([[x, x]])) for x in (1.0, 3.0)]
    assert merge(flat, method="pcrec").w.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("group", ["row", "neuron", "tensor"])
def test_fisher_by_groups(group):
    models = [encoder("abcd", seed) for seed in (1, 2)]
    models = [model.double() for model in models]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    merged = merge(models, fishers=fishers, floor=0.3, options={"group": group})
    means = [
        float(sum(v.sum() for v in f.values()) / sum(v.numel() for v in f.values()))
        for f in fishers
    ]
    for name, parameter in merged.named_parameters():
        for row in range(len(parameter)):
            shares = []
            for fisher, mean in zip(fishers, means, strict=True):
                entries = fisher[name].tolist() if group == "tensor" else [fisher[name][row]]
                entries = torch.as_tensor(entries).flatten().tolist() if group == "tensor" else (
                    torch.atleast_1d(entries[0]).tolist()
                )  # fmt: skip
                if group == "neuron" and name.startswith("dense"):
                    entries = [
                        *fisher["dense.weight"][row].tolist(),
                        float(fisher["dense.bias"][row]),
                    ]
                shares.append(sum(entries) / len(entries) / mean + 0.3)
            expected = sum(
                share * model.get_parameter(name)[row].detach()
                for share, model in zip(shares, models, strict=True)
            ) / sum(shares)
            torch.testing.assert_close(parameter[row].detach(), expected, rtol=1e-6, atol=1e-6)


def test_fisher_by_heads():
    models = [fk.BERT4Rec(7, max_len=4, dim=6, layers=2, heads=3).double() for _ in range(2)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    fishers = [
        {n: v.double() for n, v in random_fisher(m, seed).items()} for seed, m in enumerate(models)
    ]
    merged = merge(models, fishers=fishers, floor=0.3, options={"group": "head"})
    units = [float(torch.cat([v.flatten() for v in f.values()]).mean()) for f in fishers]
    for layer in ("blocks.0.attention", "blocks.1.attention"):
        for head in range(3):
            part = slice(2 * head, 2 * head + 2)
            shares = []
            for fisher, unit in zip(fishers, units, strict=True):
                entries = [fisher[f"{layer}.output.weight"][:, part].flatten()]
                for name in ("query", "key", "value"):
                    entries.append(fisher[f"{layer}.{name}.weight"][part].flatten())
                    entries.append(fisher[f"{layer}.{name}.bias"][part])
                shares.append(float(torch.cat(entries).mean()) / unit + 0.3)
            share = shares[0] / sum(shares)
            for name in ("query.weight", "key.bias", "output.weight"):
                one, two, found = (
                    m.get_parameter(f"{layer}.{name}").detach() for m in (*models, merged)
                )
                cut = (slice(None), part) if name == "output.weight" else part
                expected = share * one + (1 - share) * two
                torch.testing.assert_close(found[cut], expected[cut])
    neurons = merge(models, fishers=fishers, floor=0.3, options={"group": "neuron"})
    name = "blocks.1.feed_forward.inner.weight"
    assert torch.equal(merged.get_parameter(name), neurons.get_parameter(name))
    with pytest.raises(InputError, match="no attention heads are known of the members"):
        toy = [Toy(w=T([1.0])), Toy(w=T([2.0]))]
        merge(toy, fishers=[{"w": T([1.0])}] * 2, options={"group": "head"})


def test_regmean_is_the_papers_formula():
    torch.manual_seed(4)
    models = [Toy(w=torch.randn(4, 3).double(), v=torch.randn(3).double()) for _ in range(3)]
    inputs = [torch.randn(9, 3).double() * T([1.0, 100.0, 0.01]) for _ in models]
    grams = [{"w": x.T @ x / len(x)} for x in inputs]
    lam, alpha = [0.5, 0.3, 0.2], 0.7
    options = {"alpha": alpha, "ridge": 0.0}
    merged = merge(models, method="regmean", grams=grams, weights=lam, options=options)
    left, right = torch.zeros(3, 3).double(), torch.zeros(3, 4).double()
    for model, gram, weight in zip(models, grams, lam, strict=True):
        g = gram["w"].clone()
        for i in range(3):
            for j in range(3):
                g[i, j] *= 1.0 if i == j else alpha
        left += weight * g
        right += weight * g @ model.w.detach().T
    torch.testing.assert_close(merged.w.data, torch.linalg.solve(left, right).T, rtol=1e-9, atol=0)
    plain = sum(w * m.v.detach() for w, m in zip(lam, models, strict=True))
    torch.testing.assert_close(merged.v.data, plain)


def test_regmean_with_inputs_that_never_vary():
    # fusion_bench inverts such a matrix; here the untouched directions keep the average.
    models = [Toy(w=T([[2.0, 0.0]])), Toy(w=T([[4.0, 8.0]]))]
    grams = [{"w": T([[1.0, 0.0], [0.0, 0.0]])}, {"w": T([[3.0, 0.0], [0.0, 0.0]])}]
    merged = merge(models, method="regmean", grams=grams, options={"ridge": 0.0})
    torch.testing.assert_close(merged.w.data, T([[3.5, 4.0]]))
    nothing = [{"w": torch.zeros(2, 2)}] * 2
    merged = merge(models, method="regmean", grams=nothing, options={"ridge": 0.0})
    torch.testing.assert_close(merged.w.data, T([[3.0, 4.0]]))


def test_regmean_solves_the_rows_of_different_owners_apart():
    models = [encoder("abc", 1).double(), encoder("bcd", 2).double()]
    torch.manual_seed(0)
    inputs = [torch.randn(5, 2).double() for _ in models]
    grams = [{"item_embedding.weight": x.T @ x} for x in inputs]
    options = {"alpha": 1.0, "ridge": 0.0}
    merged = merge(models, method="regmean", grams=grams, options=options)
    table = dict(zip(merged.item_ids, merged.item_embedding.weight[1:-1].detach(), strict=True))
    own = [dict(zip(m.item_ids, m.item_embedding.weight[1:-1].detach(), strict=True))
           for m in models]  # fmt: skip
    assert torch.equal(table["a"], own[0]["a"]) and torch.equal(table["d"], own[1]["d"])
    g = [x.T @ x for x in inputs]
    expected = torch.linalg.solve(g[0] + g[1], g[0] @ own[0]["b"] + g[1] @ own[1]["b"])
    torch.testing.assert_close(table["b"], expected)


def test_regmean_takes_the_fisher_for_what_has_no_gram():
    models = [Toy(w=T([[0.0]]), v=T([0.0])), Toy(w=T([[4.0]]), v=T([4.0]))]
    grams = [{"w": T([[1.0]])}, {"w": T([[1.0]])}]
    fishers = [{"w": T([[1.0]]), "v": T([1.0])}, {"w": T([[1.0]]), "v": T([3.0])}]
    merged = merge(
        models, method="regmean", grams=grams, fishers=fishers, floor=0.0, normalize=None
    )
    assert merged.w.item() == 2.0 and merged.v.item() == 3.0


def test_a_base_with_other_items():
    models = [encoder("abc", 1), encoder("cd", 2)]
    base = encoder("zdb", 3)
    merged = merge(models, method="task_arithmetic", base=base, options={"scale": 0.5})
    tables = [dict(zip(m.item_ids, m.output_bias.tolist(), strict=True)) for m in (*models, base)]
    found = dict(zip(merged.item_ids, merged.output_bias.tolist(), strict=True))
    assert list(found) == ["a", "b", "c", "d"]
    # Base and one owner: half its task vector. No base: the owners' average.
    assert found["b"] == pytest.approx(tables[2]["b"] + 0.5 * (tables[0]["b"] - tables[2]["b"]))
    assert found["d"] == pytest.approx(tables[2]["d"] + 0.5 * (tables[1]["d"] - tables[2]["d"]))
    assert found["a"] == tables[0]["a"]
    assert found["c"] == pytest.approx((tables[0]["c"] + tables[1]["c"]) / 2)
    same = merge(models, method="ties", base=base, options={"density": 1.0})
    kept = dict(zip(same.item_ids, same.output_bias.tolist(), strict=True))
    assert kept["b"] == tables[0]["b"] and kept["d"] == tables[1]["d"]
