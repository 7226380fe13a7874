"""Bad input: one clear sentence each."""

import copy

import pytest
import torch
from helpers.merging import FisherWithMeta, Open, Toy, encoder, random_fisher
from torch import nn

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.merging import merge

T = torch.tensor


def refuse(message, models, **arguments):
    with pytest.raises(InputError, match=message) as caught:
        merge(models, **arguments)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")


def pair():
    return [encoder("abc", 1), encoder("abc", 2)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights has 1 numbers for 2 members"),
        ([1, 1, 1], "weights has 3 numbers for 2 members"),
        ([1.0, -0.5], "weight 1 is -0.5 where at least 0"),
        ([float("nan"), 1.0], "weight 0 is nan"),
        ([1.0, float("inf")], "weight 1 is inf"),
        ([0.0, 0.0], "the weights sum to 0"),
        (["a", 1], "2 numbers were expected"),
        ({0: 3.0, 1: 1.0}, "2 numbers were expected"),
        ({1.0, 3.0}, "2 numbers were expected"),
        (3.0, "2 numbers were expected"),
        ("best", "weights is 'best' where numbers, 'search' or one of"),
    ],
)
def test_weights(weights, message):
    refuse(message, pair(), weights=weights)


def test_weights_of_any_size():
    assert merge(pair(), weights=[1e308, 1e308]).merge_report["weights"] == [0.5, 0.5]
    assert merge(pair(), weights=[5e-324, 5e-324]).merge_report["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "median"}, "method 'median' is not one of uniform, weighted, fisher"),
        ({"method": "uniform", "weights": [1, 1]}, "method 'uniform' takes no weights"),
        ({"method": "weighted"}, "method 'weighted' needs weights"),
        ({"method": "fisher"}, "method 'fisher' needs fishers"),
        ({"method": "uniform", "fishers": [{}, {}]}, "method 'uniform' takes no fishers"),
        ({"weights": "search"}, "weights='search' needs score="),
        ({"score": lambda model: 0.0}, "score= is used by weights='search' only"),
        ({"floor": -0.1}, "floor is -0.1"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"floor": "0.1"}, "floor is '0.1'"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"method": ["uniform"]}, "is not one of uniform"),
        ({"weights": "search", "score": 3}, "score: a int is no function"),
        ({"weights": "search", "score": lambda model: 1.0, "steps": 1.5}, "steps must be an int"),
        ({"weights": "search", "score": lambda model: None}, "is None, not a finite number"),
        ({"normalize": "max"}, "normalize is 'max'"),
        ({"item_ids": [["a"]]}, "item_ids has 1 lists for 2 members"),
        ({"fishers": ["a.safetensors"] * 2}, "the Fisher of member 0 is a str, not a mapping"),
        ({"fishers": [{}]}, "there are 1 fishers for 2 members"),
        (
            {"weights": "search", "score": lambda model: float("nan")},
            "the score at weights .* is nan, not a finite number",
        ),
    ],
)
def test_options(arguments, message):
    refuse(message, pair(), **arguments)


def test_members_that_do_not_fit():
    refuse("there is no model to merge", [])
    refuse("member 1 is a dict, not an nn.Module", [Toy(w=T([1.0])), {}])
    refuse("member 1 is a Linear and member 0 a Toy", [Toy(w=T([1.0])), nn.Linear(1, 1)])
    one = Toy(w=T([1.0, 2.0]))
    refuse(
        r"tensor 'w' has shape \(3,\) in member 1 and \(2,\) in member 0",
        [one, Toy(w=torch.zeros(3))],
    )
    refuse("'w' has shape", [one, Toy(w=torch.zeros(2, 1))])
    refuse("'w' is torch.float64 in member 1", [one, Toy(w=torch.zeros(2).double())])
    more = Toy(w=T([1.0, 2.0]), v=T([1.0]))
    refuse("member 1 has no tensor 'v', which member 0 has", [more, one])
    refuse("member 0 has no tensor 'v', which member 1 has", [one, more])
    refuse("there is a Toy where several models were expected", one)
    refuse("member 1: 'w' has no values yet", [one, Toy(w=T([1.0, 2.0])).to("meta")])
    refuse("member 0: 'weight' has no values yet", [nn.LazyLinear(2)])


def test_widths_that_differ_are_shapes_even_where_catalogues_differ():
    models = [encoder("abc", 1, dim=2), encoder("cd", 2, dim=3)]
    refuse(r"'item_embedding.weight' has shape \(4, 3\) in member 1", models)


def test_other_settings_of_the_same_shapes():
    models = [encoder("abc", 1, heads=1), encoder("abc", 2, heads=2)]
    refuse("member 1 was built with heads=2 and member 0 with heads=1", models)
    merge([encoder("abc", 1, dropout=0.1), encoder("abc", 2, dropout=0.5)])


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_members_that_are_not_finite(value, what):
    models = pair()
    models[1].dense.weight.data[1, 0] = value
    refuse(f"tensor 'dense.weight' of member 1 holds (a )?{what}", models)


