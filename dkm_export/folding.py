"""Fold batch norm into the layer before it, without touching a palette.

A target's own fold multiplies the dense weight by a factor per channel, which turns 16 distinct
values into thousands. There are two ways around that: fold before there are palettes, which are
then those of folded weights; or let the factor become the palette's ``scale``.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from dkm_export.errors import DkmWarning, InvalidInput, Unsupported
from dkm_export.palette import Palette

_OUTPUT_AXIS: Final[Mapping[type[nn.Module], int]] = {
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    nn.Linear: 0,
}
"""Where the output channel stands in the weight of each layer that can absorb a batch norm.

Types are compared exactly, here and below: a subclass may compute anything.
"""
_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Folds:
    """Which batch norms of a module can be folded.

    Attributes:
        pairs: paths of each layer and of the batch norm that can become a part of it.
        others: paths of the modules whose batch norm has to stay.
    """

    pairs: Sequence[tuple[str, str]] = ()
    others: Sequence[str] = ()

    def warn_of_others(self) -> None:
        """Say which batch norms stay, if any."""
        if self.others:
            warnings.warn(
                f"batch norm stays separate in {_listed(self.others)}: only one that directly "
                "follows a layer, with nothing else in between or attached, can be folded",
                DkmWarning,
                stacklevel=2,
            )


def fold_before_training(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fold batch norms, in place, before `prepare` makes palettes of the weights.

    In eval mode ``module`` computes what it did, up to rounding. Trained further, it takes no batch
    statistics any more. `finalize` then needs a source with ``batch_norm="fold-before-training"``.
    A warning names the batch norms that stay, for the reasons in `fold_batch_norm`.

    Args:
        module: trained, in train or eval mode, in float32.
        inputs: example inputs of ``forward``, where the module is: ``source.example_inputs()``.

    Raises:
        InvalidInput: when no batch norm can be folded.
        Unsupported: when torch.export cannot trace ``module``.
    """
    folds = find_folds(module, inputs)
    folds.warn_of_others()
    fold(module, folds)


def find_folds(module: nn.Module, inputs: tuple[Tensor, ...]) -> Folds:
    """What `fold_before_training` would fold; values of weights and statistics do not matter.

    Raises:
        InvalidInput: when no batch norm can be folded.
        Unsupported: when torch.export cannot trace ``module``.
    """
    with _evaluating(module):
        folds = _folds(module, inputs)
    if not folds.pairs:
        found = f"that in {_listed(folds.others)} does not" if folds.others else "it has none"
        raise InvalidInput(
            "batch_norm = 'fold-before-training' needs a batch norm in the model that directly "
            f"follows a convolution or linear layer: {found}: set it to 'separate'"
        )
    return folds


def fold(module: nn.Module, folds: Folds) -> dict[str, Tensor]:
    """Fold the pairs of ``folds`` in ``module``, in place, whatever mode it is in.

    Returns:
        What the weight of each of these layers was multiplied by, by parameter name.
    """
    with torch.no_grad():
        return {
            f"{layer}.weight": _absorb(module.get_submodule(layer), module.get_submodule(norm))
            for layer, norm in folds.pairs
        }


def fold_like(module: nn.Module, state: Container[str]) -> None:
    """Give a module as its factory made it the structure of a folded one, to load a state into.

    The state's keys decide: whatever could be folded was, and it has left no statistics.

    Args:
        module: not folded.
        state: keys of the state dict of the same model after `fold_before_training`.
    """
    for path, part in module.named_modules():
        if type(part) in _BATCH_NORMS:
            if part.running_mean is not None and f"{path}.running_mean" not in state:
                _become_identity(part)
        elif type(part) in _OUTPUT_AXIS and part.bias is None and f"{path}.bias" in state:
            weight = part.weight
            assert isinstance(weight, Tensor)
            channels = weight.shape[_OUTPUT_AXIS[type(part)]]
            part.bias = nn.Parameter(weight.new_zeros(channels))


def folded_norms(module: nn.Module) -> list[str]:
    """Paths of the batch norms of ``module`` that were folded."""
    return [
        path
        for path, part in module.named_modules()
        if type(part) is nn.Identity and "running_mean" in vars(part)
    ]


