"""The file of sensitivities: written once, used again for other budgets, edited by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from dkm_export.errors import InvalidInput
from dkm_export.files import staged
from dkm_export.planning.candidates import Candidate, Setting
from dkm_export.planning.sensitivity import (
    Calibration,
    Progress,
    measured_errors,
    predicted_errors,
)
from dkm_export.spec import Frozen
from dkm_export.validation import explain

Method = Literal["gradients", "measured"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerErrors(Frozen):
    """Of one layer.

    Attributes:
        importance: multiplies all its errors; 1 until somebody knows better.
        errors: by setting, as ``4/2``: the increase of the divergence from the float model.
    """

    importance: NotNegative = 1.0
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

    def error(self, layer: Candidate, setting: Setting | None) -> float:
        """Of a layer at a setting; a dense weight has none."""
        if setting is None:
            return 0.0
        entry = self.layers[layer.name]
        return entry.importance * entry.errors[str(setting)]


def sensitivities(
    calibration: Calibration,
    layers: Sequence[Candidate],
    method: Method,
    file: Path | None,
    progress: Progress,
) -> Sensitivities:
    """The errors of all candidates: from the file as far as it has them, else found and kept there.

    Raises:
        InvalidInput: when the file is malformed, or of another model, calibration or method.
    """
    mark = _fingerprint(calibration)
    known = _read(file, method, mark) if file else {}
    wanted = [
        (layer, [x for x in layer.settings if x and str(x) not in _errors(known, layer)])
        for layer in layers
    ]
    if any(settings for _, settings in wanted):
        find = predicted_errors if method == "gradients" else measured_errors
        for (name, setting), error in sorted(find(calibration, wanted, progress).items()):
            entry = known.get(name, LayerErrors(errors={}))
            errors = {**entry.errors, str(setting): error}
            known[name] = entry.model_copy(update={"errors": errors})
    found = Sensitivities(method=method, fingerprint=mark, layers=known)
    if file:
        with staged(file, force=True) as new:
            new.write_text(found.model_dump_json(indent=2) + "\n")
    return found


def _errors(known: dict[str, LayerErrors], layer: Candidate) -> dict[str, float]:
    return known[layer.name].errors if layer.name in known else {}


def _read(file: Path, method: Method, mark: str) -> dict[str, LayerErrors]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}") from error
    try:
        found = Sensitivities.model_validate_json(content)
    except ValidationError as error:
        raise InvalidInput(f"{file}: {explain(error, Sensitivities)}") from error
    if (found.method, found.fingerprint) != (method, mark):
        what = "found in another way" if found.method != method else "of other weights or inputs"
        raise InvalidInput(
            f"{file}: its sensitivities are {what}: name another file, or remove this one"
        )
    return dict(found.layers)


def _fingerprint(calibration: Calibration) -> str:
    """Of all that the errors depend on."""
    digest = hashlib.sha256(str(calibration.seed).encode())
    tensors = [*calibration.model.state_dict().values(), *(calibration.importance or {}).values()]
    for tensor in (*tensors, *(tensor for batch in calibration.inputs for tensor in batch)):
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
