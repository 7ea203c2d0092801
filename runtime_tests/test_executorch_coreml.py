"""Programs for ExecuTorch's Core ML delegate: their ML programs, interpreted; and bad files."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from torch import Tensor, nn

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.folders import pack_folder, unpack_folder
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.reading import read_header
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from dkm_runtimes.executorch import ExecuTorchRuntime
from tests import mlpackages, networks
from tests.kinds import palettize_kinds
from tests.programs import changed_bit, differing
from tests.zoo import IMAGE, ROW, TOKENS, lively, palettize

HERE = "runtime_tests.test_executorch_coreml"
PACKAGE = "model.mlpackage"
COREML = ExecuTorchOptions(backend="coreml")
FP32 = ExecuTorchOptions(backend="coreml", precision="fp32")

CASES = {
    "convolutions": (
        "convolutions",
        IMAGE,
        (
            LayerRule(pattern="stem.*", bits=1, dim=2),
            LayerRule(pattern="depthwise.*", bits=2, dim=4, groups=4),
            LayerRule(pattern="up.*", bits=3, dim=3, groups=2),
            LayerRule(pattern="line.*", bits=4, dim=4, axis=1),
            LayerRule(pattern="head.*", bits=8),
        ),
    ),
    "tokens": (
        "tokens",
        TOKENS,
        (
            LayerRule(pattern="embedding.*", bits=4, dim=4, axis=1),
            LayerRule(pattern="hidden.*", bits=6, dim=4, axis=1, groups=4),
            LayerRule(pattern="head.*", bits=2, dim=4),
        ),
    ),
    "tied": ("tied", TOKENS, (LayerRule(bits=6, dim=2),)),
}


class Split(nn.Module):
    """Layers around an operator that Core ML does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.asinh(self.first(x)))
        return y


class Twice(nn.Module):
    """A layer before and after such an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.asinh(self.layer(x)))
        return y


class Thrice(Twice):
    """And once more after it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(super().forward(x))
        return y


class Bare(nn.Module):
    """A weight that goes into such an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x)) + torch.asinh(self.second.weight)[0]
        return y


def split() -> nn.Module:
    return lively(Split())


def twice() -> nn.Module:
    return lively(Twice())


def thrice() -> nn.Module:
    return lively(Thrice())


def bare() -> nn.Module:
    return lively(Bare())


def lower(
    model: PalettizedModel,
    folder: Path,
    options: ExecuTorchOptions = COREML,
    module: nn.Module | None = None,
) -> Path:
    exporter = ExecuTorchExporter()
    exporter.requires(model, options)
    return exporter.lower(model, module or model.build(), folder, options)


def read(artifact: Path) -> Any:
    return ExecuTorchExporter().read_palettes(artifact)


def delegates(artifact: Path) -> list[dict[str, bytes]]:
    """The folder that each delegate is given."""
    file = ProgramFile(artifact)
    count = len(file.plan("forward").delegates)
    return [unpack_folder(file.delegate("forward", index)) for index in range(count)]


def unfold(files: dict[str, bytes], folder: Path) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder / PACKAGE


def interpret(artifact: Path, inputs: list[Tensor], folder: Path) -> list[npt.NDArray[Any]]:
    """Outputs of a program that is one delegate: of its ML program, interpreted by our own reader.

    Inputs and outputs are put in place as the delegate does it, by its list of names.
    """
    (files,) = delegates(artifact)
    plan = ProgramFile(artifact).plan("forward")
    ((instruction,),) = [chain.instructions for chain in plan.chains]
    names = json.loads(files["metadata.json"])
    package = unfold(files, folder)
    given = {name: x.numpy() for name, x in zip(names["inputNames"], inputs, strict=True)}
    outputs = CoreMLReferenceRuntime().load(package).run(given)
    results = dict(zip(mlpackages.outputs(package), outputs, strict=True))
    arguments = instruction.instr_args.args
    assert arguments[: len(inputs)] == plan.inputs
    places = dict(zip(arguments[len(inputs) :], names["outputNames"], strict=True))
    return [results[places[index]] for index in plan.outputs]


def worst_error(model: PalettizedModel, artifact: Path, folder: Path) -> float:
    """The largest relative L2 error of an output."""
    generator = torch.Generator().manual_seed(7)
    inputs = [spec.random(generator) for spec in model.source.inputs]
    with torch.no_grad():
        references = model.build()(*inputs)
    tuples = references if isinstance(references, tuple) else (references,)
    return max(
        float(np.linalg.norm(output - reference.numpy()) / np.linalg.norm(reference.numpy()))
        for output, reference in zip(interpret(artifact, inputs, folder), tuples, strict=True)
    )


@contextmanager
def edited(artifact: Path) -> Iterator[Any]:
    """Change a program with ExecuTorch's own serialization."""
    file = deserialize_pte_binary(artifact.read_bytes())
    yield file.program
    artifact.write_bytes(bytes(serialize_pte_binary(file)))


