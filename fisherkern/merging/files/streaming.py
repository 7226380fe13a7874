"""merge_files(): model files merged a block of rows at a time, without a model in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fisherkern.checks import check_count, takes_numpy
from fisherkern.errors import InputError, shown
from fisherkern.members.catalogue import ItemRows
from fisherkern.members.checks import check_weights, is_counter
from fisherkern.merging import blocks as blocks_in_memory
from fisherkern.merging import checks
from fisherkern.merging.blocks import BLOCK, BlockIterator, as_table
from fisherkern.merging.decay import decayed
from fisherkern.merging.files.dcp_members import into_folders, open_any_member, open_fisher
from fisherkern.merging.files.fisher_files import FisherFiles
from fisherkern.merging.files.member_files import MemberFiles
from fisherkern.merging.files.model_writing import write_model
from fisherkern.merging.files.moved_rows import RowReaders, check_unread, own_places
from fisherkern.merging.files.native import check_name, low_rank_settings, write_native
from fisherkern.merging.files.tensor_files import (
    TYPES,
    TensorFile,
    check_no_nan,
    check_values,
    joined_hashes,
    opened,
    own_hashed,
    raw,
    read_rows,
    rows_per_block,
    spans,
)
from fisherkern.merging.rules import MergeBlock, MergeMethod, TensorBlocks, average
from fisherkern.processes import alone, check_same, gathered, rank, together
from fisherkern.provenance import package_version

PathLike = str | os.PathLike[str]

# Methods that need neither data nor a model, whose order of tensors files do not keep.
_FROM_BASE = ("task_arithmetic", "ties", "dare", "model_stock")
STREAMED = ("uniform", "weighted", "fisher", "slerp", *_FROM_BASE)
# Entries of each member read at once, and of each Fisher: a multiple of the blocks computed.
READ = 16 * BLOCK


@takes_numpy
@into_folders
def merge_files(
    paths: Sequence[PathLike],
    out: PathLike,
    *,
    method: str | None = None,
    weights: Sequence[float] | str | None = None,
    fishers: Sequence[PathLike] | None = None,
    base: PathLike | None = None,
    options: Mapping[str, Any] | None = None,
    floor: float = 0.1,
    normalize: str | None = "mean",
    check_fingerprint: bool = True,
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Merge checkpoints into one of their kind: the result of `merge` to the last bit.

    Reads members and base once and Fishers twice; members once more to see whether the Fishers are
    theirs, and for methods that look at whole tensors first. Hashes are of what is read for that;
    where tensors lie in other orders than in model files, and under torchrun, up to everything is
    read once more. Holds a million entries of each member and Fisher (4 MB in float32). Where
    catalogues of models of ours differ: also each member's row of every merged item (4 bytes an
    item and member) and, while they are matched, 20 an item; of native checkpoints, a dictionary
    of the ids. Rows that stand in other orders, but for long runs, are first copied to a file
    without a name beside the result, as large as they are, and read from it half a GB at a time.

    Under torchrun every process calls this with the same arguments and a folder that all see: each
    reads and writes its rows of models of ours, and all get the same; process 0 alone writes native
    checkpoints.

    Args:
        paths: M model files of `save_model` of one class, or M native checkpoints of one kind that
            `load_tensors` reads, with the same names, shapes and types. Of native checkpoints all
            floating tensors are merged, running statistics by lambda; others must agree. A floating
            tensor that holds infinities and is the same in all members is kept. Models with other
            item ids, in the JSON beside each, are united as in `merge`; native checkpoints by the
            ids in them, or under "item_ids" in a.json beside a.pth or item_ids.json in a folder,
            if the first has all items. Low-rank adapters (LoRA) are merged as `merge_low_rank`
            says; options rank, full and factors.
        out: A name with the members' suffix, or a folder where they are folders. Of members in
            folders of `torch.distributed.checkpoint`, which Fishers and base may be as well,
            x.safetensors; or x.dcp: such a folder, by way of a file beside it. Everything that
            stands beside the tensors is the first member's. Beside the result are written x.md, a
            model card (README.md in a folder), and for our models x.json. Each takes its name when
            all are whole, the model last; a failure leaves what was there before.
        method: "uniform", "weighted", "fisher" (all groups but "head"), "slerp", "task_arithmetic",
            "ties", "dare" or "model_stock": the methods that need neither data nor a model.
        weights: lambda, M numbers, or the name of a decay, see `merge`. Default: equal.
        fishers: M files of `DiagFisher.save`. Their names may have the prefixes of wrappers or lack
            them. Of native checkpoints, tensors without a Fisher are averaged by lambda.
        base: A checkpoint like the members, of the model that they were trained from.
        options: See `merge`.
        floor: See `merge`.
        normalize: See `merge`.
        check_fingerprint: See `merge`.
        seed: See `merge`.
        metrics: Of the merged model, for its card.

    Returns:
        The provenance, which also stands in the metadata of a model file of ours, under "merge":
        method, weights, options, floor, normalize, seed; members, fishers and base (name and sha256
        of the files; a member's metrics, and how a Fisher was made; number and hash of the items of
        each model); the catalogue that came out, with number of owners -> number of items; metrics
        and versions; of native checkpoints also kind, from_first_member (what was written as it
        stands there), averaged_buffers, without_fisher, and low_rank. No time or place is in it:
        the same inputs give the same model file.

    Raises:
        InputError: Something does not fit, a NaN included; the message names file and tensor.
    """
    checks.check_paths(paths)
    check_count("seed", seed, least=0)
    out, weights = Path(out), decayed(weights, paths)
    if fishers is not None and len(fishers) != len(paths):
        raise InputError(f"there are {len(fishers)} fishers for {len(paths)} members")
    ancestors = [] if base is None else [base]
    every = [*paths, *(fishers or []), *ancestors]
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in every):
        raise InputError(f"{out}: is one of the files that are merged")
    inputs = {"weights": weights, "fishers": fishers, "base": base}
    lam = check_weights(weights if not isinstance(weights, str) else None, len(paths))
    own = repr((method, lam, options, floor, normalize, check_fingerprint, seed))
    check_same({"paths": [str(path) for path in (*every, out)], "settings": own})
    with contextlib.ExitStack() as stack:
        with together():
            files, bases = stack.enter_context(opened(paths, ancestors, by=open_any_member))
            (fisher_files,) = stack.enter_context(opened(fishers or [], by=open_fisher))
            low_rank, options = low_rank_settings(files, method, inputs, options)
            chosen, settings = _choose(method, inputs, options, floor, normalize)
            check_name(out, files[0], low_rank)
            apart = () if low_rank is None else low_rank.names
            members = MemberFiles(files, bases[0] if bases else None, apart)
            merge = StreamingMerge(members, chosen, settings, lam, floor, seed, out.parent)
        if fishers is not None:
            merge.take_fishers(fisher_files, normalize, check_fingerprint)
        provenance = {
            "method": chosen.name,
            "weights": lam,
            "options": settings,
            "floor": floor,
            "normalize": normalize,
            "seed": seed,
            **merge.identities(),
            "metrics": {key: float(value) for key, value in (metrics or {}).items()},
            "versions": {"fisherkern": package_version(), "torch": str(torch.__version__)},
        }
        if not members.native:
            write_model(out, merge, provenance)
            return provenance
        with together():
            if rank() == 0:
                with alone():
                    write_native(out, merge, provenance, low_rank)
        return dict(gathered(provenance)[0])


