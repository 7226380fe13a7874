"""Long runs by hand: `python -m tests.fuzz --inputs 100000`, from the root of the checkout."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.readers import READERS
from tests.fuzz.run import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--keep", action="store_true", help="store what fails in the corpus")
    options = parser.parse_args()
    share = -(-options.inputs // len(options.readers))
    found = fuzz(options.readers, share, options.seed, options.seconds, options.keep)
    print(f"{found.counts['all']} inputs: {found.counts['read']} read, "
          f"{found.counts['refused']} refused, {len(found.faults)} faults")  # fmt: skip
    return bool(found.faults)


if __name__ == "__main__":
    sys.exit(main())
