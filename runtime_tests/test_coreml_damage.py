"""Damaged Core ML packages: what changed is seen, what is malformed is refused, nothing crashes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from tests.mlpackages import MODEL, edit_model, operations, program, run
from tests.zoo import IMAGE, TOKENS, palettize

pytest.importorskip("coremltools")

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[PalettizedModel, Path]:
    """A model and its fp16 package."""
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    folder = tmp_path_factory.mktemp("tokens")
    return model, CoreMLExporter().lower(model, model.build(), folder, CoreMLOptions())


def blob(spec: Any, layer: str, argument: str) -> Any:
    """The reference into weight.bin of an argument of the operation that decodes ``layer``."""
    operation = next(o for o in operations(spec) if o.outputs[0].name.startswith(f"p_{layer}"))
    return operation.inputs[argument].arguments[0].value.blobFileValue


def record(artifact: Path, layer: str = "hidden_weight", argument: str = "lut") -> int:
    """Offset of its record in weight.bin."""
    found: list[int] = []
    edit_model(artifact, lambda spec: found.append(blob(spec, layer, argument).offset))
    return found[0]


def poke(artifact: Path, offset: int, format: str, value: int) -> None:
    content = bytearray((artifact / WEIGHTS).read_bytes())
    struct.pack_into(format, content, offset, value)
    (artifact / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("argument", "count"), [("lut", "16 LUT entries"), ("indices", "4608 indices")]
)
def test_one_changed_byte_is_seen_in_its_layer(
    argument: str, count: str, tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    model, original = tokens
    artifact = Path(shutil.copytree(original, tmp_path / original.name))
    content = (artifact / WEIGHTS).read_bytes()
    (start,) = struct.unpack_from("<Q", content, record(artifact, argument=argument) + 16)
    poke(artifact, start, "<B", content[start] ^ 1)
    palettes = CoreMLExporter().read_palettes(artifact)
    differences = {name: p.difference(palettes[name]) for name, p in model.palettes.items()}
    assert differences.pop("hidden.weight") == f"1 of {count} differ"
    assert not any(differences.values())
    (tokens_in,) = model.source.example_inputs()
    (changed,), (right,) = (
        CoreMLReferenceRuntime().load(path).run({"tokens": tokens_in.numpy()})
        for path in (artifact, original)
    )
    assert not np.array_equal(changed, right)


def _truncate(artifact: Path) -> None:
    content = (artifact / WEIGHTS).read_bytes()
    (artifact / WEIGHTS).write_bytes(content[:-1])


def _escape(artifact: Path, path: str) -> None:
    manifest = artifact / "Manifest.json"
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", path))


def _link(artifact: Path) -> None:
    shutil.copy(artifact / WEIGHTS, artifact.parent / "weight.bin")
    (artifact / WEIGHTS).unlink()
    (artifact / WEIGHTS).symlink_to(artifact.parent / "weight.bin")


def _loop(artifact: Path) -> None:
    (artifact / WEIGHTS).unlink()
    (artifact / WEIGHTS).symlink_to(artifact / WEIGHTS)


def _share(artifact: Path) -> None:
    """Every record claims the same bytes, the whole file but one of them."""
    content = (artifact / WEIGHTS).read_bytes()
    for layer in ("embedding_weight", "hidden_weight", "head_weight"):
        poke(artifact, record(artifact, layer, "indices") + 8, "<Q", len(content) - 1)
        poke(artifact, record(artifact, layer, "indices") + 16, "<Q", 0)
        poke(artifact, record(artifact, layer, "indices") + 24, "<Q", 0)

    def widen(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "constexpr_lut_to_dense":
                tensor = operation.inputs["indices"].arguments[0].value.type.tensorType
                del tensor.dimensions[1:]
                tensor.dimensions[0].constant.size = 2 * (len(content) - 1)

    edit_model(artifact, widen)


def _set_shape(artifact: Path, sizes: list[int]) -> None:
    def edit(spec: Any) -> None:
        operation = next(o for o in operations(spec) if o.outputs[0].name.startswith("p_hidden"))
        tensor = operation.inputs["lut"].arguments[0].value.type.tensorType
        tensor.ClearField("dimensions")
        for size in sizes:
            tensor.dimensions.add().constant.size = size

    edit_model(artifact, edit)


def _set_blob(artifact: Path, **fields: Any) -> None:
    def edit(spec: Any) -> None:
        for name, value in fields.items():
            setattr(blob(spec, "hidden_weight", "lut"), name, value)

    edit_model(artifact, edit)


MALFORMED: dict[str, Callable[[Path], object]] = {
    "truncated weight.bin": _truncate,
    "empty weight.bin": lambda a: (a / WEIGHTS).write_bytes(b""),
    "weight.bin missing": lambda a: (a / WEIGHTS).unlink(),
    "weight.bin is a link out of the package": _link,
    "bad sentinel": lambda a: poke(a, record(a), "<I", 0xDEADBEEE),
    "other data type": lambda a: poke(a, record(a) + 4, "<I", 2),
    "size too small": lambda a: poke(a, record(a) + 8, "<Q", 30),
    "size beyond the file": lambda a: poke(a, record(a) + 8, "<Q", 1 << 63),
    "data beyond the file": lambda a: poke(a, record(a) + 16, "<Q", 1 << 40),
    "unused bits": lambda a: poke(a, record(a, argument="indices") + 24, "<Q", 3),
    "offset beyond the file": lambda a: _set_blob(a, offset=1 << 40),
    "offset at the end": lambda a: _set_blob(a, offset=(a / WEIGHTS).stat().st_size - 8),
    "weights outside": lambda a: _set_blob(a, fileName="@model_path/../../../weight.bin"),
    "weights at an absolute path": lambda a: _set_blob(a, fileName="@model_path//etc/passwd"),
    "weights elsewhere": lambda a: _set_blob(a, fileName="/etc/passwd"),
    "weight.bin is a loop of links": _loop,
    "two records share their bytes": _share,
    "more elements than a number counts": lambda a: _set_shape(a, [1 << 40, 1 << 40]),
    "a shape of no elements": lambda a: _set_shape(a, [0, 1 << 62, 1 << 62]),
    "very many axes": lambda a: _set_shape(a, [1] * 100),
    "no manifest": lambda a: (a / "Manifest.json").unlink(),
    "manifest is no JSON": lambda a: (a / "Manifest.json").write_text("{"),
    "manifest is a list": lambda a: (a / "Manifest.json").write_text("[]"),
    "manifest leaves the package": lambda a: _escape(a, "../../../model.mlmodel"),
    "manifest with an absolute path": lambda a: _escape(a, "/etc/passwd"),
    "manifest with a path that is none": lambda a: _escape(a, "\\u0000"),
    "model missing": lambda a: (a / MODEL).unlink(),
    "model is no protobuf": lambda a: (a / MODEL).write_bytes(b"\xff" * 40),
    "layers are no JSON": lambda a: edit_model(
        a, lambda s: s.description.metadata.userDefined.update({"dkm_export.layers": "["})
    ),
    "no function": lambda a: edit_model(a, lambda s: s.mlProgram.functions.pop("main")),
    "a palette is gone": lambda a: edit_model(
        a, lambda s: setattr(operations(s)[0].outputs[0], "name", "other")
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_packages_are_refused(
    case: str, tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))
    MALFORMED[case](artifact)
    with pytest.raises(InvalidInput, match=artifact.name):
        CoreMLExporter().read_palettes(artifact)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated weight.bin", "ends beyond the end of the file"),
        ("weight.bin is a link out of the package", "leaves the package"),
        ("bad sentinel", "does not begin with 0xdeadbeef"),
        ("two records share their bytes", "shares bytes with another one"),
        ("more elements than a number counts", "too many axes or elements"),
        ("a shape of no elements", "too many axes or elements"),
        ("very many axes", "too many axes or elements"),
    ],
)
def test_what_is_malformed_is_said(
    case: str, message: str, tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))
    MALFORMED[case](artifact)
    with pytest.raises(InvalidInput, match=message):
        CoreMLReferenceRuntime().load(artifact)


def test_random_damage_raises_nothing_else(
    tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))
    generator = random.Random(0)
    files = {name: (artifact / name).read_bytes() for name in (MODEL, WEIGHTS, "Manifest.json")}
    for _ in range(150):
        for name, original in files.items():
            damaged = bytearray(original)
            for _ in range(generator.choice((0, 1, 3))):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            (artifact / name).write_bytes(damaged)
        try:
            CoreMLExporter().read_palettes(artifact)
            session = CoreMLReferenceRuntime().load(artifact)
            session.run({"tokens": np.zeros((1, 12), np.int32)})
        except DkmError:
            continue


def test_unknown_operators_are_named(tokens: tuple[PalettizedModel, Path], tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))

    def rename(spec: Any) -> None:
        next(o for o in operations(spec) if o.type == "gelu").type = "mystery"

    edit_model(artifact, rename)
    message = r"'mystery' of 'gelu_cast_fp16', operation \d+ of \d+ in function 'main', is not"
    with pytest.raises(Unsupported, match=message):
        CoreMLReferenceRuntime().load(artifact)


NUMBERS = (0, 1, -1, 2, 3, 7, -2, 100, 4096, 1 << 16, 1 << 20, (1 << 31) - 1, -(1 << 31))
SIZES = (0, 1, 2, 1 << 40, (1 << 63) - 1)


def free_shapes(spec: Any) -> None:
    """Take back what the program says about results, so that anything may come out of anything."""
    for operation in operations(spec):
        for output in operation.outputs if operation.type != "const" else ():
            output.type.tensorType.ClearField("dimensions")
            output.type.tensorType.dimensions.add().unknown.variadic = True


def change_something(spec: Any, generator: random.Random) -> None:
    """A number, a shape, a data type, an operator or an argument becomes another one."""
    from dkm_runtimes.coreml_reference.interpreter import OPERATORS

    operation = generator.choice(operations(spec))
    bindings = [b for argument in operation.inputs.values() for b in argument.arguments]
    values = [b.value for b in bindings if b.HasField("value")] + list(
        operation.attributes.values()
    )
    value = generator.choice(values)
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    match generator.randrange(8):
        case 0 if bindings:
            names = [output.name for other in operations(spec) for output in other.outputs]
            generator.choice(bindings).name = generator.choice(names)
        case 1 if operation.type != "const":
            operation.type = generator.choice(sorted(OPERATORS))
        case 2 if value.type.tensorType.dimensions:
            dimension = generator.choice(value.type.tensorType.dimensions)
            dimension.constant.size = generator.choice(SIZES)
        case 3:
            value.type.tensorType.dataType = generator.choice((1, 10, 11, 21, 23, 24, 25, 31, 37))
        case _ if kind in ("ints", "floats", "bools"):
            numbers = getattr(tensor, kind).values
            replacement: Any = generator.choice(NUMBERS)
            if kind == "bools":
                replacement = generator.random() < 0.5
            elif kind == "floats":
                replacement = generator.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
            for index in range(len(numbers)):
                numbers[index] = replacement


def run_changed_packages(originals: list[Path], folder: Path, count: int) -> None:
    """Change packages at random, and run them: nothing but our own errors, in little memory."""
    generator = random.Random(0)
    results: dict[str, int] = {}
    for number in range(count):
        original = originals[number % len(originals)]
        artifact = Path(shutil.copytree(original, folder / str(number)))

        def edit(spec: Any) -> None:
            for _ in range(generator.choice((1, 1, 2, 4))):
                change_something(spec, generator)
            if generator.random() < 0.7:
                free_shapes(spec)

        edit_model(artifact, edit)
        try:
            run(artifact, example_of(artifact))
            result = "ran"
        except DkmError as error:
            result = type(error).__name__
        results[result] = results.get(result, 0) + 1
        shutil.rmtree(artifact)
    assert min(results.get(name, 0) for name in ("ran", "InvalidInput", "Unsupported")) > 5, results
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 5 << 20  # KiB


def example_of(artifact: Path) -> tuple[torch.Tensor, ...]:
    """Zeros for the inputs that a package describes."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model.FromString((artifact / MODEL).read_bytes())
    return tuple(
        torch.zeros(tuple(entry.type.multiArrayType.shape)) for entry in spec.description.input
    )


