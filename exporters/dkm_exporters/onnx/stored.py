"""What is stored in an ``.onnx`` or ``.ort`` file, whoever wrote it.

Nothing is decoded: sizes, types, and which operators take an initializer for a quantized weight
tell it all. Formats: ``onnx.proto``, and the operators of ``com.microsoft`` in ONNX Runtime's
``docs/ContribOperators.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx

from dkm_export.errors import InvalidInput
from dkm_export.exporting.description import StoredTensor
from dkm_export.palette import packed_size
from dkm_exporters.onnx.contents import Contents, Scope, outside

_BITS: Final = {
    **dict.fromkeys(("INT2", "UINT2"), 2),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("BOOL", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ"), 8),
    **dict.fromkeys(("FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT16", "UINT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("INT32", "UINT32", "FLOAT"), 32),
    **dict.fromkeys(("INT64", "UINT64", "DOUBLE", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}
"""Of one value, by the name of its type; strings have no size."""

_FIELDS: Final = (
    *("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data"),
)
"""Where a tensor may have its values one by one."""

_MOST_AXES: Final = 64
"""Of a tensor: sizes come from files, and are multiplied."""

_WORDS: Final = {"FLOAT": "float32", "DOUBLE": "float64"}


class _Inputs(NamedTuple):
    """Which inputs of an operator are a quantized weight and what dequantizes it."""

    weight: int
    scale: int | None
    zero_point: int | None


_WEIGHTS: Final[Mapping[str, tuple[_Inputs, ...]]] = {
    "DequantizeLinear": (_Inputs(0, 1, 2),),
    "QLinearConv": (_Inputs(3, 4, 5),),
    "QLinearMatMul": (_Inputs(3, 4, 5), _Inputs(0, 1, 2)),
    "MatMulInteger": (_Inputs(1, None, 3),),
    "ConvInteger": (_Inputs(1, None, 3),),
    "QGemm": (_Inputs(3, 4, 5),),
    "DynamicQuantizeMatMul": (_Inputs(1, 2, 3),),
    "MatMulIntegerToFloat": (_Inputs(1, 3, 5),),
    "DynamicQuantizeLSTM": (_Inputs(1, 8, 9), _Inputs(2, 10, 11)),
    "QAttention": (_Inputs(1, 4, 7),),
    "QEmbedLayerNormalization": (_Inputs(2, 8, 13), _Inputs(3, 9, 14), _Inputs(4, 10, 15)),
    "MatMulNBits": (_Inputs(1, 2, 3),),
    "MatMulBnb4": (_Inputs(1, 2, None),),
    "GatherBlockQuantized": (_Inputs(0, 2, 3),),
}

_PACKED: Final = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized")
"""Operators whose weights may be packed into bytes, of a width that an attribute says."""


def stored_tensors(contents: Contents) -> Iterator[StoredTensor]:
    """Every tensor of a file, in its order; scales and zero points belong to their weights.

    Raises:
        InvalidInput: when a tensor is of another size than it says.
    """
    sizes, counted = Sizes(contents.path), set[int]()
    tensors = [*contents.initializers, *contents.constants]
    for tensor in tensors:
        sizes.count(tensor.name, tensor.dims)
    # by identity: the same name is another one in another graph
    weights = _quantized(contents.scopes)
    parts = {id(part) for weight in weights.values() for part in weight.parts}
    for tensor in tensors:
        weight = weights.get(id(tensor))
        if weight is not None:
            scales = [part for part in weight.parts if id(part) not in counted]
            counted.update(id(part) for part in scales)
            nbytes, reason = sizes.of(tensor)
            yield replace(
                weight.entry,
                value_bytes=nbytes,
                scale_bytes=sum(sizes.of(part)[0] for part in scales),
                reason=reason,
            )
        elif id(tensor) not in parts:
            yield plain(tensor, sizes)
    for sparse in contents.sparse:
        values, indices = sparse.values, sparse.indices
        sizes.count(values.name, sparse.dims)
        yield StoredTensor(
            values.name,
            tuple(sparse.dims),
            f"sparse {encoding(values)}",
            bits_of(values),
            value_bytes=sizes.of(values)[0] + sizes.of(indices)[0],
        )


def plain(tensor: onnx.TensorProto, sizes: Sizes, reason: str = "") -> StoredTensor:
    """The entry of a tensor whose values are stored as they are.

    Raises:
        InvalidInput: when it is of another size than it says.
    """
    nbytes, shared = sizes.of(tensor)
    return StoredTensor(
        tensor.name,
        tuple(tensor.dims),
        encoding(tensor),
        value_bytes=nbytes,
        reason=shared or reason,
    )


def encoding(tensor: onnx.TensorProto) -> str:
    """The type of a tensor's values in words; ``unknown`` for a number that is no type."""
    name = _type_name(tensor)
    return _WORDS.get(name, name.lower())


def bits_of(tensor: onnx.TensorProto) -> int | None:
    """Of one value; None for strings and unknown types."""
    return _BITS.get(_type_name(tensor))


