"""BERT4Rec against torch's own Transformer layer, its short cuts, and its checks of input."""

import itertools

import pytest
import torch
from torch import nn

from fisherkern.encoders import ENCODERS, BERT4Rec
from fisherkern.errors import InputError

V, MAX_LEN, D = 11, 8, 6


def make(**changes):
    """A small float64 model in eval mode whose weights are large enough to matter."""
    torch.manual_seed(0)
    config = {"max_len": MAX_LEN, "dim": D, "heads": 3, "inner_dim": 10, "init_std": 0.5} | changes
    model = BERT4Rec(V, **config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def histories(width, count=5):
    """Row 0 is all padding, row 1 half; the others are full."""
    tokens = torch.randint(1, V + 1, (count, width), generator=torch.Generator().manual_seed(1))
    tokens[0] = 0
    tokens[1, : width // 2] = 0
    return tokens


def torch_states(model, tokens):
    """The same network built from nn.TransformerEncoderLayer, with the same weights."""
    config = model.config
    width = tokens.shape[1]
    x = model.item_embedding.weight[tokens] + model.position_embedding.weight[-width:]
    x = model.embedding_norm(x)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            D,
            config["heads"],
            config["inner_dim"],
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=config["norm"] == "pre",
        ).double()
        attention = block.attention
        inputs = (attention.query, attention.key, attention.value)
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([m.weight for m in inputs]),
                "self_attn.in_proj_bias": torch.cat([m.bias for m in inputs]),
                "self_attn.out_proj.weight": attention.output.weight,
                "self_attn.out_proj.bias": attention.output.bias,
                "linear1.weight": block.feed_forward.inner.weight,
                "linear1.bias": block.feed_forward.inner.bias,
                "linear2.weight": block.feed_forward.outer.weight,
                "linear2.bias": block.feed_forward.outer.bias,
                "norm1.weight": block.attention_norm.weight,
                "norm1.bias": block.attention_norm.bias,
                "norm2.weight": block.feed_forward_norm.weight,
                "norm2.bias": block.feed_forward_norm.bias,
            }
        )
        x = layer(x, src_key_padding_mask=tokens == 0)
    return model.final_norm(x)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_states_are_those_of_torchs_transformer_layer(norm):
    model = make(norm=norm)
    tokens = model.append_mask(histories(MAX_LEN))
    with torch.enable_grad():  # torch's layer takes another path, without padding, under no_grad
        expected = torch_states(model, tokens)
    items = tokens != 0
    error = (model.states(tokens) - expected)[items].abs().max()
    assert error < 1e-12


@pytest.mark.parametrize(
    "norm, tied, layers", list(itertools.product(["post", "pre"], [True, False], [1, 2]))
)
@pytest.mark.parametrize("width", [1, 5, MAX_LEN - 1, MAX_LEN, 3 * MAX_LEN])
def test_encode_is_the_last_of_all_states(norm, tied, layers, width):
    model = make(norm=norm, tied=tied, layers=layers)
    history = histories(width)
    whole = model.transform(model.states(model.append_mask(history[:, -MAX_LEN:])))
    h = model.encode(history)
    assert h.shape == (5, D)
    assert (h - whole[:, -1]).abs().max() < 1e-12
    weight, bias = model.head()
    assert (model(history) - (h @ weight.T + bias)).abs().max() < 1e-12


def test_states_at_positions_are_those_of_all_positions():
    model = make()
    tokens = model.append_mask(histories(MAX_LEN))
    positions = torch.tensor([[7, 0, 3]]).expand(len(tokens), 3)
    some, every = model.states(tokens, positions), model.states(tokens)
    assert (some - every[:, [7, 0, 3]]).abs().max() < 1e-12


