"""RecBole, RecTools and RePlay where none is installed: the calls and attributes of each."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.architecture import (
    MAX_LEN,
    NUM_ITEMS,
    WIDTH,
    Architecture,
    Histories,
    Member,
    histories,
    padded,
    shaken,
)

ITEMS = torch.arange(1, NUM_ITEMS + 1)


def halves() -> list[list[list[int]]]:
    users = histories()
    return [users[:4], users[4:6]]


def last_items() -> Tensor:
    return torch.tensor([history[-1] for part in halves() for history in part])


class Interaction:
    """RecBole's batch: no mapping, tensors by name."""

    def __init__(self, interaction: dict[str, Tensor]) -> None:
        self.interaction = interaction
        self.length = len(next(iter(interaction.values())))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        return Interaction({name: value[index] for name, value in self.interaction.items()})

    def __len__(self) -> int:
        return self.length


class RecBoleSASRec(nn.Module):
    """Right padding; the padding, id 0, is in the softmax."""

    ITEM_SEQ, ITEM_SEQ_LEN, ITEM_ID, USER_ID = "item_id_list", "item_length", "item_id", "user_id"

    def __init__(self) -> None:
        super().__init__()
        self.n_items, self.max_seq_length = NUM_ITEMS + 1, MAX_LEN
        self.item_embedding = nn.Embedding(self.n_items, WIDTH, padding_idx=0)
        self.position_embedding = nn.Embedding(MAX_LEN, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        places = torch.arange(item_seq.shape[1]).unsqueeze(0).expand_as(item_seq)
        states = self.item_embedding(item_seq) + self.position_embedding(places)
        states = torch.tanh(self.layer(states)).cumsum(1)
        index = (item_seq_len - 1).view(-1, 1, 1).expand(-1, -1, WIDTH)
        return states.gather(1, index).squeeze(1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return torch.matmul(states, self.item_embedding.weight.transpose(0, 1))


def recbole(seed: int) -> Member:
    torch.manual_seed(seed)
    model = shaken(RecBoleSASRec(), seed)

    def made(histories: Histories) -> Interaction:
        lengths = torch.tensor([min(len(h), MAX_LEN) for h in histories])
        rows = padded(histories, MAX_LEN, side="right")
        return Interaction({model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths})

    def training(histories: Histories) -> Interaction:
        batch = made([history[:-1] for history in histories])
        batch.interaction[model.ITEM_ID] = torch.tensor([h[-1] for h in histories])
        return batch

    batches = [training(part) for part in halves()]
    return Member(
        model=model,
        module=model,
        batches=batches,
        logits=lambda m, b: m(b[m.ITEM_SEQ], b[m.ITEM_SEQ_LEN]) @ m.item_embedding.weight.T,
        columns=ITEMS,
        make_batch=made,
        targets=last_items(),
    )


class ItemNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_items = NUM_ITEMS + 1
        self.ids_emb = nn.Embedding(self.n_items, WIDTH, padding_idx=0)

    def get_all_embeddings(self) -> Tensor:
        return self.ids_emb(torch.arange(self.n_items))


class Similarity(nn.Module):
    def forward(self, session_embs: Tensor, item_embs: Tensor) -> Tensor:
        return session_embs @ item_embs.T


class RecToolsBackbone(nn.Module):
    """The table is looked up whole; logits of every position, id 0 first."""

    def __init__(self) -> None:
        super().__init__()
        self.use_causal_attn = True
        self.item_model, self.similarity_module = ItemNet(), Similarity()
        self.pos_encoding_layer = nn.Module()
        self.pos_encoding_layer.pos_emb = nn.Embedding(MAX_LEN, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def encode_sessions(self, batch: dict[str, Tensor], item_embs: Tensor) -> Tensor:
        positions = self.pos_encoding_layer.pos_emb(torch.arange(MAX_LEN - 1, -1, -1))
        states = item_embs[batch["x"]] + positions
        return torch.tanh(self.layer(states)).cumsum(1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        item_embs = self.item_model.get_all_embeddings()
        return self.similarity_module(self.encode_sessions(batch, item_embs), item_embs)


class RecToolsModel:
    """The object that users hold: no module, but one inside, and the ids of items."""

    def __init__(self, backbone: nn.Module) -> None:
        self.torch_model = backbone
        names = ["PAD", *(f"i{item}" for item in ITEMS.tolist())]
        self.data_preparator = types.SimpleNamespace(
            item_id_map=types.SimpleNamespace(external_ids=names)
        )


def rectools(seed: int) -> Member:
    torch.manual_seed(seed)
    model = RecToolsModel(shaken(RecToolsBackbone(), seed))

    def training(histories: Histories) -> dict[str, Tensor]:
        seen, ends = padded([h[:-1] for h in histories], MAX_LEN), [[h[-1]] for h in histories]
        return {"x": seen, "y": torch.cat([seen[:, 1:], torch.tensor(ends)], dim=1)}

    return Member(
        model=model,
        module=model.torch_model,
        batches=[training(part) for part in halves()],
        logits=lambda m, b: (
            m.encode_sessions(b, m.item_model.ids_emb(torch.arange(NUM_ITEMS + 1)))[:, -1]
            @ m.item_model.get_all_embeddings().T
        ),
        columns=ITEMS,
        make_batch=lambda histories: {"x": padded(histories, MAX_LEN)},
        targets=last_items(),
        item_ids=model.data_preparator.item_id_map.external_ids[1:],
    )


class RePlayBody(nn.Module):
    """Items from 0, the padding after the last; positions repeated for every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Module()
        self.embedder._item_feature_name = "item_id"
        self.embedder.items = nn.Embedding(NUM_ITEMS + 1, WIDTH, padding_idx=NUM_ITEMS)
        self.embedding_aggregator = nn.Module()
        self.embedding_aggregator.pe = nn.Embedding(MAX_LEN, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, feature_tensors: dict[str, Tensor], padding_mask: Tensor) -> Tensor:
        ids = feature_tensors["item_id"]
        positions = self.embedding_aggregator.pe.weight[-ids.shape[1] :].unsqueeze(0)
        states = self.embedder.items(ids) + positions.repeat(len(ids), 1, 1)
        return torch.tanh(self.layer(states * padding_mask.unsqueeze(-1))).cumsum(1)


class RePlaySasRec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = RePlayBody()

    def get_logits(self, states: Tensor, candidates_to_score: Tensor | None = None) -> Tensor:
        ids = torch.arange(NUM_ITEMS) if candidates_to_score is None else candidates_to_score
        return states @ self.body.embedder.items(ids).T

    def forward_inference(self, feature_tensors: Any, padding_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.get_logits(self.body(feature_tensors, padding_mask)[:, -1])}

    def forward(self, feature_tensors: Any, padding_mask: Tensor, **labels: Any) -> Any:
        return self.forward_inference(feature_tensors, padding_mask)


def replay(seed: int) -> Member:
    torch.manual_seed(seed)
    model = shaken(RePlaySasRec(), seed)

    def made(histories: Histories) -> dict[str, Any]:
        ids = padded(histories, MAX_LEN, padding=NUM_ITEMS, shift=-1)
        return {"feature_tensors": {"item_id": ids}, "padding_mask": ids != NUM_ITEMS}

    def training(histories: Histories) -> dict[str, Any]:
        batch = made([history[:-1] for history in histories])
        ends = torch.tensor([[history[-1] - 1] for history in histories])
        labels = torch.cat([batch["feature_tensors"]["item_id"][:, 1:], ends], dim=1)
        mask = (labels != NUM_ITEMS)[:, :, None]
        return {**batch, "positive_labels": labels[:, :, None], "target_padding_mask": mask}

    return Member(
        model=model,
        module=model,
        batches=[training(part) for part in halves()],
        logits=lambda m, b: (
            m.body(b["feature_tensors"], b["padding_mask"])[:, -1]
            @ m.body.embedder.items.weight[:-1].T
        ),
        columns=ITEMS - 1,
        make_batch=made,
        targets=last_items() - 1,
    )


SKELETONS = [
    Architecture("RecBole skeleton", recbole, "torch"),
    Architecture("RecTools skeleton", rectools, "torch"),
    Architecture("RePlay skeleton", replay, "torch"),
]
