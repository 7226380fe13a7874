"""A merge of native checkpoints written as one more of their kind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from fisherkern.adapters import Checkpoint, write_like
from fisherkern.adapters.files.checkpoints import read_json_object
from fisherkern.adapters.files.safetensors_files import SafetensorsFile
from fisherkern.adapters.files.states import weights_beside
from fisherkern.adapters.files.writing import companions, new_folder
from fisherkern.adapters.lora import LowRankPair, check_adapter_config, scaling_of
from fisherkern.errors import InputError, shown
from fisherkern.files import atomic_path
from fisherkern.merging.files.card import model_card
from fisherkern.merging.files.tensor_files import TensorFile, write_header
from fisherkern.merging.low_rank import (
    LowRankOptions,
    check_linear,
    merge_low_rank,
    pairs_of,
    update_matrix,
)

if TYPE_CHECKING:
    from fisherkern.merging.files.streaming import StreamingMerge


log = logging.getLogger("fisherkern")


@dataclass(frozen=True)
class LowRankFiles:
    """The low-rank updates of checkpoints: pairs, each member's configuration, and the options."""

    pairs: Sequence[LowRankPair]
    configs: Sequence[Mapping[str, Any] | None]
    options: LowRankOptions

    @property
    def names(self) -> set[str]:
        """Of the tensors that are merged as products."""
        return {name for pair in self.pairs for name in pair.names}


