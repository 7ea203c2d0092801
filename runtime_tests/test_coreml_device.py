"""Core ML on a Mac and on a device: what can be tested of it without either.

``MLModel`` is a stand-in here, and no compiler sees the Swift code.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dkm_export.checking.metrics import LIMITS
from dkm_export.checking.runtime import NumericClass, Runtime
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.coreml.options import ImageInput
from dkm_exporters.mlprogram.package import Package
from dkm_runtimes.coreml import (
    CoreMLCPURuntime,
    CoreMLGPURuntime,
    CoreMLNeuralEngineRuntime,
    CoreMLRuntime,
)
from dkm_runtimes.pixels import image_inputs, picture, pixels
from tests.zoo import IMAGE, TOKENS, palettize

ct = pytest.importorskip("coremltools")

ROOT = Path(__file__).parents[1]
MODEL = "Data/com.apple.CoreML/model.mlmodel"
RUNTIMES = (CoreMLRuntime, CoreMLCPURuntime, CoreMLGPURuntime, CoreMLNeuralEngineRuntime)
COLOR = ImageInput(scale=1 / 57.375, bias=(-2.1, -2.0, -1.8), color_layout="RGB")
"""Mean and deviation about as for ImageNet."""
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 1, 3, 16, 16)).astype(np.float64)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the int64 token network."""
    inputs = (TOKENS[0].model_copy(update={"dtype": "int64"}),)
    model = palettize("tests.zoo:tokens", inputs, LayerRule(bits=4))
    folder = tmp_path_factory.mktemp("tokens")
    return CoreMLExporter().lower(model, model.build(), folder, CoreMLOptions())


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the image network, in fp32."""
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    folder = tmp_path_factory.mktemp("convolutions")
    return CoreMLExporter().lower(model, model.build(), folder, CoreMLOptions(precision="fp32"))


def with_images(package: Path, folder: Path, text: str) -> Path:
    """A copy of a package with this metadata about its image inputs."""
    from coremltools.proto import Model_pb2

    copy = folder / package.name
    shutil.copytree(package, copy)
    spec = Model_pb2.Model.FromString((copy / MODEL).read_bytes())
    spec.description.metadata.userDefined["dkm_export.images"] = text
    (copy / MODEL).write_bytes(spec.SerializeToString())
    return copy


def described(image: ImageInput) -> str:
    return json.dumps({"image": image.model_dump()})


def normalized(values: npt.NDArray[Any], image: ImageInput) -> npt.NDArray[np.float32]:
    bias = np.array(image.bias).reshape(-1, 1, 1)
    x: npt.NDArray[np.float32] = (image.scale * values + bias).astype(np.float32)
    return x


class FakeModel:
    """Stands in for ``coremltools.models.MLModel``, and keeps what it is given."""

    made: list[FakeModel]

    def __init__(self, path: str, compute_units: Any) -> None:
        self.path, self.units = path, compute_units
        self.given: Mapping[str, Any] = {}
        self.made.append(self)

    def predict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        self.given = given
        return {"other": np.zeros(1), "output": np.arange(3, dtype=np.float32)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """Models that runtimes load, on what says to be a Mac."""
    FakeModel.made = []
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    return FakeModel.made


def test_runtimes_are_registered_under_their_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["dkm_export.runtimes"]
    for name, value in entries.items():
        assert metadata.EntryPoint(name, value, "").load().name == name
    assert {runtime.name for runtime in RUNTIMES} <= entries.keys()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_core_ml_is_not_run_elsewhere(
    runtime: type[Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert runtime().unavailable() == "Core ML runs only on macOS"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert runtime().unavailable() is None


@pytest.mark.parametrize(
    ("runtime", "units"),
    [
        (CoreMLRuntime, "ALL"),
        (CoreMLCPURuntime, "CPU_ONLY"),
        (CoreMLGPURuntime, "CPU_AND_GPU"),
        (CoreMLNeuralEngineRuntime, "CPU_AND_NE"),
    ],
)
def test_compute_units_and_integers(
    runtime: type[Runtime], units: str, tokens: Path, made: list[FakeModel]
) -> None:
    session = runtime().load(tokens)
    assert session.numeric_class is NumericClass.FP16
    ids = np.arange(12).reshape(1, 12)
    assert ids.dtype == np.int64
    (output,) = session.run({"tokens": ids})
    assert output.tolist() == [0, 1, 2]
    (model,) = made
    assert (model.path, model.units) == (str(tokens), ct.ComputeUnit[units])
    assert model.given["tokens"].dtype == np.int32
    assert np.array_equal(model.given["tokens"], ids)


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_images_are_given_as_images(
    layout: str, convolutions: Path, tmp_path: Path, made: list[FakeModel]
) -> None:
    image = ImageInput.model_validate(COLOR.model_dump() | {"color_layout": layout})
    session = CoreMLRuntime().load(with_images(convolutions, tmp_path, described(image)))
    session.run({"image": normalized(PIXELS[0], image)})
    given = made[0].given["image"]
    assert (given.mode, given.size) == ("RGB", (16, 16))
    channels = PIXELS[0, 0] if layout == "RGB" else PIXELS[0, 0, ::-1]
    assert np.array_equal(np.asarray(given), channels.transpose(1, 2, 0))


def test_arrays_without_metadata_stay_arrays(convolutions: Path, made: list[FakeModel]) -> None:
    x = np.full((1, 3, 16, 16), 0.3, np.float32)
    CoreMLRuntime().load(convolutions).run({"image": x})
    assert made[0].given["image"] is x


def test_samples_that_are_no_image_are_not_run(
    convolutions: Path, tmp_path: Path, made: list[FakeModel]
) -> None:
    session = CoreMLRuntime().load(with_images(convolutions, tmp_path, described(COLOR)))
    for wrong in (0.5, -1, 256):
        values = PIXELS[0].copy()
        values[0, 1, 2, 3] = wrong
        with pytest.raises(Unsupported, match="input 'image' of a sample is not an 8-bit image"):
            session.run({"image": normalized(values, COLOR)})


def test_images_need_pillow(
    convolutions: Path, tmp_path: Path, made: list[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = with_images(convolutions, tmp_path, described(COLOR))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Unsupported, match=r"pip install 'dkm-export\[models\]'"):
        CoreMLRuntime().load(package)


def test_pixels_are_not_rounded() -> None:
    image = ImageInput(scale=0.5, bias=(1.0,), color_layout="GRAYSCALE")
    x = np.array([[[[1.0, 1.1], [2.0, 128.5]]]], np.float32)
    expected = [[[[0, 0.2], [2, 255]]]]
    assert pixels(x, image) == pytest.approx(np.array(expected), abs=1e-6)
    x[0, 0, 0, 1] = 1.5
    assert picture("grey", x, image).tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"image": {"scale": 1, "bias": [0]}}',
        '{"image": {"scale": 0, "bias": [0, 0, 0], "color_layout": "RGB"}}',
        '{"image": {"scale": 1, "bias": [0], "color_layout": "RGB"}}',
        '{"image": {"scale": 1, "bias": [0, 0, NaN], "color_layout": "RGB"}}',
        '{"image": {"scale": 1, "bias": [0], "color_layout": "GRAYSCALE"}}',
        '{"picture": {"scale": 1, "bias": [0, 0, 0], "color_layout": "RGB"}}',
    ],
)
def test_damaged_metadata_of_images(text: str, convolutions: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"dkm_export\.images.*: export it again"):
        image_inputs(Package(with_images(convolutions, tmp_path, text)))


def stored(values: bytes, entry: Mapping[str, Any], count: int) -> npt.NDArray[Any]:
    """An array of the file of values, read as the Swift code does."""
    dtype = np.dtype({"float32": "<f4", "int32": "<i4", "image": "u1"}[entry["kind"]])
    size = count * int(np.prod(entry["shape"]))
    array = np.frombuffer(values, dtype, size, entry["offset"])
    return array.reshape(count, *entry["shape"])


def test_a_device_test_holds_samples_and_limits(tokens: Path) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 96, (8, 1, 12))
    logits = generator.normal(size=(8, 1, 12)).astype(np.float32)
    best = logits.argmax(-1)
    files = CoreMLNeuralEngineRuntime().device_test(
        tokens, {"tokens": ids}, {"output": logits, "best": best}, LIMITS
    )
    prefix = Package(tokens).path.stem.capitalize()
    assert sorted(files) == [
        "README.md",
        f"{prefix}Samples.bin",
        f"{prefix}Samples.json",
        f"{prefix}Tests.swift",
    ]
    layout = json.loads(files[f"{prefix}Samples.json"])
    values = files[f"{prefix}Samples.bin"]
    assert (layout["model"], layout["count"]) == (tokens.stem, 8)
    limits = LIMITS[NumericClass.FP16]
    assert layout["limits"] == {
        "relativeL2": limits.relative_l2,
        "rtol": limits.rtol,
        "atol": limits.atol,
        "sqnrDB": limits.sqnr_db,
    }
    (given,), (expected, last) = layout["inputs"], layout["outputs"]
    assert (given["name"], given["kind"], given["shape"]) == ("tokens", "int32", [1, 12])
    assert (expected["name"], expected["kind"]) == ("output", "float32")
    assert np.array_equal(stored(values, given, 8), ids)
    assert np.array_equal(stored(values, expected, 8), logits)
    assert (last["name"], last["kind"], last["shape"]) == ("best", "int32", [1])
    assert np.array_equal(stored(values, last, 8), best)
    assert len(values) == 4 * (ids.size + logits.size + best.size)


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_a_device_test_holds_images(layout: str, convolutions: Path, tmp_path: Path) -> None:
    image = ImageInput.model_validate(COLOR.model_dump() | {"color_layout": layout})
    package = with_images(convolutions, tmp_path, described(image))
    outputs = {"output": np.ones((4, 1, 24), np.float32)}
    files = CoreMLRuntime().device_test(
        package, {"image": normalized(PIXELS, image)}, outputs, LIMITS
    )
    data = {Path(name).suffix: content for name, content in files.items()}
    layout_read = json.loads(data[".json"])
    assert layout_read["limits"]["sqnrDB"] == LIMITS[NumericClass.FP32].sqnr_db
    (entry,) = layout_read["inputs"]
    assert (entry["kind"], entry["shape"]) == ("image", [16, 16, 4])
    found = stored(data[".bin"], entry, 4)
    channels = PIXELS[:, 0] if layout == "BGR" else PIXELS[:, 0, ::-1]
    assert np.array_equal(found[..., :3], channels.transpose(0, 2, 3, 1))
    assert (found[..., 3] == 255).all()
    assert np.array_equal(stored(data[".bin"], layout_read["outputs"][0], 4), outputs["output"])
    with pytest.raises(Unsupported, match="not an 8-bit image"):
        CoreMLRuntime().device_test(
            package, {"image": normalized(PIXELS / 2, image)}, outputs, LIMITS
        )


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("digits_cnn", "DigitsCnn"), ("a", "A"), ('9"; exit(0) //', "Exit"), ("99", "Model")],
)
def test_swift_names_are_identifiers(name: str, prefix: str, tokens: Path, tmp_path: Path) -> None:
    package = tmp_path / "folder" / f"{name.replace('/', ':')}.mlpackage"
    shutil.copytree(tokens, package)
    files = CoreMLRuntime().device_test(
        package, {"tokens": np.zeros((1, 1, 12), np.int32)}, {"output": np.ones((1, 1, 12))}, LIMITS
    )
    swift = files[f"{prefix}Tests.swift"].decode()
    assert f"final class {prefix}Tests: XCTestCase {{" in swift
    assert f'"{prefix}Samples"' in swift
    assert json.loads(files[f"{prefix}Samples.json"])["model"] == package.stem
    for content in (swift, files["README.md"].decode()):
        assert "__" not in content.replace(package.stem, "")
    for opening, closing in ("()", "[]", "{}"):
        assert swift.count(opening) == swift.count(closing)


def test_the_swift_code_covers_units_and_measures() -> None:
    import dkm_runtimes.coreml_device

    swift = Path(dkm_runtimes.coreml_device.__file__).with_name("Tests.swift").read_text()
    for units in (".all", ".cpuOnly", ".cpuAndGPU", ".cpuAndNeuralEngine"):
        assert f"try check({units}, " in swift
    for measure in (
        "relative > limits.relativeL2 {",
        "abs(error) > limits.atol * largest + limits.rtol * abs(reference)\n",
        "sqnr < limits.sqnrDB {",
    ):
        assert measure in swift
    assert not [line for line in swift.splitlines() if "try!" in line or "as!" in line]
