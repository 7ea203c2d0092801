"""The file of sensitivities: written once, used again for other budgets, edited by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from dkm_export import __version__
from dkm_export.errors import InvalidInput
from dkm_export.files import staged
from dkm_export.planning.candidates import Candidate, Setting
from dkm_export.planning.sensitivity import (
    Calibration,
    Progress,
    can_be_measured,
    divergence_of_a_push,
    measured_errors,
    predicted_errors,
)
from dkm_export.spec import Frozen, Lut
from dkm_export.validation import explain

Method = Literal["gradients", "measured"]
_WORDS = {"gradients": "predicted from gradients", "measured": "measured"}

_FINER = 0.999
"""With more groups the centroids can be those of fewer groups: noise must not tell otherwise."""

_LARGEST = 1e30
NotNegative = Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]


class LayerErrors(Frozen):
    """Of one layer.

    Attributes:
        factor: multiplies all its errors; 1 until somebody knows better.
        axis: of the recipe's rule, along which its vectors lie.
        lut: of the recipe's rule.
        errors: by setting, as ``4/2``: the increase of the divergence from the float model.
    """

    factor: NotNegative = 1.0
    axis: int
    lut: Lut
    errors: dict[str, NotNegative]


class Sensitivities(Frozen):
    """The whole file.

    Attributes:
        method: how errors were found.
        fingerprint: of the weights and the calibration that they belong to.
        layers: by parameter name.
    """

    schema_version: Literal[1] = 1
    method: Method
    fingerprint: str
    layers: dict[str, LayerErrors]

    @property
    def origin(self) -> str:
        """How errors were found, in words."""
        return _WORDS[self.method]

    def error(self, layer: Candidate, setting: Setting | None) -> float:
        """Of a layer at a setting; a dense weight has none."""
        if setting is None:
            return 0.0
        entry = self.layers[layer.name]
        return entry.factor * entry.errors[str(setting)]


def sensitivities(
    calibration: Calibration,
    layers: Sequence[Candidate],
    method: Method | None,
    file: Path | None,
    known: Sensitivities | None,
    progress: Progress,
) -> Sensitivities:
    """The errors of all candidates: what is known of them, and the rest found and kept in ``file``.

    Args:
        calibration: what they are measured on.
        layers: the candidates.
        method: how errors are found where none are known; without one, see `can_be_measured`.
        file: where to keep them.
        known: what `read_sensitivities` read from there.
        progress: told after every step.

    Raises:
        InvalidInput: when what is known is of another model or calibration, or errors are not
            finite.
    """
    mark = _fingerprint(calibration)
    if known and known.fingerprint != mark:
        raise InvalidInput(
            f"{file}: its sensitivities are of another model, task, data or version of this "
            "program: name another file, or remove this one"
        )
    if known:
        method = known.method
    elif method is None:
        method = "measured" if can_be_measured(calibration, layers) else "gradients"
    entries = dict(known.layers) if known else {}
    wanted = []
    for layer in layers:
        new = LayerErrors(axis=layer.rule.axis, lut=layer.rule.lut, errors={})
        entry = entries.setdefault(layer.name, new)
        if (entry.axis, entry.lut) != (new.axis, new.lut):
            raise InvalidInput(
                f"{file}: its errors of {layer.name} are of axis {entry.axis} and lut "
                f"{entry.lut}, not {new.axis} and {new.lut}: remove that layer there"
            )
        wanted.append((layer, [x for x in layer.settings if x and str(x) not in entry.errors]))
    if any(settings for _, settings in wanted):
        find = predicted_errors if method == "gradients" else measured_errors
        for (name, setting), error in sorted(find(calibration, wanted, progress).items()):
            if not 0 <= error <= _LARGEST:
                raise InvalidInput(
                    f"{name}: its error at {setting} is {error}: the model's outputs, the task's "
                    "distillation or their gradients are not finite"
                )
            errors = {**entries[name].errors, str(setting): error}
            # sorted: settings with fewer groups came before
            coarser = (errors.get(str(x), inf) for x in setting.coarser())
            errors[str(setting)] = min(error, _FINER * min(coarser, default=inf))
            entries[name] = entries[name].model_copy(update={"errors": errors})
    found = Sensitivities(method=method, fingerprint=mark, layers=entries)
    if file and found != known:
        with staged(file, force=True) as path:
            path.write_text(found.model_dump_json(indent=2) + "\n")
    return found


def read_sensitivities(file: Path, method: Method | None) -> Sensitivities | None:
    """What the file has; None when there is none yet.

    Raises:
        InvalidInput: when the file is malformed, or its errors were found by another method.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}") from error
    try:
        found = Sensitivities.model_validate_json(content)
    except ValidationError as error:
        raise InvalidInput(f"{file}: {explain(error, Sensitivities)}") from error
    if method and found.method != method:
        raise InvalidInput(
            f"{file}: its errors are {found.origin}, not {_WORDS[method]}: name another "
            "file, or remove this one"
        )
    return found


def _fingerprint(calibration: Calibration) -> str:
    """Of all that the errors depend on.

    What the model and the divergence compute is told by rounded numbers, as machines differ.
    """
    behaviour = [*calibration.scales, divergence_of_a_push(calibration)]
    about = f"{__version__} {calibration.seed} {calibration.about}"
    digest = hashlib.sha256(" ".join([about, *(f"{x:.3g}" for x in behaviour)]).encode())
    tensors = [*calibration.model.state_dict().values(), *(calibration.importance or {}).values()]
    for tensor in (*tensors, *(tensor for batch in calibration.inputs for tensor in batch)):
        content = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{content.dtype} {list(tensor.shape)}".encode())
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
