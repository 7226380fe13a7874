"""What a run is known by: a state goes on in the run that wrote it and in no other."""

from __future__ import annotations

import copy

import pytest
import torch
from training_runs import Cycles, assert_same_bits, bits, new_model, run

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.files import read_tensors, save_tensors
from fisherkern.training.state import MOMENTS


class Stop(Exception):
    pass


def stop_after(epoch):
    def on_epoch(number, model, loss):
        if number == epoch:
            raise Stop

    return on_epoch


def started_at(seed, **changes):
    torch.manual_seed(seed)
    return new_model(**changes) if seed == 0 else fk.BERT4Rec(20, 8, dim=16)


def cut(path, **changes):
    with pytest.raises(Stop):
        run(path, on_epoch=stop_after(3), **changes)


def test_a_run_of_another_start_is_refused(tmp_path):
    cut(tmp_path / "s", model=started_at(0))
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(InputError, match=r"a run with start.model = '\w{64}', not '\w{64}'"):
        run(tmp_path / "s", model=started_at(1))
    one = started_at(0)
    with torch.no_grad():
        one.output_bias[3] += 1e-7  # a single entry
    with pytest.raises(InputError, match="start.model"):
        run(tmp_path / "s", model=one)
    # -0.0 equals 0.0 and is another start: what is hashed is bits.
    one = started_at(0)
    one.output_bias.data = -torch.zeros_like(one.output_bias)
    with pytest.raises(InputError, match="start.model"):
        run(tmp_path / "s", model=one)
    assert (tmp_path / "s").read_bytes() == before


def test_who_goes_on_with_the_interrupted_objects_has_the_same_bits(tmp_path):
    whole, _ = run(tmp_path / "whole")
    model = new_model()
    cut(tmp_path / "s", model=model)
    again, _ = run(tmp_path / "s", model=model)
    assert_same_bits(bits(again), bits(whole))
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    # Trained on by hand in between: nobody knows any more what it started from.
    with torch.no_grad():
        model.output_bias += 1
    with pytest.raises(InputError, match="start.model"):
        run(tmp_path / "s", model=model)


class Scored:
    def __init__(self, metric):
        self.metric = metric

    def __call__(self, model):
        return float(model.output_bias.sum())


def test_the_validation_metric_belongs_to_a_run(tmp_path):
    cut(tmp_path / "s", validate=Scored("ndcg@10"))
    with pytest.raises(InputError, match="a run with validation = 'ndcg@10', not 'hr@10'"):
        run(tmp_path / "s", validate=Scored("hr@10"))
    with pytest.raises(InputError, match="a run with validation = 'ndcg@10', not True"):
        run(tmp_path / "s", validate=lambda model: 0.0)
    with pytest.raises(InputError, match="a run with validation = 'ndcg@10', not False"):
        run(tmp_path / "s")
    run(tmp_path / "s", validate=Scored("ndcg@10"))


class Described(Cycles):
    def __init__(self, attributes):
        super().__init__()
        self.attributes = attributes


def test_the_attributes_belong_to_a_run(tmp_path):
    cut(tmp_path / "s", data=Described({"item 1": [1, 2]}))
    for other in (None, {}, {"item 1": [2, 1]}, {"item 1": [1, 2], "item 2": [1]}):
        with pytest.raises(InputError, match="a run with attributes"):
            run(tmp_path / "s", data=Described(other))
    run(tmp_path / "s", data=Described({"item 1": [1, 2]}))


def without(name):
    return lambda header: header.pop(name)


def put(name, value):
    return lambda header: header.update({name: value})


def progress(**fields):
    return lambda header: header["progress"].update(fields)


STRANGE = {
    "no run": (without("run"), "does not say of which run"),
    "run a list": (put("run", [1]), "does not say of which run"),
    "run a word": (put("run", "x"), "does not say of which run"),
    "run empty": (put("run", {}), "belongs to a run with attributes|batch_size = None"),
    "run of lists": (lambda h: h["run"].update(lr=[0.003]), r"lr = \[0.003\], not 0.003"),
    "run long": (lambda h: h["run"].update(lr="x" * 10**6), r"lr = 'xxx"),
    "one for true": (lambda h: h["run"].update(compile=0), "compile = 0, not False"),
    "no progress": (without("progress"), "how far its run is"),
    "progress a list": (put("progress", [1]), "how far its run is"),
    "progress null": (put("progress", None), "how far its run is"),
    "a field more": (progress(more=1), "how far its run is"),
    "a field less": (lambda h: h["progress"].pop("step"), "how far its run is"),
    "half a step": (progress(step=1.5), "how far its run is"),
    "steps a truth": (progress(step=True), "how far its run is"),
    "a step before": (progress(batch=-1), "how far its run is"),
    "losses a word": (progress(losses="abc"), "how far its run is"),
    "a loss of words": (progress(losses=["a"]), "how far its run is"),
    "scores a map": (progress(scores={"1": 2}), "how far its run is"),
    "a score of three": (progress(scores=[[1, 2, 3]]), "how far its run is"),
    "a score of an epoch list": (progress(scores=[[[1], 2]]), "how far its run is"),
    "a score of words": (progress(scores=[[1, "a"]]), "how far its run is"),
    "kind a list": (put("kind", ["training"]), "not a training state"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_state_is_refused_in_one_line(case, tmp_path):
    change, message = STRANGE[case]
    path = tmp_path / "s"
    cut(path)
    tensors, header = read_tensors(path)
    header = copy.deepcopy(header)
    change(header)
    save_tensors(path, tensors, header)
    model = new_model()
    before = bits(model)
    with pytest.raises(InputError, match=message) as error:
        run(path, model=model)
    assert len(str(error.value)) < 400
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("name", [f"{MOMENTS[0]}.model.output_bias", "model.output_bias"])
def test_a_state_with_other_tensors_is_refused(name, tmp_path):
    path = tmp_path / "s"
    cut(path)
    tensors, header = read_tensors(path)
    for changed in (tensors[name].to(torch.complex64), tensors[name][:-1], tensors[name].int()):
        save_tensors(path, tensors | {name: changed}, header)
        with pytest.raises(InputError, match=name):
            run(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("clip", "lr", "weight_decay", "ema", "save_every_seconds")
        for value in (float("inf"), float("nan"), -1.0, "5", True)
    ]
    + [("betas", (0.9, float("nan"))), ("betas", "ab"), ("betas", 3), ("betas", ("a", "b"))]
    + [("epochs", 10**30), ("seed", 2**64), ("warmup_steps", float("inf")), ("batch_size", 1.0)],
)
def test_settings_that_are_no_numbers_are_refused_before_any_work(name, value, tmp_path):
    data = Cycles()
    with pytest.raises(InputError, match=name):
        run(tmp_path / "s", data=data, **{name: value})
    assert not data.asked and not list(tmp_path.iterdir())
