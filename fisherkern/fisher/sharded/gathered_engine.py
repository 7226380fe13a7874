"""The engine for models whose `DTensor`s are gathered."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.parameters import Parameters
from fisherkern.adapters.sharded.models import ShardedModel, laid_out
from fisherkern.adapters.sharded.output_layer import seen_by
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.settings import Settings


class GatheredEngine(Engine):
    """The engine for a model whose `DTensor`s are all gathered; its result is laid out as they."""

    def __init__(self, model: ModelAdapter, settings: Settings, shards: ShardedModel) -> None:
        self.shards = shards
        parameters = Parameters(model.module, stand_ins=shards.stand_ins())
        super().__init__(seen_by(shards, model), settings, parameters)

    def finish(self, num_sequences: int) -> dict[str, Tensor]:
        """As `Engine.finish`, a `DTensor` for a `DTensor`."""
        return {name: self._laid_out(name, v) for name, v in super().finish(num_sequences).items()}

    def _laid_out(self, name: str, value: Tensor) -> Tensor:
        if name not in self.shards.whole:
            return value
        return laid_out(value, self.model.module.get_parameter(name))


def by_rows(local: Tensor, parameter: Any) -> Tensor:
    """Return a `DTensor` of this process's rows, laid out as a parameter."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
