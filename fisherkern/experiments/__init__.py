"""Experiments that run end to end from the command line, resumable stage by stage."""

from fisherkern.experiments.engine import Experiment, run_table
from fisherkern.experiments.merge_story import DEMO, MEMBERS, Story, run
from fisherkern.experiments.table1 import Table1

#: The experiments that are tables of rows, by name.
TABLES: dict[str, type[Experiment]] = {"table1": Table1}

__all__ = ["DEMO", "MEMBERS", "TABLES", "Experiment", "Story", "run", "run_table"]
