"""Faults planted in exports, one by one: `check` catches each and says what or where it is.

The manifest gets new hashes after each fault, as an exporter would write it that makes the mistake;
otherwise the hashes alone would give every one of them away.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from dkm_export.checking.check import check
from dkm_export.checking.report import Report
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import ExitCode
from dkm_export.exporting.export import export
from dkm_export.spec import LayerRule
from tests.compiler import needs_compiler
from tests.networks import palettized
from tests.spoiling import (
    Spoil,
    change_entry,
    changed,
    in_onnx,
    in_xnnpack,
    padding_in_coreml,
    padding_in_xnnpack,
    replace_constant,
)
from tests.zoo import ROW, lively, palettize

pytestmark = needs_compiler
NETWORK = "mobilenet_v3"
RUNTIMES = {"onnx": "onnxruntime", "coreml": "coreml-reference", "executorch": "executorch"}
OWNERS = {target: {f"{target} file", runtime} for target, runtime in RUNTIMES.items()}
"""Of the findings about a target."""


@dataclass(frozen=True)
class Fault:
    """A fault, and what has to be said about it.

    Attributes:
        plant: puts it into an export.
        where: owner of the finding: ``pytorch``, a target, or a runtime.
        says: pattern of the message.
    """

    plant: Callable[[Path], None]
    where: str
    says: str


def of(target: str, spoil: Spoil) -> Callable[[Path], None]:
    """Spoil the artifact of a target."""
    suffix = {"onnx": ".onnx", "coreml": ".mlpackage", "executorch": ".pte"}[target]
    return lambda out: spoil(out / target / f"{NETWORK}{suffix}")


def onnx_fault(edit: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    return of("onnx", in_onnx(edit))


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in graph.node if node.name == name]
    return found[0]


def attribute(graph: onnx.GraphProto, name: str, key: str, value: Any) -> None:
    (found,) = (found for found in node(graph, name).attribute if found.name == key)
    found.CopyFrom(helper.make_attribute(key, value))


def transpose(graph: onnx.GraphProto, output: str, order: list[int]) -> None:
    """Another order of axes for everything that takes ``output``."""
    for index, producer in enumerate(graph.node):
        if output in producer.output:
            producer.output[0] = f"{output}/before"
            added = helper.make_node("Transpose", [f"{output}/before"], [output], perm=order)
            graph.node.insert(index + 1, added)
            return
    raise ValueError(output)


def replace_input(graph: onnx.GraphProto, name: str, index: int, value: str) -> None:
    node(graph, name).input[index] = value


def samples_fault(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def plant(out: Path) -> None:
        tensors = load_file(out / "samples.safetensors")
        change(tensors)
        save_file(tensors, out / "samples.safetensors")

    return plant


def mixed_up(samples: dict[str, Any]) -> None:
    """Outputs that belong to other inputs."""
    samples["output.output"] = np.roll(samples["output.output"], 1, 0)


def all_alike(samples: dict[str, Any]) -> None:
    """One sample eight times, with its outputs."""
    for name, tensor in samples.items():
        samples[name] = np.repeat(tensor[:1], len(tensor), 0)


def stale(target: str, suffix: str) -> Callable[[Path], None]:
    """An artifact of the same model compressed otherwise, in the place of this one's."""

    def plant(out: Path) -> None:
        other = out.parent / "other"
        save_checkpoint(palettized(NETWORK, 3), other / "model.dkm.safetensors")
        export(other / "model.dkm.safetensors", [target], other / "out")
        name = f"{target}/{NETWORK}{suffix}"
        shutil.copyfile(other / "out" / name, out / name)

    return plant


def cut_short(name: str) -> Callable[[Path], None]:
    def plant(out: Path) -> None:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])

    return plant


def entry(name: str) -> Spoil:
    return lambda artifact: change_entry(artifact, palettized(NETWORK, 4).palettes[name])


