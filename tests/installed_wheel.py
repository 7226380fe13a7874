"""An installed wheel, away from its source: the compiled part, and a merge end to end.

Run by cibuildwheel on every wheel; `python tests/installed_wheel.py` asks what is installed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fisherkern as fk
from fisherkern.ops import build
from fisherkern.provenance import versions


def main() -> None:
    assert "site-packages" in fk.__file__, f"{fk.__file__} is no installed package"
    assert build.load_extension() is not None, build.status()
    assert versions()["commit"], "the wheel does not know its commit"
    data = fk.synthetic(num_users=60, num_items=40, seed=0)
    members = [fk.SASRec(data.num_items, max_len=10, dim=8, layers=1) for _ in range(2)]
    loader = data.loader(split="train", batch_size=20, max_len=10)
    fishers = [fk.diag_fisher(member, loader, progress=False) for member in members]
    merged = fk.merge(members, fishers=fishers)
    with tempfile.TemporaryDirectory() as folder:
        fk.save_model(merged, Path(folder) / "merged.safetensors")
        fk.load_model(Path(folder) / "merged.safetensors")
    print(fk.evaluate(merged, data).table())
    print(versions(), build.status())


if __name__ == "__main__":
    main()
