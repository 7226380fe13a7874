"""Hugging Face's Trainer leaves Fishers in its folder; `make libraries` installs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from benchmarks.libraries import oracle
from benchmarks.libraries.hugging_face_models import hf_gpt2

pytest.importorskip("transformers", reason="transformers is not installed: make libraries")
pytest.importorskip("accelerate", reason="accelerate is not installed: make libraries")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from fisherkern.training.trainer_callback import TrainerFishers  # noqa: E402


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named})


def fit(folder: Path, *callbacks: Any, **settings: Any) -> tuple[Any, Trainer]:
    member = hf_gpt2(0)
    rows = [
        {name: batch[name][row] for name in ("input_ids", "attention_mask", "labels")}
        for batch in member.batches
        for row in range(len(batch["input_ids"]))
    ]
    given = {"num_train_epochs": 2, "learning_rate": 0.01, "optim": "adamw_torch", **settings}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        max_grad_norm=0.0,
        **given,
    )
    trainer = Trainer(member.module, arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    member.module.eval()  # for what is computed of it by definition
    return member, trainer


def test_both_fishers_stand_beside_the_model(tmp_path: Path) -> None:
    batches, gradients = hf_gpt2(0).batches, Gradients()
    kept = TrainerFishers(batches, sampler="exact", progress=False)
    member, trainer = fit(tmp_path, kept, gradients, save_strategy="no")
    trainer.save_model()
    free = fk.DiagFisher.load(tmp_path / "optimizer.fisher.safetensors")
    steps = gradients.steps
    assert free.meta["optimizer"] == "AdamW" and free.meta["steps"] == len(steps) == 6
    for name, value in free.items():
        moment = torch.zeros_like(value)
        for step in steps:
            moment = 0.999 * moment + (1 - 0.999) * step[name].square()
        torch.testing.assert_close(value, moment / (1 - 0.999**6), rtol=1e-9, atol=1e-20)
    exact = fk.DiagFisher.load(tmp_path / "exact.fisher.safetensors")
    expected = oracle.fishers_by_definition(member.module, member.logits, member.batches, 1)
    assert oracle.worst(exact, expected["exact"])[0] < 1e-9
    # The folder is still the model's, to transformers and to us.
    again = type(member.module).from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, member.module.get_parameter(name))
    stored = fk.load_tensors(tmp_path)
    assert torch.equal(stored["transformer.wte.weight"], member.module.transformer.wte.weight)


def test_an_optimizer_that_leaves_none_is_refused_after_a_step(tmp_path: Path) -> None:
    gradients = Gradients()
    with pytest.raises(fk.InputError, match="the SGD has no second moment"):
        fit(tmp_path, TrainerFishers(), gradients, optim="sgd")
    assert len(gradients.steps) == 1 and not list(tmp_path.glob("*.fisher.safetensors"))
