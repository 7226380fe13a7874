"""Lightning's trainers leave Fishers beside their checkpoints; `make libraries` installs them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fisherkern as fk
from benchmarks.libraries import oracle
from benchmarks.libraries.wrapped_models import plain

pytest.importorskip("lightning", reason="Lightning is not installed: make libraries")

from fisherkern.training.lightning_callback import LightningFishers  # noqa: E402

EPOCHS = 2


def module_class(lightning: Any) -> Any:
    class Recommender(lightning.LightningModule):
        def __init__(self, network: nn.Module, optimizers: int, kind: Any) -> None:
            super().__init__()
            self.network, self.gradients = network, []
            self.optimizers_made, self.kind = optimizers, kind
            self.automatic_optimization = optimizers == 1

        def forward(self, batch: Any) -> Any:
            return self.network(batch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self(batch), batch["target"])
            if not self.automatic_optimization:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            named = self.network.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named})

        def configure_optimizers(self) -> Any:
            made = [self.kind(self.parameters(), lr=0.01) for _ in range(self.optimizers_made)]
            return made if len(made) > 1 else made[0]

    return Recommender


def fit(name: str, folder: Path, callback: Any, checkpoints: bool = True, **changes: Any) -> Any:
    lightning = importlib.import_module(name)
    member = plain(0)
    settings = {"optimizers": 1, "kind": torch.optim.AdamW, **changes}
    module = module_class(lightning)(member.module, **settings)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(member.batches, batch_size=None))
    return member, module, trainer


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.filterwarnings("ignore")
def test_both_fishers_stand_beside_the_checkpoint(name: str, tmp_path: Path) -> None:
    batches = plain(0).batches
    callback = LightningFishers(batches, sampler="exact", progress=False)
    member, module, trainer = fit(name, tmp_path, callback)
    folder = Path(trainer.checkpoint_callback.best_model_path).parent
    names = ["exact.fisher.safetensors", "optimizer.fisher.safetensors"]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    free = fk.DiagFisher.load(folder / names[1])
    assert free.meta["optimizer"] == "AdamW" and free.meta["steps"] == len(module.gradients) == 4
    for parameter, value in free.items():
        moment = 0.0
        for step in module.gradients:
            moment = 0.999 * moment + (1 - 0.999) * step[parameter].square()
        torch.testing.assert_close(value, moment / (1 - 0.999**4), rtol=1e-9, atol=0)
    expected = oracle.fishers_by_definition(member.module, member.logits, member.batches, 1)
    assert oracle.worst(fk.DiagFisher.load(folder / names[0]), expected["exact"])[0] < 1e-9


@pytest.mark.filterwarnings("ignore")
def test_without_checkpoints_it_is_the_trainers_folder(tmp_path: Path) -> None:
    fit("lightning.pytorch", tmp_path, LightningFishers(), checkpoints=False)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.fisher.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": 2}, "it has 2 optimizers; one was expected"),
        ({"kind": torch.optim.SGD}, "the SGD has no second moment"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_optimizers_that_leave_none_are_refused_after_a_step(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Counting(LightningFishers):
        def on_train_batch_start(self, *given: Any) -> None:
            seen.append(1)

    with pytest.raises(fk.InputError, match=message):
        fit("lightning.pytorch", tmp_path, Counting(), **changes)
    assert len(seen) == 1 and not list(tmp_path.rglob("*.fisher.safetensors"))
