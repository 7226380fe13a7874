"""What every rule does with odd members, and what it says of wrong ones."""

import math

import pytest
import torch
from helpers.merging import Toy, arguments_for, encoder, random_fisher

from fisherkern.errors import InputError
from fisherkern.merging import METHODS, merge

T = torch.tensor
methods = pytest.mark.parametrize("method", METHODS)


def run(method, models, **changes):
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    arguments = arguments_for(method, models, fishers, [1.0] * len(models))
    return merge(models, **{**arguments, **changes})


@methods
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_members_that_are_not_finite(method, value):
    models = [encoder("abc", 1), encoder("bcd", 2)]
    models[1].dense.weight.data[1, 0] = value
    with pytest.raises(InputError, match="tensor 'dense.weight' of member 1 holds"):
        run(method, models)


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_sums_do_not_overflow(method, dtype):
    models = [encoder("abc", seed).to(dtype) for seed in (1, 2, 3)]
    size = 60000.0 if dtype == torch.float16 else 3e38
    if method in ("learned_soup", "layer_wise"):
        size = 1000.0  # the model itself runs with them
    for model in models:
        model.output_bias.data.fill_(size)
    base = arguments_for(method, models, [{}] * 3, [1.0])
    if "base" in base:
        base["base"].output_bias.data.fill_(size)
    changes = {"base": base["base"]} if "base" in base else {}
    if "products" in base:
        # Products of numbers this size overflow on their own.
        changes["products"] = [lambda v: {n: torch.ones_like(x) for n, x in v.items()}] * 3
    if method in ("learned_soup", "layer_wise"):
        changes["validation"] = [(torch.tensor([[0, 1]]), torch.tensor([1]))]
    merged = run(method, models, **changes)
    for name, parameter in merged.named_parameters():
        assert parameter.dtype == dtype and bool(parameter.isfinite().all()), name
    assert torch.equal(merged.output_bias, models[0].output_bias)


@methods
def test_integers_buffers_and_frozen_parameters_stay(method):
    models = [encoder("abc", seed) for seed in (1, 2)]
    base = encoder("abcz", 77)
    for number, model in enumerate([*models, base]):
        model.dense.bias.requires_grad_(False)
        model.register_buffer("count", T([3, 4]))
        model.register_buffer("mask", T([0.0, -torch.inf]))
        model.register_buffer("mean", T([float(number)]))
        model.mode = number == 0
    models[1].train(False)
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    for fisher in fishers:
        del fisher["dense.bias"]
    changes = {"base": base} if "base" in METHODS[method].inputs else {}
    arguments = arguments_for(method, models, fishers, [1.0, 1.0])
    merged = merge(models, **{**arguments, **changes})
    assert merged.count.tolist() == [3, 4] and merged.mask.tolist() == [0.0, -torch.inf]
    report = merged.merge_report
    lam = report["weights"]
    lam = lam["mean"] if isinstance(lam, dict) else lam
    assert merged.mean.tolist() == pytest.approx([lam[1]])
    assert report["averaged_buffers"] == ["mean"]
    assert not merged.dense.bias.requires_grad and merged.dense.weight.requires_grad
    models[1].count[0] = 9
    with pytest.raises(InputError, match="'count' of member 1 differs"):
        merge(models, **{**arguments, **changes})


@methods
def test_one_member_is_itself_and_the_report_is_json(method):
    import json

    model = encoder("abc", 1)
    merged = run(method, [model])
    for name, parameter in model.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name
        assert merged.get_parameter(name) is not parameter
    report = merged.merge_report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@methods
def test_blocks_do_not_show(method, monkeypatch):
    from fisherkern.merging import blocks

    models = [encoder("abcdefg", 1), encoder("gfxyabz", 2)]
    whole = run(method, models)
    monkeypatch.setattr(blocks, "BLOCK", 5)
    parts = run(method, models)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


@methods
def test_arguments_of_other_rules_are_refused(method):
    models = [encoder("abc", 1), encoder("abc", 2)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    rule = METHODS[method]
    every = {
        "base": models[0], "grams": [{}, {}], "products": [abs, abs],
        "validation": [], "fishers": fishers, "weights": [1, 1],
    }  # fmt: skip
    for name, value in every.items():
        if name not in rule.inputs:
            with pytest.raises(InputError, match=f"method '{method}' takes no {name}"):
                run(method, models, **{name: value})
    for name, use in rule.inputs.items():
        if use == "must":
            with pytest.raises(InputError, match=f"method '{method}' needs {name}: "):
                run(method, models, **{name: None})


def bad_base(change):
    base = encoder("abc", 3)
    change(base)
    return base


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Toy(w=T([1.0])), "the base is a Toy and member 0 a Encoder"),
        (bad_base(lambda m: m.dense.bias.data.fill_(torch.nan)), "of the base holds a NaN"),
        (bad_base(lambda m: m.dense.bias.data.fill_(torch.inf)), "of the base holds an infinity"),
        (bad_base(lambda m: m.double()), "'output_bias' is torch.float64 in the base"),
        (encoder("abc", 1, dim=3), r"has shape \(5, 3\) in the base"),
        (encoder("abc", 1, heads=2), "the base was built with heads=2"),
        (bad_base(lambda m: setattr(m, "item_ids", None)), "the base has no item_ids"),
        (bad_base(lambda m: setattr(m, "item_ids", list("aab"))), "the base has item id 'a' twice"),
        (bad_base(lambda m: setattr(m, "item_ids", ["a"])), "the base has 3 items but 1 item_ids"),
        (bad_base(lambda m: m.register_buffer("x", T([1]))), "no tensor 'x', which the base has"),
    ],
)  # fmt: skip
def test_bases_that_do_not_fit(base, message):
    with pytest.raises(InputError, match=message):
        merge([encoder("abc", 1), encoder("bcd", 2)], method="ties", base=base)


