from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dkm_export.checking.report import read_report
from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput
from dkm_export.files import CHECKPOINT
from dkm_export.manifest import FileEntry
from dkm_export.reporting.content import gather
from dkm_export.reporting.html import html
from dkm_export.reporting.sources import read_sources
from tests.reports import Inputs, edit, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("report"))


def _of(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Inputs], None]:
    return lambda inputs: edit(inputs.run.parent / file, change)


def _set_logits(key: str, value: float, check: dict[str, Any]) -> None:
    """Change what one runtime's output was measured as."""
    check["runtimes"][2]["fidelity"]["logits"][key] = value


def _cut(file: str) -> Callable[[Inputs], None]:
    def cut(inputs: Inputs) -> None:
        path = inputs.run.parent / file
        path.write_bytes(path.read_bytes()[:-10])

    return cut


def _fail_structure(artifact: dict[str, Any], path: str | None = None, **file: object) -> None:
    """Make it a check that found another file than the manifest's."""
    artifact["findings"][0]["status"] = "fail"
    artifact["path"] = path or artifact["path"]
    artifact["files"][0].update(file)
    artifact["bytes"] = sum(entry["bytes"] for entry in artifact["files"])


def _link_out(inputs: Inputs) -> None:
    artifact, secret = inputs.out / "onnx" / "a_b.onnx", inputs.out.parent / "secret"
    artifact.rename(secret)
    artifact.symlink_to(secret)