def test_padding_and_the_rest_of_the_batch_change_nothing():
    model = make()
    history = histories(MAX_LEN - 1)
    together = model.encode(history)
    for row, tokens in enumerate(history):
        items = tokens[tokens != 0] if row else tokens[:1]
        assert (model.encode(items[None]) - together[row]).abs().max() < 1e-12
    other = make()
    with torch.no_grad():
        other.item_embedding.weight[0] = 100.0
    assert torch.equal(other.encode(history), together)


def test_a_row_of_padding_alone_leaves_states_and_gradients_finite():
    model = make()
    tokens = histories(5)
    states = model.states(tokens)
    assert states.isfinite().all()
    states[1:, -1].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_full_row_loses_its_oldest_item_only():
    model = make()
    history = histories(MAX_LEN)[2:]
    changed = history.clone()
    changed[:, 0] = changed[:, 0] % V + 1
    assert torch.equal(model.encode(history), model.encode(changed))
    changed[:, 1] = changed[:, 1] % V + 1
    assert not torch.isclose(model.encode(history), model.encode(changed)).all(dim=1).any()


def test_a_history_ends_where_training_windows_end():
    # A window whose last item is masked in training is the history before it at inference.
    model = make()
    window = histories(MAX_LEN)
    masked = window.clone()
    masked[:, -1] = model.mask_token
    trained = model.transform(model.states(masked)[:, -1])
    assert (model.encode(window[:, :-1]) - trained).abs().max() < 1e-12


def test_the_tied_head_is_a_view_of_the_embedding():
    model = make()
    weight, bias = model.head()
    assert weight.shape == (V, D) and bias is model.output_bias
    assert weight.untyped_storage().data_ptr() == (
        model.item_embedding.weight.untyped_storage().data_ptr()
    )
    assert torch.equal(weight, model.item_embedding.weight[1 : V + 1])
    assert model.item_embedding.weight.shape == (V + 2, D)

    untied = make(tied=False)
    assert untied.head()[0] is untied.output_embedding
    assert not torch.equal(untied.head()[0], untied.item_embedding.weight[1 : V + 1])


@pytest.mark.parametrize("tied", [True, False])
def test_item_parameters_lists_every_parameter_with_a_row_per_item(tied):
    small, large = make(tied=tied), BERT4Rec(V + 3, MAX_LEN, D, heads=3, inner_dim=10, tied=tied)
    sizes = {name: len(parameter) for name, parameter in large.named_parameters()}
    grown = {name for name, parameter in small.named_parameters() if len(parameter) != sizes[name]}
    assert set(small.item_parameters()) == grown
    history = torch.tensor([[4]])
    for name, first in small.item_parameters().items():
        model = make(tied=tied)
        with torch.no_grad():
            model.get_parameter(name)[first + 4] += 1.0  # item 5
        difference = (model(history) - small(history)).abs()[0]
        assert difference[4] > 1e-3 or name == "item_embedding.weight" and not tied
        assert difference[torch.arange(V) != 4].max() < 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_but_the_padding_row_is_trained(tied):
    model = make(tied=tied)
    model(histories(MAX_LEN)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Scores of one query change by a constant with the key's bias: no gradient but rounding.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-9, name
    assert not model.item_embedding.weight.grad[0].any()


def test_each_layer_is_called_once_with_a_row_per_sequence():
    model = make()
    calls: dict[str, list] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: calls.setdefault(name, []).append(inputs[0].shape)
            )
    model.encode(histories(5))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    # The last block has one query, which needs no position's key or value.
    unused = {"blocks.1.attention.key", "blocks.1.attention.value"}
    assert set(calls) == owners - unused
    assert all(len(shapes) == 1 and shapes[0][0] == 5 for shapes in calls.values())
    assert calls["position_embedding"] == [(5, 6)]
    assert calls["blocks.0.attention.query"] == [(5, 6, D)]
    assert calls["blocks.0.attention.key"] == [(5, 6, D)]
    assert calls["blocks.1.attention.query"] == [(5, D)]
    assert calls["blocks.1.feed_forward.inner"] == [(5, 1, D)]


