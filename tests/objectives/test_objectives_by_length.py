"""Groups of like length give the loss and the gradients of the batch gone through whole."""

import pytest
import torch

import fisherkern as fk
from fisherkern.objectives import by_length

V, T = 20, 12
# Empty rows, a full one, and more rows than any group has.
LENGTHS = [0, 1, T, 2, 5, 0, 3, T, 7, 1, 11]


def tokens(width):
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(1, V + 1, (len(LENGTHS), width), generator=draw)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[: width - length] = 0
    return rows


@pytest.mark.parametrize("rows, most_widths", [(1, 16), (2, 16), (3, 16), (1, 4)])
@pytest.mark.parametrize(
    "encoder, objective",
    [
        (fk.BERT4Rec, fk.MaskedItems(0.4)),
        (fk.BERT4Rec, fk.MaskedItems(0.2, last_ratio=0.5)),
        (fk.SASRec, fk.NextItem()),
        (fk.SASRec, fk.NextItem("sampled_softmax", negatives=3)),
        (fk.SASRec, fk.NextItem("bce", negatives=3, negatives_per="position")),
        (fk.GRU4Rec, fk.NextItem()),
    ],
)
def test_groups_give_what_the_whole_gives(monkeypatch, encoder, objective, rows, most_widths):
    monkeypatch.setattr(by_length, "_WIDTHS", most_widths)
    torch.manual_seed(0)
    model = encoder(V, max_len=T, dim=6, dropout=0.0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    batch, widths, states = tokens(T + objective.lookahead), [], model.states

    def recorded(tokens, positions=None):
        widths.append(tuple(tokens.shape))
        return states(tokens, positions)

    monkeypatch.setattr(model, "states", recorded)
    found = []
    for least in (10**9, rows):
        monkeypatch.setattr(by_length, "_ROWS", least)
        loss = objective(model, batch, torch.Generator().manual_seed(1))
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for grouped, whole in zip(found[1], found[0], strict=True):
        assert torch.allclose(grouped, whole, rtol=1e-12, atol=1e-14)
    (whole, _), groups = widths[0], widths[1:]
    assert len(groups) == whole // rows and sum(n for n, _ in groups) == whole
    assert sum(n * width for n, width in groups) < 0.75 * whole * T
    assert len({width for _, width in groups}) <= most_widths


def test_widths_are_few():
    for most in (1, 7, 16, 20, 50, 200):
        found = [by_length._rounded(width, most) for width in range(most + 1)]
        assert len(set(found)) <= 16 and found[0] >= 1 and found[-1] == most
        assert all(width <= new for width, new in enumerate(found))