def _other_checkpoint(inputs: Inputs) -> None:
    other = inputs.run / CHECKPOINT
    other.write_bytes(other.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_checkpoint, "run is of another checkpoint: its sha256 begins with "),
        (
            _of("check.json", lambda x: x.update(checkpoint_sha256="ab" * 32)),
            "check.json is of another checkpoint: its sha256 begins with abababababab, here it is ",
        ),
        (
            _of("check.json", lambda x: x["artifacts"][1]["files"][0].update(sha256="cd" * 32)),
            "onnx/a_b.onnx is of another export there: check this one",
        ),
        (
            _of("check.json", lambda x: _fail_structure(x["artifacts"][1], sha256="cd" * 32)),
            "onnx/a_b.onnx is of another export there: check this one",
        ),
        (
            _of("check.json", lambda x: _fail_structure(x["artifacts"][1], "onnx/b.onnx")),
            "onnx/b.onnx is of another export there: check this one",
        ),
        (_link_out, "out: 'a_b.onnx' leads out of its folder: remove it"),
        (_of("check.json", lambda x: x.update(exit_code=0)), "was changed since `dkm check`"),
        (
            _of("check.json", lambda x: x["runtimes"][3].update(status="fail")),
            "was changed since `dkm check`",
        ),
        (
            _of("check.json", lambda x: x["runtimes"][3].update(target="ort")),
            "'the whole': runtime onnxruntime is of target 'ort', and the artifacts are: coreml, ",
        ),
        (
            _of("check.json", lambda x: x["runtimes"][3]["limits"]["sources"].update(x="y")),
            "sources.x.[key]': Input should be 'relative_l2', 'rtol', 'atol' or 'sqnr_db'",
        ),
        (
            _of("check.json", lambda x: x["runtimes"][3].update(limits=None)),
            "'runtimes.3': 'limits' and 'numeric_class' are of what ran: give both or none",
        ),
        (
            _of("check.json", lambda x: x["runtimes"][3].update(limits=None, numeric_class=None)),
            "'runtimes.3': without 'limits' there are no 'fidelity' and no 'predictions'",
        ),
        *(
            (
                _of("check.json", partial(_set_logits, key, -1)),
                f"runtimes.2.fidelity.logits.{key}': Input should be greater than or equal to 0",
            )
            for key in ("max_abs", "relative_l2", "outside", "nonfinite")
        ),
        (_of("check.json", lambda x: x.update(more=1)), "'more': unknown key, allowed: "),
        (_of("check.json", lambda x: x.update(error={})), "no report of a check: give a file of"),
        (_of("check.json", lambda x: x.update(name="\ud800")), "not JSON: "),
        (_of("check.json", lambda x: x.update(fp32_bytes=10**300)), "'fp32_bytes': Input should"),
        (_cut("check.json"), "check.json: not JSON: "),
        (_cut("run/metrics.json"), "metrics.json: not JSON: "),
        (_of("run/metrics.json", lambda x: x.update(hard=99.0)), "'hard' is not the one that the"),
        (_of("run/metrics.json", lambda x: x.pop("seed")), "metrics.json: 'seed': Field required"),
        (_of("plan.json", lambda x: x.pop("plan")), "no key 'plan': give a file of what `dkm plan"),
        (
            _of("plan.json", lambda x: x["plan"].update(model="b")),
            "is of 'b', not of 'convolutions",
        ),
        (
            _of("plan.json", lambda x: x["plan"]["layers"][0].update(shape=[1, 2])),
            "the checkpoint has no stem.0.weight of shape [1, 2]",
        ),
        (_of("plan.json", lambda x: x["plan"].pop("front")), "plan.json: plan: 'front': Field"),
        (_cut("out/model.dkm.safetensors"), "cut short"),
        (
            _of("out/manifest.json", lambda x: x["checkpoint"].update(sha256="0")),
            "is not the checkpoint of its manifest.json: export it again",
        ),
        (lambda inputs: (inputs.run / CHECKPOINT).unlink(), "run: no model.dkm.safetensors: give"),
        (lambda inputs: inputs.plan.unlink(), "plan.json: No such file or directory: give a file"),
        (lambda inputs: shutil.rmtree(inputs.out), "out: neither manifest.json nor model.dkm."),
    ],
)
def test_inputs_that_do_not_belong_together(
    spoil: Callable[[Inputs], None],
    message: str,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(inputs.run.parent, folder)
    copy = Inputs(folder / "run", folder / "out", folder / "check.json", folder / "plan.json")
    output = tmp_path / "report.html"
    spoil(copy)
    assert main(["report", *copy.arguments, "-o", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "report.pdf"], "-o report.pdf: name a file that ends in .html or .md"),
        (["-o", "r.md", "--layer", "nose.*"], "--layer nose.* fits no palette, such as stem.0."),
        (["-o", "r.md", "--run", "."], "--run goes with the folder of `dkm export`, and "),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(inputs.run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_check_that_found_a_damaged_file_is_of_that_file(inputs: Inputs, tmp_path: Path) -> None:
    out, check = tmp_path / "out", tmp_path / "check.json"
    shutil.copytree(inputs.out, out)
    shutil.copy(inputs.check, check)
    (out / "onnx" / "a_b.onnx").write_bytes(b"damaged")
    entry = FileEntry.of(out / "onnx" / "a_b.onnx", out).model_dump()
    edit(check, lambda x: _fail_structure(x["artifacts"][1], **entry))
    content = gather(read_sources(out, check=check))
    assert (content.targets[1].checked, content.targets[1].bytes) == ("fail", len(b"damaged"))
    assert content.files[-1].state == "changed since the export"
    (out / "onnx" / "a_b.onnx").rename(out / "onnx" / "a_b.data")
    beside = entry | {"path": "onnx/a_b.data"}
    edit(out / "manifest.json", lambda x: x["artifacts"][1]["files"].append(beside))
    with pytest.raises(InvalidInput, match="of another export there"):
        read_sources(out, check=check)
    edit(check, lambda x: x["artifacts"][1].update(files=[]))
    assert gather(read_sources(out, check=check)).files[-2].state == "missing"
    shutil.copy(inputs.out / "onnx" / "a_b.onnx", out / "onnx")
    with pytest.raises(InvalidInput, match="of another export there"):
        read_sources(out, check=check)


def test_an_exact_output_and_one_that_is_not_finite_stay_apart_in_json(inputs: Inputs) -> None:
    runtimes = {runtime.runtime: runtime for runtime in read_report(inputs.check).runtimes}
    (exact,) = runtimes["onnxruntime"].fidelity.values()
    (broken,) = runtimes["onnxruntime-aarch64"].fidelity.values()
    assert (exact.relative_l2, exact.sqnr_db) == (0, None)
    assert (broken.max_abs, broken.relative_l2, broken.sqnr_db) == (np.inf, np.inf, -np.inf)


@pytest.mark.parametrize("error", [5e-324, 1e-323, 1.7e308])
def test_an_error_of_any_size_has_a_place_on_the_scale(
    error: float, inputs: Inputs, tmp_path: Path
) -> None:
    file = tmp_path / "check.json"
    shutil.copy(inputs.check, file)
    edit(file, partial(_set_logits, "relative_l2", error))
    page = html(gather(read_sources(inputs.out, check=file)))
    places = [float(x) for x in re.findall(r'"left:(.+?)%"', page)]
    assert len(places) >= 6
    assert all(0 <= place <= 100 for place in places)
    assert f"{error:.1e}" in page
