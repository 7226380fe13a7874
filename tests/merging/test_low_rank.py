"""Low-rank updates are merged as products: against averages of whole weights in float64."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import fisherkern as fk
from fisherkern.adapters.lora import LowRankPair, find_low_rank, scaling_of
from fisherkern.cli import main
from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher
from fisherkern.merging import merge_files
from fisherkern.merging.low_rank import merge_low_rank

OUT, IN, RANK = 9, 7, 2


class Adapted(nn.Module):
    """A linear layer with an update as PEFT names it, and a plain bias."""

    def __init__(self, seed, rank=RANK, scaling=2.0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_layer = nn.Linear(IN, OUT)
        self.base_layer.weight.data = torch.ones(OUT, IN)
        self.base_layer.bias.data = torch.randn(OUT, generator=generator)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(IN, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, OUT, bias=False)})
        self.lora_A["default"].weight.data = torch.randn(rank, IN, generator=generator)
        self.lora_B["default"].weight.data = torch.randn(OUT, rank, generator=generator)
        self.scaling = {"default": scaling}
        self.merged = False
        self.to(dtype)

    def delta(self):
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self.scaling["default"] * b.detach().double() @ a.detach().double()


class Network(nn.Module):
    def __init__(self, seed, **options):
        super().__init__()
        self.layer = Adapted(seed, **options)


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank], float(s[:rank].square().sum() / s.square().sum())


@pytest.mark.parametrize("weights", [[1, 1], [3, 1]])
def test_members_in_memory_merge_as_what_they_add(weights):
    models = [Network(0), Network(1, scaling=0.5)]
    merged = fk.merge(models, method="weighted", weights=weights)
    lam = [own / sum(weights) for own in weights]
    total = sum(own * model.layer.delta() for own, model in zip(lam, models, strict=True))
    expected, kept = truncated(total, RANK)
    assert torch.allclose(merged.layer.delta(), expected, atol=2e-6)
    report = merged.merge_report["low_rank"]
    assert report["energy_kept"] == pytest.approx(kept, rel=1e-9) and kept < 0.999
    assert report["pairs"]["layer"]["rank"] == RANK
    bias = sum(own * m.layer.base_layer.bias.double() for own, m in zip(lam, models, strict=True))
    assert torch.equal(merged.layer.base_layer.bias, bias.float())
    # Averages of the factors are another matrix, and are had by asking for them.
    factors = fk.merge(models, weights=weights, options={"factors": True})
    assert (factors.layer.delta() - total).norm() > 0.05 * total.norm()


def test_one_function_stays_that_function():
    """Factors of other signs make the same product; their averages cancel to nothing."""
    one, two = Network(0), Network(0)
    two.layer.lora_A["default"].weight.data *= -1
    two.layer.lora_B["default"].weight.data *= -1
    merged = fk.merge([one, two])
    assert torch.allclose(merged.layer.delta(), one.layer.delta(), atol=1e-6)
    assert merged.merge_report["low_rank"]["energy_kept"] == pytest.approx(1)
    same = fk.merge([one, Network(0)])
    for name, value in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name


def test_entries_of_factors_mean_nothing_alone():
    models = [Network(0), Network(1)]
    fishers = [
        DiagFisher({n: torch.ones_like(p) for n, p in m.named_parameters()}, {}) for m in models
    ]
    for arguments, message in (
        ({"fishers": fishers}, "merged as products, whose merge takes no fishers"),
        ({"method": "slerp"}, "whose merge is uniform or weighted with given weights"),
        ({"method": "ties", "base": Network(2)}, "takes no base"),
        ({"weights": "search", "score": lambda model: 0.0}, "takes no score"),
        ({"options": {"rank": 3}}, "options 'rank' and 'full' change shapes"),
        ({"options": {"rank": 0}}, "option 'rank' is 0"),
        ({"options": {"rank": 2, "full": True}}, "exclude one another"),
    ):
        with pytest.raises(InputError, match=message):
            fk.merge(models, **arguments)
    fk.merge(models, fishers=fishers, options={"factors": True})
    models[1].layer.merged = True
    with pytest.raises(InputError, match="member 1: the update of 'layer' is merged into its"):
        fk.merge(models)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "new weight_norm", "orthogonal", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_factors_of_a_weight_are_refused(change):
    torch.manual_seed(0)
    models = [nn.Sequential(change(nn.Linear(4, 4))) for _ in range(2)]
    with pytest.raises(InputError, match="is a factor of a weight, and the average of factors"):
        fk.merge(models)


def test_dora_is_refused():
    models = [Network(0), Network(1)]
    for model in models:
        model.layer.lora_magnitude_vector = nn.ParameterDict({"default": torch.ones(OUT)})
    with pytest.raises(InputError, match="'layer.lora_magnitude_vector.default' makes an update"):
        fk.merge(models)


def test_preflight_leaves_a_frozen_base_out():
    models = [Network(0), Network(1)]
    for model in models:
        model.layer.base_layer.bias.data.zero_()
        model.layer.base_layer.requires_grad_(False)
    found = fk.preflight(models).cosine
    one, two = (model.layer.delta().flatten() for model in models)
    expected = float(one @ two / one.norm() / two.norm())
    assert found[0][1] == pytest.approx(expected, abs=1e-6)
    assert found[0][0] == pytest.approx(1)
    base = Network(2)
    base.layer.base_layer.bias.data.zero_()
    base.layer.lora_B["default"].weight.data *= 0.1
    task = fk.preflight(models, base=base).task_cosine
    one, two = (own - base.layer.delta().flatten() for own in (one, two))
    assert task[0][1] == pytest.approx(float(one @ two / one.norm() / two.norm()), abs=1e-6)
    assert fk.preflight([Network(0), Network(0)]).cosine[0][1] == pytest.approx(1)


def test_factors_the_other_way_around_and_convolutions():
    generator = torch.Generator().manual_seed(0)

    def factors(a, b):
        return {
            "x.lora_A": torch.randn(a, generator=generator, dtype=torch.float64),
            "x.lora_B": torch.randn(b, generator=generator, dtype=torch.float64),
        }

    def merged(members, rank):
        pairs = find_low_rank(members[0])
        scalings = [{"x.lora_A": 1.0}] * 2
        return merge_low_rank(members, pairs, scalings, [0.5, 0.5], rank=rank)[0]

    # A (in, r), B (r, out): the update is A B.
    members = [factors((IN, RANK), (RANK, OUT)) for _ in range(2)]
    total = sum(own["x.lora_A"] @ own["x.lora_B"] for own in members) / 2
    found = merged(members, 2 * RANK)
    assert torch.allclose(found["x.lora_A"] @ found["x.lora_B"], total)
    members = [factors((RANK, IN, 3, 3), (OUT, RANK, 1, 1)) for _ in range(2)]
    found = merged(members, 2 * RANK)
    assert found["x.lora_A"].shape == (2 * RANK, IN, 3, 3)
    total = sum(torch.einsum("orab,rixy->oixy", m["x.lora_B"], m["x.lora_A"]) for m in members) / 2
    back = torch.einsum("orab,rixy->oixy", found["x.lora_B"], found["x.lora_A"])
    assert torch.allclose(back, total)
    with pytest.raises(InputError, match="are no factors of one weight"):
        merged([factors((3, 4), (5, 6))] * 2, 2)
    with pytest.raises(InputError, match="are square"):
        merged([factors((4, 4), (4, 4))] * 2, 2)


def test_scalings_are_pefts():
    pair = LowRankPair("base_model.model.h.0.q", "", "a", "b", None, False)
    assert scaling_of({"lora_alpha": 8}, pair, 4) == 2
    assert scaling_of({"lora_alpha": 8, "use_rslora": True}, pair, 4) == 4
    assert scaling_of({"lora_alpha": 8, "alpha_pattern": {"0.q": 2}}, pair, 4) == 0.5
    assert scaling_of({"lora_alpha": 8, "alpha_pattern": {"^q": 2}}, pair, 4) == 2
    assert scaling_of({"lora_alpha": 8, "alpha_pattern": {"^h.0.q": 2}}, pair, 4) == 0.5
    with pytest.raises(InputError, match="is no plain name"):
        scaling_of({"lora_alpha": 8, "alpha_pattern": {"(a+)+$": 2}}, pair, 4)
    with pytest.raises(InputError, match="lora_alpha is None"):
        scaling_of({}, pair, 4)


# On disk.


def adapter(folder, seed, rank=RANK, alpha=4, **config):
    """A PEFT folder of two updated modules; the updates by the names of the base's weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    for module in ("h.0.q", "h.1.v"):
        a = torch.randn(rank, IN, generator=generator)
        b = torch.randn(OUT, rank, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[f"{module}.weight"] = scale * b.double() @ a.double()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return deltas


def updates_of(folder):
    tensors = fk.load_tensors(folder)
    config = tensors.config
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): config["lora_alpha"]
        / config["r"]
        * tensors[name.replace("lora_A", "lora_B")].double()
        @ tensors[name].double()
        for name in tensors
        if "lora_A" in name
    }


