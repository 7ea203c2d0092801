"""MIL operators that step along a sequence ``[steps, batch, features]``.

Semantics: ``ops/defs/iOS15/recurrent.py`` and ``iOS18/recurrent.py``, and the NumPy references of
coremltools' own tests where those leave a question open. Weights of the gates are stacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_runtimes.coreml_reference.bounds import MOST_STEPS, TooLarge
from dkm_runtimes.coreml_reference.operators import Operator

State = tuple[Tensor, ...]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "linear": lambda x: x,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,  # scaled by 1: there is no parameter for it
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "tanh": torch.tanh,
}


def _unrolled(
    step: Callable[[Tensor, State], State], projected: Tensor, state: State, backwards: bool
) -> tuple[Tensor, State]:
    """Every step's first state, in the order of the steps, and the final states."""
    if len(projected) > MOST_STEPS:
        raise TooLarge(f"more than {MOST_STEPS} steps")
    steps = range(len(projected))
    outputs = []
    for index in reversed(steps) if backwards else steps:
        state = step(projected[index], state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _backwards(direction: str) -> bool:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction} is not known")
    return direction == "reverse"


def _chosen(sequence: Tensor, output_sequence: Tensor | bool) -> Tensor:
    return sequence if output_sequence else sequence[-1:]


def _rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    activation: str = "tanh",
) -> list[Tensor]:
    activate = _ACTIVATIONS[activation]

    def step(projected: Tensor, state: State) -> State:
        return (activate(projected + F.linear(state[0], weight_hh)),)

    sequence, (h,) = _unrolled(
        step, F.linear(x, weight_ih, bias), (initial_h,), _backwards(direction)
    )
    return [_chosen(sequence, output_sequence), h]


def _gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: Tensor | bool = False,
    input_bias: Tensor | None = None,
) -> list[Tensor]:
    """Gates are reset, output, update. ``reset_after`` resets the product, not the state."""
    gate, activate = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]
    hidden_bias = weight_hh.new_zeros(len(weight_hh)) if bias is None else bias
    reset_bias, output_bias, update_bias = hidden_bias.chunk(3)
    reset_weight, output_weight, update_weight = weight_hh.chunk(3)

    def step(projected: Tensor, state: State) -> State:
        (h,) = state
        to_reset, to_output, to_update = projected.chunk(3, -1)
        reset = gate(to_reset + F.linear(h, reset_weight, reset_bias))
        update = gate(to_update + F.linear(h, update_weight, update_bias))
        if reset_after:
            recurrent = reset * F.linear(h, output_weight, output_bias)
        else:
            recurrent = F.linear(reset * h, output_weight, output_bias)
        output = activate(to_output + recurrent)
        return ((1 - update) * output + update * h,)

    sequence, (h,) = _unrolled(
        step, F.linear(x, weight_ih, input_bias), (initial_h,), _backwards(direction)
    )
    return [_chosen(sequence, output_sequence), h]


def _lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Tensor | None = None,
) -> list[Tensor]:
    """Gates are input, forget, output, cell. Both directions of a bidirectional one are joined."""
    gate = _ACTIVATIONS[recurrent_activation]
    activate_cell, activate = _ACTIVATIONS[cell_activation], _ACTIVATIONS[activation]

    def run(
        weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        state: State,
        backwards: bool,
    ) -> tuple[Tensor, State]:
        input_weight, hidden_weight, biases, peepholes = weights
        looks = (0.0, 0.0, 0.0) if peepholes is None else peepholes.chunk(3)

        def step(projected: Tensor, state: State) -> State:
            h, c = state
            admit, forget, emit, cell = (projected + F.linear(h, hidden_weight)).chunk(4, -1)
            kept = gate(forget + c * looks[1]) * c
            c = kept + gate(admit + c * looks[0]) * activate_cell(cell)
            c = c if clip is None else c.clamp(-clip, clip)
            return gate(emit + c * looks[2]) * activate(c), c

        return _unrolled(step, F.linear(x, input_weight, biases), state, backwards)

    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        sequence, (h, c) = run(forward, (initial_h, initial_c), _backwards(direction))
        return [_chosen(sequence, output_sequence), h, c]
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm has weights for both directions")
    (h, h_back), (c, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    ahead, (h, c) = run(forward, (h, c), False)
    back, (h_back, c_back) = run(
        (weight_ih_back, weight_hh_back, bias_back, peephole_back), (h_back, c_back), True
    )
    pairs = (
        # In the order of time, which the backward direction has not.
        (_chosen(ahead, output_sequence), back.flip(0) if output_sequence else back[-1:]),
        (h, h_back),
        (c, c_back),
    )
    return [torch.cat(pair, -1) for pair in pairs]


TABLE: dict[str, Operator] = {"gru": _gru, "lstm": _lstm, "rnn": _rnn}
