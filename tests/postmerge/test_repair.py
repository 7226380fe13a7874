"""Repair: the members' channel statistics, over items and never over padding."""

import pytest
import torch
from helpers.alignment import CASES, build, logits
from models import HISTORIES
from torch import nn

from fisherkern.errors import InputError
from fisherkern.postmerge.repair import repair


def outputs(model, module, histories):
    """What `module` gives for each history alone, run without padding: (positions, channels)."""
    found = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, __, output: found.append(output.detach().flatten(0, -2))
    )
    for row in histories:
        logits(model, row[row != 0][None])
    handle.remove()
    return torch.cat(found)


NORMS = {
    "BERT4Rec-post-tied": ["embedding_norm", "blocks.1.feed_forward_norm", "transform.2"],
    "SASRec-pre-tied-bias": ["blocks.0.attention_norm", "blocks.1.feed_forward_norm", "final_norm"],
}


@pytest.mark.parametrize("case", NORMS)
def test_every_norm_gets_the_members_mean_and_deviation(case):
    model, first, second = (CASES[case](seed) for seed in range(3))
    loader = [HISTORIES[:3], {"history": HISTORIES[3:]}]
    new = repair(model, [first, second], loader, weights=[3, 1])
    for module in NORMS[case]:
        mine = outputs(new, module, HISTORIES)
        members = [outputs(m, module, HISTORIES) for m in (first, second)]
        mean = 0.75 * members[0].mean(0) + 0.25 * members[1].mean(0)
        deviation = [m.std(0, correction=0) for m in members]
        assert torch.allclose(mine.mean(0), mean, atol=1e-10)
        expected = 0.75 * deviation[0] + 0.25 * deviation[1]
        assert torch.allclose(mine.std(0, correction=0), expected, atol=1e-10)


@pytest.mark.parametrize("case", NORMS)
def test_a_model_among_copies_of_itself_stays(case):
    model = CASES[case](0)
    new = repair(model, [model, model], [HISTORIES])
    assert new is not model
    assert torch.allclose(logits(new), logits(model), atol=1e-12)


@pytest.mark.parametrize("case", NORMS)
def test_disturbed_norms_are_restored(case):
    member = CASES[case](0)
    model = CASES[case](0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.startswith("transform.2"):
                parameter.mul_(0.5).add_(0.1 if name.endswith("bias") else 0.0)
    assert (logits(model) - logits(member)).abs().max() > 0.1
    new = repair(model, [member], [HISTORIES])
    assert torch.allclose(logits(new), logits(member), atol=1e-9)
    assert new.training == model.training


def test_dropout_and_mode_do_not_matter():
    model, member = CASES["BERT4Rec-post-tied"](0), CASES["BERT4Rec-post-tied"](1)
    expected = logits(repair(model, [member], [HISTORIES]))
    new = repair(model.train(), [member.train()], [HISTORIES])
    assert new.training and model.training and member.training
    assert torch.equal(logits(new.eval()), expected)


class Untrimmed(nn.Module):
    """Normalises every column it is given, padding included."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(12, 3)
        self.table.weight.data = torch.randn(12, 3, generator=generator)
        self.norm = nn.LayerNorm(3)
        self.norm.weight.data = torch.rand(3, generator=generator) + 0.5

    def forward(self, history):
        return self.norm(self.table(history)).mean(1)


def test_padding_is_in_no_statistic():
    model, member = Untrimmed(0), Untrimmed(1)
    wide = nn.functional.pad(HISTORIES, (3, 0))
    new = repair(model, [member], [wide])
    mine, wanted = (outputs(m, "norm", HISTORIES) for m in (new, member))
    assert torch.allclose(mine.mean(0), wanted.mean(0), atol=1e-6)
    assert torch.allclose(mine.std(0), wanted.std(0), atol=1e-6)


def test_linear_layers_can_be_named():
    model, member = CASES["GRU4Rec-tied"](0), CASES["GRU4Rec-tied"](1)
    new = repair(model, [member], [HISTORIES], modules=["dense"])
    mine, wanted = (outputs(m, "dense", HISTORIES) for m in (new, member))
    assert torch.allclose(mine.mean(0), wanted.mean(0), atol=1e-10)
    assert torch.allclose(mine.std(0, correction=0), wanted.std(0, correction=0), atol=1e-10)


def test_a_channel_without_spread_gets_the_mean():
    model, member = CASES["BERT4Rec-post-tied"](0), CASES["BERT4Rec-post-tied"](1)
    with torch.no_grad():
        model.embedding_norm.weight[2] = 0
    new = repair(model, [member], [HISTORIES], modules=["embedding_norm"])
    mine, wanted = (outputs(m, "embedding_norm", HISTORIES) for m in (new, member))
    assert torch.allclose(mine.mean(0), wanted.mean(0), atol=1e-10)
    assert mine[:, 2].std() < 1e-12
    assert torch.allclose(mine.std(0)[:2], wanted.std(0)[:2], atol=1e-10)


def test_what_does_not_fit_is_named():
    model = CASES["BERT4Rec-post-tied"](0)
    padding = torch.zeros(2, 5, dtype=torch.int64)
    for arguments, message in (
        ({"loader": [padding]}, "loader gives no history with an item"),
        ({"loader": []}, "loader gives no history"),
        ({"loader": None}, "loader: a NoneType gives no batches"),
        ({"loader": [(HISTORIES,)]}, "batch 0 of the loader"),
        ({"loader": [{"target": HISTORIES}]}, "batch 0 of the loader"),
        ({"modules": ["nothing"]}, "module 'nothing' is no layer norm"),
        ({"modules": ["item_embedding"]}, "module 'item_embedding' is no layer norm"),
        ({"weights": [1, 2]}, "weights has 2 numbers for 1 members"),
        ({"members": []}, "there is no member"),
        ({"members": [CASES["GRU4Rec-tied"](0)]}, "member 1 is a GRU4Rec"),
    ):
        with pytest.raises(InputError, match=message):
            repair(**{"model": model, "members": [model], "loader": [HISTORIES], **arguments})
    plain = build("Caser", 0, dim=6)
    with pytest.raises(InputError, match="Caser has no layer norm"):
        repair(plain, [plain], [HISTORIES])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.table.weight
        self.spare = nn.LayerNorm(3)

    def forward(self, history):
        return self.out(self.table(history).mean(1))


def test_shared_and_idle_layers_are_refused():
    model = Shared()
    with pytest.raises(InputError, match="tensor 'out.weight' is shared"):
        repair(model, [model], [torch.ones(1, 2, dtype=torch.int64)], modules=["out"])
    with pytest.raises(InputError, match="module 'spare' does not run"):
        repair(model, [model], [torch.ones(1, 2, dtype=torch.int64)])
