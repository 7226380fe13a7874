"""The GPU day without a GPU: its float64 twins, its schedule, its archive, and a dry run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from benchmarks import common
from benchmarks.gpu import candidates, cases, prepare, report, schedule, sweep, twins, units
from benchmarks.gpu.day import Day, lines
from benchmarks.gpu.units import Unit
from benchmarks.speed import bench_head
from fisherkern import ops
from fisherkern.ops.backend import gpu_paths
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.launch_table import Launch
from fisherkern.ops.lookup_square import lookup_square_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_lse import RANGE, softmax_lse_reference
from fisherkern.ops.softmax_moments import range_lse_reference, softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import softmax_topk_reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_day.py"


def layer(n: int, v: int, d: int, bias: str) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(n + v)
    h, weight, b = (torch.randn(shape, generator=g) for shape in ((n, d), (v, d), (v,)))
    if bias == "impossible":
        b[::3] = -torch.inf
    return h, weight, None if bias == "none" else b


# The last of several tiles is of one item, and of a range and a half.
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (4, 2 * RANGE + 1, 6), (3, 640, 4)])
@pytest.mark.parametrize("bias", ["some", "none", "impossible"])
def test_twins_of_the_output_layer_are_the_packages(sizes: tuple[int, int, int], bias: str) -> None:
    if sizes[1] == 1 and bias == "impossible":
        pytest.skip("its only item would be impossible")
    given = layer(*sizes, bias)
    twin = twins.Softmax(*given, tile=RANGE)
    mean, covariance = softmax_moments_reference(*given)
    rows, k = torch.arange(sizes[0]) * 40, min(5, sizes[1])
    pairs = [
        (twin.lse, softmax_lse_reference(*given)),
        (twin.mean(), mean),
        (twin.ranges(), range_lse_reference(*given)),
        (twin.covariance(), covariance),
        *zip(twin.sketch(rows, 3, 9), softmax_sketch_reference(*given, rows, 3, 9), strict=True),
        *zip(twin.topk(k), softmax_topk_reference(*given, k)[:2], strict=True),
        (twin.top(k), softmax_topk_reference(*given, k)[0]),
        *zip(twin.head(), head_sqgrad_reference(*given, None, None), strict=True),
    ]
    ids = torch.randint(0, sizes[1], (sizes[0], 4), generator=torch.Generator().manual_seed(0))
    omega = torch.rand(ids.shape)
    pairs += zip(twin.head(ids, omega), head_sqgrad_reference(*given, ids, omega), strict=True)
    for found, exact in pairs:
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_the_twin_of_segments_is_the_loop() -> None:
    g = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(3, 4, 5, 6, generator=g), torch.randn(4, 5, 7, generator=g)
    found = twins.segments(delta.flatten(1, 2), inputs.flatten(0, 1), range(0, 21, 5))
    torch.testing.assert_close(found, segment_outer_square_reference(delta, inputs))
    empty = twins.segments(delta.flatten(1, 2), inputs.flatten(0, 1), [0, 0, 5, 5, 10, 15, 20])
    torch.testing.assert_close(empty, found)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_the_twin_of_lookups_is_the_loop(crossed: bool, gpu: bool) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 6, (5, 7), generator=g)
    with gpu_paths() if gpu else contextlib.nullcontext():
        given = ops.lookup_segments(ids)
    delta, hidden = torch.randn(2, 35, 3, generator=g), torch.randn(5, 3, generator=g)
    beta = torch.randn(len(given.row), 2, generator=g)
    keys = zip(given.sequence.tolist(), given.row.tolist(), strict=True)
    cross = (dict(zip(keys, beta.tolist(), strict=True)), hidden) if crossed else (None, None)
    exact = lookup_square_reference((6, 3), delta, ids, *cross)
    found = twins.lookups(6, delta, given, *((beta, hidden) if crossed else (None, None)))
    torch.testing.assert_close(found, exact)


def test_an_error_in_units_of_what_is_allowed() -> None:
    exact = torch.tensor([1.0, -4.0]).double()
    near = torch.tensor([1.0, -4.004])
    assert cases.of_allowed(near, exact, 1e-2) == pytest.approx(0.1, rel=1e-3)
    assert cases.of_allowed(torch.tensor([1.0, torch.nan]), exact, 1e-2) == float("inf")
    assert cases.of_allowed(torch.ones(1), exact, 1e-2) == float("inf")
    ids = torch.tensor([1, 2, 3, 4])
    assert cases.of_allowed(ids, torch.tensor([1, 2, 4, 3]), 0.25) == 2
    kept = torch.tensor([True, False])
    assert cases.of_allowed(torch.tensor([1.0, 9.0]), exact, 1e-2, kept) == 0


def test_a_draw_is_judged_by_the_mass_between() -> None:
    cdf = torch.tensor([[0.25, 0.5, 0.5, 1.0]], dtype=torch.float64)
    wanted = cases.Drawn(cdf, torch.tensor([[0.25 - 1e-9, 0.3, 0.75]], dtype=torch.float64))
    assert cases.of_allowed(torch.tensor([[0, 1, 3]]), wanted, 1e-6) == 0
    assert cases.of_allowed(torch.tensor([[1, 1, 3]]), wanted, 1e-6) == pytest.approx(1e-3)
    assert cases.of_allowed(torch.tensor([[0, 2, 3]]), wanted, 1e-6) == pytest.approx(2e5)
    assert cases.of_allowed(torch.tensor([[0, 1, 1]]), wanted, 1e-6) == pytest.approx(2.5e5)
    assert cases.of_allowed(torch.tensor([[0, 1, 4]]), wanted, 1e-6) == float("inf")
    assert cases.of_allowed(torch.tensor([[0, 1]]), wanted, 1e-6) == float("inf")


def test_memory_that_nobody_wrote_is_poison() -> None:
    with cases.poisoned_memory():
        found = (torch.empty(3), torch.ones(2).new_empty(3), torch.empty_like(torch.ones(2)))
        assert all(bool(tensor.isnan().all()) for tensor in found)
        assert torch.empty(2, dtype=torch.int64).tolist() == [2**30] * 2
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")


def test_a_check_notices_rows_written_around_a_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.draw("float32", 3, 7, 4, "cpu")
    right = ops.head_sqgrad_

    def beyond(weight: Tensor, *rest: Tensor) -> None:
        right(weight, *rest)
        table = weight.as_strided((9, 4), (4, 1), 0)
        table[0] += 1

    exact = cases.wanted("head_sqgrad_", case)
    whole = cases.outputs("head_sqgrad_", case)
    assert all(cases.of_allowed(whole[name], *exact[name]) <= 1 for name in exact)
    monkeypatch.setattr(cases.ops, "head_sqgrad_", beyond)
    found = cases.outputs("head_sqgrad_", case)
    wrong = {name for name in exact if cases.of_allowed(found[name], *exact[name]) > 1}
    assert wrong == {"guard rows", "guard rows, sampled"}


def test_a_setting_of_a_sweep_is_in_force_and_goes_again() -> None:
    from fisherkern.ops import launch_table

    row, device = Launch(16, 16, 16, 2, 1), torch.device("cpu")
    before = launch_table.rows_of_table()
    with sweep.setting("softmax_lse", "fp32", row):
        assert launch_table.launch("softmax_lse", device, torch.float32) == row
        assert launch_table.launch("softmax_lse", device, torch.bfloat16) != row
    assert launch_table.rows_of_table() == before


# What units of the tests below do, by the names they are given to `units.KINDS`.


def fine(day: Day, unit: str, *_: str) -> None:
    day.emit("check", unit=unit, op="x", backend="torch", of_allowed=0.5, what="x", ok=True)


def held(day: Day, unit: str, seconds: str) -> None:
    with day.alone():
        time.sleep(float(seconds))


def leaves_a_process(day: Day, unit: str, *_: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (day.out / "left").write_text(str(process.pid))
    time.sleep(600)


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Day:
    for name in ("fine", "held", "leaves_a_process"):
        monkeypatch.setitem(units.KINDS, name, (__name__, name))
    made = Day("dry", tmp_path / "out", tmp_path / "work", tmp_path / "carried", dry=True)
    made.out.mkdir()
    made.work.mkdir()
    return made


def run_units(day: Day, *waiting: Unit, workers: int = 2, budget: float = 60) -> dict:
    schedule.Schedule(day, waiting, workers, budget).run()
    return schedule.unit_states(day)


def test_each_fault_costs_one_unit(day: Day) -> None:
    faults = [Unit(f"planted:{name}", 60 if name != "hang" else 0.5) for name in units.FAULTS]
    others = [Unit(f"fine:{i}") for i in range(4)]
    mixed = [unit for pair in itertools.zip_longest(others, faults) for unit in pair if unit]
    states = run_units(day, *mixed)
    assert {name for name, (ok, _) in states.items() if ok} == {unit.name for unit in others}
    assert states["planted:wrong"] == (False, "wrong: 2 of what is allowed")
    assert states["planted:crash"] == (False, "ended by SIGSEGV")
    assert states["planted:hang"] == (False, "ended at its limit of 0.5 s")
    assert len(lines(day.out / "check.jsonl")) == 5


def test_a_unit_waits_for_another_and_for_its_phase(day: Day) -> None:
    order = run_units(
        day, Unit("fine:last", phase=1), Unit("fine:second", after="held:0.2"), Unit("held:0.2"),
        Unit("fine:alone", after="no such unit"),
    )  # fmt: skip
    assert list(order)[-1] == "fine:last" and all(ok for ok, _ in order.values())
    assert list(order).index("held:0.2") < list(order).index("fine:second")


def test_waiting_to_be_alone_does_not_count(day: Day) -> None:
    states = run_units(day, Unit("held:1.5", 30), Unit("held:0.01", 1.0))
    assert all(ok for ok, _ in states.values()), states


def test_what_a_unit_started_ends_with_it(day: Day) -> None:
    states = run_units(day, Unit("leaves_a_process", 2))
    assert states["leaves_a_process"][0] is False
    process = Path("/proc") / (day.out / "left").read_text()
    for _ in range(100):  # nobody may have waited for it yet
        if not process.exists() or "Z" in (process / "stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("the process is still there")


def test_the_end_of_the_budget_is_said_of_each_unit(day: Day) -> None:
    states = run_units(day, Unit("held:60"), Unit("fine:0"), workers=1, budget=0.5)
    assert states["held:60"] == (False, "ended by the end of the budget")
    assert states["fine:0"] == (None, "not run: the time was over")


def test_an_archive_leaves_out_what_does_not_fit(day: Day) -> None:
    fine(day, "fine:0")
    (day.work / "small.log").write_text("x" * 1000)
    (day.work / "large.bin").write_bytes(os.urandom(2**20))
    path, left = report.archive(day, "the table", limit=report.SPARE + 2**19)
    assert left == [f"work/large.bin ({2**20} bytes)"]
    assert path.stat().st_size < report.SPARE + 2**19
    with tarfile.open(path) as tar:
        names = tar.getnames()
        text = tar.extractfile("day/left_out.txt").read().decode()
    assert names == [f"day/{n}" for n in ("summary.txt", "check.jsonl", "work/small.log",
                                          "left_out.txt")]  # fmt: skip
    assert text == left[0]


def test_the_table_has_at_most_sixty_lines_and_names_failures(day: Day) -> None:
    for i in range(200):
        ok = i % 2 == 0
        day.emit("check", unit=f"check:{i}", op=f"op{i}", backend="torch", what="x",
                 of_allowed=0.1 if ok else 3.0, ok=ok)  # fmt: skip
        schedule.append(day.out / "units.jsonl", {"unit": f"check:{i}", "ok": True, "s": 1,
                                                  "reason": None})  # fmt: skip
    found = report.table(day).splitlines()
    assert len(found) <= 60
    assert found[0] == "part dry (dry): 100 of 200 units right, 100 wrong, 0 not run"
    assert sum(row.startswith("WRONG check:") for row in found) > 20


def test_candidates_are_kept_as_they_compile(tmp_path: Path) -> None:
    calls: list[tuple] = []

    def compiled(kernel: str, kind: str, row: Launch, width: int) -> dict:
        calls.append((kernel, kind, row, width))
        if row.warps == 2:
            raise ValueError("no such thing")
        return {"stack": 8 * (row.stages == 3), "shared": 2**20 * (row.warps == 8), "registers": 1}

    path = tmp_path / "candidates.json"
    assert candidates.fill(path, 0.0, compiled) == 0 and not calls
    count = candidates.fill(path, 60.0, compiled, each=2)
    found = json.loads(path.read_text())
    by_subject: dict[tuple, int] = {}
    for line in found:
        assert line["fits"] and line["warps"] not in (2, 8) and line["stages"] != 3
        key = line["kernel"], line["kind"], line["D"]
        by_subject[key] = by_subject.get(key, 0) + 1
    assert set(by_subject.values()) == {2} and len(found) == count
    tried = len(calls)
    candidates.fill(path, 60.0, compiled, each=3)
    assert len(calls) > tried and len(set(calls)) == len(calls)  # nothing is compiled twice


def test_the_first_candidate_is_the_tables_row() -> None:
    row = Launch(64, 0, 32, 4, 2)
    rows = list(candidates.settings(row))
    assert rows[0] == row and len(set(rows)) == len(rows)
    assert all(found.items == 0 and 1 <= found.stages <= 4 for found in rows)


def test_prepare_takes_a_model_and_trains_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines_of_users = [f"{u} {1 + (u + t) % 9}" for u in range(1, 8) for t in range(5)]
    (data / "ml-1m.txt").write_text("\n".join(lines_of_users) + "\n")
    monkeypatch.setenv("FISHERKERN_DATA", str(data))
    monkeypatch.setattr(prepare, "fill", lambda path, seconds: path.write_text("[]"))
    monkeypatch.setattr(prepare, "MAX_LEN", 6)
    monkeypatch.setattr(prepare, "DIM", 4)
    folder = tmp_path / "carried"
    prepare.prepare(folder, None, 0.0)
    names = {"commit.txt", "ml-1m.txt", "bert4rec.safetensors", "bert4rec.json", "candidates.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert fk.load_model(folder / "bert4rec.safetensors").max_len == 6
    other = tmp_path / "other"
    prepare.prepare(other, folder / "bert4rec.safetensors", 0.0)
    assert {path.name for path in other.iterdir()} == names
    with pytest.raises(fk.InputError, match="FISHERKERN_DATA must name the folder"):
        monkeypatch.setenv("FISHERKERN_DATA", str(tmp_path))
        prepare.prepare(other, None, 0.0)


def test_bench_head_compares_with_float64() -> None:
    """bf16 inputs are exact, so that rounding is fp32's; numbers a percent off are refused."""
    given = bench_head.draw(3001, 16, 8, torch.bfloat16)
    for name, (build, _) in bench_head.OPS.items():
        ours, plain = build(*given)
        expected = bench_head.exact(name, *given)
        bench_head.check(name, 3001, 16, (ours, plain), expected)

        def off(right=ours) -> tuple[Tensor, ...]:
            return tuple(1.01 * tensor for tensor in right())

        with pytest.raises(SystemExit, match=f"bench_head: {name} at V=3001 D=16 is off by 0.01"):
            bench_head.check(name, 3001, 16, (off, plain), expected)


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHERKERN_COMMIT", "abc")
    assert common.commit() == "abc"


