"""How far an output is from the reference, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, FiniteFloat, WithJsonSchema, model_validator

from dkm_export.checking.runtime import NumericClass
from dkm_export.spec import Frozen

FloatArray = npt.NDArray[np.float64]
NotNegative = Annotated[FiniteFloat, Field(ge=0, strict=True)]
# JSON has no infinity: pydantic writes null, which is read as infinity again
Measured = Annotated[
    float,
    BeforeValidator(lambda value: np.inf if value is None else value),
    WithJsonSchema({"type": ["number", "null"]}, mode="serialization"),
]
_Error = Annotated[
    Measured,
    Field(ge=0),
    WithJsonSchema({"type": ["number", "null"], "minimum": 0}, mode="serialization"),
]
_Count = Annotated[int, Field(ge=0, lt=2**63)]

LimitName = Literal["relative_l2", "rtol", "atol", "sqnr_db"]
BUILT_IN = "built-in"


class Limits(Frozen):
    """What an output may differ by.

    Attributes:
        relative_l2: norm of the error over norm of the reference.
        rtol: allowed error of an element, relative to its reference.
        atol: added to that, relative to the largest reference of the output or row.
        sqnr_db: least signal to error ratio, in dB.
        sources: what set each of them: ``built-in``, or the name of a file.
    """

    relative_l2: NotNegative
    rtol: NotNegative
    atol: NotNegative
    sqnr_db: FiniteFloat
    sources: dict[LimitName, str] = Field(
        default_factory=lambda: dict.fromkeys(get_args(LimitName), BUILT_IN)
    )

    def tolerance(self, reference: FloatArray, axis: int | None = None) -> FloatArray:
        """Largest allowed absolute error of each element; the largest is taken along ``axis``."""
        magnitude = np.abs(reference)
        allowed: FloatArray = (
            self.atol * magnitude.max(axis, keepdims=True, initial=0.0) + self.rtol * magnitude
        )
        return allowed

    def set_by(self, *names: LimitName) -> str:
        """Where these limits come from, in brackets, unless they are the built-in ones."""
        sources = sorted({self.sources[name] for name in names} - {BUILT_IN})
        return f" ({', '.join(sources)})" if sources else ""


LIMITS = {
    NumericClass.FP32: Limits(relative_l2=1e-5, rtol=1e-4, atol=1e-5, sqnr_db=100),
    # What rounding to 11 bits does to networks of up to a hundred layers, ours in the tests.
    NumericClass.FP16_STORED: Limits(relative_l2=5e-3, rtol=1e-2, atol=5e-3, sqnr_db=46),
    # A placeholder until measured on devices; float16 weights alone stay well within it.
    NumericClass.FP16: Limits(relative_l2=1e-2, rtol=1e-2, atol=5e-3, sqnr_db=40),
}


class Fidelity(Frozen):
    """Differences of one output from its reference, computed in float64.

    Attributes:
        max_abs: largest absolute error.
        relative_l2: norm of the error over norm of the reference.
        sqnr_db: signal to error ratio in dB; None when the output is exact.
        cosine: of output and reference, flattened; 0 when it is not defined.
        outside: elements beyond `Limits.tolerance`.
        nonfinite: elements that are NaN or infinite, here or in the reference.
    """

    max_abs: _Error
    relative_l2: _Error
    sqnr_db: float | None
    cosine: float
    outside: _Count
    nonfinite: _Count

    @model_validator(mode="before")
    @classmethod
    def _infinite_in_json(cls, data: Any) -> Any:
        """An infinite error is null in JSON, and then so is its SQNR, which must not mean exact."""
        if isinstance(data, dict) and data.get("relative_l2", 0) is None:
            return data | {"sqnr_db": -np.inf}
        return data


def compare(reference: npt.NDArray[Any], output: npt.NDArray[Any], limits: Limits) -> Fidelity:
    """Measure ``output`` against ``reference``, two arrays of the same shape."""
    expected, actual = reference.astype(np.float64), output.astype(np.float64)
    nonfinite = int((~np.isfinite(actual) | ~np.isfinite(expected)).sum())
    if nonfinite:
        return Fidelity(
            max_abs=np.inf,
            relative_l2=np.inf,
            sqnr_db=-np.inf,
            cosine=0.0,
            outside=nonfinite,
            nonfinite=nonfinite,
        )
    error = actual - expected
    signal, noise = float(np.linalg.norm(expected)), float(np.linalg.norm(error))
    # a norm of 0, or one beyond float64, has no ratio
    relative = noise / signal if 0 < signal < np.inf else (np.inf if noise else 0.0)
    norms = signal * float(np.linalg.norm(actual))
    return Fidelity(
        max_abs=float(np.abs(error).max(initial=0.0)),
        relative_l2=relative,
        sqnr_db=float(-20 * np.log10(relative)) if relative else None,
        cosine=float(np.vdot(expected, actual)) / norms if 0 < norms < np.inf else 0.0,
        outside=int((np.abs(error) > limits.tolerance(expected)).sum()),
        nonfinite=nonfinite,
    )


def violations(fidelity: Fidelity, limits: Limits) -> list[str]:
    """Which limits a measurement breaks, each with its figure and its limit."""
    found = []
    if fidelity.nonfinite:
        found.append(f"{fidelity.nonfinite} elements are NaN or infinite")
    if not fidelity.relative_l2 <= limits.relative_l2:
        found.append(
            f"relative L2 {fidelity.relative_l2:.2e} exceeds {limits.relative_l2:g}"
            + limits.set_by("relative_l2")
        )
    if fidelity.outside:
        found.append(
            f"{fidelity.outside} elements differ by more than "
            f"{limits.rtol:g} relative + {limits.atol:g} of the largest"
            + limits.set_by("rtol", "atol")
        )
    if fidelity.sqnr_db is not None and not fidelity.sqnr_db >= limits.sqnr_db:
        found.append(
            f"SQNR {fidelity.sqnr_db:.1f} dB is below {limits.sqnr_db:g} dB"
            + limits.set_by("sqnr_db")
        )
    return found


@dataclass(frozen=True)
class Agreement:
    """Predictions (argmax of each row) that differ from the reference's.

    Attributes:
        differing: rows that differ although the reference's margin exceeds the tolerance.
        ties: rows that differ where the reference's margin is within it.
    """

    differing: int
    ties: int


def agreement(
    reference: npt.NDArray[Any], output: npt.NDArray[Any], limits: Limits
) -> Agreement | None:
    """Compare predictions; None when the output is not ``[rows, classes]``."""
    if reference.ndim != 2 or reference.shape[1] < 2:
        return None
    expected = reference.astype(np.float64)
    rows = np.arange(len(expected))
    chosen, other = expected.argmax(1), output.argmax(1)
    differs = (chosen != other) | ~np.isfinite(output).all(1)
    margin = expected[rows, chosen] - expected[rows, other]
    # Both candidates may move by their tolerance, towards each other.
    tolerance = limits.tolerance(expected, axis=1)
    tie = np.isfinite(output).all(1) & (margin <= tolerance[rows, chosen] + tolerance[rows, other])
    return Agreement(differing=int((differs & ~tie).sum()), ties=int((differs & tie).sum()))


def sensitivity(stacked: npt.NDArray[Any]) -> float:
    """How much of an output depends on the sample: norm around the mean over the whole norm."""
    values = stacked.astype(np.float64)
    norm = float(np.linalg.norm(values))
    return float(np.linalg.norm(values - values.mean(0))) / norm if norm else 0.0
