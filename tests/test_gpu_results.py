"""From a run's lines to proven.json: nothing is taken that was not seen on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_results import Line, checks, folder, today, write

from benchmarks.gpu import prove
from fisherkern.errors import InputError
from fisherkern.ops import launch_table, proven
from fisherkern.ops.proven import LOOKUPS, SEGMENTS

__all__ = ["folder", "today"]  # fixtures


def times(ours: list[float], theirs: list[float], **more: Any) -> list[Line]:
    """Medians at 10³ and 10⁶ rows times items."""
    found = []
    for v, pair in zip((100, 100_000), zip(ours, theirs, strict=True), strict=True):
        for backend, p50 in zip(("triton", "torch"), pair, strict=True):
            line = {"op": "softmax_lse", "backend": backend, "dtype": "float32"}
            line |= {"D": 64, "N": 10, "V": v, "p20_ms": p50, "p50_ms": p50, "p80_ms": p50}
            found.append(line | more)
    return found


def proven_rows(folder: Path, *arguments: str) -> list[proven.Row]:
    file = folder / "proven.json"
    if not file.exists():
        file.write_text("[]\n")
    prove.main([str(folder), *arguments], file)
    return proven.read_proven(file)


def test_a_right_run_gives_a_row(folder: Path, capsys: Any, today: dict[str, str]) -> None:
    write(folder, "check", checks())
    write(folder, "time", times([1.0, 1.0], [0.5, 2.0]))
    (row,) = proven_rows(folder)
    assert row == proven.Row(
        op="softmax_lse",
        backend="triton",
        arch=90,
        dtype="float32",
        widths=(33, 64),
        multiple_of=1,
        hash=today["softmax_lse/triton"],
        launch=proven.launch_settings("softmax_lse", "triton", 90, "float32"),
        faster_from=1_000_000,
        device="NVIDIA H100",
        evidence="benchmarks/results/gpu_2027-01-01",
    )
    said = capsys.readouterr().out
    assert said == "proven  softmax_lse triton float32, 33 to 64: from 1,000,000\n"


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1, 1], [2, 2], 1000),
        ([1, 1], [0.5, 2], 1_000_000),
        ([1, 1], [2, 0.5], None),  # faster in a small case alone: no size from which on
        ([1, 1], [1, 1], None),
    ],
)
def test_the_size_from_which_a_kernel_is_faster(
    folder: Path, ours: list[float], theirs: list[float], expected: int | None
) -> None:
    write(folder, "check", checks())
    write(folder, "time", times(ours, theirs))
    assert proven_rows(folder)[0].faster_from == expected


def test_times_of_others_do_not_count(folder: Path) -> None:
    write(folder, "check", checks())
    for more in ({"dtype": "bfloat16"}, {"D": 128}, {"op": "softmax_mean"}):
        write(folder, "time", times([1, 1], [2, 2], **more))
        assert proven_rows(folder)[0].faster_from is None
    write(folder, "time", [x for x in times([1, 1], [2, 2]) if x["backend"] == "triton"])
    assert proven_rows(folder)[0].faster_from is None


def test_only_multiples_of_16_were_checked(folder: Path) -> None:
    write(folder, "check", checks(widths=(256,)))
    (row,) = proven_rows(folder)
    assert (row.widths, row.multiple_of) == ((129, 256), 16)


def without(condition: Any) -> list[Line]:
    return [line for line in checks() if not condition(line)]


CRASH = {"unit": "check:softmax_lse:float32:64", "ok": False, "exception": "ended with -6"}
WRONG = checks()[0] | {"of_allowed": 2.0, "ok": False}
RAISED = checks()[0] | {"of_allowed": None, "ok": False, "what": "exception", "exception": "no"}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([*checks(), WRONG], "lse at N 3, V 7, D 50: 2.0 of the error allowed"),
        ([WRONG, *checks()], "2.0 of the error allowed"),  # once wrong stays wrong
        ([*checks(), RAISED], "exception at N 3, V 7, D 50: no"),
        ([RAISED, *without(lambda x: (x["N"], x["D"]) == (3, 50))], "exception at N 3"),
        ([*checks(), CRASH], "ended with -6"),
        (without(lambda x: x["D"] == 64), "not checked at D = 64"),
        (without(lambda x: (x["D"], x["V"]) == (50, 3706)), "D = 50 with 2,001 to 10,000 items"),
        (without(lambda x: x["V"] == 1_000_000), "not checked at D = 64 with 1,000,000 items"),
        (without(lambda x: "stream" in x["what"]), "no check is named 'second stream'"),
        (without(lambda x: "impossible" in x["what"]), "no check is named 'bias impossible'"),
        ([*checks(), {"unit": "sampler", "ok": False}], "sampler failed"),
        (without(lambda x: x["D"] == 64) + [CRASH], "ended with -6"),
        (
            [*checks(), {"unit": "fisher:exact:triton", "op": "diag_fisher", "ok": False}],
            "fisher:exact:triton failed",
        ),
    ],
)
def test_no_row_and_the_reason(folder: Path, capsys: Any, lines: list[Line], reason: str) -> None:
    write(folder, "check", checks())
    assert len(proven_rows(folder)) == 1
    write(folder, "check", lines)
    assert proven_rows(folder) == []  # the row of the first run is gone as well
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines",
    [
        [RAISED, *checks()],
        [CRASH, *checks()],
        [*checks(), {"unit": "fisher:exact:torch", "op": "diag_fisher", "ok": False}],
        [*checks(), {"unit": "extension:lookup_square_:float32", "ok": False}],
        [*checks(), WRONG | {"backend": "torch"}],
        [*checks(), WRONG | {"dtype": "bfloat16", "unit": "check:softmax_lse:bfloat16:50"}],
        [*checks(), WRONG | {"D": 100, "unit": "check:softmax_lse:float32:100"}],
    ],
)
def test_what_costs_another_unit_alone(folder: Path, lines: list[Line]) -> None:
    """What ran again after an exception, PyTorch, other dtypes, widths, and kernels."""
    write(folder, "check", lines)
    assert [row.op for row in proven_rows(folder)] == ["softmax_lse"]


def test_a_sanitizer_is_heard_unless_told_otherwise(folder: Path, capsys: Any) -> None:
    write(folder, "check", checks())
    write(folder, "other", [{"unit": "sanitizer:memcheck:triton", "ok": False}])
    assert proven_rows(folder) == []
    assert "sanitizer:memcheck:triton failed" in capsys.readouterr().out
    assert len(proven_rows(folder, "--despite", "sanitizer:memcheck:triton")) == 1
    write(folder, "other", [{"unit": "sanitizer:memcheck:extension", "ok": False}])
    assert len(proven_rows(folder)) == 1


def test_processes_that_ended_badly(folder: Path, capsys: Any) -> None:
    """What is in units.jsonl alone; a unit that never ran is missing and no more."""
    unit = {"unit": "check:softmax_lse:float32:64", "ok": False, "reason": "ended by SIGSEGV"}
    write(folder, "check", checks())
    write(folder, "units", [unit])
    assert proven_rows(folder) == []
    assert "ended by SIGSEGV" in capsys.readouterr().out
    for right in (
        [unit, unit | {"ok": True, "reason": None}],
        [unit | {"ok": None}],
        [unit | {"unit": "sweep:softmax_lse:fp32:64"}],
        [unit | {"unit": "sanitizer:memcheck:triton"}],  # it had found nothing yet
        [unit | {"unit": "driver:all"}],
    ):
        write(folder, "units", right)
        assert len(proven_rows(folder)) == 1
    write(folder, "units", [unit | {"ok": True}])
    write(folder, "check", [line for line in checks() if line["D"] == 50])
    assert proven_rows(folder) == []


def test_a_later_part_makes_exceptions_good(folder: Path) -> None:
    first = [RAISED, *without(lambda x: (x["N"], x["D"]) == (3, 50))]
    for part, lines in (("correct", first), ("tune", checks())):
        (folder / part).mkdir()
        write(folder / part, "check", lines)
    assert len(proven_rows(folder)) == 1
    (folder / "correct").rename(folder / "zzz")  # the exception comes last
    assert proven_rows(folder) == []


def test_a_torn_line_is_a_failure_of_its_unit(folder: Path, capsys: Any) -> None:
    write(folder, "check", checks())
    with (folder / "check.jsonl").open("a") as stream:
        stream.write('{"unit": "check:softmax_lse:float32:64", "op": "softmax_')
    assert proven_rows(folder) == []
    assert "a torn line" in capsys.readouterr().out


@pytest.mark.parametrize("about", [{"device": "interpreter", "arch": 0}, {"device": "cpu"}])
def test_dry_runs_are_refused(folder: Path, about: Line) -> None:
    write(folder, "check", [*checks(), checks()[0] | about])
    with pytest.raises(InputError, match=r"check\.jsonl: line 63 is of the (interpreter|cpu), not"):
        proven_rows(folder)


def test_a_run_of_nobody_knows_what_is_refused(folder: Path, today: dict[str, str]) -> None:
    write(folder, "check", [*checks(), checks()[0] | {"device": "NVIDIA B200", "arch": 100}])
    with pytest.raises(InputError, match="not of one GPU"):
        proven_rows(folder)
    write(folder, "check", checks())
    (folder / "env.json").write_text("{}")
    with pytest.raises(InputError, match="no hashes"):
        proven_rows(folder)
    write(folder, "other", [{"unit": "env", "ok": True, "hashes": today}])
    assert len(proven_rows(folder)) == 1
    with pytest.raises(InputError, match="belongs into benchmarks/results"):
        prove.ROOT = Path(__file__).parent
        proven_rows(folder)


@pytest.mark.parametrize("key", ["softmax_lse/triton", "launch/softmax_lse/90/fp32"])
def test_a_run_of_other_kernels_proves_nothing(
    folder: Path, capsys: Any, today: dict[str, str], key: str
) -> None:
    write(folder, "check", [*checks(), *checks("softmax_covariance")])
    assert len(proven_rows(folder)) == 2
    other = "16,16,16,4,1" if key.startswith("launch") else "another"
    hashes = {"unit": "env:all", "ok": True, "hashes": today | {key: other}}
    write(folder, "other", [hashes])  # as well as what env.json says: changed in between
    assert [row.op for row in proven_rows(folder)] == ["softmax_covariance"]
    reason = "neither the checks' nor" if key.startswith("launch") else "of another source"
    assert reason in capsys.readouterr().out


def test_settings_that_only_the_sweep_saw(folder: Path, today: dict[str, str]) -> None:
    key = "launch/softmax_lse/90/fp32"
    (folder / "env.json").write_text(json.dumps({"hashes": today | {key: "16,16,16,4,1"}}))
    write(folder, "check", checks())
    now = launch_table._TABLE["softmax_lse", 90, "fp32"]._asdict()
    line = {
        "kernel": "softmax_lse",
        "kind": "fp32",
        "D": 64,
        "N": 9,
        "V": 9,
        **now,
        "correct": True,
    }
    for lines, expected in (
        ([line], 1),
        ([line, line | {"correct": False}], 0),
        ([line | {"D": 128}], 0),
        ([line | {"kind": "half"}], 0),
        ([line | {"warps": 16}], 0),
    ):
        write(folder, "sweep", lines)
        assert len(proven_rows(folder)) == expected


def test_stale_rows_go_and_others_stay(folder: Path, capsys: Any, today: dict[str, str]) -> None:
    write(folder, "check", [*checks(), *checks("softmax_mean")])
    file = folder / "proven.json"
    rows = proven_rows(folder)
    capsys.readouterr()
    prove.main([], file)
    assert proven.read_proven(file) == rows and capsys.readouterr().out == ""
    today_changed = today | {"softmax_mean/triton": "another"}
    prove.hashes_of_tree = lambda: today_changed
    prove.main([], file)
    assert proven.read_proven(file) == [row for row in rows if row.op == "softmax_lse"]
    assert capsys.readouterr().out == (
        "out     softmax_mean triton float32, 33 to 64: the kernel's source has changed since\n"
    )


def segment_checks(backend: str, dtype: str, sizes: list[tuple[int, int, str]]) -> list[Line]:
    line = {"unit": f"extension:{SEGMENTS}:{dtype}", "op": SEGMENTS, "backend": backend}
    line |= {"dtype": dtype, "N": 3, "of_allowed": 0.1, "ok": True}
    return [line | {"D": i, "V": o, "what": f"{what}second stream"} for i, o, what in sizes]


def cells(rows: list[proven.Row]) -> set[tuple[str, str, tuple[int, int]]]:
    return {(row.backend, row.dtype, row.widths) for row in rows}


def test_segments_need_aligned_and_odd_rows_of_each_tile(folder: Path) -> None:
    lines = segment_checks("cuda", "tf32", [(64, 64, "tile 64, "), (131, 65, "tile 64, ")])
    lines += segment_checks("cuda", "tf32", [(64, 64, "tile 128, ")])
    lines += segment_checks("triton", "float32", [(50, 100, ""), (64, 128, "")])
    lines += segment_checks("cuda", "float16", [(50, 100, ""), (64, 128, "")])  # not its kernels
    write(folder, "check", lines)
    first = {("cuda", "tf32", (1, 127)), ("triton", "float32", (1, 4096))}
    assert cells(proven_rows(folder)) == first
    lines += segment_checks("cuda", "tf32", [(17, 13, "tile 128, ")])
    write(folder, "check", lines)
    assert cells(proven_rows(folder)) == first | {("cuda", "tf32", (128, 4096))}
    # An exception names no tile: nobody knows which of the kernels it was.
    (raised,) = segment_checks("cuda", "tf32", [(64, 64, "")])
    raised |= {"what": "exception", "of_allowed": None, "ok": False, "exception": "CUDA error"}
    write(folder, "check", [*lines, raised])
    assert cells(proven_rows(folder)) == {("triton", "float32", (1, 4096))}


def test_lookups_say_their_size(folder: Path) -> None:
    line = {"unit": "u", "op": LOOKUPS, "backend": "cuda", "dtype": "float32", "N": 9, "V": 10}
    line |= {"of_allowed": 0.1, "ok": True, "what": "second stream: fisher"}
    write(folder, "check", [line | {"D": 50}, line | {"D": 64}])
    both = [line | {"D": 64, "backend": b, "p50_ms": t} for b, t in (("cuda", 1), ("torch", 2))]
    write(folder, "time", both)
    assert proven_rows(folder)[0].faster_from is None
    write(folder, "time", [x | {"size": 77} for x in both])
    assert proven_rows(folder)[0].faster_from == 77