def low_rank_settings(
    files: Sequence[TensorFile],
    method: str | None,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> tuple[LowRankFiles | None, Mapping[str, Any] | None]:
    """(How low-rank updates are merged, None where there are none; the method's own options)."""
    if files[0].checkpoint is None:
        return None, options
    own, rest = LowRankOptions.split(options)
    configs = [_adapter_config(file) for file in files]
    for file, config in zip(files, configs, strict=True):
        if config is not None and not own.factors:
            check_adapter_config(config, str(file.path))
    pairs = pairs_of(list(files[0].checkpoint), own)
    scales = [_scales(config) for config in configs]
    if own.factors and any(scale != scales[0] for scale in scales):
        raise InputError("option 'factors': the members scale their updates in other ways")
    if not pairs:
        return None, rest
    check_linear(method, inputs)
    bases = [config.get("base_model_name_or_path") for config in configs if config is not None]
    if any(base != bases[0] for base in bases):
        odd = next(base for base in bases if base != bases[0])
        log.warning("the adapters name different base models: %r and %r", bases[0], odd)
    known = [config is not None for config in configs]
    if any(known) and not all(known):
        lacking = files[known.index(False)].path
        raise InputError(f"{lacking}: has no adapter_config.json, which says how it is scaled")
    if own.full and not all(known):
        raise InputError(f"{files[0].path}: has no adapter_config.json, and full needs its scaling")
    known_start = (None, True, False, "gaussian", "orthogonal", "eva")
    if (own.full or own.rank is not None) and any(
        (config or {}).get("init_lora_weights") not in known_start for config in configs
    ):
        raise InputError("options 'rank' and 'full': init_lora_weights has changed the base model")
    if own.rank is not None and files[0].checkpoint.kind != "peft":
        raise InputError("option 'rank' needs PEFT folders, whose adapter_config.json has the rank")
    return LowRankFiles(pairs, configs, own), rest


def _scales(config: Mapping[str, Any] | None) -> Any:
    keys = ("lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora")
    return None if config is None else {key: config.get(key) for key in keys}


def _adapter_config(file: TensorFile) -> Mapping[str, Any] | None:
    """PEFT's configuration, in the folder or beside an adapter's file."""
    checkpoint = file.checkpoint
    if checkpoint is None:
        return None
    if checkpoint.kind == "peft":
        return checkpoint.config
    beside = file.path.parent / "adapter_config.json"
    if checkpoint.path.is_file() and file.path.stem == "adapter_model" and beside.is_file():
        return read_json_object(beside)
    return None


def is_folder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is written as a folder."""
    return checkpoint.path.is_dir() or checkpoint.index is not None


def check_name(out: Path, first: TensorFile, low_rank: LowRankFiles | None) -> None:
    """Raise InputError unless the result may have this name."""
    folder = first.checkpoint is not None and is_folder(first.checkpoint)
    suffix = ".safetensors" if first.checkpoint is None else first.path.suffix
    if low_rank is not None and low_rank.options.full:
        folder, suffix = False, ".safetensors"
    if folder and os.path.lexists(out):
        raise InputError(f"{out}: exists already and is not overwritten")
    if not folder and out.suffix != suffix:
        raise InputError(f"{out}: the name of the merged file must end in {suffix}")
    if not folder and out.is_dir():
        raise InputError(f"{out}: is a folder, and the members are files")


class MergedTensors(Mapping[str, Tensor]):
    """The merged tensors of native checkpoints under all their names, computed when asked for."""

    def __init__(self, merge: StreamingMerge) -> None:
        self._merge, self._file = merge, merge.members.files[0]
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        name = self._file.aliases.get(name, name)
        if name in self._merge.solved:
            return self._merge.solved[name]
        if self._last is None or self._last[0] != name:
            shape = self._merge.members.layout[name][1]
            blocks = list(self._merge.blocks(name))
            whole = torch.cat(blocks) if shape and blocks else None
            if whole is None:  # a number, or no rows
                whole = blocks[0] if blocks else self._file.rows(name, 0, 0)
            self._last = name, whole.reshape(shape)
        return self._last[1]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a block of rows at a time."""
        return self._merge.blocks(self._file.aliases.get(name, name))

    def __iter__(self) -> Iterator[str]:
        yield from self._merge.members.layout
        yield from self._file.aliases

    def __len__(self) -> int:
        return len(self._merge.members.layout) + len(self._file.aliases)


def write_native(
    out: Path, merge: StreamingMerge, provenance: dict[str, Any], low_rank: LowRankFiles | None
) -> None:
    """Write the merge as the first member's kind, with its card; completes the provenance."""
    members = merge.members
    source = _tensors(members.files[0])
    if low_rank is not None:
        merge.solved, provenance["low_rank"] = _merged_factors(merge, low_rank)
    provenance |= {
        "kind": source.kind,
        "from_first_member": sorted(source.extras),
        "averaged_buffers": merge.averaged_buffers(),
    }
    if others := weights_beside(set(source), source.extras):
        log.warning(
            "%s: %s holds other values of the same weights, such as their running average: there "
            "the merged file keeps the first member's",
            source.path,
            ", ".join(shown(key) for key in others[:3]),
        )
    if merge.fishers is not None:
        provenance["without_fisher"] = merge.fishers.uncovered(members.parameters)

    def card() -> str:
        """Return the card, when all has been merged: the hashes are known then."""
        merge.read_hashes()
        provenance.update(merge.identities())
        return model_card(out.name, {}, provenance)

    if low_rank is not None and low_rank.options.full:
        _write_delta(out, merge, low_rank, card())
    elif low_rank is not None and low_rank.options.rank is not None:
        _write_adapter(out, merge, low_rank, card())
    elif is_folder(source):
        write_like(out, MergedTensors(merge), source, texts=lambda: {"README.md": card()})
    else:
        with atomic_path(out.with_suffix(".md")) as beside, contextlib.ExitStack() as stack:
            # A full disk is found before the model takes its name.
            beside.write_text(model_card(out.name, {}, provenance), encoding="utf-8")
            if members.ids_beside is not None:
                path = stack.enter_context(atomic_path(out.with_suffix(".json")))
                path.write_text(json.dumps(members.ids_beside) + "\n", encoding="utf-8")
            if members.layout == members.files[0].layout:
                write_like(out, MergedTensors(merge), source, replace=True)
            else:
                _write_grown(out, merge, source)
            beside.write_text(card(), encoding="utf-8")


def _write_grown(out: Path, merge: StreamingMerge, source: Checkpoint) -> None:
    """Write a file of nothing but named tensors, with more item rows than the first member's."""
    part = source.parts[0].source
    with atomic_path(out) as temporary:
        if isinstance(part, SafetensorsFile):
            with temporary.open("wb") as stream:
                for name in write_header(stream, merge.members.layout, part.metadata):
                    merge.write(name, stream)
            return
        merged = MergedTensors(merge)
        tensors = {name: merged[name] for name in merge.members.layout}
        aliases = merge.members.files[0].aliases
        named = {name: tensors[aliases.get(name, name)] for name in source}
        torch.save(named, temporary, _use_new_zipfile_serialization=part.entries is not None)


def _tensors(file: TensorFile) -> Checkpoint:
    assert file.checkpoint is not None
    return file.checkpoint


def _rank(checkpoint: Checkpoint, pair: LowRankPair) -> int:
    a, b = checkpoint.shape(pair.a), checkpoint.shape(pair.b)
    plain = pair.a.endswith(".weight") and len(b) > 1 and a[0] == b[1]
    return int(a[0] if plain else min(*a[:2], *b[:2]))


def _scalings(
    file: TensorFile, config: Mapping[str, Any] | None, pairs: Sequence[LowRankPair]
) -> dict[str, float]:
    """Name of A -> what the product is multiplied by; 1 where nothing says it."""
    tensors, found = _tensors(file), {}
    for pair in pairs:
        alpha = pair.alpha_over_rank(tensors)
        if alpha is not None and config is not None:
            raise InputError(
                f"{file.path}: {shown(pair.alpha)} and adapter_config.json both scale it"
            )
        found[pair.a] = 1.0 if alpha is None else alpha
        if config is not None:
            found[pair.a] = scaling_of(config, pair, _rank(tensors, pair))
    return found


def _merged_factors(
    merge: StreamingMerge, low_rank: LowRankFiles
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    files, pairs, options = merge.members.files, low_rank.pairs, low_rank.options
    if low_rank.configs[0] is None and any(pair.alpha is None for pair in pairs):
        log.warning("nothing says how the members scale their low-rank updates: taken to be alike")
    scalings = [
        _scalings(file, config, pairs) for file, config in zip(files, low_rank.configs, strict=True)
    ]
    result = scalings[0]
    if options.rank is not None and low_rank.configs[0] is not None:
        result = {pair.a: scaling_of(low_rank.configs[0], pair, options.rank) for pair in pairs}
    return merge_low_rank(
        [_tensors(file) for file in files],
        pairs,
        scalings,
        merge.weights,
        rank=options.rank,
        result_scalings=result,
    )


def _write_adapter(out: Path, merge: StreamingMerge, low_rank: LowRankFiles, card: str) -> None:
    """Write a PEFT folder of another rank than the first member's."""
    config = {**(low_rank.configs[0] or {}), "r": low_rank.options.rank, "rank_pattern": {}}
    plain = {name: own.contiguous() for name, own in MergedTensors(merge).items()}
    with new_folder(out) as folder:
        safetensors.torch.save_file(
            plain, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        for file in companions(_tensors(merge.members.files[0])):
            shutil.copyfile(file, folder / file.name)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


def _write_delta(out: Path, merge: StreamingMerge, low_rank: LowRankFiles, card: str) -> None:
    """Write what the merge adds to every weight, under the names of the base model's weights."""
    files, pairs = merge.members.files, low_rank.pairs
    others = [name for name in _tensors(files[0]) if name not in merge.solved]
    if others:
        raise InputError(
            f"option 'full': tensor {shown(others[0])} is no part of a low-rank update"
        )
    deltas: dict[str, Tensor] = {}
    for pair in pairs:
        total: Tensor | None = None
        for file, config, share in zip(files, low_rank.configs, merge.weights, strict=True):
            scale = _scalings(file, config, [pair])[pair.a]
            own = share * scale * update_matrix(_tensors(file), pair)
            total = own if total is None else total + own
        a = _tensors(files[0])[pair.a]
        assert total is not None
        if pair.embedding or (low_rank.configs[0] or {}).get("fan_in_fan_out"):
            total = total.T
        elif a.dim() > 2:
            total = total.reshape(len(total), *a.shape[1:])
        module = pair.module.removeprefix("base_model.model.")
        deltas[f"{module}.weight"] = total.to(a.dtype).contiguous()
        if pair.bias is not None:
            raise InputError(
                f"option 'full': tensor {shown(pair.bias)} is a bias of a low-rank update"
            )
    with atomic_path(out.with_suffix(".md")) as beside:
        beside.write_text(card, encoding="utf-8")
        with atomic_path(out) as temporary:
            metadata = {"format": "pt", "content": "weight deltas"}
            safetensors.torch.save_file(deltas, temporary, metadata=metadata)