def _type_name(tensor: onnx.TensorProto) -> str:
    numbers = onnx.TensorProto.DataType
    return numbers.Name(tensor.data_type) if tensor.data_type in numbers.values() else "unknown"


@dataclass
class Sizes:
    """Bytes of the tensors of a file, each place outside of it counted once.

    Attributes:
        path: of the file.
    """

    path: Path
    _seen: dict[tuple[Path, int, int], onnx.TensorProto] = field(default_factory=dict)

    def of(self, tensor: onnx.TensorProto) -> tuple[int, str]:
        """The bytes of a tensor, and what is to be known of them.

        Raises:
            InvalidInput: when there are others than its shape says.
        """
        count, bits = self.count(tensor.name, tensor.dims), bits_of(tensor)
        if not tensor.data_type:
            raise InvalidInput(f"{self.path}: initializer '{tensor.name}' has no type")
        packed = None if bits is None else packed_size(count, bits)
        reason = ""
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = outside(self.path, tensor)
            stored = nbytes = place[2]
            first = self._seen.setdefault(place, tensor)
            if first is not tensor:
                nbytes, reason = 0, f"the same bytes as {first.name}"
        elif tensor.HasField("raw_data"):
            stored = nbytes = len(tensor.raw_data)
        else:
            fields = {name: getattr(tensor, name) for name in _FIELDS}
            stored = sum(map(len, fields.values()))
            # as protobuf stores them: small integers in few bytes
            nbytes = onnx.TensorProto(**fields).ByteSize()
            complex_parts = 2 if encoding(tensor).startswith("complex") else 1
            packed = packed if bits is not None and bits < 8 else count * complex_parts
        if stored != packed:
            raise InvalidInput(f"{self.path}: initializer '{tensor.name}' is not of its shape")
        return nbytes, reason

    def count(self, name: str, dims: Sequence[int]) -> int:
        """Values of a tensor.

        Raises:
            InvalidInput: when its sizes are none.
        """
        if len(dims) > _MOST_AXES or any(size < 0 for size in dims):
            raise InvalidInput(f"{self.path}: initializer '{name}' has no shape")
        return math.prod(dims)


def _quantized(scopes: Sequence[Scope]) -> dict[int, _Quantized]:
    """The initializers that a node takes for a quantized weight, by identity."""
    found: dict[int, _Quantized] = {}
    for scope in scopes:
        for node in scope.nodes:
            for inputs in _WEIGHTS.get(node.op_type, ()):
                weight = _input(node, inputs.weight, scope)
                if weight is None or id(weight) in found or bits_of(weight) is None:
                    continue
                scale = _input(node, inputs.scale, scope)
                if inputs.scale is None:  # ONNX Runtime's quantizer multiplies later, by this name
                    scale = scope.find(f"{weight.name.removesuffix('_quantized')}_scale")
                parts = (scale, _input(node, inputs.zero_point, scope))
                own = {id(x): x for x in parts if x is not None and x is not weight}
                found[id(weight)] = _Quantized(_entry(node, weight, scale), tuple(own.values()))
    return found


@dataclass(frozen=True, eq=False)
class _Quantized:
    """A quantized weight, still without sizes, and what dequantizes it."""

    entry: StoredTensor
    parts: tuple[onnx.TensorProto, ...]


def _input(node: onnx.NodeProto, index: int | None, scope: Scope) -> onnx.TensorProto | None:
    if index is None or index >= len(node.input):
        return None
    return scope.find(node.input[index])


def _entry(
    node: onnx.NodeProto, weight: onnx.TensorProto, scale: onnx.TensorProto | None
) -> StoredTensor:
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    groups = 1 if scale is None else max(math.prod(scale.dims), 1)
    bits, shape, word = bits_of(weight), tuple(weight.dims), encoding(weight)
    assert bits is not None
    block = max(numbers.get("block_size", 0), 0)
    if node.op_type in _PACKED and word == "uint8":
        bits, shape = _packed(node.op_type, numbers, shape)
        word = "float4" if node.op_type == "MatMulBnb4" else f"uint{bits}"
    if block:
        how = f"in blocks of {block}"
    elif scale is None and node.op_type not in ("MatMulInteger", "ConvInteger"):
        how = "with a scale that is computed"
    else:
        how = "per channel" if groups > 1 else "per tensor"
    return StoredTensor(weight.name, shape, f"{word} {how}", bits, groups=groups)


def _packed(
    operator: str, numbers: Mapping[str, Any], stored: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Bits, and the shape of the weight where the attributes fit what is stored."""
    bits = numbers.get("bits", 4)
    bits = bits if 1 <= bits <= 8 else 8
    if operator == "GatherBlockQuantized":
        return bits, (*stored[:-1], stored[-1] * 8 // bits) if stored else stored
    # as torch has it: outputs, inputs
    shape = (numbers.get("N", 0), numbers.get("K", 0))
    block = max(numbers.get("block_size", 0), 1)
    fits = min(shape) > 0 and 8 * math.prod(stored) >= bits * math.prod(shape)
    if fits and 8 * math.prod(stored) <= bits * shape[0] * (shape[1] + block):
        return bits, shape
    return 8, stored
