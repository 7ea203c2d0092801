"""ExecuTorch programs for stock kernels: palettes bit for bit in file and runtime, bad files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from torch import Tensor, nn

from dkm_export.checking.runtime import NumericClass
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.fields import pack_fields
from dkm_export.palette import MAX_BITS, MAX_DIM, Layout, Palette, packed_size
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.decode import Decode
from dkm_exporters.executorch.options import Backend
from dkm_runtimes.executorch import ExecuTorchRuntime
from tests.programs import changed_bit, differing
from tests.zoo import CASES, IMAGE, ROW, lively, palettize

REPOSITORY = Path(__file__).parents[1]
HERE = "runtime_tests.test_executorch"
ROWS = (InputSpec(name="rows", shape=(3, 16)),)
PORTABLE = ExecuTorchOptions(backend="portable")
VOLUME = (InputSpec(name="volume", shape=(1, 2, 4, 4, 4)),)

LAYOUTS = {
    "scalars": Layout((24, 16, 3, 3)),
    "vectors": Layout((24, 16, 3, 3), dim=4),
    "input_axis": Layout((24, 16, 3, 3), dim=8, axis=1),
    "last_axis": Layout((64, 128), dim=8, axis=1),
    "padded": Layout((25, 16, 3), dim=4),
    "padded_inside": Layout((12, 5, 3, 3), dim=2, axis=1),
    "uneven": Layout((7, 3, 3)),
    "groups": Layout((24, 16, 3, 3), groups=8),
    "uneven_groups": Layout((12, 3, 3), groups=4),
    "group_vectors": Layout((64, 32), dim=4, groups=2),
    "widest": Layout((MAX_DIM, 30), dim=MAX_DIM),
    "one": Layout((1,)),
}


class Shared(nn.Module):
    """A layer that runs twice, its weight used bare, and another that is also only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.second.weight.dtype == torch.float32
        x = self.first(torch.relu(self.first(rows)))
        return x @ self.first.weight, self.second(x)


def shared() -> nn.Module:
    return lively(Shared())


def volumes() -> nn.Module:
    return lively(nn.Conv3d(2, 8, 3))


def lower(model: PalettizedModel, folder: Path) -> Path:
    return ExecuTorchExporter().lower(model, model.build(), folder, PORTABLE)


def read(artifact: Path) -> dict[str, Palette]:
    return ExecuTorchExporter().read_palettes(artifact)


def worst_error(
    model: PalettizedModel, artifact: Path, numeric_class: NumericClass = NumericClass.FP32
) -> float:
    """The largest relative L2 error of an output, over two inputs, after the file is deleted."""
    session = ExecuTorchRuntime().load(artifact)
    assert session.numeric_class is numeric_class
    artifact.unlink()
    generator, errors = torch.Generator().manual_seed(7), []
    for _ in range(2):
        inputs = [spec.random(generator) for spec in model.source.inputs]
        references = model.build()(*inputs)
        names = (spec.name for spec in model.source.inputs)
        outputs = session.run({n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        tuples = references if isinstance(references, tuple) else (references,)
        for output, reference in zip(outputs, tuples, strict=True):
            assert output.dtype == np.float32
            assert output.shape == tuple(reference.shape)
            difference = np.linalg.norm(output - reference.numpy())
            errors.append(float(difference / np.linalg.norm(reference.numpy())))
    return max(errors)


def edited(artifact: Path, edit: Callable[[Any], None]) -> None:
    """Change a program with ExecuTorch's own serialization."""
    file = deserialize_pte_binary(artifact.read_bytes())
    edit(file.program)
    artifact.write_bytes(bytes(serialize_pte_binary(file)))


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4, dim=4))


