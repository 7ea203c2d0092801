"""What is stored in packages that coremltools made without us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from dkm_export.comparison import SAME, compare
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.inspection import Inspection, inspect
from dkm_export.palette import Palette
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from tests.foreign import IMAGE, encodings, named, network
from tests.mlpackages import edit_model, operations, program, save
from tests.zoo import TOKENS, palettize

pytest.importorskip("coremltools")

Convert = Callable[..., Any]
CONV, HIDDEN, HEAD = 32 * 27, 64 * 32, 32 * 64


@pytest.fixture(scope="module")
def convert() -> Convert:
    """The network as coremltools converts it, for a deployment target and a precision."""
    import coremltools as ct

    model, inputs = network()
    traced = torch.jit.trace(model, inputs)
    made: dict[tuple[str, str], Any] = {}

    def converted(target: str = "iOS18", precision: str = "FLOAT16") -> Any:
        if (target, precision) not in made:
            made[target, precision] = ct.convert(
                traced,
                inputs=[ct.TensorType(name="image", shape=IMAGE)],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=getattr(ct.precision, precision),
                skip_model_load=True,
            )
        return made[target, precision]

    return converted


def compressed(model: Any, how: str, folder: Path, **options: Any) -> Inspection:
    """The package that one of coremltools' ways of compressing makes of a model."""
    import coremltools.optimize.coreml as cto

    kinds = {
        "palettize_weights": cto.OpPalettizerConfig,
        "linear_quantize_weights": cto.OpLinearQuantizerConfig,
        "prune_weights": cto.OpMagnitudePrunerConfig,
    }
    joint = options.pop("joint", False)
    config = cto.OptimizationConfig(global_config=kinds[how](weight_threshold=100, **options))
    extra = {"joint_compression": True} if joint else {}
    return inspect(save(getattr(cto, how)(model, config, **extra), folder))


def weights(found: Inspection) -> list[tuple[object, ...]]:
    """Encoding, bits, dim, groups of each layer, in order."""
    return list(encodings(found).values())