def test_folders_merge_by_the_command_line(tmp_path):
    one = adapter(tmp_path / "a", 0)
    two = adapter(tmp_path / "b", 1, rank=4, use_rslora=True, target_modules=["v", "q"])
    words = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "result.json").read_text())["report"]["low_rank"]
    found = updates_of(tmp_path / "out" / "merged")
    for name in one:
        expected, kept = truncated((one[name] + two[name]) / 2, RANK)
        assert torch.allclose(found[name], expected, atol=1e-5)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert report["pairs"][module]["energy_kept"] == pytest.approx(kept, rel=1e-6)
    assert main([*words, "--option", "rank=6"]) == 0
    merged = fk.load_tensors(tmp_path / "out" / "merged")
    assert merged.config["r"] == 6 and merged.shape("base_model.model.h.0.q.lora_A.weight")[0] == 6
    found = updates_of(tmp_path / "out" / "merged")
    for name in one:
        assert torch.allclose(found[name], (one[name] + two[name]) / 2, atol=1e-5)
    assert main([*words, "--option", "full=true"]) == 0
    delta = safetensors.torch.load_file(tmp_path / "out" / "merged.safetensors")
    for name in one:
        assert torch.allclose(delta[name].double(), (one[name] + two[name]) / 2, atol=1e-5)


