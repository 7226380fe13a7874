"""Models of transformers and its collators' batches as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.libraries import EveryDoor, entries, name_of

import fisherkern as fk
from benchmarks.libraries import checks
from benchmarks.libraries.architecture import ARCHITECTURES, MAX_LEN, dataset, padded
from benchmarks.libraries.hugging_face_models import MASK

pytest.importorskip("transformers", reason="transformers is not installed")

GPT2, BERT = ARCHITECTURES["HF GPT2"], ARCHITECTURES["HF BertForMaskedLM"]


@pytest.mark.parametrize("entry", entries("transformers"), ids=name_of)
class TestHuggingFace(EveryDoor):
    pass


def test_folders_of_one_configuration_merge(tmp_path):
    members = [GPT2.build(seed).module for seed in (0, 1)]
    for number, member in enumerate(members):
        member.config.attn_pdrop = 0.1 * number
        member.save_pretrained(tmp_path / str(number))
    read = [type(m).from_pretrained(tmp_path / str(i)) for i, m in enumerate(members)]
    merged = fk.merge(read)
    for name, parameter in merged.named_parameters():
        mean = torch.stack([m.get_parameter(name).detach() for m in members]).mean(0)
        torch.testing.assert_close(parameter.detach(), mean.to(parameter.dtype))


@pytest.mark.parametrize(("setting", "value"), [("n_head", 4), ("layer_norm_epsilon", 0.1)])
def test_another_function_is_refused(setting, value):
    first, second = (entry.module for entry in (GPT2.build(0), GPT2.build(1)))
    setattr(second.config, setting, value)
    with pytest.raises(fk.InputError, match=setting):
        fk.merge([first, second])


def test_labels_that_are_the_history_name_no_next_item():
    member = checks.members(GPT2)[0]
    with pytest.raises(fk.InputError, match="no item after the last"):
        fk.diag_fisher(member.model, member.batches, sampler="target", progress=False)


def test_a_masked_model_is_evaluated_by_its_own_question():
    member = checks.members(BERT)[0]

    def question(items):
        ends = torch.full_like(items[:, :1], MASK)
        rows = [torch.cat([row[row != 0], end]) for row, end in zip(items, ends, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    data = dataset()
    report = fk.evaluate(fk.adapt(member.model, make_batch=question), data)
    by_hand = dataclasses.replace(
        member, make_batch=lambda histories: question(padded(histories, MAX_LEN))
    )
    for user, rank in zip(report.users.tolist(), report.ranks.tolist(), strict=True):
        items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        assert rank == checks.rank_by_hand(by_hand, user, items[:-1], items[-1])