@pytest.fixture(scope="module")
def original(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(model, tmp_path_factory.mktemp("original"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy of the model's artifact, to spoil."""
    copy = tmp_path / original.name
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_decode_is_exact(bits: int, layout: Layout) -> None:
    generator = np.random.default_rng(bits)
    lut = generator.normal(size=(layout.groups, 1 << bits, layout.dim)).astype(np.float16)
    indices = generator.integers(1 << bits, size=layout.index_shape, dtype=np.uint8)
    palette = Palette(bits, layout, lut, indices)
    packed = pack_fields(palette.indices.reshape(-1), bits)
    assert packed.size == packed_size(layout.vectors, bits)
    weight = Decode(palette, torch.float32)(torch.from_numpy(packed))
    np.testing.assert_array_equal(weight.numpy(), palette.dense())


@pytest.mark.parametrize(("factory", "inputs", "rules"), CASES.values(), ids=CASES)
def test_program_holds_and_computes_the_palettes(
    factory: str, inputs: tuple[InputSpec, ...], rules: tuple[LayerRule, ...], tmp_path: Path
) -> None:
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    assert len(model.palettes) == len(rules)
    artifact = lower(model, tmp_path)
    assert artifact.name == f"{factory}.pte"
    data = artifact.read_bytes()
    for name, palette in model.palettes.items():
        rows = name.startswith("embedding")
        indices = palette.indices if rows else palette.indices.reshape(-1)
        assert pack_fields(indices, palette.bits).tobytes() in data
        assert palette.lut.tobytes() in data
    assert not differing(model, artifact)
    assert worst_error(model, artifact) <= 1e-5
    (tmp_path / "half").mkdir()
    options = ExecuTorchOptions(backend="portable", precision="fp16")
    half = ExecuTorchExporter().lower(model, model.build(), tmp_path / "half", options)
    assert not differing(model, half)
    assert 1e-5 < worst_error(model, half, NumericClass.FP16) <= 1e-2


def test_nothing_dense_is_left(model: PalettizedModel, original: Path) -> None:
    constants = deserialize_pte_binary(original.read_bytes()).program.constant_buffer
    largest_dense = max(tensor.nbytes for tensor in model.dense.values())
    largest_packed = max(palette.packed.nbytes for palette in model.palettes.values())
    table = 512
    assert max(len(buffer.storage) for buffer in constants) < 32 + max(
        largest_dense, largest_packed, table
    )


def test_layers_that_run_twice_or_lend_their_weight(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:shared", ROWS, LayerRule(bits=2))
    source = model.source.model_copy(update={"outputs": ("left", "right")})
    model = PalettizedModel(source, model.spec, model.palettes, model.dense)
    artifact = lower(model, tmp_path)
    assert not differing(model, artifact)
    assert worst_error(model, artifact) <= 1e-5


@pytest.mark.slow
def test_same_bytes_in_another_process_and_folder(
    model: PalettizedModel, original: Path, tmp_path: Path
) -> None:
    assert lower(model, tmp_path).read_bytes() == original.read_bytes()
    folder = tmp_path / "elsewhere"
    save_checkpoint(model, folder / "model.dkm.safetensors")
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from pathlib import Path\n"
        "from dkm_export.checkpoint import load_checkpoint\n"
        "from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions\n"
        "model = load_checkpoint(Path('model.dkm.safetensors'))\n"
        "ExecuTorchExporter().lower(model, model.build(), Path('.'), "
        "ExecuTorchOptions(backend='portable'))"
    )
    subprocess.run([sys.executable, "-c", script, str(REPOSITORY)], cwd=folder, check=True)
    assert (folder / original.name).read_bytes() == original.read_bytes()


def test_no_path_is_in_the_file(original: Path) -> None:
    data = original.read_bytes()
    assert str(REPOSITORY).encode() not in data
    assert b".py" not in data


@pytest.mark.parametrize("part", ["lut", "indices"])
def test_one_changed_bit_is_seen_and_named(
    part: Literal["lut", "indices"], model: PalettizedModel, artifact: Path
) -> None:
    for name, palette in model.palettes.items():
        with changed_bit(artifact, palette, part):
            assert differing(model, artifact) == [name]


def test_what_the_program_runs_counts(model: PalettizedModel, artifact: Path) -> None:
    """Both LUTs are in the file still, and only the instructions see them exchanged."""

    def exchange(program: Any) -> None:
        values = [value.val for value in program.execution_plan[0].values]
        luts = [value for value in values if getattr(value, "sizes", None) == [16, 4]]
        first, second = [lut for lut in luts if lut.data_buffer_idx][:2]
        first.data_buffer_idx, second.data_buffer_idx = (
            second.data_buffer_idx,
            first.data_buffer_idx,
        )

    edited(artifact, exchange)
    assert differing(model, artifact) == ["stem.0.weight", "depthwise.weight"]


def test_a_decode_without_use_is_no_palette(artifact: Path) -> None:
    def bypass(program: Any) -> None:
        plan = program.execution_plan[0]
        calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
        names = [plan.operators[call.op_index].name for call in calls]
        # The last layer's: its weight is transposed for addmm.
        calls[len(names) - 1 - names[::-1].index("aten::permute_copy")].args[0] = 0

    edited(artifact, bypass)
    with pytest.raises(InvalidInput, match=r"head\.weight: the program does not compute"):
        read(artifact)


def test_a_header_in_another_order_is_seen(model: PalettizedModel, artifact: Path) -> None:
    data = artifact.read_bytes()
    order = b'"decodes":[["stem.0.weight"],["depthwise.weight"],["up.weight"],["line.weight"]'
    other = b'"decodes":[["stem.0.weight"],["depthwise.weight"],["line.weight"],["up.weight"]'
    assert data.count(order) == 1
    artifact.write_bytes(data.replace(order, other))
    with pytest.raises(InvalidInput, match=r"line\.weight: \d+ indices into 64 LUT entries"):
        read(artifact)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"PK\x03\x04" + data[4:],
        lambda data: data[:60],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:64] + b"\xff" * (len(data) - 64),
        lambda data: data[:4] + b"XX" + data[6:],
    ],
    ids=["empty", "other", "header_only", "half", "last_byte", "garbage", "identifier"],
)
def test_malformed_files_are_refused(spoil: Callable[[bytes], bytes], artifact: Path) -> None:
    artifact.write_bytes(spoil(artifact.read_bytes()))
    for reader in (read, ExecuTorchRuntime().load):
        with pytest.raises(InvalidInput) as caught:
            reader(artifact)
        assert str(artifact) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_files_are_read_or_refused(artifact: Path) -> None:
    data = artifact.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(len(data), size=8)] = generator.integers(256, size=8)
        artifact.write_bytes(damaged.tobytes())
        try:
            read(artifact)
        except InvalidInput as error:
            refused += str(artifact) in str(error)
    assert refused > 10


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for reader in (read, ExecuTorchRuntime().load):
        with pytest.raises(InvalidInput, match=r"none\.pte: cannot be read"):
            reader(tmp_path / "none.pte")


