"""Clean exports of random networks pass every check: no alarm is a false one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dkm_export.checking.check import check
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import ExitCode
from dkm_export.exporting.export import export
from tests.compiler import needs_compiler
from tests.random_networks import random_model

RUNTIMES = ("onnxruntime", "executorch", "executorch-runner", "coreml-reference")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_no_false_alarm(seed: int, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "model.dkm.safetensors", tmp_path / "out"
    save_checkpoint(random_model(seed), checkpoint)
    export(checkpoint, ["onnx", "executorch", "coreml"], out)
    report = check(out, required=RUNTIMES)
    assert report.exit_code is ExitCode.OK, [
        f"{owner}: {finding.check}: {finding.message}"
        for owner, findings in report.suites
        for finding in findings
        if finding.status != "pass"
    ] + report.missing
