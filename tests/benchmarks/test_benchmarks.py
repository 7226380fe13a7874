"""The benchmarks measure what they say: rivals against the definition, counts, tables, refusals.

Libraries that are not installed are skipped; `pip install -e '.[rivals]'` brings them.
"""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import pytest
import torch
from brute import all_gradients, counts, fisher
from torch import nn

import fisherkern as fk
from benchmarks import common, figures, readme_tables
from benchmarks.experiments.fisher_cost import best_scaled_error
from benchmarks.rivals import RIVALS, Rival, autograd, hooks, operators
from benchmarks.rivals.port import Port
from benchmarks.speed import bench_fisher, bench_segment, flops
from benchmarks.speed.trained import trained_model
from fisherkern import ops
from fisherkern.ops.products import product

V, K = 11, 4
# Padding, a row with an item twice, a full row.
HISTORIES = torch.tensor([[0, 0, 0, 3, 5], [1, 2, 3, 2, 4], [6, 7, 8, 9, 10]])
BY_NAME = {rival.name: rival for rival in RIVALS}
TABLE = "item_embedding.weight"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Rivals take the three histories in two parts, which must add up."""
    for module in (autograd, hooks, operators):
        monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(hooks, "BACKPACK_CHUNK", 2)


def small(tied: bool) -> fk.BERT4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fk.BERT4Rec(V, max_len=5, dim=6, layers=2, heads=2, inner_dim=7, tied=tied).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def defined():
    """By (tied, sampler): the definition in float64."""
    found = {}
    for tied in (True, False):
        p, gradients = all_gradients(small(tied).double(), HISTORIES)
        top = p.topk(K, dim=1)
        found[tied, "topk"] = fisher(gradients, counts(top.indices, top.values, V))
        found[tied, "exact"] = fisher(gradients, p)
    return found


def estimate(name: str, model: nn.Module, k: int):
    rival = BY_NAME[name]
    if rival.module is not None:
        pytest.importorskip(rival.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = rival.prepare(model)
        run(HISTORIES[:1], 2)  # a second run must owe nothing to the first
        return run(HISTORIES, k)


def off(found, expected, names) -> float:
    """The largest relative distance of a tensor, in its norm."""
    return max(float((found[n].double() - expected[n]).norm() / expected[n].norm()) for n in names)


def telling(expected):
    """All names but those of attention's key biases, whose Fisher is rounding noise."""
    return [name for name in expected if not name.endswith("key.bias")]


@pytest.mark.parametrize("tied", [True, False])
def test_the_port_gives_the_models_logits(tied):
    model = small(tied)
    port = Port(model)
    torch.testing.assert_close(port.train()(port.tokens(HISTORIES)), model(HISTORIES))
    renamed = port.estimate(dict(port.named_parameters()))
    assert {name: t.shape for name, t in renamed.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["naive loop", "torch.func vmap(grad)", "Opacus"])
def test_rivals_that_are_right(name, tied, defined):
    expected = defined[tied, "topk"]
    found = estimate(name, small(tied), K)
    assert found.keys() == expected.keys()
    assert off(found, expected, telling(expected)) < 1e-5


def test_backpack_knows_no_layer_norm_and_no_tie(defined):
    norms = [n for n in defined[False, "topk"] if "norm" in n or n.startswith("transform.2")]
    for tied in (False, True):
        expected = defined[tied, "topk"]
        found = estimate("BackPACK", small(tied), K)
        assert sorted(expected.keys() - found.keys()) == sorted(norms)
        right = [n for n in telling(expected) if n in found and not (tied and n == TABLE)]
        assert off(found, expected, right) < 1e-5
    assert off(found, expected, [TABLE]) > 0.01


