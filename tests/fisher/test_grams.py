"""Gram matrices of layer inputs, against hooks and a loop over positions."""

import pytest
import torch
import torch.nn.functional as F
from models import HISTORIES, Foreign, bert, shaken
from torch import nn

import fisherkern as fk
from fisherkern.errors import InputError


def inputs_of(model, history):
    """Name of the weight -> (N, T, I) inputs of every nn.Linear, by hooks."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module, args, name=name):
                found[f"{name}.weight"] = args[0].detach()

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model.train()(history)  # there is no dropout, and no short cut past a layer
    model.eval()
    for hook in hooks:
        hook.remove()
    return found


def expected(model, history):
    """The mean of x x^T, a loop over the positions that hold an item or the mask token."""
    token = model.append_mask(history)
    found = {}
    for name, inputs in inputs_of(model, history).items():
        total, count = torch.zeros(inputs.shape[-1], inputs.shape[-1]).double(), 0
        for n in range(len(history)):
            rows = inputs[n].reshape(-1, inputs.shape[-1])
            for t, x in enumerate(rows):
                # The last block's query, output and feed-forward see the mask token alone.
                if len(rows) > 1 and token[n, token.shape[1] - len(rows) + t] == 0:
                    continue
                total += torch.outer(x, x)
                count += 1
        found[name] = total / count
    return found


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_padding_is_left_out(norm, chunk):
    model = bert(norm=norm, dropout=0)
    grams = fk.linear_grams(model, [HISTORIES], chunk=chunk, progress=False)
    found = expected(model, HISTORIES)
    # The tied table is looked up too, so it has none.
    names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(grams) == set(found) == names
    for name, value in found.items():
        torch.testing.assert_close(grams[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_more_padding_changes_nothing():
    model = bert(max_len=9)
    wide = torch.cat([torch.zeros(len(HISTORIES), 3, dtype=torch.int64), HISTORIES], dim=1)
    wide[0, 0] = 1  # so that the model cannot trim it
    narrow = fk.linear_grams(model, [wide[:1], HISTORIES[1:]], progress=False)
    found = fk.linear_grams(model, [wide], progress=False)
    assert found.meta["positions"] == narrow.meta["positions"]
    for name in narrow:
        torch.testing.assert_close(found[name], narrow[name], rtol=1e-12, atol=1e-12)


def test_the_untied_output_layer_has_one():
    model = bert(tied=False)
    grams = fk.linear_grams(model, [HISTORIES[:2], HISTORIES[2:]], progress=False)
    h = model.encode(HISTORIES).detach()
    torch.testing.assert_close(grams["output_embedding"], h.T @ h / len(h), rtol=1e-12, atol=1e-12)
    assert grams.meta["num_sequences"] == len(HISTORIES)


def test_a_weight_used_twice_and_one_used_otherwise():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(12, 3)
            self.both = nn.Linear(3, 3)
            self.also = nn.Linear(3, 3)
            self.part = nn.Parameter(torch.randn(6, 3))
            self.out = nn.Linear(3, 11)

        def forward(self, history):
            x = self.items(history).sum(1)
            y = self.both(x)
            z = self.both(y) + self.also(x)
            if history.shape[1] > 5:
                z = z + (self.also.weight * 2).sum()
            return self.out(F.linear(z, self.part[:3]))

    torch.manual_seed(0)
    model = Twice().double()
    wide = torch.cat([HISTORIES, HISTORIES[:, :1]], dim=1)
    grams = fk.linear_grams(model, [HISTORIES, wide], progress=False)
    assert set(grams) == {"both.weight", "out.weight"} == set(grams.meta["positions"])
    grams = fk.linear_grams(model, [HISTORIES], progress=False)
    assert set(grams) == {"both.weight", "also.weight", "out.weight"}
    x = model.items(HISTORIES).sum(1).detach()
    y = model.both(x).detach()
    both = (x.T @ x + y.T @ y) / 10
    torch.testing.assert_close(grams["both.weight"], both, rtol=1e-12, atol=1e-12)


def test_frozen_weights_have_none_and_the_mode_stays():
    model = shaken(Foreign("none")).train()
    model.mlp[0].weight.requires_grad_(False)
    grams = fk.linear_grams(model, [HISTORIES], progress=False)
    assert set(grams) == {"decoder.weight"} and model.training


def test_a_file_of_them(tmp_path):
    grams = fk.linear_grams(bert(), [HISTORIES], progress=False)
    grams.save(tmp_path / "g.safetensors")
    again = fk.LinearGrams.load(tmp_path / "g.safetensors")
    assert again.meta == grams.meta and set(again) == set(grams)
    assert all(torch.equal(again[name], grams[name]) for name in grams)
    fk.diag_fisher(bert(), [HISTORIES], k=3, progress=False).save(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="not a file of Gram matrices"):
        fk.LinearGrams.load(tmp_path / "f.safetensors")


def test_bad_input():
    with pytest.raises(InputError, match="loader: it gave no sequences"):
        fk.linear_grams(bert(), [], progress=False)
    with pytest.raises(InputError, match="chunk: must be at least 1, got 0"):
        fk.linear_grams(bert(), [HISTORIES], chunk=0, progress=False)


def test_a_model_that_is_no_function_of_a_sequence_has_no_grams():
    class Random(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.items, self.dense = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4)

        def forward(self, history):
            h = torch.nn.functional.dropout(self.items(history), 0.5, training=True)
            return self.dense(h).mean(1) @ self.items.weight.T

    with pytest.raises(InputError, match="two passes over one batch"):
        fk.linear_grams(Random(), [torch.arange(8).view(2, 4)])
