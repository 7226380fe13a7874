"""mergekit's recipes: the merge that they say by its formulas, or a refusal by name."""

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.cli.recipe import from_file
from fisherkern.errors import InputError

NAMES = ("base", "a", "b")


@pytest.fixture
def states(tmp_path):
    """Three checkpoints beside the recipe, and their tensors in float64."""
    found = {}
    for seed, name in enumerate(NAMES):
        state = {"x": torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))}
        torch.save(state, tmp_path / f"{name}.pth")
        found[name] = state["x"].double()
    return found


def merged(tmp_path, text):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    return fk.load_tensors(tmp_path / "out" / "merged.pth")["x"].double()


MODELS = """
models:
  - model: a.pth
    parameters: {{weight: {}{extra}}}
  - model: b.pth
    parameters: {{weight: {}{extra}}}
"""


def test_linear(states, tmp_path):
    found = merged(tmp_path, MODELS.format(1, 3, extra="") + "merge_method: linear\ndtype: float32")
    assert torch.allclose(found, 0.25 * states["a"] + 0.75 * states["b"], atol=1e-6)


def test_slerp(states, tmp_path):
    text = (
        "models: [{model: a.pth}, {model: base.pth}]\nmerge_method: slerp\nbase_model: base.pth\n"
    )
    found = merged(tmp_path, text + "parameters: {t: 0.3}")
    one, two = states["base"].flatten(), states["a"].flatten()
    angle = torch.acos(one @ two / one.norm() / two.norm())
    turned = torch.sin(0.7 * angle) * one / one.norm() + torch.sin(0.3 * angle) * two / two.norm()
    expected = (0.7 * one.norm() + 0.3 * two.norm()) * turned / torch.sin(angle)
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


@pytest.mark.parametrize(("normalize", "divisor"), [("", 1.0), (", normalize: true", 1.25)])
def test_task_arithmetic(normalize, divisor, states, tmp_path):
    text = MODELS.format(0.5, 0.75, extra="") + "merge_method: task_arithmetic\n"
    text += f"base_model: base.pth\nparameters: {{lambda: 0.8{normalize}}}"
    base = states["base"]
    delta = 0.5 * (states["a"] - base) + 0.75 * (states["b"] - base)
    assert torch.allclose(merged(tmp_path, text), base + 0.8 * delta / divisor, atol=1e-5)


def test_ties(states, tmp_path):
    text = MODELS.format(1, 2, extra=", density: 0.5")
    text += "  - model: base.pth\nmerge_method: ties\nbase_model: base.pth"
    base, total, share = states["base"], 0, 0
    tau = []
    for name, weight in (("a", 1), ("b", 2)):
        own = states[name] - base
        kept = own.abs() >= own.abs().flatten().sort(descending=True).values[14]
        tau.append((own * kept, weight))
    sign = sum(weight * own for own, weight in tau).sign()
    for own, weight in tau:
        agrees = (own.sign() == sign) & (sign != 0)
        total, share = total + weight * own * agrees, share + weight * agrees
    expected = base + total / share.clamp(min=1)
    assert torch.allclose(merged(tmp_path, text), expected, atol=1e-5)


def test_dare_linear_keeps_or_rescales(states, tmp_path):
    text = MODELS.format(0.5, 0.5, extra=", density: 0.25")
    text += "merge_method: dare_linear\nbase_model: base.pth"
    base = states["base"]
    deltas = [2 * (states[name] - base) for name in ("a", "b")]
    found = merged(tmp_path, text) - base
    options = torch.stack([torch.zeros_like(base), *deltas, sum(deltas)])
    assert float((options - found).abs().amin(0).max()) < 1e-5


def test_model_stock_is_by_the_angle_of_the_task_vectors(states, tmp_path):
    text = "models: [{model: a.pth}, {model: b.pth}, {model: base.pth}]\n"
    text += "merge_method: model_stock\nbase_model: base.pth\nparameters: {filter_wise: false}"
    one, two = (states[name] - states["base"] for name in ("a", "b"))
    cos = (one * two).sum() / one.norm() / two.norm()
    ratio = max(0.0, 2 * float(cos) / (1 + float(cos)))
    expected = states["base"] + ratio * (one + two) / 2
    assert torch.allclose(merged(tmp_path, text), expected, atol=1e-5)
    (tmp_path / "rows.yml").write_text(text.replace("false", "true"))
    with pytest.raises(InputError, match="'filter_wise' is true, and ours has one angle"):
        from_file(tmp_path / "rows.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: dare_ties", "merge_method 'dare_ties' has no counterpart; linear, slerp"),
        (
            "merge_method: linear\ntokenizer_source: union",
            "'tokenizer_source' of the recipe is not",
        ),
        ("slices: []\nmerge_method: linear", "'slices' of the recipe is not understood"),
        ("merge_method: linear\nbase_model: base.pth", "'base_model' is nothing that linear uses"),
        ("merge_method: linear\ndtype: int8", "'dtype' is 'int8' where one of"),
        ("merge_method: linear\nparameters: {normalize: false}", "'normalize' is false, and the"),
        ("merge_method: ties", "ties needs a 'base_model'"),
        (
            "merge_method: ties\nbase_model: base.pth\nparameters: {normalize: false}",
            "our ties always normalises",
        ),
        ("merge_method: slerp\nbase_model: a.pth", "'weight' of 'parameters' of 'models' entry 0"),
        ("merge_method: linear\nparameters: {lambda: 1}", "'lambda' of 'parameters' of linear"),
        (
            "merge_method: dare_linear\nbase_model: base.pth\nparameters: {rescale: false}",
            "'rescale' is false",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(text, message, states, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(MODELS.format(1, 1, extra="") + text)
    with pytest.raises(InputError, match=message):
        from_file(recipe)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("[{model: a.pth, parameters: {weight: [0, 1]}}]", "'weight' is .0, 1. where one number"),
        ("[{model: a.pth, parameters: {weights: 1}}]", "'weights' of 'parameters' of 'models'"),
        ("[a.pth]", "'models' entry 0 has no 'model'"),
        ("[{model: a.pth, parameters: {weight: 1}}, {model: b.pth}]", "every model needs a 'wei"),
        ("a.pth", "'models' must be a list"),
    ],
)
def test_models_that_are_not_understood(models, message, states, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"models: {models}\nmerge_method: linear")
    with pytest.raises(InputError, match=message):
        from_file(recipe)


def test_another_dtype_is_refused(states, tmp_path, capsys):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(MODELS.format(1, 1, extra="") + "merge_method: linear\ndtype: bfloat16")
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "tensor 'x' is float32 and the recipe's dtype bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