def bias(name: str) -> Spoil:
    def spoil(artifact: Path) -> None:
        right = palettized(NETWORK, 4).dense[name].numpy()
        replace_constant(artifact.parent, right, right + np.float32(0.1))

    return spoil


def bounds(graph: Any) -> None:
    """An activation that ends at another value."""
    node = next(n for n in graph["xnodes"] if n.get("output_min_max"))
    node["output_min_max"]["output_max"] = 0.1


def one_more(array: Any) -> Any:
    array.flat[0] += 0.05 * np.abs(array).max()
    return array


def swapped(array: Any) -> Any:
    """The first two packed bytes that differ, exchanged."""
    flat = array.reshape(-1)
    other = int(np.flatnonzero(flat != flat[0])[0])
    flat[[0, other]] = flat[[other, 0]]
    return array


FAULTS: dict[str, Fault] = {
    "onnx: LUT entry": Fault(
        of("onnx", changed("3.body.3.weight.lut", one_more)),
        "onnx file",
        r"3\.body\.3\.weight: 1 of 16 LUT entries",
    ),
    "onnx: swapped indices": Fault(
        of("onnx", changed("4.body.0.weight.indices", swapped)),
        "onnx file",
        r"4\.body\.0\.weight: 4 of 192 indices differ",
    ),
    "onnx: shifted bias": Fault(
        of("onnx", changed("3.body.3.bias", one_more)),
        "onnxruntime",
        r"first wrong layer: 3\.body\.[34]",
    ),
    "onnx: wrong padding": Fault(
        onnx_fault(lambda graph: attribute(graph, "4.body.3/Conv", "pads", [1, 1, 3, 3])),
        "onnxruntime",
        r"first wrong layer: 4\.body\.3",
    ),
    "onnx: wrong slope of an activation": Fault(
        onnx_fault(lambda graph: attribute(graph, "3.body.6.gate/HardSigmoid", "alpha", 0.2)),
        "onnxruntime",
        r"hardsigmoid in 3\.body\.6\.gate",
    ),
    "onnx: missing scale": Fault(
        of("onnx", changed("3.body.0.weight.scale", np.ones_like)),
        "onnxruntime",
        r"first wrong layer: 3\.body\.0",
    ),
    "onnx: transposed weight": Fault(
        onnx_fault(lambda graph: transpose(graph, "3.body.3.weight", [0, 1, 3, 2])),
        "onnxruntime",
        r"first wrong layer: 3\.body\.3",
    ),
    "onnx: wrong axis": Fault(
        of("onnx", changed("val_6", lambda axes: axes * 0 + [1, 2])),
        "onnxruntime",
        r"first wrong layer: 7 .* not shown just before it: adaptive_avg_pool2d in 5",
    ),
    "onnx: another activation": Fault(
        onnx_fault(lambda graph: setattr(node(graph, "4.body.2/HardSwish"), "op_type", "Relu")),
        "onnxruntime",
        r"first wrong step: hardswish in 4\.body\.2",
    ),
    "onnx: a shortcut taken from the wrong place": Fault(
        onnx_fault(lambda graph: replace_input(graph, "4/Add", 0, "hardswish")),
        "onnxruntime",
        r"first wrong step: add in 4",
    ),
    "onnx: stale artifact": Fault(
        stale("onnx", ".onnx"), "onnx file", r"0\.weight: bits 3 instead of 4$"
    ),
    "coreml: LUT entry": Fault(
        of("coreml", entry("3.body.0.weight")), "coreml file", r"3\.body\.0\.weight: 1 of 16 LUT"
    ),
    "coreml: shifted bias": Fault(
        of("coreml", bias("4.body.6.reduce.bias")),
        "coreml-reference",
        r"first wrong layer: 4\.body\.6\.reduce",
    ),
    "coreml: wrong padding": Fault(
        of("coreml", padding_in_coreml), "coreml-reference", r"first wrong layer: 3\.body\.3"
    ),
    "executorch: LUT entry": Fault(
        of("executorch", entry("4.body.7.weight")),
        "executorch file",
        r"4\.body\.7\.weight: the packed weight",
    ),
    "executorch: shifted bias": Fault(
        of("executorch", bias("3.body.6.expand.bias")),
        "executorch",
        r"first wrong layer: 3\.body\.6\.expand",
    ),
    "executorch: wrong padding": Fault(
        of("executorch", padding_in_xnnpack), "executorch", r"first wrong layer: 3\.body\.3"
    ),
    "executorch: wrong bound of an activation": Fault(
        of("executorch", in_xnnpack(bounds)), "executorch", r"3\.body\.6"
    ),
    "executorch: stale artifact": Fault(
        stale("executorch", ".pte"), "executorch file", r"0\.weight: bits 3 instead of 4$"
    ),
    "executorch: cut short": Fault(
        cut_short(f"executorch/{NETWORK}.pte"), "executorch file", r"cut short"
    ),
    "all: samples of other inputs": Fault(
        samples_fault(mixed_up), "pytorch", r"output: the checkpoint computes something else"
    ),
    "all: samples that are all alike": Fault(
        samples_fault(all_alike), "pytorch", r"only 0\.0% of the output depends on the input"
    ),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_checkpoint(palettized(NETWORK, 4), folder / "model.dkm.safetensors")
    export(folder / "model.dkm.safetensors", list(RUNTIMES), folder / "out")
    return folder / "out"


def rehash(out: Path) -> None:
    """Let the manifest say that the files are what they are now."""
    manifest = json.loads((out / "manifest.json").read_text())
    files = [file for artifact in manifest["artifacts"] for file in artifact["files"]]
    for entry in (*files, manifest["checkpoint"], manifest["samples"]):
        content = (out / entry["path"]).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (out / "manifest.json").write_text(json.dumps(manifest))


def failures(report: Report) -> list[tuple[str, str]]:
    """Owner and message of whatever is not as it should be."""
    return [
        (owner, finding.message)
        for owner, findings in report.suites
        for finding in findings
        if finding.status in ("fail", "error")
    ]


def test_the_clean_export_passes(clean: Path) -> None:
    report = check(clean, required=list(RUNTIMES.values()))
    assert failures(report) == []
    assert report.exit_code is ExitCode.OK


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(name: str, clean: Path, tmp_path: Path) -> None:
    fault, out = FAULTS[name], Path(shutil.copytree(clean, tmp_path / "out"))
    fault.plant(out)
    rehash(out)
    report = check(out, runtimes=list(RUNTIMES.values()))
    found = failures(report)
    print(*found, sep="\n")
    assert report.exit_code is ExitCode.GATE
    assert any(owner == fault.where and re.search(fault.says, said) for owner, said in found)
    owners = OWNERS.get(name.partition(":")[0])
    assert owners is None or {owner for owner, _ in found} <= owners


def test_values_beyond_float16(tmp_path: Path) -> None:
    """A network that computes with larger numbers than its precision has."""
    model = palettize("runtime_tests.test_faults:loud", ROW, LayerRule(bits=4))
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    settings = {"executorch": {"precision": "fp16"}}
    export(tmp_path / "model.dkm.safetensors", ["executorch"], tmp_path / "out", settings=settings)
    found = failures(check(tmp_path / "out", runtimes=["executorch"]))
    assert any("elements are NaN or infinite" in said for _, said in found)
    assert any(said.startswith("first wrong layer: first") for _, said in found), found


class Loud(nn.Module):
    """Large numbers between a layer and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def loud() -> nn.Module:
    module = Loud()
    lively(module)
    with torch.no_grad():
        module.first.weight.mul_(5e4)
        module.first.bias.mul_(5e4)
        module.second.weight.mul_(2e-5)
    return module
