"""Programs bundled with samples: verified by ExecuTorch's own runtime, and wrong ones refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dkm_export.checking.metrics import LIMITS
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.native import load_backend
from dkm_exporters.executorch.options import Backend
from dkm_runtimes.executorch import ExecuTorchRuntime
from tests.compiler import needs_compiler
from tests.zoo import TOKENS, palettize


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=3))


def bundled(
    model: PalettizedModel, folder: Path, backend: Backend, off: float = 0
) -> dict[str, bytes]:
    """The program with three samples; ``off`` is added to what is expected of the last one."""
    options = ExecuTorchOptions(backend=backend)
    artifact = ExecuTorchExporter().lower(model, model.build(), folder, options)
    inputs = np.random.default_rng(0).integers(96, size=(3, 1, 12)).astype(np.int32)
    module = model.build()
    outputs = np.stack([module(torch.from_numpy(x)).numpy() for x in inputs])
    outputs[-1] += off
    given, expected = {"tokens": inputs}, {"output": outputs}
    files = ExecuTorchRuntime().device_test(artifact, given, expected, LIMITS)
    assert "3 samples" in files["README.md"].decode()
    return files


def verifying(files: dict[str, bytes]) -> Callable[[int], object]:
    """ExecuTorch's own comparison for one sample, with the tolerances that our page names."""
    from executorch.extension.pybindings import portable_lib

    load_backend()
    bundle = portable_lib._load_bundled_program_from_buffer(files["tokens.bpte"])
    page = files["README.md"].decode()
    rtol, atol = (float(found) for found in re.findall(r"tol ([0-9.e-]+[0-9])", page))
    return lambda index: bundle.verify_result_with_bundled_expected_output(
        "forward", index, rtol, atol
    )


@needs_compiler
@pytest.mark.parametrize("backend", ["xnnpack-lut", "portable"])
def test_right_samples_pass_and_wrong_ones_do_not(
    backend: Backend, model: PalettizedModel, tmp_path: Path
) -> None:
    verify = verifying(bundled(model, tmp_path, backend))
    for index in range(3):
        verify(index)
    verify = verifying(bundled(model, tmp_path, backend, off=0.01))
    verify(1)
    with pytest.raises(RuntimeError):
        verify(2)


@pytest.mark.slow
def test_every_backend_can_be_bundled(model: PalettizedModel, tmp_path: Path) -> None:
    for backend in get_args(Backend):
        (tmp_path / backend).mkdir()
        content = bundled(model, tmp_path / backend, backend)["tokens.bpte"]
        assert content[4:8] == b"BP08"


@needs_compiler
def test_check_writes_it(
    model: PalettizedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    out = tmp_path / "out"
    assert main(["export", "--target", "executorch", str(tmp_path), "-o", str(out), "-q"]) == 0
    test = tmp_path / "test"
    required = "executorch,executorch-runner"
    assert main(["check", str(out), "--require", required, "--device-test", str(test)]) == 0
    assert "xnnpack-lut, fp32: the app links XNNPACK and our delegate" in capsys.readouterr().out
    names = {file.name for file in (test / "executorch").iterdir()}
    assert names == {"tokens.bpte", "README.md"}
    assert json.loads((test / "device_test.json").read_text())["model"] == "tokens"