SCRIPT = """
import resource, sys
from pathlib import Path
from runtime_tests.test_coreml_damage import run_changed_packages
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
*originals, folder, count = sys.argv[1:]
run_changed_packages([Path(original) for original in originals], Path(folder), int(count))
"""


def test_changed_programs_neither_crash_nor_hang_nor_fill_the_memory(
    tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    rules = (LayerRule(bits=4), LayerRule(pattern="stem*", bits=2, dim=2))
    model = palettize("tests.zoo:convolutions", IMAGE, *rules)
    other = CoreMLExporter().lower(model, model.build(), tmp_path, CoreMLOptions())
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tokens[1], other, tmp_path, "300"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )


def _build(operator: str, **arguments: Any) -> Callable[[Any], Any]:
    def build(x: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        return getattr(mb, operator)(**{"x": x, **arguments})

    return build


KERNEL = np.ones((4, 4, 2, 2), np.float32)
HUGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    # an operator in whose parameter a huge number is written
    "tile": (_build("tile", reps=[2, 1, 1, 1]), "reps"),
    "pad": (_build("pad", pad=[1, 2]), "pad"),
    "pad before a convolution": (
        _build("conv", weight=KERNEL, pad_type="custom", pad=[1, 1, 1, 1]),
        "pad",
    ),
    "dilation": (_build("conv", weight=KERNEL, pad_type="same", dilations=[2, 2]), "dilations"),
    "dilation, transposed": (
        _build("conv_transpose", weight=KERNEL, dilations=[2, 2]),
        "dilations",
    ),
    "stride, transposed": (_build("conv_transpose", weight=KERNEL, strides=[2, 2]), "strides"),
    "pad before a pool": (
        _build("max_pool", kernel_sizes=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
        "pad",
    ),
    "nearest": (_build("upsample_nearest_neighbor", scale_factor_height=2), "scale_factor_height"),
    "bilinear": (_build("upsample_bilinear", scale_factor_height=2), "scale_factor_height"),
    "resized": (_build("resize_bilinear", target_size_height=8), "target_size_height"),
    "resized by repeating": (
        _build("resize_nearest_neighbor", target_size_height=8, target_size_width=8),
        "target_size_height",
    ),
    "parts": (_build("split", num_splits=2, axis=1), "num_splits"),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_numbers_are_refused_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    build, parameter = HUGE[case]
    x = torch.ones(1, 4, 6, 6)
    artifact = program(build, (x,), tmp_path)
    run(artifact, (x,))

    def edit(spec: Any) -> None:
        names = {b.name for o in operations(spec) for b in o.inputs[parameter].arguments}
        for operation in operations(spec):
            if operation.outputs[0].name in names:
                values = operation.attributes["val"].immediateValue.tensor.ints.values
                values[:] = [1 << 30] * len(values)
        free_shapes(spec)

    edit_model(artifact, edit)
    with pytest.raises(DkmError, match=r"(more than 1 GiB|more than 4096 parts|overflowed)"):
        run(artifact, (x,))


@pytest.mark.parametrize("case", ["fill", "range_1d", "one_hot", "outer product", "matmul"])
def test_huge_results_of_inputs_are_refused(case: str, tmp_path: Path) -> None:
    """Sizes that are known when the program runs."""

    def build(n: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        count = mb.squeeze(x=n, axes=[0])
        if case == "fill":
            return mb.fill(shape=n)
        if case == "one_hot":
            return mb.one_hot(indices=n, one_hot_vector_size=count)
        places = mb.range_1d(start=0, end=count, step=1)
        row, column = mb.expand_dims(x=places, axes=[0]), mb.expand_dims(x=places, axes=[1])
        if case == "outer product":
            return mb.mul(x=row, y=column)
        return mb.matmul(x=column, y=row) if case == "matmul" else places

    small, large = torch.tensor([5], dtype=torch.int32), torch.tensor([1 << 24], dtype=torch.int32)
    artifact = program(build, (small,), tmp_path)
    run(artifact, (small,))
    if case in ("fill", "one_hot", "range_1d"):
        large *= 100
    with pytest.raises(Unsupported, match=r"more than 1 GiB"):
        run(artifact, (large,))


@pytest.mark.parametrize(
    ("name", "bound", "message"),
    [
        ("interpreter.MOST_BYTES_TOGETHER", 4000, "more than 4 GiB of"),
        ("bounds.MOST_WORK", 4000, r"5e\+03 operations, more than 4e\+03"),
        ("bounds.MOST_BYTES", 500, "takes 1024 bytes of memory"),
        ("operators.MOST_NUMBERS", 1, "a list of 2 numbers"),
    ],
)
def test_bounds(
    name: str, bound: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(1, 4, 6, 6)

    def build(x: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        y = mb.avg_pool(x=x, kernel_sizes=[3, 3], pad_type="same")
        for _ in range(8):
            y = mb.add(x=mb.matmul(x=y, y=x), y=mb.conv(x=y, weight=KERNEL, pad_type="same"))
        return y

    artifact = program(build, (x,), tmp_path)
    run(artifact, (x,))
    monkeypatch.setattr(f"dkm_runtimes.coreml_reference.{name}", bound)
    with pytest.raises(Unsupported, match=message):
        run(artifact, (x,))


def test_values_are_given_up_after_their_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(1000)

    def build(x: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        for _ in range(20):
            x = mb.square(x=x)
        return x

    artifact = program(build, (x,), tmp_path)
    limit = "dkm_runtimes.coreml_reference.interpreter.MOST_BYTES_TOGETHER"
    monkeypatch.setattr(limit, 8000)
    run(artifact, (x,))
    monkeypatch.setattr(limit, 7999)
    with pytest.raises(Unsupported, match="more than 4 GiB of values"):
        run(artifact, (x,))


def test_long_sequences_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, h = torch.ones(6, 1, 2), torch.ones(1, 2)

    def build(x: Any, h: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        weight = np.ones((2, 2), np.float32)
        return mb.rnn(x=x, initial_h=h, weight_ih=weight, weight_hh=weight)[0]

    artifact = program(build, (x, h), tmp_path)
    run(artifact, (x, h))
    monkeypatch.setattr("dkm_runtimes.coreml_reference.recurrent.MOST_STEPS", 5)
    with pytest.raises(Unsupported, match="more than 5 steps"):
        run(artifact, (x, h))


@pytest.mark.parametrize("limit", ["_MOST_BYTES", "_MOST_BYTES_TOGETHER"])
def test_weights_that_unpack_to_too_much_are_refused(
    limit: str, tokens: tuple[PalettizedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the palettes decodes no weight, and goes on."""
    monkeypatch.setattr(f"dkm_exporters.mlprogram.constants.{limit}", 5000)
    assert CoreMLExporter().read_palettes(tokens[1]).keys() == tokens[0].palettes.keys()
    with pytest.raises(Unsupported, match=r"more than [14] GiB"):
        CoreMLReferenceRuntime().load(tokens[1])
