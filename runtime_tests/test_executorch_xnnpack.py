"""ExecuTorch programs for XNNPACK: packed weights, the numbers of dense ones, bad files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from torch import Tensor, nn

from dkm_export.checking.runtime import NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.folding import fold_batch_norm
from dkm_export.palette import Palette
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.options import WEIGHTS_SUFFIX, Backend, Precision
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.xnnpack import BLOB_PREFIX, LUT_BACKEND
from dkm_runtimes.executorch import ExecuTorchRuntime
from dkm_runtimes.executorch_runner import ExecuTorchRunnerRuntime
from tests.compiler import needs_compiler
from tests.networks import FAMILIES, palettized
from tests.programs import changed_bit, differing
from tests.zoo import CASES, IMAGE, TOKENS, lively, palettize

HERE = "runtime_tests.test_executorch_xnnpack"
pytestmark = needs_compiler
ROWS = (InputSpec(name="rows", shape=(3, 16)),)
XNNPACK: tuple[Backend, ...] = ("xnnpack-lut", "xnnpack-ptd")
RUNTIMES = (ExecuTorchRuntime(), ExecuTorchRunnerRuntime())

Arrays = list[npt.NDArray[Any]]


class Copied(nn.Module):
    """Two layers with the same weight that are not tied, as copies of a layer have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(rows)))
        return y


class Bare(nn.Module):
    """Weights that XNNPACK does not take: one that is added, one behind its own batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.added = nn.Linear(16, 16), nn.Linear(16, 3)
        self.image = nn.Conv2d(1, 8, 3)
        self.norm = OwnNorm(8)

    def forward(self, rows: Tensor) -> Tensor:
        image = self.norm(self.image(rows[None, None]))
        y: Tensor = self.layer(rows) + self.added.weight.sin() + image.mean()
        return y


class Wide(nn.Module):
    """Makes a float32 tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        y: Tensor = self.layer(rows + torch.ones(16))
        return y


class OwnNorm(nn.BatchNorm2d):
    """A subclass, which our fold leaves alone and XNNPACK's does not."""


def copied() -> nn.Module:
    module = Copied()
    lively(module)
    module.second.load_state_dict(module.first.state_dict())
    return module


def bare() -> nn.Module:
    return lively(Bare())


def wide() -> nn.Module:
    return lively(Wide())


def lower(model: PalettizedModel, folder: Path, backend: Backend, **options: Any) -> Path:
    settings = ExecuTorchOptions(backend=backend, **options)
    return ExecuTorchExporter().lower(model, model.build(), folder, settings)


def read(artifact: Path) -> dict[str, Palette]:
    return ExecuTorchExporter().read_palettes(artifact)


