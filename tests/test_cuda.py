"""The same on a GPU. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dkm_export.clustering import inertia, initial_centroids, soft_cluster
from dkm_export.compress import finalize, prepare
from dkm_export.palettized import InputSpec, ModelSource
from dkm_export.parametrization import DkmWeight
from dkm_export.spec import CompressionSpec, LayerRule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SOURCE = ModelSource(
    name="lines", factory="tests.test_cuda:_lines", inputs=(InputSpec(name="x", shape=(1, 64)),)
)


def _lines() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 320), nn.Tanh(), nn.Linear(320, 64))


def _error(found: Tensor, expected: Tensor) -> float:
    exact = expected.double()
    return float((found.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("n", "dim", "dtype"),
    [
        (5_000, 1, torch.float32),  # every weight is a value
        (60_000, 1, torch.float32),  # values on a grid
        (60_000, 1, torch.bfloat16),  # values are codes
        (20_000, 4, torch.float32),
    ],
)
def test_clustering_is_the_cpu_s(n: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, n, dim, generator=generator).to(dtype)
    start = initial_centroids(vectors, 16, seed=0)
    tau = (inertia(vectors, start) / n)[:, None, None]
    cotangent = torch.randn(vectors.shape, generator=generator).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        weights = vectors.to(device).requires_grad_()
        clusters = soft_cluster(weights, start.to(device), tau.to(device), 3)
        clusters.vectors.backward(cotangent.to(device))
        assert weights.grad is not None
        results.append((clusters.vectors.detach(), clusters.centroids, weights.grad))
    for expected, found in zip(*results, strict=True):
        assert found.device.type == "cuda"
        # results of 16 bits are rounded to those
        assert _error(found, expected) < (1e-4 if found.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(1, torch.float32), (4, torch.float32), (1, torch.bfloat16)]
)
def test_a_prepared_model_trains(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rules = (LayerRule(bits=3, dim=dim),)
    model = _lines().to("cuda", dtype)
    prepare(model, CompressionSpec(rules=rules, small_layer_size=0))
    before = copy.deepcopy(finalize(model, SOURCE).palettes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(8, 64, device="cuda", dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).float().square().mean().backward()
        optimizer.step()
    layers = [part for part in model.modules() if isinstance(part, DkmWeight)]
    assert [(int(dkm.steps), dkm.centroids.device.type) for dkm in layers] == [(2, "cuda")] * 2
    palettized = finalize(model, SOURCE)
    for name, palette in palettized.palettes.items():
        assert palette.difference(before[name]) is not None
    with torch.no_grad():
        expected = model.eval().float()(x.float()).cpu()
        found = palettized.build()(x.float().cpu())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
