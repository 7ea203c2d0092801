"""The onnx package's own evaluator: every operator as the standard describes it, in numpy."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.precision import numeric_class_of

if TYPE_CHECKING:
    import onnx
    from onnx.reference import ReferenceEvaluator

# What the checker says of a valid file that this version of onnx is too old for.
_TOO_NEW = ("No Op registered for", "is higher than the checker's")


class OnnxReferenceRuntime(Runtime):
    """Interprets ``.onnx`` files node by node: an implementation beside ONNX Runtime's."""

    name = "onnx-reference"
    target = "onnx"
    where = "interpreted by the onnx package in Python"
    packages = ("onnx",)
    only_named = "slow, hours for a large test split"

    def load(self, artifact: Path) -> _ReferenceSession:
        """Read a model, with the external data beside it, and prepare its nodes.

        Raises:
            Unsupported: for an operator or opset that this version of onnx does not have, or
                computes wrongly.
            InvalidInput: when the file is missing or malformed.
        """
        import onnx
        from onnx.reference import ReferenceEvaluator

        if not artifact.is_file():
            raise InvalidInput(f"{artifact}: there is no such file: export it again")
        try:
            onnx.checker.check_model(artifact)
            model = onnx.load(artifact, load_external_data=False)
            reason = _unsupported(model)
            if reason is None:
                # by path, from where it finds external data
                return _ReferenceSession(artifact, ReferenceEvaluator(str(artifact)))
        except NotImplementedError as error:
            reason = _line(error).partition(". ")[0]
        except Exception as error:  # the checker's own, protobuf's, and numpy's for bad values
            reason = _line(error)
            if not any(sign in reason for sign in _TOO_NEW):
                raise InvalidInput(f"{artifact}: {reason}: export it again") from error
        raise Unsupported(f"{artifact}: onnx {onnx.__version__} cannot run it: {reason}")

    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        """What every node gives, decoders included.

        Raises:
            Unsupported, InvalidInput: as `load` and the session do.
        """
        return self.load(artifact).intermediates(inputs)


class _ReferenceSession(Session):
    def __init__(self, artifact: Path, evaluator: ReferenceEvaluator) -> None:
        self.numeric_class = numeric_class_of(artifact)
        self._artifact = artifact
        self._evaluator = evaluator

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Evaluate all nodes, those that decode weights included.

        Raises:
            Unsupported: when the evaluator fails at a node, which is named.
            InvalidInput: when the inputs are not the model's.
        """
        results = self._evaluate(inputs)
        return [results[name] for name in self._evaluator.output_names]

    def intermediates(self, inputs: Arrays) -> list[tuple[str, npt.NDArray[Any]]]:
        """Evaluate all nodes, and show what each gives.

        Raises:
            Unsupported, InvalidInput: as `run` does.
        """
        return list(self._evaluate(inputs).items())

    def _evaluate(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        names = self._evaluator.input_names
        if set(names) != set(inputs):
            raise InvalidInput(
                f"{self._artifact}: takes the inputs {', '.join(names)}, "
                f"got {', '.join(inputs) or 'none'}"
            )
        try:
            results = self._evaluator.run(None, dict(inputs), intermediate=True)
        except Exception as error:  # whatever numpy raises in the middle of an operator
            raise Unsupported(
                f"{self._artifact}: onnx's evaluator fails{_place(error)}: {_line(error)}"
            ) from error
        assert isinstance(results, dict)
        return {name: np.asarray(value) for name, value in results.items() if value is not None}


def _unsupported(model: onnx.ModelProto) -> str | None:
    """What the evaluator would take and compute wrongly, or None."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            return f"opset {entry.version}, it knows those up to {newest}"
    for node in _nodes(model):
        # Up to onnx 1.23, a group's channels and bias are cut out at wrong places: mostly that
        # fails, but with one channel per group each gets the bias of the first.
        if node.op_type == "ConvTranspose" and any(
            attribute.name == "group" and attribute.i > 1 for attribute in node.attribute
        ):
            return f"its ConvTranspose is wrong with groups, as '{node.name}' has them"
    return None


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of the graph and of the model's functions."""
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _place(error: Exception) -> str:
    """The innermost node that was computed when ``error`` was raised, from the frames."""
    from onnx.reference.op_run import OpRun

    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        operator = frame.f_locals.get("self")
        if isinstance(operator, OpRun):
            place = f" at {operator.onnx_node.op_type} '{operator.onnx_node.name}'"
    return place


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".: ")
