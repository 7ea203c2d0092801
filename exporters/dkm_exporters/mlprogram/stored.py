"""What is stored in an ML program, whoever wrote it.

Nothing is decoded: types, shapes and the operations that the constants go through tell it all. One
of them may take what another one gives, such as a LUT of int8 or a palette with a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from dkm_export.exporting.description import PALETTE, StoredTensor, distinct
from dkm_export.palette import Palette
from dkm_exporters.mlprogram.constants import DECODERS, LUT_TO_DENSE, SHIFT_SCALE
from dkm_exporters.mlprogram.package import Operation, Package, Reference, Storage
from dkm_exporters.mlprogram.palettes import layer_names, palettes_of_any, read_palettes

_CONST: Final = "const"
_SPARSE: Final = "constexpr_sparse_to_dense"
_SPARSE_LUT: Final = "constexpr_lut_to_sparse"
_SPARSE_SCALE: Final = "constexpr_sparse_blockwise_shift_scale"
_AFFINE: Final = "constexpr_affine_dequantize"
_CAST: Final = "constexpr_cast"

_DATA: Final = {
    LUT_TO_DENSE: "indices",
    SHIFT_SCALE: "data",
    _SPARSE: "nonzero_data",
    _SPARSE_LUT: "indices_nonzero_data",
    _SPARSE_SCALE: "nonzero_data",
    _AFFINE: "quantized_data",
    _CAST: "source_val",
    _CONST: "val",
}
"""The argument that has a value for each weight, or for each that is not 0."""

_KINDS: Final = {
    "lut": "lut_bytes",
    **dict.fromkeys(("scale", "offset", "zero_point"), "scale_bytes"),
}
"""What an argument's bytes count as, if not as values."""

_SETTINGS: Final = {"shape", "axis", "vector_axis", "output_dtype"}
"""Arguments that belong to the program."""

_MOST_NESTED: Final = 8
"""Operations that a constant may go through; coremltools writes three."""


Unread = dict[str, int | None]
"""As in `Description`."""


def describe(package: Package) -> tuple[list[StoredTensor], dict[str, Palette], Unread]:
    """The tensors of all functions, the palettes that are known bit for bit, and what is unread.

    What `dkm export` wrote has to be as `read_palettes` wants it.

    Raises:
        InvalidInput: when the package is malformed.
        Unsupported: when `dkm export` wrote it, with a palette that is none.
    """
    layers = layer_names(package)
    if layers:
        palettes, refused = read_palettes(package), dict[str, str]()
    else:
        palettes, refused = palettes_of_any(package)
    names = {operation: layer.name for operation, layer in layers.items()}
    counted: dict[object, str] = {}
    tensors = []
    for entry in _Function(package, counted).tensors():
        reason = refused.get(entry.name, "")
        noted = replace(entry, reason=f"only listed: {reason}") if reason else entry
        tensors.append(replace(noted, name=names.get(entry.name, entry.name)))
    nested = {package.function: _nested_bytes(package)}
    for name in package.functions:
        if name != package.function:
            other = package.another(name)
            nested[name] = _nested_bytes(other)
            tensors += [
                replace(entry, name=f"{name}/{entry.name}")
                for entry in _Function(other, counted).tensors()
                if entry.nbytes  # what functions share is listed once
            ]
    unread: Unread = {
        f"blocks of operations in function '{name}'": count
        for name, count in nested.items()
        if count
    }
    if package.unread_bytes:
        unread["weights that are taken in blocks only, or not at all"] = package.unread_bytes
    return distinct(tensors), palettes, unread


def _nested_bytes(package: Package) -> int:
    return sum(operation.nested for operation in package.operations)


