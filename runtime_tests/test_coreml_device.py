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

from dkm_export.checking.runtime import NumericClass, Runtime
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.coreml.package import Package
from dkm_runtimes.coreml import (
    CoreMLCPURuntime,
    CoreMLGPURuntime,
    CoreMLNeuralEngineRuntime,
    CoreMLRuntime,
)
from dkm_runtimes.pixels import ImageInput, image_inputs, picture, pixels
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
