"""Weights that two processes hold a part of each: they train as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dkm_export.clustering import Gradient
from dkm_export.compress import finalize, freeze, prepare, set_temperature, shard
from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_export.parametrization import DkmSettings, DkmWeight
from dkm_export.sharding import cut_axis
from dkm_export.spec import CompressionSpec, LayerRule

ROOT = Path(__file__).parents[1]
SOURCE = ModelSource(
    name="mixed",
    factory="tests.test_sharding:Mixed",
    inputs=(InputSpec(name="image", shape=(1, 4, 10, 10)),),
)
RULES = (
    LayerRule(bits=3, dim=2),
    LayerRule(pattern="depthwise.*", bits=1, dim=4),
    LayerRule(pattern="padded.*", bits=3, dim=4, axis=1),
    LayerRule(pattern="grouped.*", bits=2, dim=2, groups=2, axis=1),
    LayerRule(pattern="large.*", bits=4),
    LayerRule(pattern="tied.*", bits=4),
    LayerRule(pattern="fours.*", bits=3, dim=4),
)
NOT_CUT = {"depthwise.weight"}


class Mixed(nn.Module):
    """Layers that are cut along different axes or not at all, a tied one, and one to freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 34, 3)
        self.depthwise = nn.Conv2d(34, 34, 1, groups=34)  # half of it is no whole vectors
        self.padded = nn.Linear(34, 71)  # cut between outputs, 36 and 35
        self.grouped = nn.Linear(71, 200)  # cut between inputs
        self.large = nn.Linear(200, 200)  # each half takes a grid of values
        self.tied = nn.Linear(200, 200)
        self.tied.weight = self.large.weight
        self.fours = nn.Linear(200, 64)
        self.frozen = nn.Linear(64, 32)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.stem(image))))
        x = torch.tanh(self.grouped(torch.tanh(self.padded(x.mean((2, 3))))))
        x = torch.tanh(self.tied(torch.tanh(self.large(x))))
        y: Tensor = self.frozen(torch.tanh(self.fours(x)))
        return y


def _prepared(gradient: Gradient) -> nn.Module:
    torch.manual_seed(0)
    model = Mixed()
    spec = CompressionSpec(rules=RULES, small_layer_size=0)
    prepare(model, spec, DkmSettings(tau=1.0, gradient=gradient))
    freeze(model, "frozen.*")
    return model.train()


def _layers(model: nn.Module) -> dict[str, DkmWeight]:
    parts = (part for part in model.modules() if isinstance(part, DkmWeight))
    return {part.names[0]: part for part in parts}


def _latent(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name.removesuffix('.weight')}.parametrizations.weight.original")


def _steps(model: nn.Module, part: slice, mesh: DeviceMesh | None, foreach: bool) -> None:
    """Three steps of SGD on one part of the batch, gradients of plain parameters averaged."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 4, 10, 10, generator=generator)
    targets = torch.randn(8, 32, generator=generator)
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    rest = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.SGD(parts or rest, lr=0.5, foreach=foreach)
    if parts:  # a group of their own, as foreach kernels do not take both together
        optimizer.add_param_group({"params": rest})
    for step in range(3):
        set_temperature(model, 1.0 - 0.2 * step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images[part]), targets[part]).backward()
        for parameter in model.parameters():
            if mesh and parameter.grad is not None and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= mesh.size()
        optimizer.step()


def _assert_equal(found: PalettizedModel, expected: PalettizedModel) -> None:
    assert found.ties == expected.ties == {"tied.weight": "large.weight"}
    for name, tensor in expected.dense.items():
        torch.testing.assert_close(found.dense[name], tensor, rtol=0, atol=1e-5, msg=name)
    for name, palette in expected.palettes.items():
        ours = found.palettes[name]
        # a centroid may round to the next float16, and a weight between two go to the other
        np.testing.assert_allclose(ours.lut, palette.lut, rtol=1e-3, atol=1e-5, err_msg=name)
        assert (ours.indices != palette.indices).mean() <= 1e-3, name


class _Recorder:
    """The sizes of what goes through ``dist.all_reduce``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._all_reduce = dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", self)

    def __call__(self, tensor: Tensor, **options: Any) -> object:
        self.sizes.append(tensor.numel())
        return self._all_reduce(tensor, **options)


