"""Core ML's settings: every palette that a deployment target holds, and what apps expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dkm_export.checking.check import check
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import ExitCode, InvalidInput, Unsupported
from dkm_export.exporting.export import export
from dkm_export.palettized import BatchNorm, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.mlprogram.package import Package
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from tests.closeness import relative_l2
from tests.kinds import KINDS, palettize_kinds
from tests.networks import FAMILIES, palettized
from tests.zoo import IMAGE, TOKENS, palettize

pytest.importorskip("coremltools")

MODEL = "Data/com.apple.CoreML/model.mlmodel"


def matrix() -> Iterator[tuple[str, str, LayerRule]]:
    """Deployment target, how LUTs are stored, and the rule, as far as the format holds it."""
    every_bits = (1, 2, 3, 4, 6, 8)
    for target, bits in product(("iOS16", "iOS17"), (1, 2, 4, 6, 8)):
        yield target, "float", LayerRule(bits=bits)
    for bits, dim, groups, axis in product(every_bits, (1, 2, 4), (1, 2, 3), (0, 1)):
        if (bits, dim) != (8, 4):  # more centroids than vectors
            yield "iOS18", "float", LayerRule(bits=bits, dim=dim, groups=groups, axis=axis)
    for bits, dim, groups in product(every_bits, (1, 2), (1, 2)):
        yield "iOS26", "float", LayerRule(bits=bits, dim=dim, groups=groups)
    for target, bits, dim in product(("iOS18", "iOS26"), (1, 2, 3, 4, 6), (1, 4)):
        yield target, "int8", LayerRule(bits=bits, dim=dim, lut="int8")


def lower(model: PalettizedModel, module: nn.Module, folder: Path, **options: Any) -> Path:
    exporter = CoreMLExporter()
    chosen = CoreMLOptions.model_validate(options)
    exporter.requires(model, chosen)
    return exporter.lower(model, module, folder, chosen)


def spec_of(package: Path) -> Any:
    from coremltools.proto import Model_pb2

    return Model_pb2.Model.FromString((package / MODEL).read_bytes())


# 156 packages with up to eleven palettes each, one of them tied
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "lut", "rule"),
    [
        pytest.param(
            *case,
            id=f"{case[0]} {case[1]} {case[2].bits}/{case[2].dim} "
            f"axis {case[2].axis} groups {case[2].groups}",
        )
        for case in matrix()
    ],
)
def test_every_palette_that_the_format_holds(
    target: str, lut: str, rule: LayerRule, tmp_path: Path
) -> None:
    model, reference = palettize_kinds(rule)
    assert len(model.palettes) >= 5  # where a palette is no smaller than float16, there is none
    options = {"precision": "fp32", "deployment_target": target, "lut": lut}
    package = lower(model, reference, tmp_path, **options)
    palettes = CoreMLExporter().read_palettes(package)
    assert palettes.keys() == model.palettes.keys()
    assert not any(p.difference(palettes[name]) for name, p in model.palettes.items())
    (tokens,) = KINDS.example_inputs()
    outputs = CoreMLReferenceRuntime().load(package).run({"tokens": tokens.numpy()})
    for ours, theirs in zip(outputs, reference(tokens), strict=True):
        assert relative_l2(ours, theirs) <= 1e-5


def ways() -> Iterator[Any]:
    """Each family in both precisions, and with its batch norms folded where it has some."""
    for name, family in FAMILIES.items():
        kept: BatchNorm = "separate"
        folded: BatchNorm = "fold-before-training"
        for batch_norm, precision in ((kept, "fp16"), (kept, "fp32"), (folded, "fp32")):
            if batch_norm == kept or family.batch_norms:
                usual = (batch_norm, precision) == (kept, "fp16") and not family.slow
                marks = [] if usual else [pytest.mark.slow]
                yield pytest.param(name, batch_norm, precision, marks=marks)


@pytest.mark.parametrize(("name", "batch_norm", "precision"), list(ways()))
def test_every_family_passes_the_check(
    name: str, batch_norm: BatchNorm, precision: str, tmp_path: Path
) -> None:
    save_checkpoint(palettized(name, 6, batch_norm), tmp_path / "model.dkm.safetensors")
    settings = {"coreml": {"precision": precision}}
    export(tmp_path / "model.dkm.safetensors", ["coreml"], tmp_path / "out", settings=settings)
    report = check(tmp_path / "out", runtimes=["coreml-reference"])
    assert report.exit_code is ExitCode.OK, report.runtimes


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (
            {"bits": 3},
            {"deployment_target": "iOS16"},
            r"embedding\.weight: bits 3 cannot be held, allowed: 1, 2, 4, 6, 8 \(nearest: 2\) on "
            r"iOS16; change its rule .* coreml\.deployment_target=iOS18",
        ),
        ({"bits": 4, "dim": 2}, {"deployment_target": "iOS17"}, "dim 2 cannot be held.*iOS17"),
        ({"bits": 4, "groups": 2}, {"deployment_target": "iOS16"}, "groups 2 cannot .*iOS16"),
        ({"bits": 4}, {"deployment_target": "iOS15"}, "iOS15 holds no palettes: .*iOS16"),
        ({"bits": 4}, {"lut": "int8"}, r"not int8 times a power of two: set coreml\.lut=float"),
        (
            {"bits": 4, "lut": "int8"},
            {"lut": "int8", "deployment_target": "iOS17"},
            "iOS17 has no int8 LUTs",
        ),
        ({"bits": 5}, {}, r"bits 5 cannot be held.*\(nearest: 4\); change its rule in the recipe$"),
    ],
)
def test_what_a_target_cannot_hold(
    rule: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(**rule))
    with pytest.raises(Unsupported, match=message):
        CoreMLExporter().requires(model, CoreMLOptions.model_validate(options))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_luts_take_half_the_bytes(precision: str, tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4, dim=4, lut="int8"))
    for name in ("float", "int8"):
        (tmp_path / name).mkdir()
    packages = {
        name: lower(model, model.build(), tmp_path / name, precision=precision, lut=name)
        for name in ("float", "int8")
    }
    palettes = {name: CoreMLExporter().read_palettes(path) for name, path in packages.items()}
    for name, palette in model.palettes.items():
        assert palette.difference(palettes["float"][name]) is None
        assert palette.difference(palettes["int8"][name]) is None
    operations = Package(packages["int8"]).operations
    kinds = [operation.kind for operation in operations]
    assert kinds.count("constexpr_blockwise_shift_scale") == len(model.palettes)


LABELS = tuple(f"label {index}" for index in range(24))
IMAGES = {"image": {"scale": [0.01, 0.02, 0.03], "bias": [-1, 0, 0.5]}}


@pytest.fixture(scope="module")
def convolutions() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_images_and_class_labels(
    layout: str, convolutions: PalettizedModel, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n")
    package = lower(
        convolutions,
        convolutions.build(),
        tmp_path,
        precision="fp32",
        images={"image": {**IMAGES["image"], "color_layout": layout}},
        class_labels=str(labels),
        author="A. Uthor",
        license="MIT",
        version="1.2",
        description="Tells things apart.",
    )
    spec = spec_of(package)
    (image,) = spec.description.input
    assert image.type.imageType.width == 16
    assert image.type.imageType.ColorSpace.Name(image.type.imageType.colorSpace) == layout
    names = [output.name for output in spec.description.output]
    assert names == ["classLabel", "classLabel_probs", "output"]
    assert spec.description.predictedFeatureName == "classLabel"
    metadata = spec.description.metadata
    assert (metadata.author, metadata.license) == ("A. Uthor", "MIT")
    assert (metadata.versionString, metadata.shortDescription) == ("1.2", "Tells things apart.")
    (x,) = convolutions.source.example_inputs()
    (logits,) = CoreMLReferenceRuntime().load(package).run({"image": x.numpy()})
    assert relative_l2(logits, convolutions.build()(x)) <= 1e-5
    assert "label 23" in (package / MODEL).read_bytes().decode(errors="ignore")


def test_packages_say_where_they_come_from(convolutions: PalettizedModel, tmp_path: Path) -> None:
    from dataclasses import replace

    from dkm_export import __version__

    model = replace(convolutions, sha256="ab" * 32)
    own = spec_of(lower(model, model.build(), tmp_path)).description.metadata.userDefined
    assert own["dkm_export.version"] == __version__
    assert own["dkm_export.checkpoint_sha256"] == "ab" * 32
    layers = json.loads(own["dkm_export.layers"])
    assert layers["p_head_weight_cast_fp16"]["bits"] == 4
    assert not any("date" in key for key in own)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"enumerated_shapes": {"image": [[1, 3, 16, 16], [1, 3, 24, 20]]}}, (24, 20)),
        ({"shape_ranges": {"image": [1, 3, [8, 32], [8, 32]]}}, (8, 30)),
    ],
)
@pytest.mark.parametrize("images", [{}, IMAGES])
def test_shapes_that_vary(
    options: dict[str, Any],
    sizes: tuple[int, int],
    images: dict[str, Any],
    convolutions: PalettizedModel,
    tmp_path: Path,
) -> None:
    package = lower(
        convolutions, convolutions.build(), tmp_path, precision="fp32", images=images, **options
    )
    for height, width in ((16, 16), sizes):
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
        (y,) = CoreMLReferenceRuntime().load(package).run({"image": x.numpy()})
        assert relative_l2(y, convolutions.build()(x)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": {"photo": {}}}, "images: no input 'photo', the model has: image"),
        ({"images": {"image": {"color_layout": "GRAYSCALE"}}}, "GRAYSCALE image is float32"),
        ({"class_labels": ["a", "a"]}, "a label is there twice"),
        ({"enumerated_shapes": {"image": [[1, 3, 8, 8]]}}, "that of the recipe, is one of them"),
        ({"shape_ranges": {"image": [1, 3, [20, 32], 16]}}, "the shape of the recipe, among them"),
        (
            {
                "enumerated_shapes": {"image": [[1, 3, 16, 16]]},
                "shape_ranges": {"image": [1, 3, 16, 16]},
            },
            "has both enumerated_shapes and shape_ranges",
        ),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], message: str, convolutions: PalettizedModel
) -> None:
    with pytest.raises(InvalidInput, match=message):
        CoreMLExporter().requires(convolutions, CoreMLOptions.model_validate(options))


def test_labels_have_to_be_as_many_as_the_output(
    convolutions: PalettizedModel, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"has shape \[1, 24\], 2 labels need \[1, 2\]"):
        lower(convolutions, convolutions.build(), tmp_path, class_labels=["a", "b"])