def test_asdl_squares_each_position(defined):
    # Right where a parameter acts at one position alone, wrong at the layers below.
    last = ("transform", "blocks.1.feed_forward", "blocks.1.attention.output", "output_")
    expected = defined[False, "topk"]
    found = estimate("ASDL", small(False), K)
    assert found.keys() == expected.keys()
    assert off(found, expected, [n for n in expected if n.startswith(last)]) < 1e-5
    assert off(found, expected, ["blocks.0.feed_forward.inner.weight"]) > 0.1
    # The table's two uses are both there, their cross terms are not.
    assert 0.01 < off(estimate("ASDL", small(True), K), defined[True, "topk"], [TABLE]) < 0.2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["curvlinops Hutchinson", "curvlinops XDiag"])
def test_curvlinops_estimates_the_exact_fisher(name, tied, defined):
    expected = defined[tied, "exact"]
    found = estimate(name, small(tied), 400)
    together = torch.cat([found[n].double().flatten() for n in expected])
    exact = torch.cat([expected[n].flatten() for n in expected])
    # Hutchinson's own error at 400 products; a wrong factor or a lost tie is larger.
    assert float((together - exact).norm() / exact.norm()) < 0.3
    assert float(together.sum() / exact.sum()) == pytest.approx(1, abs=0.1)


def test_a_missing_library_is_said():
    reason = Rival("x", "topk", autograd.naive, "no_such_library", "x").missing()
    assert reason is not None and "no_such_library" in reason and "[rivals]" in reason


def test_every_op_has_a_count():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fisherkern::")
    }
    assert registered - flops.FORMULAS.keys() == set()


def attention(q, k):
    return ops.attention_backward(torch.rand(1, 1, 3, 5), torch.stack([q, q]), q, k, k, 1.0)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda h, w: h @ w.T, 2 * 3 * 5 * 4),
        (lambda h, w: ops.softmax_lse(h, w, None), 2 * 3 * 5 * 4),
        (lambda h, w: ops.softmax_topk(h, w, None, 2), 2 * 3 * 5 * 4),
        (
            lambda h, w: ops.segment_outer_square_(
                w.new_zeros(2, 4), h[None, None, :, :2], h[None]
            ),
            48,
        ),
        (lambda h, w: product(h, w), 2 * 3 * 5 * 4),
        (lambda h, w: attention(h[None, :, None], w[None, :, None]), 2 * 2 * 4 * 3 * 5 * 4),
    ],
)
def test_flop_counts(call, expected):
    h, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert flops.count(lambda: call(h, weight))[1] == expected


def test_counting_reaches_into_vmap():
    weight, x = torch.randn(5, 4), torch.randn(3, 4)
    rows, found = flops.count(lambda: torch.func.vmap(lambda row: weight @ row)(x))
    assert rows.shape == (3, 5) and found == 2 * 3 * 5 * 4


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


