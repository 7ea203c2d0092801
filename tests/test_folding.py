from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dkm_export.compress import finalize, prepare
from dkm_export.errors import DkmWarning, InvalidInput, Unsupported
from dkm_export.folding import fold_batch_norm, fold_before_training, fold_like
from dkm_export.palette import Layout, Palette
from dkm_export.palettized import BatchNorm, ModelSource
from dkm_export.spec import CompressionSpec, LayerRule
from tests.zoo import IMAGE, Convolutions, convolutions


def _norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _randomize(module: nn.Module) -> nn.Module:
    """`zoo.lively`, for batch norms without parameters or statistics as well."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0.2, 0.5, generator=generator)
    return module.eval()


def _palettize(module: nn.Module) -> dict[str, Palette]:
    """Give every layer of ``module`` a 3-bit palette of random values as its weight."""
    random, palettes = np.random.default_rng(0), {}
    for name, weight in module.named_parameters():
        if not name.endswith(".weight") or weight.dim() == 1:
            continue
        layout = Layout(tuple(weight.shape))
        lut = random.normal(size=(1, 8, 1)).astype(np.float16)
        indices = random.integers(0, 8, layout.index_shape, dtype=np.uint8)
        palettes[name] = Palette(3, layout, lut, indices)
        weight.data = torch.from_numpy(palettes[name].dense()).to(weight.dtype)
    return palettes


def _check(module: nn.Module, *shape: int, folds: int, dtype: torch.dtype = torch.float32) -> None:
    """Fold, and compare outputs, palettes and weights with those before."""
    _randomize(module).to(dtype)
    palettes = _palettize(module)
    inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)
    norms, state = _norms(module), copy.deepcopy(module.state_dict())
    with torch.no_grad():
        expected = module(*inputs)
        folded = fold_batch_norm(module, palettes, inputs)
        actual = module(*inputs)
        traced = torch.export.export(module, inputs).module()(*inputs)
    assert norms - _norms(module) == folds
    assert expected.dtype == actual.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) <= (1e-6 if folds else 0)
    assert torch.equal(traced, actual)
    assert folded.keys() == palettes.keys()
    assert sum(palette.scale is not None for palette in folded.values()) == folds
    for name, palette in palettes.items():
        assert folded[name].lut is palette.lut
        assert folded[name].indices is palette.indices
        weight = module.get_parameter(name).detach()
        dense = torch.from_numpy(folded[name].dense()).to(dtype)
        # Bits, not values: -0.0 equals 0.0.
        assert torch.equal(weight.view(torch.uint8), dense.view(torch.uint8))
    if not folds:
        after = module.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda bias: nn.Conv1d(3, 6, 3, bias=bias), nn.BatchNorm1d, (2, 3, 9)),
        (lambda bias: nn.Conv2d(3, 6, 3, stride=2, bias=bias), nn.BatchNorm2d, (2, 3, 9, 9)),
        (lambda bias: nn.Conv3d(3, 6, 3, bias=bias), nn.BatchNorm3d, (2, 3, 5, 5, 5)),
        (lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias), nn.BatchNorm2d, (2, 4, 7, 7)),
        (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 7, 7)),
        (lambda bias: nn.ConvTranspose1d(3, 6, 3, bias=bias), nn.BatchNorm1d, (2, 3, 9)),
        (lambda bias: nn.ConvTranspose2d(3, 6, 3, 2, bias=bias), nn.BatchNorm2d, (2, 3, 5, 5)),
        (lambda bias: nn.ConvTranspose3d(3, 6, 3, bias=bias), nn.BatchNorm3d, (2, 3, 3, 3, 3)),
        (lambda bias: nn.Linear(5, 6, bias=bias), nn.BatchNorm1d, (4, 5)),
    ],
    ids=["1d", "2d", "3d", "depthwise", "grouped", "up1d", "up2d", "up3d", "linear"],
)
def test_layer_and_norm_become_one(
    layer: Callable[[bool], nn.Module],
    norm: type[nn.BatchNorm2d],
    shape: tuple[int, ...],
    affine: bool,
    bias: bool,
) -> None:
    module = layer(bias)
    channels = getattr(module, "out_channels", 6)
    _check(nn.Sequential(module, norm(channels, affine=affine)), *shape, folds=1)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("width", [3, 4])
def test_padding_same(width: int, padding_mode: Literal["zeros", "circular"]) -> None:
    conv = nn.Conv2d(3, 6, width, padding="same", padding_mode=padding_mode)
    _check(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(inplace=True)), 2, 3, 8, 8, folds=1)


def test_a_norm_without_a_bias_folds() -> None:
    norm = nn.BatchNorm2d(6)
    norm.register_parameter("bias", None)
    _check(nn.Sequential(nn.Conv2d(3, 6, 3), norm), 2, 3, 8, 8, folds=1)


def test_several_norms_in_nested_modules_fold() -> None:
    def block(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    _check(nn.Sequential(block(3), nn.ModuleDict({"a": block(4)})["a"]), 2, 3, 9, 9, folds=2)


def test_only_palettized_layers_get_a_scale() -> None:
    module = _randomize(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    assert fold_batch_norm(module, {}, (torch.randn(2, 3, 8, 8),)) == {}
    assert _norms(module) == 0


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        # Axis 1 is the batch norm's, and here as long as the channel axis, but not that axis.
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 6, 5)),
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (3, 8)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6), (3, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.BatchNorm2d(6), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten()), nn.BatchNorm1d(6), (2, 3, 1, 1)),
    ],
    ids=[
        "linear-3d",
        "unbatched-1d",
        "unbatched-2d",
        "grouped-transposed",
        "instance-norm",
        "no-statistics",
        "relu-between",
        "flatten-between",
    ],
)
def test_other_sequences_stay(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    module = nn.Sequential(layer, norm)
    _check(module, *shape, folds=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    _check(module, 2, 3, 8, 8, folds=0, dtype=dtype)


class _DropsBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class _NormAct(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


class _Net(nn.Module):
    """A convolution and its batch norm, in ``forward`` as in the simplest case."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=bias)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class _BiasUsedElsewhere(_Net):
    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return super().forward(x) + self.conv.bias.sum()


