"""Scores in fp32 of models in half precision, and catalogues that are ranked tile by tile."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkern as fk
from fisherkern.data import SequenceDataset, synthetic
from fisherkern.errors import InputError
from fisherkern.evaluation.scores import TiledScores, full_ranks, sampled_ranks

V, D = 600, 16
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def data():
    return synthetic(num_users=60, num_items=V, seed=3)


class Pooled(nn.Module):
    """Somebody's network: a mean of vectors, times the table; `end` makes the logits."""

    max_len = 12
    first_item = 1

    def __init__(self, end="plain", items=V):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(items + 1, D, padding_idx=0)
        self.inner = nn.Linear(D, D)
        self.bias = nn.Parameter(torch.randn(items + 1))
        self.end = end
        with torch.no_grad():
            self.table.weight[1:].mul_(0.2)

    def hidden(self, batch):
        return torch.tanh(self.inner(self.table(batch["history"]).sum(dim=1)))

    def forward(self, batch):
        h = self.hidden(batch)
        z = h @ self.table.weight.t()
        if self.end == "bias":
            z = z + self.bias
        if self.end == "scale":
            z = z * 0.5
        if self.end == "float":
            z = z.float()
        return z[:, 1:]

    def brute(self, batch):
        """The scores in float64 from the hidden state, which no rounding of scores has touched."""
        z = self.hidden(batch).double() @ self.table.weight.double().t()
        return (z + self.bias.double() if self.end == "bias" else z)[:, 1:]


def brute_ranks(model, data, seen="exclude"):
    """Rank by rank, user by user; bf16 states depend on how many are computed together."""
    ranks = []
    (batch,) = data.loader(split="test", batch_size=256, max_len=model.max_len)
    with torch.no_grad():
        scores = model.brute(batch).tolist()
    for score, user, target in zip(
        scores, batch["user"].tolist(), batch["target"].tolist(), strict=True
    ):
        left_out = data.sequence(user)[:-1].tolist() if seen == "exclude" else []
        ahead = [v for v in range(1, V + 1) if v != target and v not in left_out]
        ranks.append(1 + sum(score[v - 1] >= score[target - 1] for v in ahead))
    return ranks


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("end", ["plain", "bias", "scale", "float"])
def test_half_precision_is_ranked_without_the_ties_of_rounding(data, end, dtype):
    model = Pooled(end).to(dtype)
    expected = brute_ranks(model, data)
    assert fk.evaluate(model, data).ranks.tolist() == expected

    def rounded(batch):
        return model(batch)

    rounded.max_len, rounded.first_item = model.max_len, 1
    ties = fk.evaluate(rounded, data).ranks
    assert (ties > np.array(expected)).any(), "the scores as they are tie"


def test_autocast_around_the_call_is_ranked_without_ties(data):
    model = Pooled("bias")
    with torch.autocast("cpu", torch.bfloat16):
        found = fk.evaluate(model, data).ranks
        expected = brute_ranks(model, data)
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", [fk.SASRec, fk.BERT4Rec, fk.GRU4Rec, fk.Caser])
def test_the_encoders_in_bf16_rank_by_their_states(data, kind):
    torch.manual_seed(0)
    model = kind(V, max_len=12, dim=D).eval().to(torch.bfloat16)

    def brute(batch):
        weight, bias = model.head()
        z = model.encode(batch).double() @ weight.double().t()
        return z if bias is None else z + bias.double()

    found = fk.evaluate(model, data).ranks
    model.brute = brute
    assert found.tolist() == brute_ranks(model, data)


def test_members_in_half_precision_are_averaged_in_fp32(data):
    members = [Pooled("plain").to(torch.bfloat16), Pooled("bias").to(torch.bfloat16)]
    ensemble = fk.ScoreEnsemble(members)
    batch = next(iter(data.loader(split="test", batch_size=60, max_len=12)))
    with torch.no_grad():
        found = ensemble(batch)
        expected = sum(member.brute(batch).log_softmax(dim=1) for member in members) / 2
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


class Random(Pooled):
    def forward(self, batch):
        return torch.randn(len(batch["history"]), V, dtype=torch.bfloat16)


class Centred(Pooled):
    def forward(self, batch):
        z = super().forward(batch)
        return z - z.mean(dim=0)


@pytest.mark.parametrize("kind", [Random, Centred])
def test_logits_without_an_output_layer_are_widened(data, kind):
    assert fk.evaluate(kind().to(torch.bfloat16), data).num_users == 60


# Ranks do not depend on what is held at once.


def tied_table(model):
    """Make items of one score far apart: many ties, in tiles of their own."""
    with torch.no_grad():
        model.table.weight[301:601] = model.table.weight[1:301].clone()
    return model