def dry(tmp_path: Path, *only: str) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path / "day")]
    return [*command, "--work", str(tmp_path / "work"), *(("--only", *only) if only else ())]


def test_a_signal_leads_to_the_archive_and_the_table(tmp_path: Path) -> None:
    process = subprocess.Popen(
        dry(tmp_path, "planted:hang", "planted:wrong"), stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "work" / "planted.hang.log"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "WRONG planted:hang: ended by a signal" in said
    with tarfile.open(tmp_path / "day" / "day.tar.gz") as tar:
        assert "day/units.jsonl" in tar.getnames()


def test_a_dry_run_ends_with_1_where_a_unit_is_wrong(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from benchmarks import gpu_day;"
        "gpu_day.settle(gpu_day.parse(sys.argv[2:]));"
        "from benchmarks.gpu import units;"
        "units.KINDS['env'] = ('benchmarks.gpu.units', 'no_such_function');"
        "sys.exit(gpu_day.main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", program, str(BENCHMARKS.parent), *dry(tmp_path, "env")[2:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 1 and "WRONG env:all: ended with status 1: AttributeError" in done.stdout
    )


@pytest.mark.slow
def test_a_dry_run_is_right_but_for_what_was_planted(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    done = subprocess.run(dry(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = [row for row in done.stdout.splitlines() if row.startswith("WRONG")]
    # In the order that the processes of the day found them.
    planted = sorted(f"planted:{name}:" for name in units.FAULTS)
    assert sorted(row.split()[1] for row in wrong) == planted
    # Whatever comes back from a lent machine fits its few files.
    assert len(list((tmp_path / "day").iterdir())) <= 8
    kinds = {line["unit"].split(":")[0] for line in lines(tmp_path / "day" / "units.jsonl")}
    assert kinds == units.KINDS.keys()
