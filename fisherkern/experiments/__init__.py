"""Experiments that run end to end from the command line, resumable stage by stage."""

from fisherkern.experiments.branches import Branches
from fisherkern.experiments.emkd import Emkd
from fisherkern.experiments.engine import run_table
from fisherkern.experiments.experiment import Experiment
from fisherkern.experiments.merge_story import DEMO, MEMBERS, Story, run
from fisherkern.experiments.objectives import Objectives
from fisherkern.experiments.paper import Paper, run_paper
from fisherkern.experiments.pcrec import Pcrec
from fisherkern.experiments.samplers import Samplers
from fisherkern.experiments.splits import Splits
from fisherkern.experiments.table1 import Table1
from fisherkern.experiments.table2 import Table2

#: The experiments that are tables of rows, by name.
TABLES: dict[str, type[Experiment]] = {
    "objectives": Objectives,
    "table1": Table1,
    "table2": Table2,
    "samplers": Samplers,
    "splits": Splits,
    "branches": Branches,
    "emkd": Emkd,
    "pcrec": Pcrec,
}

__all__ = [
    "DEMO",
    "MEMBERS",
    "TABLES",
    "Experiment",
    "Paper",
    "Story",
    "run",
    "run_paper",
    "run_table",
]