class _WeightUsedElsewhere(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv.weight.sum()


class _NormWeightUsedElsewhere(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bn.weight.sum()


class _StatisticsUsedElsewhere(_Net):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bn.running_var is not None
        return super().forward(x) * self.bn.running_var.sum()


class _OutputUsedElsewhere(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z: Tensor = self.bn(y) + y.mean()
        return z


class _ConvTwice(_Net):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.conv(x)) + self.conv(x.flip(-1))
        return z


class _NormTwice(_Net):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.conv(x)) + self.bn(x.repeat(1, 2, 1, 1)).mean()
        return z


class _OwnKernel(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(6, 3, 3, 3))
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(F.conv2d(x, self.kernel))
        return y


class _OwnWeight(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 3, 3, 3))
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(F.conv2d(x, self.weight))
        return y


class _FunctionalConv(_Net):
    """Takes all tensors of a layer that has no bias, but would not take a new bias."""

    def __init__(self) -> None:
        super().__init__(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(F.conv2d(x, self.conv.weight))
        return y


class _FunctionalNorm(_Net):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


class _BorrowedStatistics(_Net):
    """Plain tensors on a module that is no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.Module()
        self.statistics.register_buffer("running_mean", torch.linspace(-1, 1, 6))
        self.statistics.register_buffer("running_var", torch.linspace(1, 2, 6))
        del self.bn

    def forward(self, x: Tensor) -> Tensor:
        mean = self.statistics.get_buffer("running_mean")
        return F.batch_norm(self.conv(x), mean, self.statistics.get_buffer("running_var"))


class _WrongBias(_Net):
    """The convolution of one module with the bias of another."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(F.conv2d(x, self.conv.weight, self.other.bias))
        return y


class _TwoNames(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.also_conv, self.also_bn = self.conv, self.bn


class _TwoNamesTwice(_TwoNames):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.conv(x)) + self.also_bn(self.also_conv(x.flip(-1)))
        return z


class _TiedWeight(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Conv2d(3, 6, 3)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = super().forward(x) + self.tied(x)
        return z


class _WeightIsBuffer(_Net):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(2))
        del self.conv.weight
        self.conv.register_buffer("weight", weight)


def _drops_bias() -> nn.Module:
    return nn.Sequential(_DropsBias(3, 6, 3, bias=True), nn.BatchNorm2d(6))


def _drops_no_bias() -> nn.Module:
    return nn.Sequential(_DropsBias(3, 6, 3, bias=False), nn.BatchNorm2d(6))


def _norm_with_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), _NormAct(6))


def _synchronized() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6))


def _parametrized() -> nn.Module:
    module = _Net()
    parametrizations.weight_norm(module.conv)
    return module


def _parametrized_bias() -> nn.Module:
    module = _Net()
    parametrize.register_parametrization(module.conv, "bias", nn.Softplus())
    return module


def _hook_on_the_norm() -> nn.Module:
    module = _Net()
    module.bn.register_forward_hook(lambda part, args, output: torch.relu(output))
    return module


def _hook_before_the_norm() -> nn.Module:
    module = _Net()
    module.bn.register_forward_pre_hook(lambda part, args: args)
    return module


def _other_forward() -> nn.Module:
    module = _Net(bias=False)
    conv = module.conv
    vars(conv)["forward"] = lambda x: F.conv2d(x, conv.weight)
    return module


