"""What ONNX Runtime's mobile usability checker says of an ``.onnx`` file, for the report."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dkm_export.plugins import missing_packages
from dkm_exporters.onnx.options import data_file


def usability(artifact: Path) -> str:
    """The verdict for each of the phones' execution providers, or why there is none; one line."""
    reason = missing_packages(("onnxruntime",), "onnx")
    if data_file(artifact).exists():
        reason = "weights of more than 2 GB would have to be decoded for it"
    if reason is None:
        try:
            verdicts = ", ".join(_verdicts(artifact))
        except Exception as error:  # its tools and ONNX Runtime raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason is not None:
        return f"no verdict of ONNX Runtime's mobile usability checker: {reason}"
    return (
        f"{verdicts}: the static verdict of ONNX Runtime's mobile usability checker, by operator "
        "and shape, on the graph with decoded weights; no provider was run"
    )


def _verdicts(artifact: Path) -> list[str]:
    from onnxruntime.tools.mobile_helpers.usability_checker import (
        check_coreml_partitions,
        check_nnapi_partitions,
    )
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with TemporaryDirectory() as temporary:
        # The level after which execution providers choose their nodes. The decoders are folded.
        folded = Path(temporary) / "folded.onnx"
        optimize_model(artifact, folded, use_external_initializers=True)
        model = ModelProtoWithShapeInfo(folded).model_with_shape_info
    network, program = (
        f"coreml_supported_{kind}_ops.md" for kind in ("neuralnetwork", "mlprogram")
    )
    return [
        _verdict("CoreML NeuralNetwork", check_coreml_partitions(model, True, network)),
        _verdict("CoreML ML Program", check_coreml_partitions(model, True, program)),
        _verdict("NNAPI", check_nnapi_partitions(model, True)),
    ]


def _verdict(provider: str, found: Any) -> str:
    partitions = (
        "1 partition" if found.num_partitions == 1 else f"{found.num_partitions} partitions"
    )
    return f"{provider} {found.num_supported_nodes} of {found.num_nodes} nodes in {partitions}"
