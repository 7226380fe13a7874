"""Validation and early stopping, averaged weights, bf16, torch.compile, TensorBoard, objectives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from training_runs import Cycles, T, assert_same_bits, bits, new_model, run

from fisherkern.encoders import SASRec
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems, NextItem
from fisherkern.training.loggers import RunScalars


def by_epoch(scores, seen=None):
    """A validation that gives `scores` in turn, and keeps in `seen` what it was shown."""
    turn = iter(scores)

    def validate(model):
        assert not model.training
        if seen is not None:
            seen.append(bits(model))
        return next(turn)

    return validate


@pytest.mark.parametrize(
    ("scores", "settings", "epochs", "best"),
    [
        ([0.1, 0.3, 0.2, 0.25, 0.4, 0.5], {"patience": 2}, 4, 2),
        ([0.1, 0.3, 0.2, 0.25, 0.4, 0.35], {"patience": 3}, 6, 5),
        ([0.3, 0.3, 0.3, 0.9], {"patience": 2}, 3, 1),  # a tie is no improvement
        ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1], {}, 6, 1),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"patience": 1}, 6, 6),
        ([0.4, 0.3, 0.2], {"patience": 2, "validate_every": 2}, 6, 2),
        ([0.4, 0.5], {"validate_every": 4}, 6, 6),  # after the last epoch in any case
        ([0.4], {"patience": 1, "validate_every": 100}, 6, 6),
        ([-3.0, -2.0, -4.0], {"patience": 1}, 3, 2),
    ],
)
def test_early_stopping(scores, settings, epochs, best):
    seen, calls = [], []
    model, log = run(
        validate=by_epoch(scores, seen), on_epoch=lambda epoch, *_: calls.append(epoch), **settings
    )
    assert calls == list(range(1, epochs + 1)) and len(log.losses) == epochs
    assert log.best_epoch == best and log.scores[best] == max(scores[: len(log.scores)])
    assert_same_bits(bits(model), seen[list(log.scores).index(best)])
    every = settings.get("validate_every", 1)
    assert list(log.scores) == [e for e in range(1, epochs + 1) if e % every == 0 or e == 6]
    assert not model.training


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path):
    scores = [0.1, 0.3, 0.2, 0.1]
    model, log = run(tmp_path / "state", validate=by_epoch(scores), patience=2)
    again, second = run(tmp_path / "state", validate=by_epoch([]), patience=2)
    assert_same_bits(bits(again), bits(model))
    assert second.scores == log.scores == {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.1}
    with pytest.raises(InputError, match="patience = 2, not 3"):
        run(tmp_path / "state", validate=by_epoch([]), patience=3)


def test_validation_changes_no_step():
    """What is validated in between, and whatever it draws, the weights of the end are the same."""
    plain, _ = run()

    def validate(model):
        torch.rand(3)
        return float(len(calls.append(1) or calls))  # the last epoch is the best

    calls = []
    model, _ = run(validate=validate)
    assert_same_bits(bits(model), bits(plain))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 1}, "patience needs validate"),
        ({"patience": 0, "validate": by_epoch([])}, "patience must be at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"validate": by_epoch([float("nan")])}, "validate gave nan after epoch 1"),
        ({"validate": by_epoch([0.5, float("inf")])}, "validate gave inf after epoch 2"),
        ({"validate": by_epoch([None])}, "validate gave nan after epoch 1"),
        ({"validate": 3}, "validate: a int is no function"),
        ({"on_epoch": 3}, "on_epoch: a int is no function"),
        ({"objective": MaskedItems}, "objective: .* is no objective"),
        ({"model": torch.nn.Linear(2, 2)}, "model: a Linear is no encoder of fisherkern"),
        ({"model": new_model().requires_grad_(False)}, "model: it has no trainable parameter"),
        ({"data": [1]}, "data: a list is no data set"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, "ema must be in"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16', got 'fp16'"),
        ({"save_every_steps": 0}, "save_every_steps must be at least 1, got 0"),
        ({"save_every_seconds": 0.0}, "save_every_seconds must be positive and finite, got 0.0"),
        ({"compile": "nonesuch"}, "compile: 'nonesuch' is no backend of torch.compile"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_numbers_of_adam_may_be_integers():
    assert_same_bits(bits(run(betas=(0, 0))[0]), bits(run(betas=(0.0, 0.0))[0]))


class Recorder(MaskedItems):
    """Keeps the weights before every step, in float64."""

    def __init__(self):
        super().__init__(0.2)
        object.__setattr__(self, "weights", [])

    def __call__(self, model, tokens, generator):
        self.weights.append({name: tensor.double() for name, tensor in bits(model).items()})
        return super().__call__(model, tokens, generator)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_averaged_weights_follow_the_formula(decay):
    objective = Recorder()
    model = new_model().double()
    _, log = run(model=model, objective=objective, ema=decay, lr=3e-2)
    steps = [*objective.weights[1:], bits(model)]
    assert len(steps) == 18
    average = objective.weights[0]
    for t, weights in enumerate(steps):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * weights[name] for name in average}
    for name, tensor in log.ema.state_dict().items():
        assert torch.allclose(tensor, average[name], rtol=1e-12, atol=1e-14), name
    assert not log.ema.training and log.ema.config == model.config
    assert log.ema.item_ids == model.item_ids == Cycles.item_ids
    assert_same_bits(bits(model), bits(run(model=new_model().double(), lr=3e-2)[0]))


def test_the_average_is_that_of_the_best_epoch():
    _, whole = run(validate=by_epoch([0.1, 0.2, 0.1, 0.1, 0.1, 0.1]), ema=0.9)
    _, short = run(validate=by_epoch([0.1, 0.2, 0.1]), ema=0.9, patience=1)
    assert whole.best_epoch == short.best_epoch == 2
    assert_same_bits(bits(whole.ema), bits(short.ema))
    assert run()[1].ema is None


def test_bf16_computes_under_autocast_and_keeps_the_weights():
    seen = []

    class Watching(MaskedItems):
        def __call__(self, model, tokens, generator):
            weight = model.blocks[0].feed_forward.inner.weight
            seen.append(torch.nn.functional.linear(weight, weight).dtype)
            return super().__call__(model, tokens, generator)

    model, log = run(objective=Watching(0.2), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _, exact = run()
    assert log.losses != exact.losses
    assert log.losses == pytest.approx(exact.losses, rel=0.02)  # eight bits of mantissa
    again, _ = run(precision="bf16")
    assert_same_bits(bits(again), bits(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_goes_through_the_backend_and_leaves_no_trace(tmp_path: Path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name="counting")
    try:
        model, log = run(model=new_model(dropout=0.0), compile="counting", epochs=2)
        assert graphs and "states" not in vars(model)
        plain, plain_log = run(model=new_model(dropout=0.0), epochs=2)
        assert log.losses == pytest.approx(plain_log.losses, rel=1e-5)
    finally:
        torch._dynamo.reset()


class FakeLogger:
    """As W&B's run: log(values, step)."""

    def __init__(self):
        self.calls = []

    def log(self, data, step=None):
        self.calls.append((step, dict(data)))