@pytest.mark.parametrize(
    "factory",
    [
        _drops_bias,
        _drops_no_bias,
        _norm_with_activation,
        _synchronized,
        _parametrized,
        _parametrized_bias,
        _hook_on_the_norm,
        _hook_before_the_norm,
        _other_forward,
        _BiasUsedElsewhere,
        _WeightUsedElsewhere,
        _NormWeightUsedElsewhere,
        _StatisticsUsedElsewhere,
        _OutputUsedElsewhere,
        _ConvTwice,
        _NormTwice,
        _OwnKernel,
        _OwnWeight,
        _FunctionalConv,
        _FunctionalNorm,
        _BorrowedStatistics,
        _WrongBias,
        _TwoNames,
        _TwoNamesTwice,
        _TiedWeight,
        _WeightIsBuffer,
    ],
)
def test_whatever_else_uses_or_changes_a_part_of_the_pair_stays(
    factory: Callable[[], nn.Module],
) -> None:
    _check(factory(), 2, 3, 8, 8, folds=0)


class _ReadsTheNorm(_Net):
    """Reaches its batch norm through a list, and reads its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = (self.conv, self.bn)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        norm = self.parts[1]
        assert norm.weight.shape == (6,)
        return x.to(norm.weight.dtype).reshape(-1, norm.num_features)


def test_the_model_s_code_may_still_look_at_a_folded_norm() -> None:
    _check(_ReadsTheNorm(), 2, 3, 8, 8, folds=1)


def test_a_folded_norm_leaves_nothing_behind_that_a_target_would_store() -> None:
    module = _randomize(_Net())
    fold_batch_norm(module, {}, (torch.randn(2, 3, 8, 8),))
    assert type(module.bn) is nn.Identity
    assert module.state_dict().keys() == {"conv.weight", "conv.bias"}


def test_a_norm_in_training_mode_stays() -> None:
    module = _randomize(_Net())
    module.get_submodule("bn").train()
    assert fold_batch_norm(module, {}, (torch.randn(2, 3, 8, 8),)) == {}
    assert _norms(module) == 1


class _Untraceable(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)


def test_a_model_that_cannot_be_traced_is_unsupported_in_one_line() -> None:
    with pytest.raises(
        Unsupported, match=r"^torch\.export cannot trace the model: .*; rewrite"
    ) as e:
        fold_batch_norm(_randomize(_Untraceable()), {}, (torch.randn(2, 3, 8, 8),))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("training", [False, True])
def test_before_training_outputs_stay_and_weights_train_on(training: bool) -> None:
    module = convolutions()
    inputs = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)
    expected = module(*inputs)
    module.train(training)
    module.get_submodule("stem").eval()
    fold_before_training(module, inputs)
    assert _norms(module) == 0
    assert (module.training, module.get_submodule("stem.0").training) == (training, False)
    actual = module.eval()(*inputs)
    error = (actual - expected).norm() / expected.norm()
    assert error.item() <= 1e-6
    actual.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


def test_a_frozen_layer_stays_frozen() -> None:
    module = _Net()
    module.conv.weight.requires_grad_(False)
    fold_before_training(module, (torch.randn(2, 3, 8, 8),))
    assert not any(parameter.requires_grad for parameter in module.parameters())


def _partly() -> nn.Module:
    """The second batch norm follows an activation, the third has no statistics."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6, track_running_stats=False)),
        nn.Conv2d(6, 6, 1, bias=False),
    )


@pytest.mark.parametrize(
    ("factory", "shape", "others"),
    [
        (Convolutions, (1, 3, 16, 16), []),
        (_partly, (2, 3, 8, 8), ["3", "5"]),
    ],
)
def test_a_folded_state_fits_the_factory_s_model_again(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], others: list[str]
) -> None:
    module, inputs = _randomize(factory()), (torch.randn(shape),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DkmWarning)
        fold_before_training(module, inputs)
    said = [str(warning.message) for warning in caught]
    expected = f"batch norm stays separate in {', '.join(others)}: only one that directly follows"
    assert [message[: len(expected)] for message in said] == [expected] * bool(others)
    again = factory()
    fold_like(again, module.state_dict())
    again.load_state_dict(module.state_dict())
    assert _norms(again) == _norms(module) == len(others)
    assert torch.equal(again.eval()(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3)), "it has none"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "that in 1 does not"),
        (_NormTwice(), "that in bn does not"),
        (_FunctionalNorm(), "that in _FunctionalNorm does not"),
    ],
)
def test_nothing_to_fold_is_an_error(module: nn.Module, found: str) -> None:
    with pytest.raises(
        InvalidInput, match=rf"^batch_norm = 'fold-before-training' needs .*: {found}: set it to"
    ):
        fold_before_training(module, (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize(
    ("folded", "batch_norm", "message"),
    [
        (True, "separate", "batch norm stem.1 was folded .* batch_norm='fold-before-training'"),
        (False, "fold-before-training", "no batch norm .* call fold_before_training"),
    ],
)
def test_the_source_says_what_was_done(folded: bool, batch_norm: BatchNorm, message: str) -> None:
    module = convolutions()
    source = ModelSource(
        name="net", factory="tests.zoo:convolutions", inputs=IMAGE, batch_norm=batch_norm
    )
    if folded:
        fold_before_training(module, source.example_inputs())
    prepare(module, CompressionSpec(rules=(LayerRule(bits=4),)))
    with pytest.raises(InvalidInput, match=message):
        finalize(module, source)