def fold_batch_norm(
    module: nn.Module,
    palettes: Mapping[str, Palette],
    inputs: tuple[Tensor, ...],
    ties: Mapping[str, str] = {},
) -> dict[str, Palette]:
    """Fold every float32 batch norm of ``module``, in place, that directly follows a layer.

    Afterwards the layer's weight is ``palette.dense()`` of the returned palette, and the batch
    norm is an ``nn.Identity``. A batch norm stays as it is where the fold could change a result:
    its input has another use, the layer or the batch norm is a subclass, has hooks or runs twice,
    or one of their tensors has another use.

    Args:
        module: in eval mode.
        palettes: the palettes of its weights, by parameter name.
        inputs: example inputs of ``forward``.
        ties: other names of these weights, each with its name in ``palettes``.

    Returns:
        ``palettes``, with ``scale`` set where a batch norm was folded in.

    Raises:
        Unsupported: when torch.export cannot trace ``module``.
    """
    folded = dict(palettes)
    for weight, scale in fold(module, _folds(module, inputs)).items():
        name = ties.get(weight, weight)
        if name in folded:
            folded[name] = replace(folded[name], scale=scale.numpy())
    return folded


def _absorb(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Fold ``norm`` into ``layer``; returns what the weight was multiplied by."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    factor, shift = _affine(norm)
    along = [1] * weight.dim()
    along[_OUTPUT_AXIS[type(layer)]] = -1
    scale = factor.reshape(along)
    bias = layer.bias * factor + shift if isinstance(layer.bias, Tensor) else shift
    layer.weight = nn.Parameter(weight * scale, weight.requires_grad)
    layer.bias = nn.Parameter(bias, weight.requires_grad)
    _become_identity(norm)
    return scale


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The batch norm in eval mode as ``factor * x + shift``."""
    assert isinstance(norm, _BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias


def _become_identity(norm: nn.Module) -> None:
    """Make the object itself an Identity, so that the model's code finds it, and its sizes.

    Its tensors become plain attributes, which no target stores.
    """
    tensors = {**norm._parameters, **norm._buffers}
    norm._parameters.clear()
    norm._buffers.clear()
    vars(norm).update(tensors)
    norm.__class__ = nn.Identity


def _folds(module: nn.Module, inputs: tuple[Tensor, ...]) -> Folds:
    program = _trace(module, inputs)
    modules = dict(module.named_modules())
    pairs, others = [], []
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before, training = node.args[0], node.args[5]
        layer, norm = _caller(before), _caller(node)
        if (
            not training
            and len(before.users) == 1
            # The second call of a module has a path of its own, ``conv@1``, that no module has.
            and _are_plain(modules.get(layer), modules.get(norm))
            and _takes_own_tensors(before, layer, modules[layer], program)
            and _takes_own_tensors(node, norm, modules[norm], program)
            and _channels_match(before.meta["val"], modules[layer])
        ):
            pairs.append((layer, norm))
        else:
            others.append(norm.partition("@")[0] or type(module).__name__)
    return Folds(pairs, list(dict.fromkeys(others)))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within it, ``module`` is in eval mode; afterwards each part is in its own again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _trace(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs)
    except Exception as error:  # tracing runs the model's own code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(
            f"torch.export cannot trace the model: {reason}; rewrite that part of it"
        ) from error


def _caller(node: fx.Node) -> str:
    """The path of the module whose ``forward`` contains ``node``; '' for the outermost one."""
    stack = node.meta.get("nn_module_stack")
    path: str = next(reversed(stack.values()))[0] if stack else ""
    return path


def _are_plain(layer: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether both are stock modules that do nothing besides their type's ``forward``."""
    return (
        type(layer) in _OUTPUT_AXIS
        and type(norm) in _BATCH_NORMS
        and not any(
            "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
            for part in (layer, norm)
            if part is not None
        )
    )


def _takes_own_tensors(node: fx.Node, path: str, part: nn.Module, program: ExportedProgram) -> bool:
    """Whether ``node`` takes exactly the tensors of ``part``, and nothing else takes them.

    They are float32: in float16 a fold would round where the batch norm does not.
    """
    parameters = program.graph_signature.inputs_to_parameters
    owners = {"weight": parameters, "bias": parameters}
    if isinstance(part, _BATCH_NORMS):
        buffers = program.graph_signature.inputs_to_buffers
        owners |= {"running_mean": buffers, "running_var": buffers}
    arguments = [*node.args[1:], None]  # a layer's operator leaves out a bias of None
    return all(
        (argument is None and getattr(part, attribute) is None)
        or (
            isinstance(argument, fx.Node)
            and names.get(argument.name) == f"{path}.{attribute}"
            and len(argument.users) == 1
            and argument.meta["val"].dtype == torch.float32
        )
        for (attribute, names), argument in zip(owners.items(), arguments, strict=False)
    )


def _channels_match(output: Tensor, layer: nn.Module) -> bool:
    """Whether axis 1 of ``output``, the batch norm's, is the output axis of the weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # An unbatched convolution, or a Linear over positions, has its channels on another axis; a
    # grouped transposed convolution has fewer in its weight.
    same_rank = output.dim() == weight.dim()
    return same_rank and output.shape[1] == weight.shape[_OUTPUT_AXIS[type(layer)]]
