"""A prepared model in training loops as people write them: nothing about those has to change."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dkm_export.clustering import Gradient, initial_centroids, soft_cluster
from dkm_export.compress import prepare
from dkm_export.errors import InvalidInput
from dkm_export.parametrization import DkmSettings, DkmWeight
from dkm_export.spec import CompressionSpec, LayerRule

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
Forward = Callable[[nn.Module, Tensor], Tensor]


def _model(settings: DkmSettings | None = None, dim: int = 1) -> nn.Sequential:
    """A layer that is called twice in one forward pass, and one that is called once."""
    torch.manual_seed(0)
    again = nn.Linear(32, 32)
    model = nn.Sequential(again, nn.Tanh(), again, nn.Tanh(), nn.Linear(32, 16))
    spec = CompressionSpec(rules=(LayerRule(bits=2, dim=dim),), small_layer_size=0)
    prepare(model, spec, settings)
    return model.train()


def _first(model: nn.Sequential) -> Tensor:
    """The weight as the first layer sees it."""
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight


def _dkm(model: nn.Module) -> list[DkmWeight]:
    return [part for part in model.modules() if isinstance(part, DkmWeight)]


def _gradients(model: nn.Module, forward: Forward = lambda model, x: model(x)) -> dict[str, Tensor]:
    model.zero_grad()
    forward(model, X).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(name.endswith("weight.original") for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_layer_called_twice_is_clustered_once() -> None:
    model = _model()
    seen = []
    handle = model[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    _gradients(model)
    handle.remove()
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert [int(dkm.steps) for dkm in _dkm(model)] == [1, 1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_compute_the_same(backend: str) -> None:
    model = _model()
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, backend=backend)
    for _ in range(2):
        found = _gradients(compiled_model, lambda _, x: compiled(x))
        _assert_equal(found, _gradients(model))
        for own in (model, compiled_model):
            torch.optim.SGD(own.parameters(), lr=0.1).step()
    model.eval()
    compiled_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_activation_checkpointing(reentrant: bool, inner: bool) -> None:
    model = _model()
    checkpointed = copy.deepcopy(model)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(model, nn.Sequential)
        parts = list(model) if inner else [model]
        x = x.clone().requires_grad_()
        for part in parts:
            x = checkpoint(part, x, use_reentrant=reentrant)
        return x

    _assert_equal(_gradients(checkpointed, forward), _gradients(model))
    assert [int(dkm.steps) for dkm in _dkm(checkpointed)] == [1, 1]


def test_gradient_accumulation() -> None:
    model = _model()
    whole = _gradients(model)
    centroids = [dkm.centroids.clone() for dkm in _dkm(model)]
    model.zero_grad()
    weights = []
    for half in X.chunk(2):
        model(half).square().sum().backward()
        weights.append(_first(model).detach())
    assert torch.equal(*weights)
    _assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)
    for dkm, before in zip(_dkm(model), centroids, strict=True):
        assert dkm.steps == 1
        assert torch.equal(dkm.centroids, before)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(_first(model).detach(), weights[0])
    assert _dkm(model)[0].steps == 2


def test_a_copy_goes_its_own_way() -> None:
    model = _model()
    loss = model(X).square().sum()
    twin = copy.deepcopy(model)
    before = [dkm.centroids.clone() for dkm in _dkm(model)]
    _gradients(twin)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    twin(X)
    assert all(map(torch.equal, before, (dkm.centroids for dkm in _dkm(model))))
    loss.backward()
    _assert_equal(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        _gradients(_model()),
    )


def test_autocast() -> None:
    model = _model()
    plain = _gradients(model)
    soft = _first(model).detach()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    mixed = _gradients(model, forward)
    assert torch.equal(_first(model), soft)  # clustering itself stays exact
    for name, tensor in plain.items():
        assert mixed[name].dtype == torch.float32
        assert (mixed[name] - tensor).norm() < 0.05 * tensor.norm(), name


def test_the_gradient_of_the_settings_is_used() -> None:
    kinds: tuple[Gradient, ...] = ("unrolled", "implicit", "jacobian-free")
    settings = [DkmSettings(tau=1.0, iterations=2, gradient=kind) for kind in kinds]
    name = "0.parametrizations.weight.original"
    unrolled, implicit, free = (_gradients(_model(each, dim=2))[name] for each in settings)
    for one, other in ((unrolled, implicit), (unrolled, free), (implicit, free)):
        assert (one - other).norm() > 1e-3 * unrolled.norm()


def test_weights_that_stop_being_finite_are_named() -> None:
    model = _model()
    for _ in range(2):
        _gradients(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        model.get_parameter("4.parametrizations.weight.original")[3, 5] = torch.nan
    with pytest.raises(InvalidInput, match=r"^4.weight: weights are not finite \(step 3\): the"):
        model(X)


def _kept(iterations: int, n: int, dim: int) -> int:
    """Bytes of all tensors that are alive between the forward and the backward pass."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, n, dim, generator=generator)
    start = initial_centroids(vectors, 16, seed=0)
    vectors.requires_grad_()
    tau = torch.full((1, 1, 1), 0.01, dtype=torch.float64)
    gc.collect()
    # boxes, because what autograd keeps for itself is not seen from here
    with saved_tensors_hooks(lambda tensor: [tensor], lambda box: box[0]):
        clusters = soft_cluster(vectors, start, tau, iterations)
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
    assert clusters.vectors.requires_grad
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("n", "dim"), [(9_000, 1), (40_000, 1), (10_000, 4)])
def test_memory_does_not_grow_with_iterations(n: int, dim: int) -> None:
    # up to 8 iterations, few weights are clustered in another way (few.py)
    short, long = (_kept(iterations, n, dim) for iterations in (9, 30))
    assert short > 4 * n * dim
    assert long - short < 4 * n * dim  # 21 iterations more, and not one number per weight


def test_two_forward_passes_before_two_backward_passes() -> None:
    """As with any layer, each loss has a graph of its own."""
    model, x = nn.Linear(32, 32), torch.randn(4, 32)
    prepare(model, CompressionSpec(rules=(LayerRule(bits=2),), small_layer_size=0))
    model.train()
    first, second = model(x).square().sum(), model(2 * x).square().sum()
    first.backward()
    second.backward()
    latent = model.get_parameter("parametrizations.weight.original")
    assert latent.grad is not None
    separate, latent.grad = latent.grad, None
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    torch.testing.assert_close(latent.grad, separate)
