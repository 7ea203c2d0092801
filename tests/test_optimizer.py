from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dkm_export.training.optimizer import learning_rate, make_optimizer
from dkm_export.training.recipe import TrainSection


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.1464466094067263]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    section = TrainSection.model_validate({"epochs": 2, "learning_rate": 1, "schedule": schedule})
    assert [learning_rate(section, step, steps=2) for step in range(4)] == pytest.approx(expected)


def test_the_warm_up_comes_first_and_the_schedule_takes_the_rest() -> None:
    section = TrainSection(epochs=3, learning_rate=1, schedule="linear", warmup_epochs=0.5)
    rates = [learning_rate(section, step, steps=4) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([1 - step / 10 for step in range(10)])
    all_of_it = TrainSection(epochs=1, learning_rate=1, warmup_epochs=1)
    assert [learning_rate(all_of_it, step, steps=2) for step in range(2)] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("section", "make"),
    [
        ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0)),
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ({"optimizer": "sgd", "momentum": 0}, lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
)
def test_state_made_at_once_changes_no_step(section: dict[str, object], make: object) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    theirs = deepcopy(ours)
    chosen = TrainSection.model_validate({"epochs": 1, "learning_rate": 0.1, **section})
    assert callable(make)
    for model, optimizer in (
        (ours, make_optimizer(ours, chosen)),
        (theirs, make(theirs.parameters())),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(4.0)).square().sum().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_decay_and_biases_and_norms_do_not(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = deepcopy(model.state_dict())
    section = TrainSection.model_validate(
        {"epochs": 1, "learning_rate": 0.1, "optimizer": optimizer, "weight_decay": 0.5}
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, section).step()
    after = model.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.95)
    assert all(torch.equal(after[name], before[name]) for name in after if name != "0.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_epochs": 2}, "warmup_epochs is more than epochs"),
        ({"accumulate": 65}, "accumulate is more than batch_size"),
        ({"momentum": 1}, "less than 1"),
        ({"schedule": "step"}, "'cosine', 'linear' or 'constant'"),
        ({"precision": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSection.model_validate({"epochs": 1, **change})
