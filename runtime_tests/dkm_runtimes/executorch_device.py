"""A program together with samples and what PyTorch computes for them: ExecuTorch's ``.bpte``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from executorch.devtools import BundledProgram
from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
from executorch.devtools.bundled_program.serialize import (
    serialize_from_bundled_program_to_flatbuffer,
)

from dkm_export.checking.metrics import Limits
from dkm_export.checking.runtime import Arrays, NumericClass
from dkm_export.errors import InvalidInput
from dkm_exporters.executorch import ExecuTorchExporter
from dkm_exporters.executorch.header import INPUTS_METHOD
from dkm_exporters.executorch.options import LINKS
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.reading import read_header

_README = """# A test of {name} on the device

`dkm check --device-test` wrote it: {count} samples and what PyTorch computes for them, in one file
with the program. In the app's tests:

1. Link what the program needs: {links}; and ExecuTorch's `bundled_program` (CMake:
   `EXECUTORCH_BUILD_DEVTOOLS=ON`).
2. Take the program out of the file, `executorch::bundled_program::get_program_data`, and load its
   method `forward`.
3. For each sample, `load_bundled_input`, execute the method, and `verify_method_outputs` with
   rtol {rtol:g} and atol {atol:.1g}. ExecuTorch's own defaults refuse right results.
"""


def make_device_test(
    artifact: Path,
    inputs: Arrays,
    outputs: Arrays,
    limits: Mapping[NumericClass, Limits],
) -> dict[str, bytes]:
    """Contents by name of the file, see `Runtime.device_test`.

    Raises:
        InvalidInput: when the artifact is malformed, or ExecuTorch cannot add these samples.
    """
    file = ProgramFile(artifact)
    names, count = file.strings(INPUTS_METHOD), len(next(iter(outputs.values())))
    cases = [
        MethodTestCase(
            inputs=[torch.from_numpy(inputs[name][index].copy()) for name in names],
            expected_outputs=[torch.from_numpy(x[index].copy()) for x in outputs.values()],
        )
        for index in range(count)
    ]
    try:
        bundle = BundledProgram(
            None, [MethodTestSuite("forward", cases)], pte_file_path=str(artifact)
        )
        content = bytes(serialize_from_bundled_program_to_flatbuffer(bundle))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{artifact}: cannot be bundled with samples: {error}") from error
    header = read_header(file)
    limit = limits[NumericClass(header.precision)]
    readme = _README.format(
        name=artifact.stem,
        count=count,
        links=LINKS[header.backend],
        rtol=limit.rtol,
        # ExecuTorch's comparison does not know the largest element of an output.
        atol=limit.atol * max(float(np.abs(x).max()) for x in outputs.values()),
    )
    beside = ExecuTorchExporter().files(artifact)[1:]
    return {
        artifact.with_suffix(".bpte").name: content,
        "README.md": readme.encode(),
        **{part.name: part.read_bytes() for part in beside},
    }