def test_adapters_of_other_bases_are_told(tmp_path, caplog):
    adapter(tmp_path / "a", 0, base_model_name_or_path="x/one")
    adapter(tmp_path / "b", 1, base_model_name_or_path="x/two")
    merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    messages = [record.message for record in caplog.records]
    assert messages == ["the adapters name different base models: 'x/one' and 'x/two'"]


def test_conv1d_and_embeddings_store_the_transpose(tmp_path):
    one = adapter(tmp_path / "a", 0, fan_in_fan_out=True)
    merge_files([tmp_path / "a"], tmp_path / "out.safetensors", options={"full": True})
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for name, delta in one.items():
        assert torch.allclose(found[name].double(), delta.T, atol=1e-5)


def test_what_is_no_product_is_refused(tmp_path):
    adapter(tmp_path / "a", 0)
    adapter(tmp_path / "b", 1)
    paths = [tmp_path / "a", tmp_path / "b"]
    for config, message in (
        ({"use_dora": True}, "b: its adapter has use_dora, whose update is not a product"),
        ({"peft_type": "LOHA"}, "b: its adapter is of the kind LOHA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True|no setting"),
    ):
        known = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "fan_in_fan_out": False}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(known))
        (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(known | config))
        with pytest.raises(InputError, match=message):
            merge_files(paths, tmp_path / "out")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(known | {"lora_alpha": 5}))
    with pytest.raises(InputError, match="'factors': the members scale their updates in other"):
        merge_files(paths, tmp_path / "out", options={"factors": True})
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(known))
    merge_files(paths, tmp_path / "out", method="slerp", options={"factors": True})
    with pytest.raises(InputError, match="whose merge is uniform or weighted"):
        merge_files(paths, tmp_path / "out2", method="slerp")


# Files in which every update has its own alpha, as kohya's trainer writes them.


