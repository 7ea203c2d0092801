"""What is stored in a ``.pte`` file, whoever wrote it.

A program has no names for its constants: they are called after their places, and those beside a
palette after it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import KernelCall, Tensor, TensorDataLocation

from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.exporting.description import (
    Description,
    StoredTensor,
    distinct,
    stored_palette,
)
from dkm_export.fields import Field, pack_fields
from dkm_export.palette import Palette
from dkm_export.plugins import missing_packages
from dkm_exporters.executorch.header import PALETTES_METHOD
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.reading import COREML, Decode, read_decodes
from dkm_exporters.executorch.xnnpack import BLOB_PREFIX, LUT_BACKEND
from dkm_exporters.executorch.xnnpack_graph import DATA_TYPES, Constant, Place, read_constants

_XNNPACK: Final = ("XnnpackBackend", LUT_BACKEND)
_MOST_AXES: Final = 64
_ELSEWHERE: Final = "constants in another file"

_WORDS: Final = {
    ScalarType.BYTE: ("uint8", 8),
    ScalarType.CHAR: ("int8", 8),
    ScalarType.SHORT: ("int16", 16),
    ScalarType.INT: ("int32", 32),
    ScalarType.LONG: ("int64", 64),
    ScalarType.HALF: ("float16", 16),
    ScalarType.FLOAT: ("float32", 32),
    ScalarType.DOUBLE: ("float64", 64),
    ScalarType.BOOL: ("bool", 8),
    ScalarType.BFLOAT16: ("bfloat16", 16),
    ScalarType.UINT16: ("uint16", 16),
    ScalarType.UINT32: ("uint32", 32),
    ScalarType.UINT64: ("uint64", 64),
}
"""What the values of a tensor are, and bits of one."""


_CONSTANT, _NAMED, _SEGMENT = "constant", "named", "segment"
_Key = tuple[str, str]
"""A place of data: of which kind, and its number or its name."""


class _Quantized(NamedTuple):
    """Arguments of an operator: a quantized weight, its scales and zero points.

    And bits of a value, or None for as many as its type has.
    """

    weight: int
    parts: tuple[int, ...]
    bits: int | None


_QUANTIZED: Final = {
    "quantized_decomposed::dequantize_per_tensor": _Quantized(0, (), None),
    "quantized_decomposed::dequantize_per_channel": _Quantized(0, (1, 2), None),
    "quantized_decomposed::embedding_byte": _Quantized(0, (1, 2), None),
    "quantized_decomposed::embedding_4bit": _Quantized(0, (1, 2), 4),
    "quantized_decomposed::embedding_2bit": _Quantized(0, (1, 2), 2),
}


def describe(file: ProgramFile, files: Sequence[Path]) -> Description:
    """Say what is stored.

    Raises:
        InvalidInput: when the file is malformed or contradicts itself.
    """
    decodes = read_decodes(file) if PALETTES_METHOD in file.methods else {}
    reader = _Reader(file, decodes)
    tensors = distinct(reader.tensors())
    return Description(files, tensors, reader.palettes, reader.unread)


@dataclass
class _Reader:
    """Goes through a program.

    Attributes:
        file: the program.
        decodes: of palettes that `dkm export` wrote, by parameter name.
        palettes: that are known bit for bit.
        unread: as in `Description`.
    """

    file: ProgramFile
    decodes: dict[str, Decode]
    palettes: dict[str, Palette] = field(default_factory=dict)
    unread: dict[str, int | None] = field(default_factory=dict)
    # by places: what has them first, and its name, which others may have too
    _seen: dict[object, tuple[object, str]] = field(default_factory=dict)

    def tensors(self) -> Iterator[StoredTensor]:
        """All that is stored; each place once."""
        self.palettes = {name: decode.palette for name, decode in self.decodes.items()}
        delegated = list(self._of_delegates())
        described = {tensor.name for tensor in delegated}
        for name, decode in self.decodes.items():
            if name not in described:
                yield _of_decode(name, decode)
        yield from self._constants()
        yield from delegated
        if self.file.initial_bytes:
            self.unread["values that buffers have at first"] = self.file.initial_bytes
        packed = (BLOB_PREFIX + decode.key for decode in self.decodes.values())
        known = {*self._seen, *(self._data(key) for key in packed)}
        for key, segment in self.file.named_segments.items():
            if self._data(key) not in known:
                known.add(self._data(key))
                self.unread[f"data named '{key}'"] = self.file.segment_size(segment)

    def _data(self, key: str) -> _Key:
        """The place of named data, which several names may have; its own where it is elsewhere."""
        segment = self.file.named_segments.get(key)
        return (_NAMED, key) if segment is None else (_SEGMENT, str(segment))

    def _first(self, place: object, owner: object, name: str) -> str | None:
        """The name of what had the place before the owner, or None."""
        known, first = self._seen.setdefault(place, (owner, name))
        return None if known == owner else first

    def _constants(self) -> Iterator[StoredTensor]:
        """Constants of the program itself, less those that palettes consist of."""
        parts = set(_parts(self.decodes))
        for method in self.file.methods:
            plan = self.file.plan(method)
            tensors = [x.val for x in plan.values if isinstance(x.val, Tensor)]
            quantized = dict(self._quantized(plan))
            scales = {place for _, own in quantized.values() for place in own}
            for tensor in tensors:
                place = _place(tensor)
                if place is None or place in self._seen or place in scales:
                    continue
                entry, data = self._stored(tensor, place)
                self._seen[place] = place, entry.name
                if data in parts:
                    continue
                if place in quantized:
                    operator, own = quantized[place]
                    bits = operator.bits or _WORDS[tensor.scalar_type][1]
                    entry = self._with_scales(entry, operator, bits, own)
                yield entry

    def _quantized(self, plan: Any) -> Iterator[tuple[_Key, tuple[_Quantized, dict[_Key, Any]]]]:
        """Weights that an operator dequantizes: by which, and its scales and zero points."""
        for chain in plan.chains:
            for instruction in chain.instructions:
                call = instruction.instr_args
                if not isinstance(call, KernelCall):
                    continue
                try:
                    operator = _QUANTIZED.get(plan.operators[call.op_index].name)
                    if operator is None:
                        continue
                    values = [plan.values[index].val for index in call.args]
                    weight = _place(values[operator.weight])
                    own = {_place(values[index]): values[index] for index in operator.parts}
                except IndexError as error:
                    raise self._malformed("an instruction") from error
                if weight is not None:
                    known = {place: part for place, part in own.items() if place is not None}
                    yield weight, (operator, known)

    def _stored(self, tensor: Any, place: _Key) -> tuple[StoredTensor, bytes]:
        """A constant as it is, and its bytes where it is none that has a name."""
        word, bits = _WORDS.get(tensor.scalar_type, (tensor.scalar_type.name.lower(), 0))
        sizes = tuple(tensor.sizes)
        if len(sizes) > _MOST_AXES or any(size < 0 for size in sizes):
            raise self._malformed("a shape")
        kind, name = place
        if not bits:
            raise Unsupported(f"{self.file.path}: constants of {word} are not known")
        nbytes = math.prod(sizes) * bits // 8
        if kind == _CONSTANT:
            data = bytes(self.file.constant_bytes(int(name), nbytes))
            return StoredTensor(f"constant {name}", sizes, word, value_bytes=nbytes), data
        size, reason = self._named_bytes(name, nbytes, place, name)
        return StoredTensor(name, sizes, word, value_bytes=size, reason=reason), b""

    def _with_scales(
        self, entry: StoredTensor, operator: _Quantized, bits: int, parts: Mapping[_Key, Any]
    ) -> StoredTensor:
        """The entry of a weight that is dequantized with these."""
        entries = {place: self._stored(part, place)[0] for place, part in parts.items()}
        new = [x for place, x in entries.items() if place not in self._seen]
        self._seen |= {place: (place, entry.name) for place in parts}
        groups = max((math.prod(x.shape) for x in entries.values()), default=1)
        how = "per channel" if operator.parts else "per tensor"
        packed = max(8 // bits, 1)
        return replace(
            entry,
            shape=(*entry.shape[:-1], entry.shape[-1] * packed) if entry.shape else (),
            encoding=f"{entry.encoding if packed == 1 else f'int{bits}'} {how}",
            bits=bits,
            groups=groups,
            scale_bytes=sum(x.nbytes for x in new),
        )

    def _of_delegates(self) -> Iterator[StoredTensor]:
        """What delegates have, in the program's named data or in what they are given."""
        for method in self.file.methods:
            for index in range(len(self.file.plan(method).delegates)):
                label = f"{method}/delegate {index}"
                if self._first(self.file.delegate_place(method, index), label, label):
                    continue  # of another method
                backend, blob = self.file.backend(method, index), self.file.delegate(method, index)
                if backend in _XNNPACK:
                    yield from self._xnnpack(blob, label)
                elif backend == COREML and not missing_packages(("coremltools",), "coreml"):
                    yield from self._ml_program(blob, label)
                else:
                    self.unread[f"{label}, for {backend}"] = len(blob)

    def _ml_program(self, blob: bytes, label: str) -> Iterator[StoredTensor]:
        # It imports coremltools, which takes seconds.
        from dkm_exporters.executorch.ml_programs import describe_part

        try:
            tensors, palettes, unread = describe_part(blob, f"{self.file.path}: {label}")
        except DkmError as error:
            if self.decodes:
                raise
            reason = str(error).removeprefix(f"{self.file.path}: {label}: ")
            self.unread[f"{label}, for {COREML} ({reason})"] = len(blob)
            return
        self.unread |= {f"{label}: {what}": count for what, count in unread.items()}
        for tensor in tensors:
            name = tensor.name if tensor.name in self.decodes else f"{label}/{tensor.name}"
            if tensor.name in palettes:
                self.palettes.setdefault(name, palettes[tensor.name])
            yield replace(tensor, name=name)

    def _xnnpack(self, blob: bytes, label: str) -> Iterator[StoredTensor]:
        """The constants of a graph for XNNPACK; the weights of palettes are not among them."""
        try:
            constants = read_constants(blob)
        except (ValueError, IndexError, struct.error) as error:
            raise self._malformed(label) from error
        layers = {decode.key: name for name, decode in self.decodes.items() if decode.key}
        beside = {x.number: layers[x.place.key] for x in constants if x.place.key in layers}
        for constant in constants:
            if constant.place.key in layers:
                continue
            if constant.role == "bias" and constant.beside in beside:
                name = f"bias beside {beside[constant.beside]}"
            elif constant.role:
                name = f"{label}/node {constant.node}/{constant.role}"
            else:
                name = f"{label}/value {constant.number}"
            yield self._xnnpack_constant(constant, name, label)

    def _xnnpack_constant(self, constant: Constant, name: str, label: str) -> StoredTensor:
        word, bits = DATA_TYPES.get(constant.data_type, (f"type {constant.data_type}", None))
        nbytes, reason = self._new_bytes(constant.place, constant, name, label)
        scale_bytes = constant.scale_bytes
        if constant.scale_place is not None:
            scale_bytes += self._new_bytes(constant.scale_place, constant, name, label)[0]
        how = "per channel" if constant.scales else "per tensor"
        if constant.block:
            how = f"in blocks of {constant.block}"
        return StoredTensor(
            name,
            constant.shape,
            word if bits is None else f"{word} {how}",
            bits,
            groups=max(constant.scales, 1),
            value_bytes=nbytes,
            scale_bytes=scale_bytes,
            reason=reason,
        )

    def _new_bytes(
        self, place: Place, constant: Constant, name: str, label: str
    ) -> tuple[int, str]:
        """Bytes at a place of a part, 0 where they are counted already; and what is to be known."""
        owner = label, constant.number
        if place.key:
            return self._named_bytes(place.key, place.size, owner, name)
        first = self._first((label, place.offset), owner, name)
        return (place.size, "") if first is None else (0, f"the same bytes as {first}")

    def _named_bytes(self, key: str, least: int, owner: object, name: str) -> tuple[int, str]:
        """Bytes of named data, 0 where they are counted already; and what is to be known.

        Args:
            key: of the data.
            least: bytes that it has to have.
            owner: what it belongs to.
            name: of the owner.
        """
        segment = self.file.named_segments.get(key)
        first = self._first(self._data(key), owner, name)
        if first is not None:
            return 0, f"the same bytes as {first}"
        if segment is None:
            self.unread[_ELSEWHERE] = None
            return 0, "in another file"
        size = self.file.segment_size(segment)
        if size < least:
            raise self._malformed(f"'{key}'")
        return size, ""

    def _malformed(self, what: str) -> InvalidInput:
        return InvalidInput(f"{self.file.path}: {what} is malformed: export it again")