def test_a_program_of_another_origin_is_refused(artifact: Path) -> None:
    def rename(program: Any) -> None:
        for plan in program.execution_plan[1:]:
            plan.name = plan.name.replace("dkm", "xyz")

    edited(artifact, rename)
    for reader in (read, ExecuTorchRuntime().load):
        with pytest.raises(InvalidInput, match="did not write it"):
            reader(artifact)


def test_wrong_input_is_one_line(original: Path) -> None:
    session = ExecuTorchRuntime().load(original)
    with pytest.raises(InvalidInput, match="fails on these inputs"):
        session.run({"image": np.zeros((1, 3, 17, 16), np.float32)})


def test_a_palette_that_is_not_used_is_named(tmp_path: Path) -> None:
    model = palettize("tests.zoo:unused", ROW, LayerRule(bits=2))
    with pytest.raises(Unsupported, match=r"does not use the palette of unused\.weight"):
        lower(model, tmp_path)


def test_volumes_are_refused(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:volumes", VOLUME, LayerRule(bits=2))
    with pytest.raises(Unsupported, match="3-D"):
        lower(model, tmp_path)


def test_number_of_outputs_is_checked(tmp_path: Path) -> None:
    model = palettize(f"{HERE}:shared", ROWS, LayerRule(bits=2))
    with pytest.raises(InvalidInput, match="returns 2 outputs, its source names 1"):
        lower(model, tmp_path)


@pytest.mark.slow
def test_export_needs_no_network() -> None:
    """ExecuTorch's package for Qualcomm downloads an SDK when it is imported."""
    script = (
        "import socket, sys, tempfile\n"
        "from pathlib import Path\n"
        "def refuse(*arguments): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.path.append(sys.argv[1])\n"
        "from dkm_export.spec import LayerRule\n"
        "from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions\n"
        "from tests.zoo import TOKENS, palettize\n"
        "model = palettize('tests.zoo:tokens', TOKENS, LayerRule(bits=2))\n"
        "for backend in sys.argv[2:]:\n"
        "    folder, options = Path(tempfile.mkdtemp()), ExecuTorchOptions(backend=backend)\n"
        "    artifact = ExecuTorchExporter().lower(model, model.build(), folder, options)\n"
        "    ExecuTorchExporter().read_palettes(artifact)\n"
        "assert not [name for name in sys.modules if 'backends.qualcomm' in name]"
    )
    command = [sys.executable, "-c", script, str(REPOSITORY), *get_args(Backend)]
    subprocess.run(command, check=True)


def test_importing_the_packages_imports_no_torch() -> None:
    script = (
        "import sys, dkm_exporters.executorch, dkm_runtimes.executorch\n"
        "assert not {'torch', 'executorch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