@dataclass
class _Function:
    """The constants of one function.

    Attributes:
        package: the function.
        counted: names of constants by their places in weight files, each of which counts once.
    """

    package: Package
    counted: dict[object, str]
    _made: dict[str, Operation] = field(default_factory=dict)
    _inside: dict[object, str] = field(default_factory=dict)  # the model file; by identity

    def tensors(self) -> Iterator[StoredTensor]:
        """Each constant that the program computes with, in its order."""
        constants = [x for x in self.package.operations if x.kind in DECODERS]
        self._made = {output: constant for constant in constants for output in constant.outputs}
        parts = {name for x in constants if x.kind != _CONST for name in x.references}
        for constant in constants:
            if parts.isdisjoint(constant.outputs) and self._is_tensor(constant):
                yield self._with_bytes(constant, self._entry(constant))

    def _is_tensor(self, constant: Operation) -> bool:
        """Whether it is more than a setting, such as a stride, which belongs to the program."""
        data = constant.storage.get("val")
        return constant.kind != _CONST or (
            data is not None
            and (data.place is not None or bool(data.shape and "float" in data.word))
        )

    def _entry(self, constant: Operation, depth: int = 0) -> StoredTensor:
        """What an operation gives, still without bytes."""
        kind, data = constant.kind, self._argument(constant, _DATA[constant.kind])
        if isinstance(data, Operation) and depth < _MOST_NESTED:
            inner = self._entry(data, depth + 1)
        elif isinstance(data, Storage):
            inner = StoredTensor(constant.name, data.shape, data.word, data.bits)
        else:
            inner = StoredTensor(constant.name, (), "unknown", 0)
        if kind in (_CONST, _CAST):
            return replace(inner, name=constant.name, bits=None)
        entry = replace(inner, name=constant.name, shape=_shape(constant) or inner.shape)
        if kind in (LUT_TO_DENSE, _SPARSE_LUT):
            return self._palette(constant, entry)
        if kind == _SPARSE:
            return replace(entry, encoding=f"sparse {inner.encoding}")
        if inner.encoding == PALETTE:
            return entry
        scale = self._argument(constant, "scale")
        scales = scale.shape if isinstance(scale, Storage) else ()
        mask = self._argument(constant, "data_mask")
        sizes = mask.shape if isinstance(mask, Storage) else inner.shape
        return replace(
            entry,
            encoding=f"{inner.encoding} {_granularity(sizes, scales)}",
            groups=max(math.prod(scales), 1),
        )

    def _palette(self, constant: Operation, entry: StoredTensor) -> StoredTensor:
        lut = self._argument(constant, "lut")
        # of int8, it is scaled
        sizes = _shape(lut) if isinstance(lut, Operation) else lut.shape if lut else ()
        entries, dim = (*sizes, 1) if len(sizes) == 1 else sizes[-2:] or (1, 1)
        return replace(
            entry,
            encoding=PALETTE,
            bits=max(entries - 1, 1).bit_length(),
            dim=dim,
            groups=max(math.prod(sizes[:-2]), 1),
            axis=self._axis(constant, len(entry.shape)) if dim > 1 else None,
        )

    def _argument(self, operation: Operation, name: str) -> Storage | Operation | None:
        """How an argument is stored, or the operation that makes it of what is."""
        if name in operation.storage:
            return operation.storage[name]
        for reference in operation.arguments.get(name, []):
            made = self._made.get(reference.name) if isinstance(reference, Reference) else None
            return made.storage.get("val") if made and made.kind == _CONST else made
        return None

    def _axis(self, constant: Operation, rank: int) -> int | None:
        """Along which the vectors of a palette lie, where the program says it."""
        for value in constant.arguments.get("vector_axis", []):
            made = self._made.get(value.name) if isinstance(value, Reference) else None
            for known in made.arguments.get("val", []) if made else [value]:
                if isinstance(known, np.ndarray) and known.size == 1 and known.dtype.kind in "iu":
                    return int(known.reshape(())) % max(rank, 1)
        return None

    def _with_bytes(self, constant: Operation, entry: StoredTensor) -> StoredTensor:
        """The entry with the bytes of all that the operation is made of."""
        sizes = {"value_bytes": 0, "lut_bytes": 0, "scale_bytes": 0}
        reason, seen, left = "", {constant.name}, [(constant, "value_bytes")]
        while left:
            operation, kind = left.pop()
            for name in sorted(operation.arguments.keys() - _SETTINGS):
                part = self._argument(operation, name)
                own = kind if kind == "lut_bytes" else _KINDS.get(name, kind)
                if isinstance(part, Operation) and part.name not in seen:
                    seen.add(part.name)
                    left.append((part, own))
                elif isinstance(part, Storage):
                    first = self._first(part, entry.name)
                    sizes[own] += 0 if first else part.nbytes
                    if own == "value_bytes" and first not in (None, entry.name):
                        reason = f"the same bytes as {first}"
        return replace(
            entry,
            value_bytes=sizes["value_bytes"],
            lut_bytes=sizes["lut_bytes"],
            scale_bytes=sizes["scale_bytes"],
            reason=reason,
        )

    def _first(self, part: Storage, name: str) -> str | None:
        """What else has the same bytes, or None where they are new."""
        known: dict[object, str] = self.counted if part.place else self._inside
        key: object = part.place or id(part)  # the package keeps it alive
        if key in known:
            return known[key]
        known[key] = name
        return None


def _shape(operation: Operation) -> tuple[int, ...]:
    """That of what an operation gives, a mask and values as well: of the last."""
    shape = [*operation.outputs.values()][-1].shape if operation.outputs else None
    return tuple(size or 0 for size in shape or ())


def _granularity(sizes: tuple[int, ...], scales: tuple[int, ...]) -> str:
    """How many values share a scale, in words."""
    if math.prod(scales) <= 1:
        return "per tensor"
    if len(sizes) == len(scales):
        for size, count in zip(sizes, scales, strict=True):
            if 1 < count < size:
                return f"in blocks of {size // count}"
    return "per channel"
