"""The extension against plain float64 loops: its CPU loops, its CUDA kernels emulated on
the CPU, and the same kernels on a GPU where there is one."""

from __future__ import annotations

import itertools
import re
from typing import Any

import emulated_extension
import pytest
import torch
from helpers.extension import (
    NO_EXTENSION,
    SEGMENTS,
    assert_close,
    brute_segments,
    guarded,
    tf32,
)
from torch import Tensor

from fisherkern import ops
from fisherkern.errors import InputError
from fisherkern.ops import _extension, build
from fisherkern.ops._extension import LaunchSplit
from fisherkern.ops.backend import use_backend
from fisherkern.ops.lookup_square import lookup_square_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulated_extension.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def where(request: pytest.FixtureRequest) -> tuple[Any, str, bool]:
    """(the extension, the device of its tensors, whether to launch the CUDA kernels)."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated"), "cpu", True
    built = build.load_extension()
    if built is None:
        pytest.skip(NO_EXTENSION)
    if request.param == "cpu":
        return built, "cpu", False
    if not built.cuda_archs:
        pytest.skip("fisherkern._C was built without CUDA kernels")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the compiled CUDA kernels are not run")
    return built, "cuda", True


def to_device(tensor: Tensor, device: str) -> Tensor:
    return tensor if device == "cpu" else tensor.to(device)


def test_a_table_of_literals(where: tuple[Any, str, bool]) -> None:
    """Two positions that cancel; one of 2·5; an empty segment; two probes of the last."""
    extension, device, launch = where
    delta = torch.tensor([[[1.0], [1.0], [2.0]], [[0.0], [0.0], [3.0]]], device=device)
    inputs = torch.tensor([[3.0], [-3.0], [5.0]], device=device)
    offsets = torch.tensor([0, 2, 2, 3], device=device)
    fisher = torch.ones(1, 1, device=device)
    split = LaunchSplit(1) if launch else None
    _extension.segment_outer_square_(extension, fisher, delta, inputs, offsets, split=split)
    assert fisher.item() == 1 + 0 + 0 + 100 + 225


@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("case", SEGMENTS, ids=str)
def test_segment_outer_square(
    where: tuple[Any, str, bool], case: tuple[int, list[int], int, int], kind: str
) -> None:
    extension, device, launch = where
    probes, lengths, rows, columns = case
    starts = [0, *itertools.accumulate(lengths)]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    delta = guarded(probes, starts[-1], rows, dtype=dtype)
    inputs = guarded(starts[-1], columns, dtype=dtype, seed=1)
    exact = [tf32(x) if kind == "tf32" else x for x in (delta, inputs)]
    before = torch.rand(rows, columns)
    expected = before.double() + brute_segments(exact[0], exact[1], starts)
    delta, inputs = to_device(delta, device), to_device(inputs, device)
    splits = [LaunchSplit(1), LaunchSplit(3, 128)] if launch else [None]
    if launch and device == "cpu":
        emulated_extension.allow_reads(extension, delta, inputs)
    for split, index in itertools.product(splits, (torch.int32, torch.int64)):
        fisher = before.to(device, copy=True)
        offsets = torch.tensor(starts, dtype=index, device=device)
        _extension.segment_outer_square_(
            extension, fisher, delta, inputs, offsets, tf32=kind == "tf32", split=split
        )
        assert_close(fisher, expected)
    if launch and device == "cpu":
        emulated_extension.allow_reads(extension)


def test_equal_lengths_need_no_offsets(where: tuple[Any, str, bool]) -> None:
    extension, device, launch = where
    delta, inputs = guarded(2, 5, 6, 4).to(device), guarded(5, 6, 12, seed=1).to(device)
    fisher = torch.zeros(4, 12, device=device)
    split = LaunchSplit(2) if launch else None
    _extension.segment_outer_square_(
        extension, fisher, delta.view(2, 30, 4), inputs.view(30, 12), 6, split=split
    )
    assert_close(fisher, segment_outer_square_reference(delta.cpu(), inputs.cpu()))


def test_results_repeat(where: tuple[Any, str, bool]) -> None:
    extension, device, launch = where
    delta, inputs = guarded(2, 90, 16).to(device), guarded(90, 20, seed=1).to(device)
    offsets = torch.tensor([0, 7, 40, 41, 90], device=device)
    found = []
    for _ in range(2):
        fisher = torch.zeros(16, 20, device=device)
        split = LaunchSplit(5) if launch else None
        _extension.segment_outer_square_(extension, fisher, delta, inputs, offsets, split=split)
        found.append(fisher)
    assert torch.equal(*found)


# (R, N, T, V, D): one of everything; primes with duplicates; no position; more than 128
# columns, and more pairs of a row than threads along them; widths that are and are not a
# multiple of 4.
LOOKUPS = [(1, 1, 1, 1, 1), (3, 5, 7, 4, 13), (2, 3, 0, 4, 8), (3, 23, 2, 2, 132), (5, 7, 3, 50, 8)]


def lookups(
    case: tuple[int, int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, ops.LookupSegments, Tensor, Tensor]:
    probes, n, t, v, d = case
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, v, (n, t), generator=g)
    segments = ops.lookup_segments(ids)
    delta = guarded(probes, n * t, d, dtype=dtype)
    return ids, delta, segments, guarded(len(segments.row), probes, seed=1), guarded(n, d, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_lookup_square(
    where: tuple[Any, str, bool], case: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    extension, device, launch = where
    ids, delta, segments, beta, hidden = lookups(case, dtype)
    order, starts, row, sequence, row_start = (x.to(device) for x in segments)
    pairs = zip(segments.sequence.tolist(), segments.row.tolist(), strict=True)
    by_pair = dict(zip(pairs, beta.tolist(), strict=True))
    shape = (case[3], case[4])
    before = torch.rand(shape)
    splits = [LaunchSplit(1), LaunchSplit(3)] if launch else [None]
    crosses = [(None, None, None), (to_device(beta, device), to_device(hidden, device), sequence)]
    for split, cross in itertools.product(splits, crosses):
        fisher = before.to(device, copy=True)
        _extension.lookup_square_(
            extension, fisher, to_device(delta, device), order, starts, row, row_start, *cross,
            split=split,
        )  # fmt: skip
        given = (by_pair, hidden) if cross[0] is not None else (None, None)
        assert_close(fisher, before.double() + lookup_square_reference(shape, delta, ids, *given))


def test_a_row_of_minus_one_adds_nothing(where: tuple[Any, str, bool]) -> None:
    extension, device, launch = where
    indices = ([0, 1, 2], [0, 1, 3], [-1, 1], [0, 1, 2])
    order, starts, row, row_start = (torch.tensor(x, device=device) for x in indices)
    delta = torch.tensor([[[1.0], [2.0], [3.0]]], device=device)
    for split in [LaunchSplit(1), LaunchSplit(2)] if launch else [None]:
        fisher = torch.zeros(2, 1, device=device)
        _extension.lookup_square_(
            extension, fisher, delta, order, starts, row, row_start, split=split
        )
        assert fisher.flatten().tolist() == [0, 25]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_the_op_in_the_extension_and_in_pytorch(
    case: tuple[int, int, int, int, int], backend: str
) -> None:
    ids, delta, segments, beta, hidden = lookups(case, torch.float32)
    pairs = zip(segments.sequence.tolist(), segments.row.tolist(), strict=True)
    by_pair = dict(zip(pairs, beta.tolist(), strict=True))
    shape = (case[3], case[4])
    plain, crossed = torch.ones(shape), torch.ones(shape)
    with use_backend(backend):
        ops.lookup_square_(plain, delta, segments)
        ops.lookup_square_(crossed, delta, segments, beta, hidden)
    assert_close(plain, 1 + lookup_square_reference(shape, delta, ids))
    assert_close(crossed, 1 + lookup_square_reference(shape, delta, ids, by_pair, hidden))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_row_of_every_sequence_is_not_rounded_square_by_square(backend: str) -> None:
    """2,048 squares of about 1 beside a sum whose unit in the last place is 1/16."""
    ids, n = torch.zeros(2048, 1, dtype=torch.int64), 2048
    delta = 1 + torch.rand(1, n, 3, generator=torch.Generator().manual_seed(0))
    fisher = torch.full((2, 3), 2.0**20)
    with use_backend(backend):
        ops.lookup_square_(fisher, delta, ops.lookup_segments(ids))
    expected = 2.0**20 + delta[0].double().square().sum(dim=0)
    assert ((fisher[0] - expected).abs() <= 1 / 16).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_on_a_gpu(dtype: torch.dtype) -> None:
    """Through torch.library, where nothing but the backend names the extension."""
    delta, inputs = guarded(2, 40, 7, 136, dtype=dtype), guarded(40, 7, 200, dtype=dtype, seed=1)
    fisher = torch.zeros(136, 200, device="cuda")
    with use_backend("cuda"):
        ops.segment_outer_square_(fisher, delta.cuda(), inputs.cuda())
    assert_close(fisher, segment_outer_square_reference(delta, inputs))
    ids, delta, segments, beta, hidden = lookups((9, 33, 8, 12, 64), dtype)
    pairs = zip(segments.sequence.tolist(), segments.row.tolist(), strict=True)
    by_pair = dict(zip(pairs, beta.tolist(), strict=True))
    fisher = torch.zeros(12, 64, device="cuda")
    segments = ops.LookupSegments(*(x.cuda() for x in segments))
    with use_backend("cuda"):
        ops.lookup_square_(fisher, delta.cuda(), segments, beta.cuda(), hidden.cuda())
    assert_close(fisher, lookup_square_reference((12, 64), delta, ids, by_pair, hidden))


def test_segments_of_a_literal() -> None:
    segments = ops.lookup_segments(torch.tensor([[2, 0, 2], [-1, 2, 0]]))
    assert segments.order.tolist() == [1, 5, 0, 2, 4]
    assert segments.segment_start.tolist() == [0, 1, 2, 4, 5]
    assert segments.row.tolist() == [0, 0, 2, 2]
    assert segments.sequence.tolist() == [0, 1, 0, 1]
    assert segments.row_start.tolist() == [0, 2, 4]


def test_wrong_tensors_are_named() -> None:
    def call(fisher: Tensor, delta: Tensor, inputs: Tensor, offsets: Any = 1) -> None:
        _extension.segment_outer_square_(None, fisher, delta, inputs, offsets)

    f, d, a = torch.zeros(2, 3), torch.zeros(1, 4, 2), torch.zeros(4, 3)
    with pytest.raises(InputError, match=r"^inputs: \(5, 3\) is not \(M, I\)"):
        call(f, d, torch.zeros(5, 3))
    with pytest.raises(InputError, match=r"^fisher: \(3, 2\) is not \(O, I\)"):
        call(f.T.contiguous(), d, a)
    with pytest.raises(InputError, match="^fisher: must be fp32 and contiguous"):
        call(torch.zeros(3, 2).T, d, a)
    with pytest.raises(InputError, match="float16 and torch.float32 are not"):
        call(f, d.half(), a)
    with pytest.raises(InputError, match=r"^offsets: .* got \(2,\) torch.int16"):
        call(f, d, a, torch.zeros(2, dtype=torch.int16))
    starts = torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"^beta: \(2, 1\) is not \(U, R\)"):
        _extension.lookup_square_(
            None, torch.zeros(2, 2), d, starts[:1], starts, starts[:1], starts,
            torch.zeros(2, 1), torch.zeros(1, 2), starts[:1],
        )  # fmt: skip


SEGMENT_ARGUMENTS = {
    "fisher": 8, "delta": 8, "inputs": 8, "offsets": 0, "offset_bytes": 0, "length": 1,
    "probes": 1, "positions": 1, "segments": 1, "rows": 1, "columns": 1, "precision": 0,
}  # fmt: skip
LAUNCH = {"device": 0, "stream": 0, "tile": 64, "splits": 1, "workspace": 0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": -1}, "segment_outer_square: rows must not be negative, got -1"),
        ({"delta": 0}, "segment_outer_square: delta is a null address"),
        ({"precision": 3}, "precision must be 0 (fp32), 1 (tf32) or 2 (bf16), got 3"),
        ({"offset_bytes": 2}, "offset_bytes must be 0, 4 or 8, got 2"),
        ({"segments": 2}, "2 segments of 1 do not fit into 1 positions"),
        ({"tile": 32}, "segment_outer_square: tile must be 64 or 128, got 32"),
        ({"splits": 2}, "segment_outer_square: workspace is a null address"),
        ({"device": 7}, "cudaSetDevice: "),
    ],
)
def test_wrong_numbers_are_named(emulated: Any, wrong: dict[str, int], message: str) -> None:
    """Before any address is read: those here are of nothing."""
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        emulated.segment_outer_square_cuda(**{**SEGMENT_ARGUMENTS, **LAUNCH, **wrong})


@pytest.mark.parametrize("starts", [[0, 2, 1], [-1, 2], [0, 5]])
def test_the_cpu_refuses_wrong_offsets(emulated: Any, starts: list[int]) -> None:
    d, a, f = torch.ones(1, 4, 1), torch.ones(4, 1), torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"segment_outer_square: segment \d is \["):
        _extension.segment_outer_square_(emulated, f, d, a, torch.tensor(starts))


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "order[0] is 9"), (1, "segment_start decreases at 1"), (2, "row[0] is 9"),
     (4, "sequence[0] is 9")],
)  # fmt: skip
def test_the_cpu_refuses_wrong_indices(emulated: Any, index: int, message: str) -> None:
    order, starts, row, row_start, sequence = (
        torch.tensor(x) for x in ([0], [0, 1], [0], [0, 1], [0])
    )
    indices = [order, starts, row, row_start, sequence]
    indices[index][0] = 9
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=re.escape("lookup_square: " + message)):
        _extension.lookup_square_(emulated, one, one[None], *indices[:4], one, one, indices[4])


def test_what_a_gpu_can_run() -> None:
    archs, ptx = (80, 90, 100), (100,)
    served = {
        c: build.supports_arch(c, archs, ptx) for c in [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)]
    }
    assert served == {(7, 5): False, (8, 0): True, (8, 6): True, (9, 0): True, (12, 0): True}
    assert not build.supports_arch((10, 0), (80, 103), ())
    assert not build.supports_arch((9, 0), (), (100,))
