"""Recurrent layers and cells by captured Linears.

The input's part of all steps is one Linear, the state's one for each step; a place's uses
at all steps are joined again when they are squared. Gates in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern.fisher.capture import Linear, Replacement, Rules

# The state, then the input's and the state's parts of the gates -> the next state.
State = tuple[Tensor, ...]
Step = Callable[[State, Tensor, Tensor], State]


def _gru(state: State, gi: Tensor, gh: Tensor) -> State:
    (h,) = state
    (ir, iz, new), (hr, hz, hn) = gi.chunk(3, dim=1), gh.chunk(3, dim=1)
    candidate = torch.tanh(new + torch.sigmoid(ir + hr) * hn)
    return (candidate + torch.sigmoid(iz + hz) * (h - candidate),)


def _lstm(state: State, gi: Tensor, gh: Tensor) -> State:
    i, f, g, o = (gi + gh).chunk(4, dim=1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _tanh(state: State, gi: Tensor, gh: Tensor) -> State:
    return (torch.tanh(gi + gh),)


def _relu(state: State, gi: Tensor, gh: Tensor) -> State:
    return (torch.relu(gi + gh),)


def _layer(step: Step) -> Replacement:
    """torch.gru and its kin; NotImplemented for packed sequences and projections."""

    def replacement(
        linear: Linear,
        input: Tensor,
        state: Any,
        weights: Any,
        biases: Any = None,
        num_layers: Any = None,
        dropout: Any = None,
        train: Any = None,
        bidirectional: Any = None,
        batch_first: Any = None,
    ) -> Any:
        # A packed sequence's batch_sizes stand where the state does here.
        if not isinstance(weights, (list, tuple)) or not isinstance(batch_first, bool):
            return NotImplemented
        directions = 2 if bidirectional else 1
        each = 4 if biases else 2
        if (train and dropout) or len(weights) != num_layers * directions * each:
            return NotImplemented
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        x = input if batch_first else input.transpose(0, 1)
        last = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                parameters = weights[index * each : (index + 1) * each]
                first = tuple(s[index] for s in states)
                hidden, final = _run(linear, step, x, first, parameters, direction == 1)
                outputs.append(hidden)
                last.append(final)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
        finals = [torch.stack(part) for part in zip(*last, strict=True)]
        return (x if batch_first else x.transpose(0, 1)), *finals

    return Replacement(replacement)


def _run(
    linear: Linear,
    step: Step,
    input: Tensor,
    state: State,
    parameters: Sequence[Tensor],
    backwards: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction over (N, T, I): the states (N, T, H), and the last one."""
    input_weight, state_weight, input_bias, state_bias = (*parameters, None, None)[:4]
    gates = linear(input, input_weight, input_bias).unbind(dim=1)
    hidden = []
    for gi in gates[::-1] if backwards else gates:
        state = step(state, gi, linear(state[0], state_weight, state_bias))
        hidden.append(state[0])
    return torch.stack(hidden[::-1] if backwards else hidden, dim=1), state


def _cell(step: Step) -> Replacement:
    """torch.gru_cell and its kin."""

    def replacement(
        linear: Linear,
        input: Tensor,
        state: Any,
        input_weight: Tensor,
        state_weight: Tensor,
        input_bias: Tensor | None = None,
        state_bias: Tensor | None = None,
    ) -> Any:
        if input.dim() != 2:
            return NotImplemented
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        gi = linear(input, input_weight, input_bias)
        result = step(states, gi, linear(states[0], state_weight, state_bias))
        return result[0] if isinstance(state, Tensor) else result

    return Replacement(replacement)


RULES: Rules = {
    torch.gru: _layer(_gru),
    torch.lstm: _layer(_lstm),
    torch.rnn_tanh: _layer(_tanh),
    torch.rnn_relu: _layer(_relu),
    torch.gru_cell: _cell(_gru),
    torch.lstm_cell: _cell(_lstm),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}