@pytest.mark.parametrize("max_scores", [60, 7 * V + 3])
@pytest.mark.parametrize("end", ["plain", "bias"])
@pytest.mark.parametrize("seen", ["exclude", "keep", "last-2"])
def test_tiles_give_the_ranks_of_whole_scores(data, end, seen, max_scores):
    model = tied_table(Pooled(end))
    whole = fk.evaluate(model, data, seen=seen)
    tiled = fk.evaluate(model, data, seen=seen, max_scores=max_scores)
    assert tiled.ranks.tolist() == whole.ranks.tolist()
    assert (tiled.users == whole.users).all()
    if seen != "last-2":
        expected = np.array(brute_ranks(model, data, seen))
        assert (np.abs(whole.ranks - expected) <= 1).all() and (
            whole.ranks == expected
        ).mean() > 0.9


@pytest.mark.parametrize("max_scores", [7 * V])
@pytest.mark.parametrize("candidates", ["uniform-100", "popular-100", "top-popular-100"])
def test_sampled_candidates_are_scored_alone(data, candidates, max_scores):
    model = tied_table(Pooled("bias"))
    whole = fk.evaluate(model, data, candidates=candidates)
    tiled = fk.evaluate(model, data, candidates=candidates, max_scores=max_scores)
    assert tiled.ranks.tolist() == whole.ranks.tolist()


def test_sampled_candidates_are_drawn_in_any_number_of_blocks(data, monkeypatch):
    model = Pooled()
    for candidates in ("uniform-100", "popular-100", "top-popular-100"):
        whole = fk.evaluate(model, data, candidates=candidates)
        with monkeypatch.context() as patch:
            patch.setattr("fisherkern.evaluation.candidates._KEYS", 7 * V)
            cut = fk.evaluate(model, data, candidates=candidates)
        assert cut.ranks.tolist() == whole.ranks.tolist()


@pytest.mark.parametrize("max_scores", [5 * V, 2**25])
def test_items_in_another_order_are_found_in_tiles(data, max_scores):
    order = np.random.default_rng(0).permutation(V)
    ids = [data.item_ids[place] for place in order]
    model = Pooled("bias")
    permuted = fk.adapt(model, item_ids=ids)
    back = np.empty(V, np.int64)
    back[order] = np.arange(V)

    def brute(batch):
        items = batch["history"]
        own = torch.from_numpy(np.append(0, back + 1))[items]
        return Pooled.brute(model, {"history": own})[:, torch.from_numpy(back)]

    model.brute = brute
    expected = brute_ranks(model, data)
    del model.brute
    assert fk.evaluate(permuted, data, max_scores=max_scores).ranks.tolist() == expected


