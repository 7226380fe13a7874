"""python -m fisherkern: the command line."""

import sys

from fisherkern.cli import main

sys.exit(main())