class FakeMLflow:
    """As the module mlflow: log_metrics(metrics, step)."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))


class MLflowLogger:
    """The adapter of the documentation."""

    def __init__(self, mlflow):
        self.mlflow = mlflow

    def log(self, values, step):
        self.mlflow.log_metrics(dict(values), step=step)


def stopping():
    """Masked items that are interrupted once, in the third step of the third epoch."""
    calls: list[int] = []

    class Stopping(MaskedItems):
        def __call__(self, model, tokens, generator):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return super().__call__(model, tokens, generator)

    return Stopping(0.2)


def test_scalars_go_to_tensorboard_and_go_on_after_an_interrupt(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    objective, logger = stopping(), FakeLogger()
    logged = {"log_dir": tmp_path / "log", "validate": lambda model: 0.5, "lr": 1e-3}
    logged |= {"logger": logger}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state", objective=objective, **logged)
    _, log = run(tmp_path / "state", objective=objective, **logged)
    events = accumulator.EventAccumulator(str(tmp_path / "log")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate", "gradient_norm", "validation"}
    # Steps 6 and 7 were made twice, the run having been saved after step 5, and are there once.
    loss = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == list(range(18))
    for epoch, mean in enumerate(log.losses):
        found = [loss[step] for step in range(3 * epoch, 3 * epoch + 3)]
        assert sum(found) / 3 == pytest.approx(mean, rel=1e-5)
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates[:2] == pytest.approx([5e-4, 1e-3]) and rates[17] == pytest.approx(1e-3 / 16)
    assert [event.step for event in events.Scalars("validation")] == [2, 5, 8, 11, 14, 17]
    assert all(event.value > 0 for event in events.Scalars("gradient_norm"))
    last: dict[str, dict[int, float]] = {}
    for step, values in logger.calls:
        for name, value in values.items():
            assert type(name) is str and type(value) is float
            last.setdefault(name, {})[step] = value
    for name, values in last.items():  # TensorBoard keeps fp32
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(values, rel=1e-6)
    assert set(last) == set(events.Tags()["scalars"])


@pytest.mark.parametrize("kind", [FakeLogger, FakeMLflow])
def test_a_logger_gets_the_steps_of_the_whole_run(tmp_path: Path, kind):
    """Those of a run never interrupted, and the two steps after the last save once more."""

    def logged(own):
        given = own if kind is FakeLogger else MLflowLogger(own)
        return {"logger": given, "validate": lambda model: 0.5}

    whole, parted, objective = kind(), kind(), stopping()
    run(**logged(whole))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state", objective=objective, **logged(parted))
    assert [step for step, _ in parted.calls] == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    before = len(parted.calls)
    run(tmp_path / "state", objective=objective, **logged(parted))
    assert parted.calls[: before - 2] + parted.calls[before:] == whole.calls
    assert parted.calls[before - 2 : before] == parted.calls[before : before + 2]
    assert [set(values) for _, values in whole.calls[:4]] == [
        *[{"loss", "learning_rate", "gradient_norm"}] * 3,
        {"validation"},
    ]
    done = list(parted.calls)
    run(tmp_path / "state", objective=objective, **logged(parted))  # finished: nothing to tell
    assert parted.calls == done


@pytest.mark.parametrize("rank", [0, 1])
def test_process_0_alone_logs(rank, tmp_path: Path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("fisherkern.processes.rank", lambda: rank)
    logger, folder = FakeLogger(), tmp_path / "log"
    with RunScalars(folder, logger) as scalars:
        scalars.resume(3)
        scalars.log({"loss": 1.0}, 3)
    assert folder.exists() is bool(logger.calls) is (rank == 0)
    with pytest.raises(InputError, match="logger: 1 has no method"):  # on every process
        RunScalars(None, 1)


def test_a_logger_changes_no_step():
    assert_same_bits(bits(run(logger=FakeLogger())[0]), bits(run()[0]))


def test_what_is_no_logger_is_refused_before_the_work(tmp_path: Path):
    model = new_model()
    start = bits(model)
    with pytest.raises(InputError, match=r"logger: 'wandb' has no method log\(values, step\)"):
        run(tmp_path / "state", model=model, logger="wandb")
    assert_same_bits(bits(model), start)


def test_without_tensorboard_one_sentence_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    model = new_model()
    start = bits(model)
    with pytest.raises(InputError, match=r"log_dir: TensorBoard is not installed; pip install"):
        run(model=model, log_dir=tmp_path / "log")
    assert_same_bits(bits(model), start) and not (tmp_path / "log").exists()


def test_an_objective_is_bound_once_and_gets_the_columns_it_asks_for():
    bound, widths = [], set()

    class Asking(NextItem):
        def bind(self, data, max_len):
            bound.append((data, max_len))
            return self

        def __call__(self, model, tokens, generator):
            widths.add(tuple(tokens.shape))
            return super().__call__(model, tokens, generator)

    data = Cycles()
    torch.manual_seed(0)
    run(model=SASRec(20, T, dim=16), objective=Asking(), data=data, max_len=T - 1)
    assert bound == [(data, T - 1)] and widths == {(16, T)}
    assert {asked[1] for asked in data.asked} == {T}