@pytest.mark.parametrize(("precision", "size"), [("FLOAT16", 2), ("FLOAT32", 4)])
def test_a_plain_package_is_all_dense(
    precision: str, size: int, convert: Convert, tmp_path: Path
) -> None:
    found = inspect(save(convert("iOS16", precision), tmp_path))
    assert not found.layers
    assert {x.encoding for x in found.dense} == {f"float{8 * size}"}
    assert [x.nbytes for x in found.dense] == [
        size * count for count in (HIDDEN, HEAD, CONV, 64, 32, 32)
    ]
    assert sum(found.totals.values()) == found.bytes
    assert found.bytes == sum(x.stat().st_size for x in tmp_path.rglob("*") if x.is_file())


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_palettes_are_known_bit_for_bit(target: str, convert: Convert, tmp_path: Path) -> None:
    found = compressed(convert(target), "palettize_weights", tmp_path, nbits=4)
    assert weights(found) == [("palette", 4, 1, 1)] * 3
    assert [(x.value_bytes, x.lut_bytes) for x in found.layers] == [
        (count // 2, 32) for count in (CONV, HIDDEN, HEAD)
    ]
    assert found.palettes.keys() == {layer.name for layer in found.layers}
    assert found.account is not None
    assert found.account.parameters == CONV + HIDDEN + HEAD + 32 + 64 + 32


def test_vectors(convert: Convert, tmp_path: Path) -> None:
    found = compressed(convert(), "palettize_weights", tmp_path, nbits=4, cluster_dim=2)
    assert weights(found) == [("palette", 4, 2, 1)] * 3
    assert {x.axis for x in found.layers} == {0}
    assert [(x.value_bytes, x.lut_bytes) for x in found.layers] == [
        (count // 4, 64) for count in (CONV, HIDDEN, HEAD)
    ]


def test_groups_of_channels(convert: Convert, tmp_path: Path) -> None:
    options = {"nbits": 3, "granularity": "per_grouped_channel", "group_size": 8}
    found = compressed(convert(), "palettize_weights", tmp_path, **options)
    assert weights(found) == [("palette", 3, 1, groups) for groups in (4, 8, 4)]
    assert [x.lut_bytes for x in found.layers] == [16 * groups for groups in (4, 8, 4)]
    assert len(found.palettes) == 3


@pytest.mark.parametrize(
    ("target", "options", "reason", "lut_bytes"),
    [
        (("iOS18", "FLOAT32"), {"nbits": 4}, "its LUT is not representable in float16", 64),
        (
            ("iOS18", "FLOAT16"),
            {
                "nbits": 3,
                "granularity": "per_grouped_channel",
                "group_size": 8,
                "channel_axis": 1,
            },
            "groups along other axes than 0 are not known",
            16 * 8,
        ),
    ],
)
def test_what_no_palette_of_ours_can_express_is_listed(
    target: tuple[str, str],
    options: dict[str, Any],
    reason: str,
    lut_bytes: int,
    convert: Convert,
    tmp_path: Path,
) -> None:
    found = compressed(convert(*target), "palettize_weights", tmp_path, **options)
    assert not found.palettes
    assert {x.encoding for x in found.layers} == {"palette"}
    assert {x.reason for x in found.layers} == {f"only listed: {reason}"}
    head = found.layers[-1]
    assert (head.bits, head.shape, head.lut_bytes) == (options["nbits"], (32, 64), lut_bytes)
    assert head.value_bytes == HEAD * options["nbits"] // 8
    assert found.account is None


def test_a_scale_per_channel_after_a_palette(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import Builder as mb

    rng = np.random.default_rng(0)
    lut = rng.standard_normal((1, 1, 16, 1)).astype(np.float16).astype(np.float32)
    indices = rng.integers(0, 16, (8, 24), np.uint8)
    scale = rng.uniform(1, 2, (8, 1)).astype(np.float32)

    def build(x: Any) -> Any:
        from coremltools.converters.mil.mil import types

        dtype = types.nptype_from_builtin(types.string_to_builtin("uint4"))
        weight = mb.constexpr_lut_to_dense(indices=indices.astype(dtype), lut=lut)
        scaled = mb.constexpr_blockwise_shift_scale(data=weight, scale=scale, name="scaled")
        return mb.linear(x=x, weight=scaled)

    found = inspect(program(build, (torch.zeros(1, 24),), tmp_path))
    (layer,) = found.layers
    assert (layer.encoding, layer.bits, layer.shape) == ("palette", 4, (8, 24))
    assert (layer.value_bytes, layer.lut_bytes, layer.scale_bytes) == (96, 64, 32)
    palette = found.palettes[layer.name]
    np.testing.assert_array_equal(palette.indices, indices)
    assert palette.scale is not None
    np.testing.assert_array_equal(palette.scale, scale)
    assert found.account is not None
    assert [change.palette for change in compare(found, found) if change.is_layer] == [SAME]


def copy_lookups(spec: Any, count: int) -> None:
    """Let each palette be decoded more often, from the same records."""
    function = spec.mlProgram.functions["main"]
    listed = function.block_specializations[function.opset].operations
    for place in reversed(range(len(listed))):
        if listed[place].type == "constexpr_lut_to_dense":
            for number in range(count):
                copy = type(listed[place])()
                copy.CopyFrom(listed[place])
                copy.outputs[0].name += f"_copy_{number}"
                listed.insert(place + 1, copy)


def test_operations_that_share_a_record_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of iOS 16, where an operation unpacks the indices itself."""
    from coremltools.converters.mil.mil import Builder as mb

    from dkm_exporters.mlprogram import constants

    packed = np.random.default_rng(0).integers(0, 256, 125_000, np.uint8)
    lut, shape = np.array([-1, 1], np.float32), np.array([1000, 1000], np.uint32)

    def build(x: Any) -> Any:
        weight = mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=shape, name="weight")
        return mb.linear(x=x, weight=weight)

    path = program(build, (torch.zeros(1, 1000),), tmp_path, "iOS16")
    assert inspect(path).palettes["weight"].indices.nbytes == 1_000_000
    edit_model(path, lambda spec: copy_lookups(spec, 200))
    decoded: list[str] = []
    decode = constants.DECODERS["const"]

    def counted(arguments: constants.Arguments) -> list[Any]:
        decoded.append("const")
        return decode(arguments)

    monkeypatch.setitem(cast("dict[str, Any]", constants.DECODERS), "const", counted)
    found = inspect(path)
    assert len(found.layers) == 201
    assert sum(palette.indices.nbytes for palette in found.palettes.values()) <= 8 * found.bytes
    reasons = {x.reason for x in found.layers if x.name not in found.palettes}
    assert reasons == {
        "only listed: decoded weights take more than eight times the memory of the files"
    }
    assert len(decoded) <= 10, "each constant once, however many take it"


@pytest.mark.parametrize(
    ("target", "options", "encoding", "bits", "groups", "scale_bytes"),
    [
        # of iOS 16: a float16 scale and an int8 zero point per channel
        ("iOS16", {}, "int8 per channel", 8, 64, 64 * 3),
        ("iOS18", {}, "int8 per channel", 8, 64, 64 * 2),
        (
            "iOS18",
            {"dtype": "int4", "granularity": "per_tensor"},
            *("int4 per tensor", 4, 1, 2),
        ),
        (
            "iOS18",
            {"dtype": "uint4", "granularity": "per_block", "block_size": 8, "mode": "linear"},
            *("uint4 in blocks of 8", 4, 64 * 4, 64 * 4 * 2 + 64 * 4 // 2),
        ),
    ],
)
def test_quantized_weights(
    target: str,
    options: dict[str, Any],
    encoding: str,
    bits: int,
    groups: int,
    scale_bytes: int,
    convert: Convert,
    tmp_path: Path,
) -> None:
    options = {"mode": "linear_symmetric"} | options
    found = compressed(convert(target), "linear_quantize_weights", tmp_path, **options)
    (hidden,) = [x for x in found.layers if x.shape == (64, 32)]
    assert (hidden.encoding, hidden.bits, hidden.groups) == (encoding, bits, groups)
    assert hidden.value_bytes == HIDDEN * bits // 8
    assert hidden.scale_bytes in (scale_bytes, scale_bytes + 1)  # packed with or without a rest
    assert not found.palettes
    assert found.account is None


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_pruned_weights(target: str, convert: Convert, tmp_path: Path) -> None:
    found = compressed(convert(target), "prune_weights", tmp_path, target_sparsity=0.5)
    assert weights(found) == [("sparse float16", 16, 1, 1)] * 3
    mask_and_values = [(count + 7) // 8 + 2 * (count // 2) for count in (CONV, HIDDEN, HEAD)]
    sizes = [layer.value_bytes for layer in found.layers]
    assert sizes == pytest.approx(mask_and_values, abs=4)


@pytest.mark.parametrize(
    ("how", "options", "encoding"),
    [
        ("palettize_weights", {"nbits": 4}, ("sparse palette", 4, 1, 1)),
        (
            "linear_quantize_weights",
            {"mode": "linear_symmetric"},
            ("sparse int8 per channel", 8, 1, 32),
        ),
    ],
)
def test_pruned_and_compressed(
    how: str,
    options: dict[str, Any],
    encoding: tuple[object, ...],
    convert: Convert,
    tmp_path: Path,
) -> None:
    import coremltools.optimize.coreml as cto

    prune = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100)
    pruned = cto.prune_weights(convert(), cto.OptimizationConfig(global_config=prune))
    found = compressed(pruned, how, tmp_path, joint=True, **options)
    assert weights(found)[-1] == encoding
    assert not any(layer.reason for layer in found.layers)
    bits = encoding[1]
    assert isinstance(bits, int)
    assert found.layers[-1].value_bytes == pytest.approx(HEAD // 8 + HEAD // 2 * bits // 8, abs=4)


def test_a_lut_of_int8(convert: Convert, tmp_path: Path) -> None:
    import coremltools.optimize.coreml as cto

    config = cto.OpPalettizerConfig(nbits=4, weight_threshold=100)
    palettized = cto.palettize_weights(convert(), cto.OptimizationConfig(global_config=config))
    found = compressed(
        palettized,
        "linear_quantize_weights",
        tmp_path,
        joint=True,
        mode="linear_symmetric",
        granularity="per_tensor",
    )
    assert weights(found) == [("palette", 4, 1, 1)] * 3
    assert {layer.lut_bytes for layer in found.layers} == {16 + 2}


def test_functions_share_what_they_share(convert: Convert, tmp_path: Path) -> None:
    import coremltools as ct

    parts = []
    for name, how, options in (
        ("first", "palettize_weights", {"nbits": 4}),
        ("second", "linear_quantize_weights", {"mode": "linear_symmetric"}),
    ):
        (tmp_path / name).mkdir()
        parts.append(compressed(convert(), how, tmp_path / name, **options))
    functions = ct.utils.MultiFunctionDescriptor()
    for name, part in zip(("first", "second"), parts, strict=True):
        functions.add_function(str(part.file), "main", name)
    functions.default_function_name = "first"
    ct.utils.save_multifunction(functions, str(tmp_path / "both.mlpackage"))
    found = inspect(tmp_path / "both.mlpackage")
    first, second = (encodings(part) for part in parts)
    assert encodings(found) == first | {f"second/{name}": x for name, x in second.items()}
    assert [x.name for x in found.dense] == [x.name for x in parts[0].dense], "biases are shared"
    assert sum(found.totals.values()) == found.bytes


@pytest.mark.parametrize("folder", ["weights", "weights/../weights"])
def test_one_record_counts_once(folder: str, convert: Convert, tmp_path: Path) -> None:
    def share(spec: Any) -> None:
        function = spec.mlProgram.functions["main"]
        constants = {
            operation.outputs[0].name: operation.attributes["val"]
            for operation in function.block_specializations[function.opset].operations
            if operation.type == "const"
        }
        constants["head_bias_to_fp16"].blobFileValue.CopyFrom(
            constants["conv_bias_to_fp16"].blobFileValue
        )
        constants["head_bias_to_fp16"].blobFileValue.fileName = f"@model_path/{folder}/weight.bin"

    path = save(convert(), tmp_path)
    before = inspect(path)
    edit_model(path, share)
    found = inspect(path)
    tensors = named(found)
    assert tensors["conv_bias_to_fp16"] == named(before)["conv_bias_to_fp16"]
    shared = tensors["head_bias_to_fp16"]
    assert (shared.nbytes, shared.reason) == (0, "the same bytes as conv_bias_to_fp16")
    assert found.description.unread == {"weights that are taken in blocks only, or not at all": 64}
    assert sum(found.totals.values()) == found.bytes


def test_a_palette_of_the_same_record_counts_once(convert: Convert, tmp_path: Path) -> None:
    before = compressed(convert("iOS16"), "palettize_weights", tmp_path, nbits=4)
    edit_model(before.file, lambda spec: copy_lookups(spec, 1))
    found = inspect(before.file)
    assert [layer.nbytes for layer in found.layers] == [
        size for layer in before.layers for size in (layer.nbytes, 0)
    ]
    assert len(found.palettes) == 6
    assert found.account == before.account
    assert found.account is not None


def test_the_result_of_an_operation_has_no_thousands_of_axes(
    convert: Convert, tmp_path: Path
) -> None:
    def edit(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "constexpr_lut_to_dense":
                for _ in range(5000):
                    sizes = operation.outputs[0].type.tensorType.dimensions
                    sizes.add().constant.size = (1 << 63) - 1

    path = compressed(convert("iOS16"), "palettize_weights", tmp_path, nbits=4).file
    edit_model(path, edit)
    with pytest.raises(
        InvalidInput, match=r"operation \d+ of \d+ in function 'main' gives a value"
    ):
        inspect(path)


def test_weights_inside_blocks_are_counted(tmp_path: Path) -> None:
    weight = np.ones((64, 64), np.float32)

    def build(x: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        return mb.while_loop(
            _cond=lambda i, y: mb.less(x=i, y=np.float32(3)),
            _body=lambda i, y: (mb.add(x=i, y=np.float32(1)), mb.linear(x=y, weight=weight)),
            loop_vars=(np.float32(0), x),
        )[1]

    found = inspect(program(build, (torch.zeros(1, 64),), tmp_path))
    blocks = found.description.unread["blocks of operations in function 'main'"]
    assert blocks is not None
    assert 0 < blocks < found.totals["not taken apart"]
    weights = found.description.unread["weights that are taken in blocks only, or not at all"]
    assert weights is not None
    assert weight.nbytes <= weights < weight.nbytes + 600  # a bias, too


def test_a_neural_network_is_refused_in_one_line(tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.models import datatypes
    from coremltools.models.neural_network import NeuralNetworkBuilder

    builder = NeuralNetworkBuilder(
        [("x", datatypes.Array(3))], [("y", datatypes.Array(2))], disable_rank5_shape_mapping=True
    )
    builder.add_inner_product("layer", np.ones((2, 3)), None, 3, 2, False, "x", "y")
    path = tmp_path / "old.mlpackage"
    ct.models.MLModel(builder.spec, skip_model_load=True, weights_dir=str(tmp_path)).save(str(path))
    with pytest.raises(Unsupported, match=r"old\.mlpackage: holds a neuralNetwork, not an ml"):
        inspect(path)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_ours_are_compared_with_the_checkpoint_by_layer(precision: Any, tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4, dim=2))
    options = CoreMLOptions(precision=precision)
    found = inspect(CoreMLExporter().lower(model, model.build(), tmp_path, options))
    assert found.palettes.keys() == model.palettes.keys()
    changes = {change.name: change for change in compare(found, found)}
    assert {changes[name].palette for name in model.palettes} == {SAME}
    for layer in found.layers:
        palette: Palette = model.palettes[layer.name]
        assert palette.difference(found.palettes[layer.name]) is None
        assert layer.value_bytes == palette.packed.nbytes
        assert layer.lut_bytes == palette.lut.nbytes * (1 if precision == "fp16" else 2)


def test_an_attribute_counts_for_nothing_where_an_input_has_its_name(
    convert: Convert, tmp_path: Path
) -> None:
    def edit(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "const":
                operation.inputs["val"].SetInParent()  # without any arguments

    path = save(convert(), tmp_path)
    edit_model(path, edit)
    found = inspect(path)
    assert not found.layers
    assert not found.dense
