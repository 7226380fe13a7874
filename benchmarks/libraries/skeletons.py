"""SASRec.pytorch and gSASRec: attributes, methods and tensor flow of two one-file models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointWise(nn.Module):
    """Two convolutions of width 1 over (N, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, kernel_size=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=1)

    def forward(self, states: Tensor) -> Tensor:
        return self.conv2(self.conv1(states.transpose(1, 2)).relu()).transpose(1, 2)


class SASRec(nn.Module):
    """SASRec.pytorch: histories are NumPy arrays, id 0 pads on the left, position 0 is padding."""

    def __init__(self, item_num: int, max_len: int, width: int, norm_first: bool) -> None:
        super().__init__()
        self.item_num, self.norm_first, self.dev = item_num, norm_first, "cpu"
        self.item_emb = nn.Embedding(item_num + 1, width, padding_idx=0)
        self.pos_emb = nn.Embedding(max_len + 1, width, padding_idx=0)
        self.emb_dropout = nn.Dropout(0.2)
        self.attention_layernorms = nn.ModuleList([nn.LayerNorm(width, eps=1e-8)])
        self.attention_layers = nn.ModuleList([nn.MultiheadAttention(width, 2, 0.2)])
        self.forward_layernorms = nn.ModuleList([nn.LayerNorm(width, eps=1e-8)])
        self.forward_layers = nn.ModuleList([PointWise(width)])
        self.last_layernorm = nn.LayerNorm(width, eps=1e-8)

    def ids(self, array: Any) -> Tensor:
        return torch.tensor(array, dtype=torch.long, device=self.dev)

    def log2feats(self, log_seqs: Any) -> Tensor:
        ids = self.ids(log_seqs)
        states = self.item_emb(ids)
        states *= self.item_emb.embedding_dim**0.5
        count = ids.shape[1]
        positions = torch.arange(1, count + 1).unsqueeze(0).expand(len(ids), -1)
        states += self.pos_emb(positions * (ids != 0))
        states = self.emb_dropout(states)
        future = ~torch.tril(torch.ones(count, count, dtype=torch.bool))
        blocks = zip(
            self.attention_layernorms,
            self.attention_layers,
            self.forward_layernorms,
            self.forward_layers,
            strict=True,
        )
        for norm, attention, forward_norm, feed_forward in blocks:
            states = states.transpose(0, 1)
            if self.norm_first:
                x = norm(states)
                states = (states + attention(x, x, x, attn_mask=future)[0]).transpose(0, 1)
                states = states + feed_forward(forward_norm(states))
            else:
                mixed = attention(states, states, states, attn_mask=future)[0]
                states = norm(states + mixed).transpose(0, 1)
                states = forward_norm(states + feed_forward(states))
        return self.last_layernorm(states)

    def forward(self, user_ids: Any, log_seqs: Any, pos_seqs: Any, neg_seqs: Any) -> Any:
        states = self.log2feats(log_seqs)
        positive, negative = self.item_emb(self.ids(pos_seqs)), self.item_emb(self.ids(neg_seqs))
        return (states * positive).sum(-1), (states * negative).sum(-1)

    def predict(self, user_ids: Any, log_seqs: Any, item_indices: Any) -> Tensor:
        items = self.item_emb(self.ids(item_indices))
        return items.matmul(self.log2feats(log_seqs)[:, -1, :].unsqueeze(-1)).squeeze(-1)


class HeadsInBatch(nn.Module):
    """gSASRec's attention: heads stand one after another in the batch's dimension."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj, self.key_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.val_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        maps = ((self.query_proj, queries), (self.key_proj, keys), (self.val_proj, keys))
        q, k, v = (torch.cat(m(x).chunk(self.heads, dim=2), dim=0) for m, x in maps)
        scores = q.matmul(k.transpose(1, 2)) / k.shape[-1] ** 0.5
        real = keys.abs().sum(-1).sign().repeat(self.heads, 1).unsqueeze(1)
        scores = scores.masked_fill(real.repeat(1, queries.shape[1], 1) == 0, float("-inf"))
        past = torch.tril(torch.ones_like(scores[0]))[None].repeat(len(scores), 1, 1)
        shares = F.softmax(scores.masked_fill(past == 0, float("-inf")), dim=-1)
        shares = torch.nan_to_num(shares, nan=0.0, posinf=0.0, neginf=0.0)
        asked = queries.abs().sum(-1).sign().repeat(self.heads, 1).unsqueeze(-1)
        shares = shares * asked.repeat(1, 1, keys.shape[1])
        return torch.cat(shares.matmul(v).chunk(self.heads, dim=0), dim=2)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.multihead_attention = HeadsInBatch(width, 2)
        self.dense1, self.dense2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        queries = self.first_norm(states)
        states = self.second_norm(self.multihead_attention(queries, states) + queries)
        return (self.dense2(self.dense1(states)) + states) * mask


class GSASRec(nn.Module):
    """gSASRec: items from 1, the padding is num_items + 1; a table of its own may score."""

    def __init__(self, num_items: int, sequence_length: int, width: int, reuse: bool) -> None:
        super().__init__()
        self.num_items, self.sequence_length = num_items, sequence_length
        self.embedding_dim, self.reuse_item_embeddings = width, reuse
        self.item_embedding = nn.Embedding(num_items + 2, width)
        self.position_embedding = nn.Embedding(sequence_length, width)
        self.embeddings_dropout = nn.Dropout(0.2)
        self.transformer_blocks = nn.ModuleList([Block(width)])
        self.seq_norm = nn.LayerNorm(width)
        if not reuse:
            self.output_embedding = nn.Embedding(num_items + 2, width)

    def get_output_embeddings(self) -> nn.Embedding:
        return self.item_embedding if self.reuse_item_embeddings else self.output_embedding

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        states = self.item_embedding(ids.long())
        mask = (ids != self.num_items + 1).to(states.dtype).unsqueeze(-1)
        positions = torch.arange(ids.shape[1]).unsqueeze(0).repeat(len(ids), 1)
        states = self.embeddings_dropout(states + self.position_embedding(positions)[: len(ids)])
        states *= mask
        for block in self.transformer_blocks:
            states = block(states, mask)
        return self.seq_norm(states), []

    def get_predictions(self, ids: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            states = self.forward(ids)[0][:, -1, :]
            scores = torch.einsum("bd,nd->bn", states, self.get_output_embeddings().weight)
            scores[:, 0] = float("-inf")
            scores[:, self.num_items + 1 :] = float("-inf")
            top = torch.topk(scores, limit, dim=1)
        return top.indices, top.values
