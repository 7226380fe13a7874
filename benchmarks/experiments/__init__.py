"""The papers' experiments, end to end: python -m benchmarks.experiments; resumable."""

from benchmarks.experiments.ablation import Ablation
from benchmarks.experiments.branches import Branches
from benchmarks.experiments.checkpoints import Checkpoints
from benchmarks.experiments.emkd import Emkd
from benchmarks.experiments.engine import run_table
from benchmarks.experiments.environments import Environments
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.free_fisher import FreeFisher
from benchmarks.experiments.objectives import Objectives
from benchmarks.experiments.paper import Paper, run_paper
from benchmarks.experiments.pcrec import Pcrec
from benchmarks.experiments.pruning import Pruning
from benchmarks.experiments.samplers import Samplers
from benchmarks.experiments.shard_merge import ShardMerge
from benchmarks.experiments.splits import Splits
from benchmarks.experiments.table1 import Table1
from benchmarks.experiments.table2 import Table2

#: The experiments that are tables of rows, by name.
TABLES: dict[str, type[Experiment]] = {
    "merge": ShardMerge,
    "objectives": Objectives,
    "table1": Table1,
    "table2": Table2,
    "samplers": Samplers,
    "splits": Splits,
    "free-fisher": FreeFisher,
    "environments": Environments,
    "pruning": Pruning,
    "ablation": Ablation,
    "checkpoints": Checkpoints,
    "branches": Branches,
    "emkd": Emkd,
    "pcrec": Pcrec,
}

#: All experiments by the name of their command.
EXPERIMENTS: dict[str, type[Experiment]] = {"paper": Paper, **TABLES}

__all__ = [
    "EXPERIMENTS",
    "TABLES",
    "Experiment",
    "Paper",
    "ShardMerge",
    "run_paper",
    "run_table",
]