def test_buffers_that_cannot_be_averaged():
    def toy(**buffers):
        return Toy(buffers=buffers, w=T([1.0]))

    for a, b in (([3], [4]), ([True], [False])):
        message = f"'count' of member 1 differs .* values of type {T(a).dtype}"
        refuse(message, [toy(count=T(a)), toy(count=T(b))])
    values = torch.eye(2)
    for kind in (torch.complex64, torch.float8_e4m3fn):
        message = f"'v' of member 1 differs .* values of type {kind}"
        refuse(message, [toy(v=values.to(kind)), toy(v=(2 * values).to(kind))])
    refuse("differs .* sparse values", [toy(v=values.to_sparse()), toy(v=-values.to_sparse())])
    refuse("'m' of member 0 holds an infinity", [toy(m=T([torch.inf])), toy(m=T([0.0]))])
    refuse("'m' of member 0 holds a NaN", [toy(m=T([torch.nan])), toy(m=T([torch.nan]))])


def test_buffers_of_any_kind_stay_where_members_agree():
    values = torch.eye(2)
    alike = {
        "complex": values * 1j,
        "fp8": values.to(torch.float8_e4m3fn),
        "coo": values.to_sparse(),
    }
    models = [Toy(alike, w=T([w])) for w in (1.0, 3.0)]
    models[0].register_buffer("expanded", T([1.0]).expand(3))
    models[1].register_buffer("expanded", T([3.0]).expand(3))
    merged = merge(models)
    assert (merged.w.item(), merged.expanded.tolist()) == (2.0, [2.0, 2.0, 2.0])
    for name, value in alike.items():
        kept = merged.get_buffer(name)
        assert kept.dtype == value.dtype
        assert kept.layout == value.layout
        assert torch.equal(*(own.to_dense().to(torch.complex64) for own in (kept, value)))


def test_ties_that_differ():
    def model(tied):
        module = Open()
        module.a = nn.Parameter(T([1.0, 2.0]))
        module.b = nn.Parameter(module.a.data if tied else T([1.0, 2.0]))
        return module

    refuse("'a' is tied to others in one of members 0 and 1", [model(True), model(False)])
    odd = Open()
    flat = torch.zeros(3)
    odd.a, odd.b = nn.Parameter(flat[:2]), nn.Parameter(flat[1:])
    refuse("member 0: tensors 'a' and 'b' overlap in memory", [odd])
    inside = Open()
    inside.register_buffer("flat", flat)
    inside.a = nn.Parameter(flat[:2])
    refuse("parameter 'a' lies in the memory of buffer 'flat'", [inside])


def test_fishers_that_do_not_fit():
    models = pair()

    def fishers(change):
        made = [random_fisher(model, seed) for seed, model in enumerate(models)]
        change(made[1])
        return made

    def put(name, value):
        return lambda fisher: fisher.__setitem__(name, value)

    negative, bad = torch.ones(3), torch.ones(3)
    negative[2], bad[0] = -1e-9, torch.nan
    whose = "the Fisher of member 1"
    for change, message in [
        (put("output_bias", negative), f"'output_bias' of {whose} holds a negative value"),
        (put("output_bias", bad), f"'output_bias' of {whose} holds a value that is not finite"),
        (put("output_bias", bad / 0), "holds a value that is not finite"),
        (put("output_bias", torch.ones(4)), r"has shape \(4,\) where the model's has \(3,\)"),
        (put("output_bias", [1.0] * 3), f"'output_bias' of {whose} is no dense tensor"),
        (put("output_bias", torch.ones(3).to_sparse()), "is no dense tensor"),
        (put("output_bias", torch.ones(3, device="meta")), "is no dense tensor"),
        (put("output_bias", T([1, 1, 1])), f"'output_bias' of {whose} is torch.int64"),
        (put("other", bad), f"{whose} has a tensor 'other', which the model does not"),
        (lambda f: f.pop("dense.bias"), f"{whose} has no tensor 'dense.bias', which is trainable"),
        (lambda f: [v.zero_() for v in f.values()], f"{whose} is zero everywhere|member 1 is zero"),
    ]:
        refuse(message, models, fishers=fishers(change))


def test_a_fisher_of_another_model():
    models = pair()
    own = [
        FisherWithMeta(random_fisher(model, seed), fingerprint(model))
        for seed, model in enumerate(models)
    ]
    merge(models, fishers=own)
    swapped = [own[1], own[0]]
    refuse(
        r"the Fisher of member 0 was computed on another model \(it is of member 1\)",
        models,
        fishers=swapped,
    )
    merge(models, fishers=swapped, check_fingerprint=False)
    trained_on = copy.deepcopy(models)
    trained_on[1].dense.bias.data += 1
    refuse("the Fisher of member 1 was computed on another model: its", trained_on, fishers=own)