def edit_folder(artifact: Path, edit: Callable[[dict[str, bytes]], None]) -> None:
    """Change the folder of the only delegate."""
    with edited(artifact) as program:
        (inline,) = program.backend_delegate_data
        files = unpack_folder(bytes(inline.data))
        edit(files)
        inline.data = pack_folder(files)


def edit_model(artifact: Path, folder: Path, edit: Callable[[Any], None]) -> None:
    """Change the ML program of the only delegate."""

    def change(files: dict[str, bytes]) -> None:
        package = unfold(files, folder)
        mlpackages.edit_model(package, edit)
        files[f"{PACKAGE}/{mlpackages.MODEL}"] = (package / mlpackages.MODEL).read_bytes()

    edit_folder(artifact, change)


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4, dim=4))


@pytest.fixture(scope="module")
def original(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(model, tmp_path_factory.mktemp("original"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy of the model's artifact, to spoil."""
    copy = tmp_path / original.name
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.mark.parametrize(("options", "limit"), [(COREML, 2e-3), (FP32, 1e-6)], ids=["fp16", "fp32"])
@pytest.mark.parametrize(("factory", "inputs", "rules"), CASES.values(), ids=CASES)
def test_ml_program_holds_and_computes_the_palettes(
    factory: str,
    inputs: tuple[InputSpec, ...],
    rules: tuple[LayerRule, ...],
    options: ExecuTorchOptions,
    limit: float,
    tmp_path: Path,
) -> None:
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    artifact = lower(model, tmp_path, options)
    assert not differing(model, artifact)
    assert worst_error(model, artifact, tmp_path) <= limit
    kinds = mlpackages.kinds(tmp_path / PACKAGE)
    assert kinds.count("constexpr_lut_to_dense") == len(model.palettes)  # the tied one too


def test_every_kind_of_layer(tmp_path: Path) -> None:
    for rule in (LayerRule(bits=2, dim=2), LayerRule(bits=6, dim=2, axis=1, groups=2)):
        model, module = palettize_kinds(rule)
        assert not differing(model, lower(model, tmp_path, module=module))


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    model = networks.palettized(name, 4)
    artifact = lower(model, tmp_path)
    assert not differing(model, artifact)
    assert worst_error(model, artifact, tmp_path) <= 5e-3


def test_nothing_dense_is_left(model: PalettizedModel, original: Path) -> None:
    (files,) = delegates(original)
    weights = files[f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"]
    palettes = sum(palette.nbytes for palette in model.palettes.values())
    dense = sum(tensor.numel() * 2 for tensor in model.dense.values())
    assert len(weights) < palettes + dense + 64 * 4 * (len(model.palettes) + len(model.dense))


def test_the_folder_is_one_that_executorch_reads(original: Path, tmp_path: Path) -> None:
    from executorch.backends.apple.coreml import executorchcoreml

    processed = ProgramFile(original).delegate("forward", 0)
    assert executorchcoreml.unflatten_directory_contents(processed, str(tmp_path))
    (root,) = tmp_path.iterdir()
    theirs = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert theirs == unpack_folder(processed)
    assert unpack_folder(executorchcoreml.flatten_directory_contents(str(root))) == theirs


def test_same_bytes_on_another_day(
    model: PalettizedModel, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime.date):
        @classmethod
        def today(cls) -> Later:
            return cls(2100, 1, 1)

    monkeypatch.setattr("coremltools.converters._converters_entry.date", Later)
    assert lower(model, tmp_path).read_bytes() == original.read_bytes()


def test_cached_under_another_name_when_it_differs(
    model: PalettizedModel, original: Path, tmp_path: Path
) -> None:
    def name(artifact: Path) -> str:
        (files,) = delegates(artifact)
        return str(json.loads(files["metadata.json"])["identifier"])

    assert name(lower(model, tmp_path, FP32)) != name(original)


def test_the_app_may_choose_the_batch(model: PalettizedModel, tmp_path: Path) -> None:
    artifact = lower(model, tmp_path, ExecuTorchOptions(backend="coreml", max_batch=8))
    assert not differing(model, artifact)
    assert worst_error(model, artifact, tmp_path) <= 2e-3  # of one sample
    (files,) = delegates(artifact)
    (sizes, *_) = mlpackages.input_ranges(unfold(files, tmp_path))
    assert sizes == (1, 8)


@pytest.mark.parametrize(
    ("factory", "decodes"), [("split", ["first", "second"]), ("twice", ["layer", "layer"])]
)
def test_each_part_holds_the_palettes_that_it_uses(
    factory: str, decodes: list[str], tmp_path: Path
) -> None:
    model = palettize(f"{HERE}:{factory}", ROW, LayerRule(bits=4))
    artifact = lower(model, tmp_path)
    assert not differing(model, artifact)
    header = read_header(ProgramFile(artifact))
    assert [name for names in header.decodes for name in names] == [f"{n}.weight" for n in decodes]
    for index, files in enumerate(delegates(artifact)):
        kinds = mlpackages.kinds(unfold(files, tmp_path / str(index)))
        assert kinds.count("constexpr_lut_to_dense") == 1


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            f"{HERE}:bare",
            r"second\.weight: Core ML does not take what uses this weight.*xnnpack-lut",
        ),
        (f"{HERE}:thrice", r"layer\..* is used by several parts of it, and twice by one"),
        ("tests.zoo:unused", r"does not use the palette of unused\.weight"),
    ],
)
def test_what_would_be_dense_is_refused(factory: str, message: str, tmp_path: Path) -> None:
    model = palettize(factory, ROW, LayerRule(bits=4))
    with pytest.raises(Unsupported, match=message):
        lower(model, tmp_path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"bits": 5}, r"stem\.0\.weight: backend=coreml: bits 5 .*allowed: 1, 2, 3, 4, 6.*-lut"),
        ({"bits": 2, "dim": 5}, r"stem\.0\.weight: backend=coreml: dim 5 does not.*portable"),
    ],
)
def test_what_core_ml_cannot_hold_is_refused(rule: dict[str, int], message: str) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule.model_validate(rule))
    with pytest.raises(Unsupported, match=message):
        ExecuTorchExporter().requires(model, COREML)
    ExecuTorchExporter().requires(model, ExecuTorchOptions())