def inputs_of(model: PalettizedModel, batch: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        specs = model.source.inputs
        if batch is not None:
            shapes = [(batch, *spec.shape[1:]) for spec in specs]
            specs = tuple(
                spec.model_copy(update={"shape": shape})
                for spec, shape in zip(specs, shapes, strict=True)
            )
        yield tuple(spec.random(generator) for spec in specs)


def run(session: Session, model: PalettizedModel, inputs: tuple[Tensor, ...]) -> Arrays:
    names = (spec.name for spec in model.source.inputs)
    return session.run({n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def reference(model: PalettizedModel, inputs: tuple[Tensor, ...]) -> Arrays:
    outputs = model.build()(*inputs)
    return [x.numpy() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def dense(model: PalettizedModel, precision: Precision) -> Callable[[tuple[Tensor, ...]], Arrays]:
    """XNNPACK as it is, with the weights that the palettes stand for."""
    import executorch.runtime

    module, inputs = model.build(), model.source.example_inputs()
    fold_batch_norm(module, model.palettes, inputs, model.ties)
    if precision == "fp16":
        module.half()
        inputs = halved(inputs)
    program = to_edge_transform_and_lower(
        torch.export.export(module, inputs), partitioner=[XnnpackPartitioner()]
    )
    data = bytes(program.to_executorch().buffer)
    loaded = executorch.runtime.Runtime.get().load_program(data)
    forward = loaded.load_method("forward")

    def execute(given: tuple[Tensor, ...]) -> Arrays:
        assert loaded
        taken = halved(given) if precision == "fp16" else given
        return [output.float().numpy().copy() for output in forward.execute(list(taken))]

    return execute


def halved(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.half() if x.is_floating_point() else x for x in tensors)


def error(outputs: Arrays, references: Arrays) -> float:
    """The largest relative L2 of an output."""
    return max(
        float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
        for output, expected in zip(outputs, references, strict=True)
    )


def check(
    model: PalettizedModel, folder: Path, backend: Backend, precision: Precision = "fp32"
) -> Path:
    """Palettes bit for bit, and on all runtimes outputs as with dense weights, also bit for bit."""
    artifact = lower(model, folder, backend, precision=precision)
    assert not differing(model, artifact)
    sessions, exact = [runtime.load(artifact) for runtime in RUNTIMES], dense(model, precision)
    assert {session.numeric_class for session in sessions} == {NumericClass(precision)}
    for inputs in inputs_of(model):
        expected = exact(inputs)
        # XNNPACK's own float16 is beyond the limits of a check on a random ResNet.
        limit = {"fp32": 1e-5, "fp16": 5e-2}[precision]
        assert error(expected, reference(model, inputs)) < limit
        for session in sessions:
            for found, right in zip(run(session, model, inputs), expected, strict=True):
                np.testing.assert_array_equal(found.view(np.uint32), right.view(np.uint32))
    return artifact


def edited(artifact: Path, edit: Callable[[Any], None]) -> None:
    """Change a program with ExecuTorch's own serialization."""
    file = deserialize_pte_binary(artifact.read_bytes())
    edit(file)
    artifact.write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4, dim=4))


@pytest.fixture(scope="module")
def originals(
    model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Backend], Path]:
    return functools.cache(lambda backend: lower(model, tmp_path_factory.mktemp("o"), backend))


@pytest.fixture(params=XNNPACK)
def artifact(
    request: pytest.FixtureRequest, originals: Callable[[Backend], Path], tmp_path: Path
) -> Path:
    """A copy of the model's artifact, to spoil."""
    original = originals(request.param)
    for file in ExecuTorchExporter().files(original):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / original.name


# ResNet-50's layers are of the kinds of ResNet-18's, and CPUs without float16 take minutes for it.
_FAMILIES = [
    (name, precision)
    for name in FAMILIES
    for precision in get_args(Precision)
    if (name, precision) != ("resnet50", "fp16")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), _FAMILIES)
def test_families(name: str, precision: Precision, tmp_path: Path) -> None:
    artifact = check(palettized(name, 4), tmp_path, "xnnpack-lut", precision)
    assert b"DKM-LUT" in artifact.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3", "minilm", "unet"])
