"""Packed weights in a file: expanded the same in C++ and in Python, and hostile files refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dkm_export.checking.runtime import Runtime
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions, weights_file
from dkm_exporters.executorch import expand as command
from dkm_exporters.executorch.native import EXPAND, RUNNER, built
from dkm_exporters.executorch.weights_file import WeightsFile
from dkm_runtimes.executorch import ExecuTorchRuntime
from dkm_runtimes.executorch_runner import ExecuTorchRunnerRuntime
from fuzz.lut_blobs import Geometry, random_blob
from fuzz.weights_files import CORPUS, ENTRY, HEADER, Weights, examples, hostile
from tests.compiler import needs_compiler
from tests.networks import palettized

pytestmark = needs_compiler

Expander = Callable[[Path, Path], str]
"""Expands a file to another, and returns what it says on stderr when that fails."""


def in_cpp(packed: Path, output: Path) -> str:
    done = subprocess.run(
        [built() / EXPAND, packed, output], capture_output=True, text=True, check=False
    )
    assert not done.stdout
    assert done.returncode == (1 if done.stderr else 0)
    return done.stderr


@pytest.fixture
def in_python(capsys: pytest.CaptureFixture[str]) -> Expander:
    def expand(packed: Path, output: Path) -> str:
        code = command.main([str(packed), str(output), "--force"])
        out, err = capsys.readouterr()
        assert not out
        assert code == (1 if err else 0)
        return err

    return expand


def check_refused(expand: Expander, packed: Path) -> str:
    """With one line, without an output, and with an earlier one untouched; returns the line."""
    output = packed.with_name("out.ptd")
    before = sorted(packed.parent.iterdir())
    for earlier in (None, b"earlier"):
        if earlier is not None:
            output.write_bytes(earlier)
        error = expand(packed, output)
        assert error.count("\n") == 1
        assert str(packed) in error or str(output) in error
        assert (output.read_bytes() if output.exists() else None) == earlier
        output.unlink(missing_ok=True)
        assert sorted(packed.parent.iterdir()) == before
    return error


@pytest.fixture(scope="module", params=["mobilenet_v3", "minilm"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PalettizedModel, Path]:
    model = palettized(request.param, 4)
    options = ExecuTorchOptions(backend="xnnpack-ptd")
    folder = tmp_path_factory.mktemp(request.param)
    return model, ExecuTorchExporter().lower(model, model.build(), folder, options)


@pytest.fixture(scope="module")
def small() -> bytes:
    """A file with two weights."""
    sizes = {"a" * 64: Geometry(1, 7, 5), "b" * 64: Geometry(2, 6, 3, scales=6, scale_stride=3)}
    blobs = {key: random_blob(3, 2, geometry).to_bytes() for key, geometry in sizes.items()}
    return WeightsFile.of(blobs).to_bytes()


def test_both_expand_to_the_same_bytes(
    exported: tuple[PalettizedModel, Path], in_python: Expander, tmp_path: Path
) -> None:
    packed = exported[1].with_suffix(".lut")
    output, other = tmp_path / "cpp.ptd", tmp_path / "python.ptd"
    assert not in_python(packed, other)
    expected = other.read_bytes()
    assert len(expected) > 2 * packed.stat().st_size
    for _ in range(2):
        assert not in_cpp(packed, output)
        assert output.read_bytes() == expected
    assert sorted(tmp_path.iterdir()) == [output, other]


@pytest.mark.parametrize("runtime", [ExecuTorchRuntime(), ExecuTorchRunnerRuntime()])
def test_the_program_runs_with_them(
    runtime: Runtime, exported: tuple[PalettizedModel, Path]
) -> None:
    model, artifact = exported
    inputs = model.source.example_inputs()
    names = [spec.name for spec in model.source.inputs]
    session = runtime.load(artifact)
    (output,) = session.run({n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    reference = model.build()(*inputs).detach().numpy()
    assert np.linalg.norm(output - reference) <= 1e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize("spoil", ["missing", "cut", "another"])
def test_the_program_without_them_is_refused(
    spoil: str, exported: tuple[PalettizedModel, Path], small: bytes, tmp_path: Path
) -> None:
    _, artifact = exported
    data = []
    if spoil != "missing":
        packed, weights = tmp_path / "weights.lut", tmp_path / "weights.ptd"
        packed.write_bytes(
            small if spoil == "another" else artifact.with_suffix(".lut").read_bytes()
        )
        assert not in_cpp(packed, weights)
        if spoil == "cut":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        data = ["--data", str(weights)]
    done = subprocess.run(
        [built() / RUNNER, artifact, *data], input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "error" in json.loads(done.stdout)


def test_python_refuses_the_program_without_them(
    exported: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone.pte"
    alone.write_bytes(exported[1].read_bytes())
    for _ in range(2):
        with pytest.raises(Unsupported, match="the runtime rejects the program"):
            ExecuTorchRuntime().load(alone)


@pytest.mark.parametrize(("name", "weights"), list(examples()))
def test_expands_as_the_format_says(name: str, weights: Weights, tmp_path: Path) -> None:
    data = weights.to_bytes()
    assert (CORPUS / name).read_bytes() == data, "run fuzz/weights_files.py"
    packed, output = tmp_path / "weights.lut", tmp_path / "out.ptd"
    packed.write_bytes(data)
    assert not in_cpp(packed, output)
    assert output.read_bytes() == weights.expanded()


def test_hostile_files_are_refused(in_python: Expander, tmp_path: Path) -> None:
    packed = tmp_path / "weights.lut"
    for name, data in hostile():
        packed.write_bytes(data)
        # It sees what does not fit before it asks for the memory or reads where nothing is.
        error = check_refused(in_cpp, packed)
        assert not {"memory", "read"} & set(error.split()), name
        check_refused(in_python, packed)


def test_damaged_files_are_refused(small: bytes, in_python: Expander, tmp_path: Path) -> None:
    packed = tmp_path / "weights.lut"
    changed = [
        small[:place] + bytes([small[place] ^ flip]) + small[place + 1 :]
        for place in range(HEADER.size)
        for flip in (1, 128)
    ]
    cut = [small[:length] for length in range(0, len(small), 17)]
    for data in (*changed, *cut, small[:-1], small + b"\0"):
        packed.write_bytes(data)
        for expand in (in_cpp, in_python):
            check_refused(expand, packed)


def test_a_small_file_writes_nothing_large(
    small: bytes, in_python: Expander, tmp_path: Path
) -> None:
    """Weights of a terabyte each, in a table and blobs that agree."""
    terabyte = 1 << 40
    blob = bytearray(random_blob(1, 64, Geometry(1, 64, 1)).to_bytes())
    blob[16:24] = (terabyte // 256).to_bytes(8, "little")
    keys = [digit.encode() * 64 for digit in "ab"]
    entries = [
        ENTRY.pack(key, 64 + number * terabyte, terabyte, len(blob))
        for number, key in enumerate(keys)
    ]
    header = HEADER.pack(b"DKM-PTD\0", 1, 2, 64, 64 + 2 * terabyte)
    packed = tmp_path / "weights.lut"
    packed.write_bytes(b"".join((header, *entries, bytes(64), blob, blob)))
    assert "cannot be as large" in check_refused(in_cpp, packed)
    check_refused(in_python, packed)


def test_an_output_that_is_no_file_of_its_own(
    small: bytes, in_python: Expander, tmp_path: Path
) -> None:
    packed, link, folder = (tmp_path / name for name in ("weights.lut", "link", "folder"))
    packed.write_bytes(small)
    folder.mkdir()
    link.symlink_to("elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for expand in (in_cpp, in_python):
        for output in (packed, link, folder, packed / "below"):
            assert expand(packed, output).count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert packed.read_bytes() == small


def test_an_input_that_is_no_file(in_python: Expander, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for expand in (in_cpp, in_python):
        for packed in (tmp_path / "missing", tmp_path / "folder"):
            check_refused(expand, packed)


def test_a_disk_that_takes_no_more(
    small: bytes, in_python: Expander, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(packed: Path, output: Path) -> str:
        return subprocess.run(
            [built() / EXPAND, packed, output],
            capture_output=True,
            text=True,
            check=False,
            restore_signals=False,  # Python ignores the signal that would come before the error
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)),
        ).stderr

    def full(blob: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights_file, "expand_blob", full)
    packed = tmp_path / "weights.lut"
    packed.write_bytes(small)
    for expand in (limited, in_python):
        check_refused(expand, packed)


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["one"], ["one", "two", "three"]):
        done = subprocess.run([built() / EXPAND, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        with pytest.raises(SystemExit, match="2"):
            command.main(words)
    capsys.readouterr()


def test_python_keeps_an_earlier_output(small: bytes, tmp_path: Path) -> None:
    packed, output = tmp_path / "weights.lut", tmp_path / "out.ptd"
    packed.write_bytes(small)
    assert command.main([str(packed), str(output)]) == 0
    assert command.main([str(packed), str(output)]) == 1
    assert command.main([str(packed), str(output), "--force"]) == 0


def test_a_device_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "net.lut").symlink_to("/dev/null")
    with pytest.raises(InvalidInput, match=r"net\.lut: cannot be read: .* no regular one"):
        WeightsFile.read(tmp_path / "net.lut")