def test_padding_of_the_whole_batch_is_not_computed():
    model = make()
    widths = []
    model.position_embedding.register_forward_hook(lambda _, i, __: widths.append(i[0].shape[1]))
    history = torch.zeros(3, 7, dtype=torch.int64)
    history[0, -2:] = 1
    model.encode(history)
    model.encode(torch.zeros(2, 7, dtype=torch.int64))
    assert widths == [3, 1]


def test_batches_of_other_kinds_and_sizes():
    model = make()
    history = histories(5)
    expected = model(history)
    assert torch.equal(model(history.int()), expected)
    assert torch.equal(model({"history": history, "target": None}), expected)
    assert model(history[:0]).shape == (0, V)
    assert torch.equal(model.read_history(histories(20)), histories(20)[:, -MAX_LEN:])
    one = make(max_len=1)
    assert one(history).shape == (5, V)
    assert expected.isfinite().all()


def test_the_config_rebuilds_the_model():
    model = make(norm="pre", tied=False, attention_dropout=0.3)
    again = ENCODERS["BERT4Rec"](**model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(histories(5)), model(histories(5)))


def test_initial_values():
    torch.manual_seed(0)
    model = BERT4Rec(1000, dim=64, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, not name.endswith("bias")))
        elif "embedding" in name:
            assert parameter.abs().max() <= 0.04, name
            # The standard deviation of a unit normal cut at two is 0.88.
            assert parameter.std().item() == pytest.approx(0.88 * 0.02, rel=0.05), name
        else:
            variance = 2 / sum(parameter.shape)
            assert parameter.abs().max() <= (3 * variance) ** 0.5, name
            assert parameter.var().item() == pytest.approx(variance, rel=0.1), name
    assert not model.item_embedding.weight[0].any()


def test_dropout_acts_in_training_only():
    history = histories(5)
    model = make(dropout=0.5, attention_dropout=0.0)
    assert torch.equal(model(history), model(history))
    for changes in ({"dropout": 0.5}, {"dropout": 0.0, "attention_dropout": 0.5}):
        model = make(**changes).train()
        assert not torch.equal(model(history), model(history))
    model = make(dropout=0.0).train()
    assert torch.equal(model(history), model(history))


def test_mask_items_hides_the_chosen_places_alone():
    model = make()
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    positions = torch.tensor([[3, 1], [0, 2]])
    masked = model.mask_items(tokens, positions, torch.tensor([[True, False], [True, True]]))
    assert masked.tolist() == [[0, 1, 2, V + 1], [V + 1, 5, V + 1, 7]]
    assert tokens[1, 0] == 4


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.ones(2, 3), "integer item ids, got torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "integer item ids, got torch.bool"),
        (torch.tensor([[1, V + 1]]), f"item id {V + 1}, outside 0..{V}"),
        (torch.tensor([[-3, 1]]), "item id -3"),
        (torch.ones(2, 0, dtype=torch.int64), r"\(N, T\) with T >= 1, got \(2, 0\)"),
        (torch.ones(3, dtype=torch.int64), r"got \(3,\)"),
        (torch.tensor([[0, 1], [1, 0]]), "row 1 ends in padding"),
        ({"target": torch.ones(1)}, r"no 'history', only \['target'\]"),
        ([[1, 2]], "must be a tensor, got list"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    with pytest.raises(InputError, match=message):
        make().encode(batch)


def test_too_many_tokens_are_named():
    with pytest.raises(InputError, match="9 columns, more than max_len = 8"):
        make().states(torch.ones(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_items": 0}, "num_items must be at least 1"),
        ({"max_len": 0}, "max_len must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 5}, "heads = 5 does not divide dim = 64"),
        ({"inner_dim": 0}, "inner_dim must be at least 1"),
        ({"norm": "both"}, "norm must be 'post' or 'pre', got 'both'"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        BERT4Rec(**({"num_items": 5} | changes))