def test_core_ml_computes_in_float16_unless_it_is_told_otherwise() -> None:
    assert COREML.computes_in == "fp16"
    assert FP32.computes_in == ExecuTorchOptions().computes_in == "fp32"


def test_it_is_not_run_here(original: Path) -> None:
    with pytest.raises(Unsupported, match="which runs on Apple systems only"):
        ExecuTorchRuntime().load(original)


@pytest.mark.parametrize("part", ["lut", "indices"])
def test_one_changed_bit_is_seen_and_named(
    part: Literal["lut", "indices"], model: PalettizedModel, artifact: Path
) -> None:
    for name, palette in model.palettes.items():
        with changed_bit(artifact, palette, part):
            assert differing(model, artifact) == [name]


def test_a_palette_without_use_is_none(artifact: Path, tmp_path: Path) -> None:
    def bypass(spec: Any) -> None:
        operations = mlpackages.operations(spec)
        (linear,) = [operation for operation in operations if operation.type == "linear"]
        linear.inputs["weight"].arguments[0].name = "elsewhere"

    edit_model(artifact, tmp_path, bypass)
    with pytest.raises(InvalidInput, match="nothing uses the palette 'p_head_weight_cast_fp16'"):
        read(artifact)


def test_palettes_that_are_named_otherwise_are_seen(artifact: Path) -> None:
    data = artifact.read_bytes()
    order = b'"decodes":[["stem.0.weight"],["depthwise.weight"],["up.weight"],["line.weight"]'
    other = b'"decodes":[["stem.0.weight"],["depthwise.weight"],["line.weight"],["up.weight"]'
    assert data.count(order) == 1
    artifact.write_bytes(data.replace(order, other))
    with pytest.raises(InvalidInput, match=r"delegate 0: up\.weight: the header says 'line"):
        read(artifact)


def test_a_compiled_model_beside_it_is_refused(artifact: Path) -> None:
    """The delegate would load that one."""
    edit_folder(artifact, lambda files: files.update({"model.mlmodelc/coremldata.bin": b""}))
    with pytest.raises(InvalidInput, match="unknown file"):
        read(artifact)


def node(name: str, **changes: Any) -> dict[str, Any]:
    region = {"offset": 0, "size": 4}
    return {"children": {}, "dataRegion": region, "kind": 0, "name": name, **changes}


def root(**children: int) -> dict[str, Any]:
    return node("root", kind=1, children=children)


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node("a"), node("root", kind=1, children={"../a": 0})],
        [node(".."), node("root", kind=1, children={"..": 0})],
        [node("a"), root(b=0)],
        [node("a"), root(a=7)],
        [node("a"), root(a=-1)],
        [root(root=0)],
        [node("a", dataRegion={"offset": 0, "size": 1 << 40}), root(a=0)],
        [node("a", dataRegion={"offset": -4, "size": 4}), root(a=0)],
        [node("a", dataRegion={"offset": 0, "size": "4"}), root(a=0)],
        [
            *(node(n, dataRegion={"offset": 0, "size": 400}) for n in "ab"),
            root(a=0, b=1),
        ],
        [{"name": "a"}],
        "nodes",
    ],
    ids=lambda nodes: json.dumps(nodes)[:40],
)
def test_malformed_folders_are_refused(nodes: Any) -> None:
    data = bytes(400) + json.dumps({"nodes": nodes}).encode()[::-1]
    with pytest.raises(InvalidInput, match="malformed"):
        unpack_folder(data)


def test_damaged_files_are_read_or_refused(artifact: Path) -> None:
    data = artifact.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(len(data), size=8)] = generator.integers(256, size=8)
        artifact.write_bytes(damaged.tobytes())
        try:
            read(artifact)
        except (InvalidInput, Unsupported) as error:
            refused += str(artifact) in str(error) and "\n" not in str(error)
    assert refused > 10
