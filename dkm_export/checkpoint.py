"""``.dkm.safetensors``: one file that holds a palettized model.

Tensors: ``<param>.lut`` (float16 ``[groups, 2**bits, dim]``), ``<param>.indices`` (packed uint8)
and every dense tensor under its own name. The header's metadata has one key, ``dkm``, with a JSON
object: schema version, tool version, source, spec, the layout of each palette, and which other
parameters are tied to one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dkm_export import __version__
from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput
from dkm_export.files import CHECKPOINT, sha256, staged
from dkm_export.palette import Palette, unpack
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, Frozen
from dkm_export.validation import explain

SUFFIX = ".dkm.safetensors"
_KEY = "dkm"


class _Header(Frozen):
    schema_version: Literal[1] = 1
    tool_version: str
    source: ModelSource
    spec: CompressionSpec
    metrics: dict[str, FiniteFloat]
    layers: dict[str, PaletteEntry]
    ties: dict[str, str] = Field(default_factory=dict)


def save_checkpoint(model: PalettizedModel, path: Path, *, force: bool = False) -> None:
    """Write ``model``; the same model gives the same bytes.

    Raises:
        InvalidInput: when ``path`` exists and ``force`` is false.
    """
    tensors = dict(model.dense)
    layers = {}
    for name, palette in model.palettes.items():
        tensors[f"{name}.lut"] = torch.from_numpy(palette.lut)
        tensors[f"{name}.indices"] = torch.from_numpy(palette.packed)
        layers[name] = PaletteEntry.of(palette)
    header = _Header(
        tool_version=__version__,
        source=model.source,
        spec=model.spec,
        metrics=dict(model.metrics),
        layers=layers,
        ties=dict(model.ties),
    )
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with staged(path, force=force) as new:
        new.write_bytes(save(contiguous, metadata={_KEY: header.model_dump_json()}))


def load_checkpoint(path: Path) -> PalettizedModel:
    """Read and validate a checkpoint; no code is run and no size field is trusted.

    Raises:
        InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
    """
    if not path.is_file():
        raise InvalidInput(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path}: not a safetensors file, or cut short: {error}") from error
    if _KEY not in metadata:
        raise InvalidInput(f"{path}: has no '{_KEY}' metadata, so `dkm compress` did not write it")
    try:
        header = _Header.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        raise InvalidInput(f"{path}: {explain(error, _Header)}") from error
    palettes = {}
    for name, entry in header.layers.items():
        try:
            palettes[name] = _palette(
                entry, tensors.pop(f"{name}.lut"), tensors.pop(f"{name}.indices")
            )
        except KeyError as error:
            raise InvalidInput(f"{path}: tensor {error} is missing") from error
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {name}: {error}") from error
    try:
        return PalettizedModel(
            header.source,
            header.spec,
            palettes,
            tensors,
            header.metrics,
            header.ties,
            sha256(path),
        )
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the one in the folder of a run or an export."""
    return path / CHECKPOINT if path.is_dir() else path


def _palette(entry: PaletteEntry, lut: Tensor, packed: Tensor) -> Palette:
    layout = entry.layout
    if lut.dtype != torch.float16 or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise InvalidInput(
            f"LUT is {lut.dtype} and indices are {packed.dtype}{list(packed.shape)}, "
            "expected torch.float16 and flat torch.uint8"
        )
    # `unpack` compares the count with the bytes that are there before it allocates anything.
    indices = unpack(packed.numpy(), entry.bits, layout.vectors).reshape(layout.index_shape)
    return Palette(entry.bits, layout, lut.numpy(), indices)