def _choose(
    method: str | None,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    floor: float,
    normalize: str | None,
) -> tuple[MergeMethod, dict[str, Any]]:
    if isinstance(inputs["weights"], str):
        raise InputError("merge_files takes numbers as weights, or the name of a decay")
    unused = dict.fromkeys(("grams", "products", "score", "validation"))
    if method is not None and method not in STREAMED:
        raise InputError(
            f"method {shown(method)} is not one that files merge by: {', '.join(STREAMED)}"
        )
    chosen = checks.choose_method(method, {**inputs, **unused}, options, floor, normalize, None)
    if chosen[1].get("group") == "head":
        raise InputError("option 'group' is 'head', and files do not say what heads are: use merge")
    return chosen


class StreamingMerge:
    """What is merged and how, tensor by tensor.

    solved: known tensors, by name. hashed: files that this process hashes. folder: for moved rows.
    """

    def __init__(
        self,
        members: MemberFiles,
        method: MergeMethod,
        options: dict[str, Any],
        weights: list[float],
        floor: float,
        seed: int,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.members, self.weights = members, weights
        self.method, self.options = method, options
        self.function = method.with_options(options)
        self.floor, self.seed = floor, seed
        self.fishers: FisherFiles | None = None
        self.solved: Mapping[str, Tensor] = {}
        self._stats: Mapping[str, Any] | None = None
        self._as_they_are: dict[str, bool] = {}
        self.hashed = own_hashed(members.everything)
        self._hashes: dict[Path, str] = {}

    def take_fishers(
        self, fishers: Sequence[TensorFile], normalize: str | None, check_fingerprint: bool
    ) -> None:
        """Read the members' Fishers once, for their sums and, if asked, for what they are of."""
        files, parameters = self.members.files, self.members.parameters
        own = own_hashed(fishers)
        self.fishers = FisherFiles(fishers, files, parameters, normalize)
        self._hashes |= joined_hashes(own)
        if check_fingerprint:
            with together():
                self.fishers.check_fingerprints(files, parameters)

    def identities(self) -> dict[str, Any]:
        """Return what is merged, for the provenance; hashes are UNKNOWN before `read_hashes`."""
        members, fishers, hashes = self.members, self.fishers, self._hashes
        return {
            "members": members.identities(hashes),
            "catalogue": members.catalogue_identity(),
            "fishers": None if fishers is None else fishers.identities(hashes),
            "base": members.base_identity(hashes),
        }

    def read_hashes(self) -> None:
        """Hash the members and the base, of which what has been merged is not read again."""
        self._hashes |= joined_hashes(self.hashed)

    def write(self, name: str, stream: BinaryIO) -> None:
        """Write the merged tensor's bytes."""
        for block in self.blocks(name):
            stream.write(raw(block))

    def blocks(self, name: str, part: slice | None = None) -> Iterator[Tensor]:
        """Yield the merged tensor, a block of rows at a time; `part`: see `pieces`."""
        shape = self.members.layout[name][1]
        if name in self.solved:
            yield self.solved[name]
            return
        if self._kept(name):
            first, last = (0, shape[0] if shape else 1) if part is None else (part.start, part.stop)
            for start, stop in spans((last - first,), self.step(name)):
                yield self.members.files[0].rows(name, first + start, first + stop)
            return
        by_method = name in self.members.parameters
        function: Callable[[MergeBlock], Tensor] = self.function if by_method else average
        stats = self.stats.get(name) if by_method else None
        for start, blocks in self.pieces(name, part):
            merged = torch.empty_like(blocks.tensors[0])
            for part, own_block in blocks.weighted(self.weights, stats):
                moved = dataclasses.replace(own_block, start=own_block.start + start)
                as_table(merged)[part] = function(moved).to(merged.dtype)
            yield merged

    def averaged_buffers(self) -> list[str]:
        """Floating tensors that differ and are averaged by lambda, whatever the method."""
        others = self.members.layout.keys() - set(self.members.parameters)
        floating = [name for name in sorted(others) if self.members.files[0].floating(name)]
        return [name for name in floating if not self._kept(name)]

    @property
    def stats(self) -> Mapping[str, Any]:
        """What the method's `prepare` finds, in one more reading of every tensor."""
        if self._stats is None:
            self._stats = {}
            if self.method.prepare is not None:
                names = [n for n in self.members.parameters if n not in self.solved]
                tensors: dict[str, TensorBlocks] = {
                    name: _FileBlocks(self, name) for name in names if not self._kept(name)
                }
                self._stats = self.method.prepare(tensors, self.options)
        return self._stats

    def step(self, name: str) -> int:
        """Rows of a tensor that are read at once."""
        shape = self.members.layout[name][1]
        # Of whole blocks, so that their sums are those of the tensor in memory.
        inner = rows_per_block(shape, blocks_in_memory.BLOCK)
        step = rows_per_block(shape, READ)
        return max(inner, step - step % inner)

    def pieces(self, name: str, part: slice | None = None) -> Iterator[tuple[int, BlockIterator]]:
        """(First row, all that is known) of each part of a tensor that is read at once.

        `part`: rows, from a multiple of `step` on; all by default.
        """
        members, step = self.members, self.step(name)
        shape = members.layout[name][1]
        part = slice(0, shape[0] if shape else 1) if part is None else part
        by_method = name in members.parameters
        scaled = self.fishers.scaled(name) if self.fishers and by_method else None
        places, base_place = members.rows(name), members.base_rows(name)
        if by_method and members.base is not None and base_place is not None:
            check_unread(members.base, name, base_place, step)
        with contextlib.ExitStack() as stack:

            def readers(
                files: Sequence[TensorFile], names: Sequence[str], maps: Sequence[ItemRows] | None
            ) -> RowReaders:
                return stack.enter_context(RowReaders(files, names, maps, part, step, self.folder))

            own_rows = readers(members.files, [name] * len(members.files), places)
            base_rows = fisher_rows = None
            if by_method and members.base is not None:
                base_maps = None if base_place is None else [base_place]
                base_rows = readers([members.base], [name], base_maps)
            if scaled is not None and self.fishers is not None:
                fisher_rows = readers(self.fishers.files, scaled.names, places)
            for start, stop in spans((part.stop - part.start,), step):
                start, stop = start + part.start, stop + part.start
                own = own_rows.read(start, stop)
                known: dict[str, Any] = {}
                base: list[Tensor] = []
                if base_rows is not None:
                    base = base_rows.read(start, stop)
                    place = None if base_place is None else own_places(base_place[start:stop])
                    known = {"base": base[0], "base_rows": place}
                check_values(name, [*own, *base], members.everything)
                if by_method:
                    fisher = None if fisher_rows is None else fisher_rows.read(start, stop)
                    known |= {"floor": self.floor, "seed": self.seed}
                    known["fishers"] = scaled.of(fisher) if scaled and fisher else None
                rows = (
                    None if places is None else [own_places(index[start:stop]) for index in places]
                )
                yield start, BlockIterator(name, own, rows, **known)

    def _kept(self, name: str) -> bool:
        """See `_is_kept`; asked once."""
        if name not in self._as_they_are:
            step = rows_per_block(self.members.layout[name][1], READ)
            self._as_they_are[name] = self._is_kept(name, step)
        return self._as_they_are[name]

    def _is_kept(self, name: str, step: int) -> bool:
        """Whether no method touches the tensor: it is the same in all members and no parameter.

        In files of others, where any floating tensor may be a mask: and holds an infinity.
        """
        files = self.members.files
        by_method = name in self.members.parameters
        moves = self.members.rows(name) is not None
        if by_method and (self.members.known or moves):
            return False
        if moves:
            raise InputError(
                f"{files[0].path}: tensor {name!r} has a row per item in other orders, and values "
                f"of type {TYPES[files[0].layout[name][0]]} cannot be merged"
            )
        odd, infinite = None, False
        for start, stop in spans(files[0].layout[name][1], step):
            own = read_rows(files, name, start, stop, None)
            odd = next((m for m, block in enumerate(own) if not torch.equal(block, own[0])), None)
            if odd is not None:
                break
            if own[0].is_floating_point():
                check_no_nan(name, own, files)
                infinite = infinite or bool(own[0].isinf().any())
        if odd is not None and not files[0].floating(name):
            if not by_method and is_counter(name, files[0].layout[name][1]):
                return True
            raise InputError(
                f"{files[odd].path}: tensor {name!r} differs from that of {files[0].path}, and "
                f"values of type {TYPES[files[0].layout[name][0]]} cannot be averaged"
            )
        return odd is None and (infinite or not by_method)


class _FileBlocks:
    """A tensor's blocks with equal weights, read anew each time: `TensorBlocks`."""

    grams = heads = None

    def __init__(self, merge: StreamingMerge, name: str) -> None:
        self._merge, self._name = merge, name
        self.shape = merge.members.layout[name][1]
        self.members = len(merge.members.files)

    def __iter__(self) -> Iterator[MergeBlock]:
        for start, blocks in self._merge.pieces(self._name):
            for block in blocks:
                yield dataclasses.replace(block, start=block.start + start)