def _same_as_alone(mesh: DeviceMesh, gradient: Gradient, foreach: bool) -> None:
    alone, parted = _prepared(gradient), _prepared(gradient)
    ignored = shard(parted, mesh)
    for name in _layers(alone):
        latent, whole = _latent(parted, name), _latent(alone, name)
        assert isinstance(latent, DTensor)
        assert latent in ignored
        local = latent.to_local().numel()
        if name in NOT_CUT:
            assert local == whole.numel(), name
        else:
            assert 0.4 * whole.numel() < local < 0.6 * whole.numel(), name
    assert _latent(parted, "tied.weight") is _latent(parted, "large.weight")

    half = slice(0, 4) if mesh.get_rank() == 0 else slice(4, 8)
    _steps(alone, slice(0, 8), None, foreach)
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = _Recorder(monkeypatch)
        _steps(parted, half, mesh, foreach)
    largest = max(
        dkm.centroids[0].numel() + len(dkm.centroids[0]) for dkm in _layers(alone).values()
    )
    if gradient == "implicit":
        largest = max(largest, 16 * 16)  # the Jacobian of scalars
    plain = {p.numel() for p in alone.parameters()}  # of gradients, one for each parameter
    assert all(size <= largest or size in plain for size in recorder.sizes), recorder.sizes
    assert sum(size > largest for size in recorder.sizes) <= 3 * len(plain)

    for name, dkm in _layers(alone).items():
        other = _layers(parted)[name]
        steps = 0 if name == "frozen.weight" else 3
        assert (name, int(other.steps), int(dkm.steps)) == (name, steps, steps)
        torch.testing.assert_close(other.centroids, dkm.centroids, rtol=0, atol=1e-5, msg=name)
        layer = name.removesuffix(".weight")
        soft, expected = (m.get_submodule(layer).weight for m in (parted, alone))
        assert type(soft) is Tensor
        torch.testing.assert_close(soft, expected, rtol=0, atol=1e-5, msg=name)
    _assert_equal(finalize(parted, SOURCE), finalize(alone, SOURCE))


def _wrong_placements(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 34))
    rule = LayerRule(bits=2, dim=4)
    prepare(model, CompressionSpec(rules=(rule,), small_layer_size=0))
    model.train()
    chain = model.get_submodule("0.parametrizations.weight")
    whole = _latent(model, "0.weight").detach()
    chain.original = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    with pytest.raises(
        InvalidInput, match=r"^0.weight: 2 parts of axis 0 \(34\) would be empty or"
    ):
        model(torch.zeros(1, 32))
    square = init_device_mesh("cpu", (2, 1))
    chain.original = nn.Parameter(distribute_tensor(whole, square, [Shard(1), Replicate()]))
    with pytest.raises(
        InvalidInput, match=r"^0.weight: a weight placed as \[.*use dkm_export.shard"
    ):
        model(torch.zeros(1, 32))


def _not_finite_on_one_rank(mesh: DeviceMesh) -> None:
    model = _prepared("unrolled")
    shard(model, mesh)
    if mesh.get_rank() == 1:
        latent = _latent(model, "fours.weight")
        assert isinstance(latent, DTensor)
        with torch.no_grad():
            latent.to_local()[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"^fours.weight: weights are not finite \(step 1\)"):
        model(torch.zeros(1, 4, 10, 10))


def _whole_weights_under_fsdp(mesh: DeviceMesh) -> None:
    """FSDP2 hands over whole weights, which it changes behind their version counters."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(16, 32), torch.randn(16, 8)
    for model in models:
        prepare(model, CompressionSpec(rules=(LayerRule(bits=2, dim=2),), small_layer_size=0))
    fully_shard(models[1], mesh=mesh)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model.train()(x), y).backward()
            optimizer.step()
    for ours, alone in zip(*(_layers(model).values() for model in models), strict=True):
        assert (int(ours.steps), int(alone.steps)) == (3, 3)
        torch.testing.assert_close(ours.centroids, alone.centroids, rtol=0, atol=1e-5)


def on_each_rank() -> None:
    """Everything that needs two processes, which take longer to start than to do it."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    _same_as_alone(mesh, "unrolled", foreach=True)
    _same_as_alone(mesh, "implicit", foreach=False)
    _wrong_placements(mesh)
    _not_finite_on_one_rank(mesh)
    _whole_weights_under_fsdp(mesh)
    dist.destroy_process_group()


def _launch(call: str, *arguments: object) -> None:
    """Call a function of this module in two processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = f"import sys; from tests.test_sharding import {call} as call; call(*sys.argv[1:])"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        pytest.fail("\n".join(errors))


def test_two_processes_do_what_one_does() -> None:
    _launch("on_each_rank")


@pytest.mark.parametrize(
    ("layout", "axis"),
    [
        (Layout((64, 32), dim=4), 0),
        (Layout((32, 64), dim=4), 1),
        (Layout((64, 32), dim=4, groups=2), 1),
        (Layout((66, 30), dim=4), 1),  # two halves of axis 0 would split a vector
        (Layout((33, 2), dim=1), 0),
        (Layout((9, 1, 3, 3), dim=4), 2),
        (Layout((1, 1)), None),
        (Layout((4, 1), dim=4), None),
    ],
)
def test_weights_are_cut_between_their_vectors(layout: Layout, axis: int | None) -> None:
    assert cut_axis(layout, 2) == axis