@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize("items", [1, 257, 2100])
@pytest.mark.parametrize("by_column", [False, True])
def test_tiled_ranks_equal_those_of_one_product(n, items, by_column):
    generator = torch.Generator().manual_seed(n * items)
    h = torch.randn(n, 7, generator=generator)
    weight = torch.randint(-1, 2, (items + 3, 7), generator=generator).float()  # ties
    bias = torch.zeros(items + 3)
    columns = torch.randperm(items + 3, generator=generator)[:items] if by_column else 2
    rows = columns if by_column else slice(2, items + 2)
    target = torch.randint(1, items + 1, (n,), generator=generator)
    pairs = (
        torch.randint(n, (50,), generator=generator),
        torch.randint(1, items + 1, (50,), generator=generator),
    )
    whole = torch.nn.functional.linear(h, weight[rows], bias[rows])
    for elements in (300 * n, 2**25):
        tiled = TiledScores(h, weight, bias, columns, items, elements)
        for excluded in (None, pairs):
            found = tiled.full_ranks(target, excluded)
            exact = full_ranks(h.double() @ weight[rows].double().t(), target, excluded)
            assert ((found - exact).abs() <= (whole.shape[1] // 50 + 1)).all()
            same = found == full_ranks(whole, target, excluded)
            assert same.float().mean() > 0.9
    negatives = torch.stack([torch.randperm(items, generator=generator)[:5] + 1 for _ in range(n)])
    tiled = TiledScores(h.double(), weight, bias, columns, items, 1)
    expected = sampled_ranks(h.double() @ weight[rows].double().t(), target, negatives)
    assert torch.equal(tiled.sampled_ranks(target, negatives), expected)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.most = max(self.most, result.numel())
        return result


def test_no_more_scores_are_held_than_asked(data):
    for model in (Pooled("bias"), Pooled("bias").to(torch.bfloat16)):
        for candidates in ("full", "uniform-100"):
            with Largest() as whole:
                fk.evaluate(model, data, max_scores=60 * V, candidates=candidates)
            with Largest() as tiled:
                fk.evaluate(model, data, max_scores=2 * V, candidates=candidates)
            others = 60 * (12 if candidates == "full" else 101) * D  # histories, rows of W
            assert tiled.most <= max(2 * (V + 1), model.table.weight.numel(), others)
            if model.bias.dtype == torch.float32:
                assert whole.most >= 60 * V


class Counted(Random):
    """Gives no output layer away, and knows how many sequences it was asked for at once."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, batch):
        self.asked.append(len(batch["history"]))
        item = torch.arange(V)
        return ((batch["history"].sum(1)[:, None] * 31 + item * item) % 23).float()


@pytest.mark.parametrize("kind", ["module", "function"])
def test_batches_are_cut_where_no_output_layer_is_known(data, kind):
    model = Counted()

    def function(batch):
        return model(batch)

    function.max_len, function.first_item = model.max_len, 1
    asked = model if kind == "module" else function
    whole = fk.evaluate(asked, data)
    model.asked.clear()
    cut = fk.evaluate(asked, data, max_scores=9 * V)
    assert max(model.asked) == 9 and cut.ranks.tolist() == whole.ranks.tolist()
    assert cut.users.tolist() == whole.users.tolist()


@pytest.mark.parametrize("max_scores", [3 * V, 2**25])
@pytest.mark.parametrize("candidates", ["full", "uniform-100"])
def test_a_nan_names_its_user_in_tiles_too(max_scores, candidates):
    rows = [[v, v + 1, v + 2] for v in range(1, 200, 3)]
    offsets = np.arange(len(rows) + 1) * 3
    names = [f"i{v}" for v in range(1, V + 1)]
    users = [f"u{u}" for u in range(len(rows))]
    made = SequenceDataset("made", np.concatenate(rows), offsets, names, users)
    model = Pooled("bias")
    with torch.no_grad():
        model.table.weight[made.sequence(40)[0]] = math.nan
    # Its own history makes user 40's state NaN; as a candidate the item makes everybody's.
    with pytest.raises(InputError, match="a score of user number"):
        fk.evaluate(model, made, max_scores=max_scores, candidates=candidates, users=[40, 41])


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None, True])
def test_max_scores_is_a_positive_integer(data, wrong):
    with pytest.raises(InputError, match="max_scores must"):
        fk.evaluate(Pooled(), data, max_scores=wrong)


class Short(Pooled):
    def forward(self, batch):
        return super().forward(batch)[:, :-5]


def test_a_table_that_lacks_items_is_refused_in_tiles_too(data):
    for max_scores in (V, 2**25):
        with pytest.raises(InputError, match=f"items 1 to {V}"):
            fk.evaluate(Short(), data, max_scores=max_scores)


class Lightning(nn.Module):
    """What holds a network as `self.model`, as trainers' modules do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch)


@pytest.mark.parametrize("max_scores", [7 * V, 2**25])
@pytest.mark.parametrize("wrap", [nn.DataParallel, Lightning])
def test_wrappers_hide_neither_length_nor_first_item(data, wrap, max_scores):
    model = Pooled("bias")
    expected = fk.evaluate(model, data).ranks
    model.max_len = 3
    assert (fk.evaluate(model, data).ranks != expected).any()
    found = fk.evaluate(wrap(model), data, max_scores=max_scores).ranks
    assert found.tolist() == fk.evaluate(model, data).ranks.tolist()


@pytest.mark.parametrize("n", [1, 7, 70])
def test_ties_in_other_tiles_count_against_the_target(n):
    generator = torch.Generator().manual_seed(n)
    base, h = torch.randn(50, 33, generator=generator), torch.randn(n, 33, generator=generator)
    target = torch.randint(1, 10_001, (n,), generator=generator)
    found = TiledScores(h, base.repeat(200, 1), None, 0, 10_000, 2048 * n).full_ranks(target, None)
    scores = h.double() @ base.double().t()
    own = scores.gather(1, (target[:, None] - 1) % 50)
    assert found.tolist() == (200 * (scores >= own).sum(dim=1)).tolist()


class NoFunction(torch.nn.Module):
    """Scores that are random, of the batch, or no numbers."""

    def __init__(self, kind, num_items):
        super().__init__()
        self.kind, self.first_item = kind, 1
        self.items = torch.nn.Embedding(num_items + 1, 4)

    def forward(self, history):
        z = self.items(history).sum(1) @ self.items.weight[1:].T
        if self.kind == "random":
            return torch.nn.functional.dropout(z, 0.5, training=True)
        if self.kind == "batch":
            return z - z.mean(0)
        return {"bool": z > 0, "sparse": z.to_sparse(), "complex": z.to(torch.complex64)}[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("random", "two passes over one batch"), ("batch", "depend on the other sequences")],
)
def test_a_model_that_is_no_function_of_a_history_is_told(kind, message, caplog):
    data = fk.synthetic(40, 20, min_length=5, max_length=8)
    fk.evaluate(NoFunction(kind, data.num_items), data)
    assert [message in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(("kind", "message"), [("complex", "complex"), ("sparse", "no dense")])
def test_scores_without_an_order_are_refused(kind, message):
    data = fk.synthetic(40, 20, min_length=5, max_length=8)
    with pytest.raises(InputError, match=f"its scores are {message}"):
        fk.evaluate(NoFunction(kind, data.num_items), data)


def test_scores_that_are_true_or_false_are_ranked():
    data = fk.synthetic(40, 20, min_length=5, max_length=8)
    model = NoFunction("bool", data.num_items)
    whole = fk.adapt(model, logits=lambda model, batch: model(batch["history"]).int())
    assert fk.evaluate(model, data).ranks.tolist() == fk.evaluate(whole, data).ranks.tolist()