def test_grams_that_do_not_fit():
    models = [encoder("abc", 1), encoder("abc", 2)]
    good, whose = {"dense.weight": torch.eye(2)}, "the Gram mapping of member 1"
    for gram, message in [
        ({"dense.weight": torch.eye(3)}, rf"'dense.weight' of {whose} has shape \(3, 3\)"),
        ({"dense.bias": torch.eye(2)}, f"'dense.bias' of {whose} has shape"),
        ({"x": torch.eye(2)}, f"{whose} has a tensor 'x', which the model does not"),
        ({"dense.weight": torch.eye(2) / 0}, f"of {whose} holds a value that is not finite"),
        ({"dense.weight": -torch.eye(2)}, f"of {whose} has a negative diagonal entry"),
        ([1], f"{whose} is a list, not a mapping"),
    ]:
        with pytest.raises(InputError, match=message):
            merge(models, method="regmean", grams=[good, gram])
    with pytest.raises(InputError, match="there are 1 grams for 2 members"):
        merge(models, method="regmean", grams=[good])
    # What only one member has a matrix of is averaged.
    merged = merge(models, method="regmean", grams=[good, {}])
    assert torch.equal(merged.dense.weight, merge(models).dense.weight)


def test_donors_of_no_information_give_no_nan():
    # mmatena/model_merging: at lambda (0, 1) a donor entry of zero Fisher is 0/0.
    models = [Toy(w=T([1.0, 1.0])), Toy(w=T([3.0, 3.0]))]
    fishers = [{"w": T([1.0, 1.0])}, {"w": T([0.0, 2.0])}]
    for floor in (0.0, 0.1):
        merged = merge(models, fishers=fishers, weights=[0, 1], floor=floor)
        assert merged.w.tolist() == [3.0, 3.0]


def test_rows_nobody_saw_are_averaged_whatever_the_norms():
    # fusion_bench adds its floor before it normalises: such a row goes to the smaller Fisher.
    models = [Toy(w=T([[1.0], [0.0]])), Toy(w=T([[3.0], [0.0]]))]
    fishers = [{"w": T([[0.0], [1.0]])}, {"w": T([[0.0], [100.0]])}]
    assert merge(models, fishers=fishers).w[0].item() == 2.0
    # And small Fishers are not swamped: 1e-9 against 3e-9 is 1 to 3.
    small = [{"w": T([[1e-9], [1e-9]])}, {"w": T([[3e-9], [3e-9]])}]
    merged = merge(models, fishers=small, floor=0.0, normalize=None)
    assert merged.w[0].item() == pytest.approx(2.5)


def test_pcrec_counts_the_largest_weight():
    # Its authors' histogram drops it: [0, 1] would have one weight in one bin, entropy 0.35.
    models = [Toy(w=T([[0.0, 1.0]])), Toy(w=T([[0.5, 0.5]]))]
    merged = merge(models, method="pcrec", options={"alpha": 1.0, "bins": 2})
    assert merged.w[0, 0].item() == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"densty": 0.1}, "has no option 'densty'; it has density, scale, per"),
        ("uniform", {"scale": 1.0}, "method 'uniform' has no option 'scale'; it has none"),
        ("ties", {"density": 0.0}, "'density' is 0.0 where a number above 0 and at most 1 was"),
        ("ties", {"density": 1.5}, "option 'density' is 1.5"),
        ("ties", {"density": "0.5"}, "option 'density' is '0.5'"),
        ("ties", {"scale": math.nan}, "'scale' is nan where a number of at least 0 was"),
        ("ties", {"scale": True}, "option 'scale' is True"),
        ("ties", {"per": "layer"}, "'per' is 'layer' where 'model' or 'tensor' was expected"),
        ("pcrec", {"bins": 2.5}, "'bins' is 2.5 where an integer of at least 1 was expected"),
        ("ties", [1], "options is a list, not a mapping"),
    ],
)
def test_options(method, options, message):
    models = [Toy(w=T([x])) for x in (1.0, 2.0)]
    given = {"base": Toy(w=T([0.0]))} if method == "ties" else {}
    with pytest.raises(InputError, match=message):
        merge(models, method=method, options=options, **given)
