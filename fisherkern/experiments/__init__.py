"""Experiments that run end to end from the command line, resumable stage by stage."""

from fisherkern.experiments.branches import Branches
from fisherkern.experiments.emkd import Emkd
from fisherkern.experiments.engine import Experiment, run_table
from fisherkern.experiments.merge_story import DEMO, MEMBERS, Story, run
from fisherkern.experiments.objectives import Objectives
from fisherkern.experiments.pcrec import Pcrec
from fisherkern.experiments.splits import Splits
from fisherkern.experiments.table1 import Table1

#: The experiments that are tables of rows, by name.
TABLES: dict[str, type[Experiment]] = {
    "objectives": Objectives,
    "table1": Table1,
    "splits": Splits,
    "branches": Branches,
    "emkd": Emkd,
    "pcrec": Pcrec,
}

__all__ = ["DEMO", "MEMBERS", "TABLES", "Experiment", "Story", "run", "run_table"]