def run_fisher(tmp_path, *more: str) -> None:
    sizes = ["--max-len", "5", "--dim", "6", "--epochs", "1", "--sequences", "8", "--repeats", "1"]
    folder = ["--out", str(tmp_path / "models"), "--limit", "0.01", "--data", "synthetic"]
    bench_fisher.main([*sizes, *folder, *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_bench_fisher_writes_rows_and_a_figure(results, monkeypatch, capsys):
    def broken(model):
        raise NotImplementedError("no such layer\nand more")

    absent = Rival("absent", "topk", autograd.naive, "no_such_library", "x")
    rivals = (RIVALS[1], absent, Rival("broken", "topk", broken))
    monkeypatch.setattr(bench_fisher, "RIVALS", rivals)
    monkeypatch.setattr(bench_fisher, "RIVAL_SIZES", (2,))
    monkeypatch.setattr(bench_fisher, "OURS", [bench_fisher.OURS[0], bench_fisher.OURS[-1]])
    run_fisher(results)
    batchwise, exact, vmap = rows_of(results / "fisher.csv")
    assert list(vmap) == [*bench_fisher.COLUMNS, *common.MACHINE]
    assert (batchwise["provider"], batchwise["k"]) == (bench_fisher.BATCHWISE, "10")
    assert (exact["sampler"], exact["k"], exact["sequences"]) == ("exact", "6", "8")
    assert float(exact["error"]) < 1e-6 < float(batchwise["error"])
    assert (vmap["sequences"], vmap["k"], vmap["missing"]) == ("4", "2", "0")
    assert float(vmap["off"]) < 1e-4 and float(vmap["off_tied"]) < 1e-4
    assert float(vmap["error"]) > 0.1  # two items of many
    assert float(vmap["p50_ms_per_sequence"]) > 0 and float(vmap["gflop_per_sequence"]) > 0
    printed = capsys.readouterr().out
    assert "absent                 skipped: No module named 'no_such_library'" in printed
    assert "broken                 skipped: NotImplementedError: no such layer\n" in printed
    assert "4 sequences only" in printed
    assert (results / "fisher_synthetic_T5.png").stat().st_size > 5000

    # Run again from the model kept: another row, of which tables take the last.
    monkeypatch.setattr(bench_fisher, "trained_model", _only_loading)
    run_fisher(results, "--only", "vmap")
    assert len(rows_of(results / "fisher.csv")) == 5
    table = readme_tables.fisher_rows(T="5")
    assert table.count("torch.func vmap(grad)") == 1 and table.count("\n") == 4
    assert readme_tables.fisher_rows(T="6").count("\n") == 1


def _only_loading(data, checkpoint, folder, **sizes):
    (kept,) = folder.glob("*.safetensors")
    return trained_model(data, kept, folder, **sizes)


def test_bench_fisher_refuses_wrong_numbers(results, monkeypatch):
    right = fk.diag_fisher

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        return fk.DiagFisher({name: 1.01 * t for name, t in found.items()}, found.meta)

    monkeypatch.setattr(bench_fisher.fk, "diag_fisher", wrong)
    with pytest.raises(SystemExit, match="differs from brute force"):
        run_fisher(results)
    assert not (results / "fisher.csv").exists()


def test_rows_of_other_columns_stop_the_run_at_once(results, monkeypatch):
    (results / "fisher.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(bench_fisher, "Bench", None)  # nothing may be trained or measured first
    with pytest.raises(SystemExit, match=r"fisher\.csv: holds rows of other columns"):
        run_fisher(results)
    with pytest.raises(fk.InputError, match="other columns"):
        common.append("fisher", [{"a": 1}])


def test_a_model_of_another_catalogue_is_named(results, tmp_path):
    fk.save_model(small(True), tmp_path / "small.safetensors")
    with pytest.raises(SystemExit, match=r"small\.safetensors: has 11 items, the data synthetic"):
        run_fisher(results, "--model", str(tmp_path / "small.safetensors"))
    sasrec = fk.SASRec(V, max_len=5, dim=6)
    fk.save_model(sasrec, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="a SASRec; the rivals take a BERT4Rec"):
        run_fisher(results, "--model", str(tmp_path / "other.safetensors"))


def test_bench_segment_writes_rows(results, monkeypatch):
    monkeypatch.setattr(bench_segment, "SHAPES", [(2, 3, 5, 7)])
    monkeypatch.setattr(bench_segment, "matmul_rate", lambda size, dtype: 1e9)
    monkeypatch.setattr(bench_segment, "copy_bandwidth", lambda: 1e9)
    bench_segment.main(["--sequences", "4", "--repeats", "1"])
    rows = rows_of(results / "segment.csv")
    assert [row["provider"] for row in rows] == ["fisherkern", *bench_segment.RIVALS, "bmm alone"]
    first = rows[0]
    # 2·2·2·3·5·7 FLOP and 2·3·(2·5 + 7) numbers of 4 bytes.
    seconds = float(first["p50_ms"]) / 1e3
    assert float(first["gflop_s"]) * 1e9 * seconds == pytest.approx(840)
    assert float(first["gb_s"]) * 1e9 * seconds == pytest.approx(408)
    assert float(first["share_of_matmul"]) == pytest.approx(float(first["gflop_s"]))
    assert readme_tables.segment_rows(T="3").count("| 5 × 7 |") == len(rows)


@pytest.mark.parametrize("culprit", ["ours", "a rival"])
def test_bench_segment_refuses_wrong_numbers(results, monkeypatch, culprit):
    def wrong(delta, inputs):
        return 1.001 * bench_segment.stored(delta, inputs)

    if culprit == "ours":
        monkeypatch.setattr(bench_segment, "ours", wrong)
    else:
        monkeypatch.setitem(bench_segment.RIVALS, "torch einsum, stored", wrong)
    with pytest.raises(SystemExit, match="times the allowed error"):
        bench_segment.main(["--sequences", "2", "--repeats", "1"])
    assert not (results / "segment.csv").exists()


def test_percentiles_and_peak():
    assert common.percentiles([4.0, 0.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(
        {"p20_ms": 1.0, "p50_ms": 2.5, "p80_ms": 4.0}
    )
    result, extra = common.with_peak(lambda: float(torch.ones(2**24).sum()))
    # 64 MB held for a moment.
    assert result == 2**24 and extra > 50


def test_an_estimate_of_nothing_has_error_one():
    exact = {"a": torch.tensor([1.0, 2.0])}
    assert best_scaled_error({"a": torch.zeros(2)}, exact) == 1
    assert best_scaled_error({"a": torch.tensor([-3.0, 0.0])}, exact) == pytest.approx(0.8**0.5)


def test_summary_of_experiments(tmp_path):
    def gap(mean, error=0.001):
        return {"model": "member 2", "mean": mean, "standard_error": error}

    def row(model, ndcg, best, uniform):
        return {"model": model, "ndcg@10": ndcg, "over": {"best": best, "uniform merge": uniform}}

    rows = [
        row("member 2", 0.15, gap(0, 0), gap(-0.01)),
        row("uniform merge", 0.16, gap(0.01), None),
        row("Fisher", 0.17, gap(0.02), gap(0.0102, 0.0005)),
        row("ensemble", 0.18, gap(0.03), gap(0.02)),
    ]
    (tmp_path / "here").mkdir()
    result = {"seeds": [0, 1], "tables": [{"rows": []}, {"rows": rows}]}
    (tmp_path / "here" / "result.json").write_text(json.dumps(result))
    names = ("uniform merge", "Fisher", "ensemble", "not there yet")
    lines = [("these", "here", *names), ("those", "not run", *names)]
    *_, line = found = readme_tables.summary_rows(tmp_path, lines).split("\n")
    assert len(found) == 3
    assert line == (
        "| these | 2 | 0.1500 | +0.0100 ± 0.0020 | +0.0200 ± 0.0020 | +0.0102 ± 0.0010"
        " | +0.0300 ± 0.0020 |  |"
    )


def test_merges_by_start(tmp_path):
    def row(model, ndcg, mean):
        gap = {"model": "member 2", "mean": mean, "standard_error": 0.001}
        return {"model": model, "ndcg@10": ndcg, "over": {"best member": gap}}

    rows = [
        row("member 2", 0.15, 0),
        row("uniform merge", 0.14, -0.01),
        row("uniform merge, aligned by the loss", 0.16, 0.01),
        row("score ensemble", 0.17, 0.02),
    ]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "result.json").write_text(json.dumps({"tables": [{"rows": rows}]}))
    lines = [("these", "here"), ("those", "not run")]
    *_, line = found = readme_tables.start_rows(tmp_path, lines).split("\n")
    assert len(found) == 3
    assert line == (
        "| these | 0.1500 | -0.0100 ± 0.0020 |  |  |  | +0.0100 ± 0.0020 | +0.0200 ± 0.0020 |"
    )