def _place(value: Any) -> _Key | None:
    """Where a constant is, or None for what is none."""
    if not isinstance(value, Tensor) or value.allocation_info is not None:
        return None
    extra = value.extra_tensor_info
    if extra is not None and extra.location == TensorDataLocation.EXTERNAL:
        return _NAMED, extra.fully_qualified_name or ""
    return (_CONSTANT, str(value.data_buffer_idx)) if value.data_buffer_idx else None


def _of_decode(name: str, decode: Decode) -> StoredTensor:
    """A palette in the program's constants, or packed with its scale."""
    palette = decode.palette
    scale_bytes = 0 if palette.scale is None or decode.packed is None else palette.scale.nbytes
    return stored_palette(name, palette, scale_bytes=scale_bytes)


def _parts(decodes: Mapping[str, Decode]) -> Iterator[bytes]:
    """The constants that decodes consist of: LUTs, packed indices, and tables of fields."""
    for decode in decodes.values():
        palette = decode.palette
        yield palette.lut.tobytes()
        yield pack_fields(palette.indices.reshape(-1), palette.bits).tobytes()
        yield pack_fields(palette.indices, palette.bits).tobytes()
    for width in (1, 2, 4):
        for shift in range(0, 8, width):
            yield Field(width, shift).table().tobytes()
