"""What turns gradients into steps: the optimizer of a phase, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dkm_export.training.recipe import TrainSection


def make_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.Optimizer:
    """The section's optimizer with its state made at once: there is always one to restore.

    The state is what makes the first step the same as if it had none.
    """
    parameters = list(model.parameters())
    # Decay pulls weights to 0; biases and norms have other places to be.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rate = section.learning_rate
    optimizer: torch.optim.Optimizer
    if section.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=section.momentum)
        slots: tuple[str, ...] = ("momentum_buffer",) if section.momentum else ()
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate)
        slots = ("exp_avg", "exp_avg_sq")
    for parameter in parameters:
        state: dict[str, Tensor] = {
            slot: torch.zeros_like(parameter, memory_format=torch.preserve_format) for slot in slots
        }
        if section.optimizer == "adamw":
            state["step"] = torch.tensor(0.0)
        optimizer.state[parameter] = state
    return optimizer


def learning_rate(section: TrainSection, step: int, steps: int) -> float:
    """The rate of one step: of its number alone, so that a resumed run needs no history.

    Args:
        section: of the recipe.
        step: of the whole phase, the first of which is 0.
        steps: per epoch.
    """
    warm_up = section.warmup_epochs * steps
    if step < warm_up:
        return section.learning_rate * min(1.0, (step + 1) / warm_up)
    part = (step - warm_up) / (steps * section.epochs - warm_up)
    match section.schedule:
        case "cosine":
            left = (1 + math.cos(math.pi * part)) / 2
        case "linear":
            left = 1 - part
        case "constant":
            left = 1.0
    return section.learning_rate * left