def kohya(path, seed, alpha, rank, size=(OUT, IN), down="lora_down", prefix="lora_unet_"):
    """A file of a linear layer and a convolution; what they add to the weights, by module."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for module, kernel in ((f"{prefix}mid_to_q", ()), (f"{prefix}conv", (3, 3))):
        a = torch.randn(rank, size[1], *kernel, generator=generator)
        b = torch.randn(size[0], rank, *(1 for _ in kernel), generator=generator)
        up = down.replace("down", "up")
        dot = "_" if down.startswith("lora.") else "."
        tensors[f"{module}{dot}{down}.weight"], tensors[f"{module}{dot}{up}.weight"] = a, b
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
        scale = 1 if alpha is None else alpha / rank
        deltas[module] = scale * b.double().flatten(1) @ a.double().flatten(1)
    safetensors.torch.save_file(tensors, path)
    return deltas


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_text_", "unet."])
@pytest.mark.parametrize(
    ("ranks", "alphas", "size"),
    [((2, 3), (1.0, 4.0), (OUT, IN)), ((6, 5), (3.0, 8.0), (4, 4)), ((5, 5), (5.0, 5.0), (5, 5))],
)
def test_alphas_in_the_file_scale_the_products(tmp_path, prefix, ranks, alphas, size):
    """Ranks above the width too."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    each = zip(paths, range(2), alphas, ranks, strict=True)
    one, two = (kohya(*own, size=size, prefix=prefix) for own in each)
    merge_files(paths, tmp_path / "out.safetensors", weights=[1, 3])
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for module, delta in one.items():
        expected, _ = truncated(delta / 4 + 3 * two[module] / 4, ranks[0])
        a, b = (found[f"{module}.lora_{own}.weight"].double() for own in ("down", "up"))
        alpha = found[f"{module}.alpha"]
        assert alpha == alphas[0] and len(a) == ranks[0]
        product = float(alpha) / len(a) * b.flatten(1) @ a.flatten(1)
        torch.testing.assert_close(product, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("down", ["lora.down", "lora_linear_layer.down"])
def test_pairs_by_other_names_are_products(tmp_path, down):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    one, two = (kohya(path, n, None, RANK, down=down) for n, path in enumerate(paths))
    merge_files(paths, tmp_path / "out.safetensors")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for module, delta in one.items():
        own = [found[n] for n in sorted(found) if n.startswith(module)]
        expected, _ = truncated((delta + two[module]) / 2, RANK)
        product = own[1].double().flatten(1) @ own[0].double().flatten(1)
        torch.testing.assert_close(product, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("unet.conv.dora_scale", "an update that is not a product"),
        ("unet.conv.scalar", "an update that is not a product"),
        ("unet.conv.lora_mid.weight", "an update that is not a product"),
        ("unet.q.hada_w1_a", "is a factor of a weight"),
        ("lora_unet_q.lokr_w1", "is a factor of a weight"),
        ("unet.q_LoRA.first", "an update that is not a product"),
    ],
)
def test_other_updates_of_such_files_are_refused(tmp_path, added, message):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        kohya(path, seed, 2, RANK, prefix="unet.")
        tensors = safetensors.torch.load_file(path) | {added: torch.randn(OUT)}
        safetensors.torch.save_file(tensors, path)
    with pytest.raises(InputError, match=f"{added!r} .*{message}"):
        merge_files(paths, tmp_path / "out.safetensors")


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for alpha in (float("nan"), float("inf")):
        for path in paths:
            kohya(path, 0, alpha, RANK)
        with pytest.raises(InputError, match="alpha' is not one number"):
            merge_files(paths, tmp_path / "out.safetensors")


class Kohya(nn.Module):
    """A module of kohya's trainer, around a layer."""

    def __init__(self, seed, alpha):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_down = nn.Linear(IN, RANK, bias=False)
        self.lora_up = nn.Linear(RANK, OUT, bias=False)
        for own in (self.lora_down, self.lora_up):
            own.weight.data = torch.randn(own.weight.shape, generator=generator)
        self.register_buffer("alpha", torch.tensor(alpha))

    def delta(self):
        scale = float(self.alpha) / RANK
        return scale * self.lora_up.weight.double() @ self.lora_down.weight.double()


def test_modules_with_an_alpha_merge_in_memory():
    one, two = (nn.Sequential(Kohya(seed, alpha)) for seed, alpha in ((0, 1.0), (1, 6.0)))
    merged = fk.merge([one, two])
    expected, _ = truncated((one[0].delta() + two[0].delta()).detach() / 2, RANK)
    torch.testing.assert_close(merged[0].delta().detach(), expected, rtol=0, atol=3e-5)
    assert merged[0].alpha == 1