def test_families_with_weights_beside_them(name: str, tmp_path: Path) -> None:
    check(palettized(name, 3), tmp_path, "xnnpack-ptd")


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("xnnpack-lut", "fp32"),
        ("xnnpack-lut", "fp16"),
        pytest.param("xnnpack-ptd", "fp16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("factory", "inputs", "rules"), CASES.values(), ids=CASES)
def test_layouts(
    factory: str,
    inputs: tuple[InputSpec, ...],
    rules: tuple[LayerRule, ...],
    backend: Backend,
    precision: Precision,
    tmp_path: Path,
) -> None:
    check(palettize(f"tests.zoo:{factory}", inputs, *rules), tmp_path, backend, precision)


def test_nothing_dense_is_left(model: PalettizedModel, artifact: Path) -> None:
    files = ExecuTorchExporter().files(artifact)
    packed = sum(palette.nbytes for palette in model.palettes.values())
    norms = sum(x.nbytes for name, x in model.dense.items() if "norm" in name or "stem.1" in name)
    rest = sum(tensor.nbytes for tensor in model.dense.values()) + norms
    assert sum(file.stat().st_size for file in files) < packed + rest + 7000
    assert 4 * sum(palette.layout.size for palette in model.palettes.values()) > 20 * packed


def test_tied_weights_and_embeddings(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tied", TOKENS, LayerRule(bits=3))
    artifact = lower(model, tmp_path, "xnnpack-lut")
    assert not differing(model, artifact)
    session = RUNTIMES[0].load(artifact)
    for inputs in inputs_of(model):
        assert error(run(session, model, inputs), reference(model, inputs)) < 1e-5


def test_layers_with_the_same_weight_are_stored_once(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:copied", ROWS, LayerRule(bits=2))
    artifact = check(model, tmp_path, "xnnpack-lut")
    header = json.loads(ProgramFile(artifact).strings("dkm_palettes")[0])
    assert header["decodes"] == 2 * [["first.weight", "second.weight"]]
    assert artifact.read_bytes().count(b"DKM-LUT") == 1


def test_a_model_that_is_not_for_float16_is_refused(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:wide", ROWS, LayerRule(bits=2))
    check(model, tmp_path, "xnnpack-lut")
    with pytest.raises(Unsupported, match=r"with mismatched dtypes: Operator: .*addmm"):
        lower(model, tmp_path, "xnnpack-lut", precision="fp16")


def test_what_xnnpack_does_not_take_is_decoded_in_the_graph(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:bare", ROWS, LayerRule(bits=2))
    artifact = lower(model, tmp_path, "xnnpack-lut")
    assert not differing(model, artifact)
    session = RUNTIMES[0].load(artifact)
    for inputs in inputs_of(model):
        assert error(run(session, model, inputs), reference(model, inputs)) < 1e-5
    assert artifact.read_bytes().count(BLOB_PREFIX.encode()) == 1


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
@pytest.mark.parametrize("backend", [*XNNPACK, "portable"])
def test_the_app_chooses_the_batch(backend: Backend, runtime: Runtime, tmp_path: Path) -> None:
    rules = LayerRule(bits=3), LayerRule(pattern="embedding.*", bits=4, dim=4, groups=2)
    model = palettize("tests.zoo:tokens", TOKENS, *rules)
    artifact = lower(model, tmp_path, backend, max_batch=5)
    assert not differing(model, artifact)
    session = runtime.load(artifact)
    for batch in (1, 2, 5):
        for inputs in inputs_of(model, batch):
            assert error(run(session, model, inputs), reference(model, inputs)) < 1e-5
    with pytest.raises(InvalidInput, match="fails"):
        run(session, model, next(inputs_of(model, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dim", [1, 4, 5])
def test_embeddings_decode_rows(bits: int, axis: int, dim: int, tmp_path: Path) -> None:
    groups = 1 if dim == 5 else 2
    rules = (
        LayerRule(pattern="embedding.*", bits=bits, dim=dim, axis=axis, groups=groups),
        LayerRule(pattern="h*", skip=True),
    )
    model = palettize("tests.zoo:tokens", TOKENS, *rules)
    artifact = lower(model, tmp_path, "portable")
    assert not differing(model, artifact)
    tensors = [value.val for value in ProgramFile(artifact).plan("forward").values]
    # the table is never there as a whole
    assert [96, 48] not in [x.sizes for x in tensors if getattr(x, "allocation_info", None)]
    session = RUNTIMES[0].load(artifact)
    for inputs in inputs_of(model):
        assert error(run(session, model, inputs), reference(model, inputs)) < 1e-5


def test_same_bytes_again(model: PalettizedModel, artifact: Path, tmp_path: Path) -> None:
    backend = XNNPACK[len(ExecuTorchExporter().files(artifact)) - 1]
    (tmp_path / "again").mkdir()
    again = lower(model, tmp_path / "again", backend)
    for first, second in zip(*map(ExecuTorchExporter().files, (artifact, again)), strict=True):
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("part", ["lut", "indices"])
def test_one_changed_bit_is_seen(
    part: Literal["lut", "indices"], model: PalettizedModel, artifact: Path
) -> None:
    file = ExecuTorchExporter().files(artifact)[-1]
    with (
        changed_bit(file, model.palettes["head.weight"], part),
        pytest.raises(InvalidInput, match=r"head\.weight: the packed weight is not what"),
    ):
        read(artifact)


def test_exchanged_weights_are_seen(originals: Callable[[Backend], Path], tmp_path: Path) -> None:
    """Each is what its key says, and the program asks for the other one's key."""
    artifact = tmp_path / "x.pte"
    artifact.write_bytes(originals("xnnpack-lut").read_bytes())

    def exchange(file: Any) -> None:
        entries = file.named_data.pte_data
        first, second = [key for key in entries if key.startswith(BLOB_PREFIX)][:2]
        entries[first], entries[second] = entries[second], entries[first]

    edited(artifact, exchange)
    with pytest.raises(InvalidInput, match="the packed weight is not what the program calls it"):
        read(artifact)


def test_header_in_another_order_is_seen(artifact: Path) -> None:
    data = artifact.read_bytes()
    names = [b'["stem.0.weight"]', b'["depthwise.weight"]']
    order, other = b",".join(names), b",".join(names[::-1])
    assert data.count(order) == 1
    artifact.write_bytes(data.replace(order, other))
    with pytest.raises(InvalidInput, match=r"depthwise\.weight: the packed weight is not what"):
        read(artifact)


def test_missing_weights_are_seen(artifact: Path) -> None:
    beside = artifact.with_suffix(WEIGHTS_SUFFIX)
    if beside.exists():
        beside.unlink()
        with pytest.raises(InvalidInput, match=r"\.lut: cannot be read"):
            read(artifact)
        return

    def drop(file: Any) -> None:
        entries = file.named_data.pte_data
        del entries[next(key for key in entries if key.startswith(BLOB_PREFIX))]

    edited(artifact, drop)
    with pytest.raises(InvalidInput, match=r"does not compute this weight|packed weight is not"):
        read(artifact)
    for runtime in RUNTIMES:
        with pytest.raises(Unsupported, match="rejects the program"):
            runtime.load(artifact)


def test_malformed_blobs_are_an_error_of_the_runtime(
    originals: Callable[[Backend], Path], tmp_path: Path
) -> None:
    """A length that contradicts the file: the delegate says so and nothing crashes."""
    data = originals("xnnpack-lut").read_bytes()
    start = data.index(b"DKM-LUT\0")
    for offset in (8, 12, 13, 16, 24, 40, 56):
        changed = bytearray(data)
        changed[start + offset + 3] ^= 0x40
        (tmp_path / "x.pte").write_bytes(changed)
        for runtime in RUNTIMES:
            with pytest.raises((Unsupported, InvalidInput)):
                runtime.load(tmp_path / "x.pte")


def test_damaged_files_are_read_or_refused(artifact: Path) -> None:
    file = ExecuTorchExporter().files(artifact)[-1]
    data = file.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(30):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(len(data), size=8)] = generator.integers(256, size=8)
        file.write_bytes(damaged.tobytes())
        try:
            read(artifact)
        except InvalidInput as error_:
            refused += "\n" not in str(error_)
    assert refused > 10


@pytest.mark.slow
def test_every_backend_says_what_the_app_links(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=3))
    for backend in get_args(Backend):
        (tmp_path / backend).mkdir()
        artifact = lower(model, tmp_path / backend, backend)
        notes = ExecuTorchExporter().notes(artifact)
        assert any(backend in note for note in notes)


def test_the_delegate_is_named_where_it_is_needed(artifact: Path) -> None:
    ours = artifact.with_suffix(WEIGHTS_SUFFIX).exists()
    assert (LUT_BACKEND.encode() in artifact.read_bytes()) != ours
