"""Installing the emulated runtimes, with an apt, a pip and a qemu that do next to nothing."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dkm_export.cli.main import main
from dkm_export.errors import Unsupported
from dkm_exporters.executorch import native
from dkm_runtimes.aarch64.emulator import EmulatedRuntime
from dkm_runtimes.aarch64.executorch import ExecuTorchAarch64
from dkm_runtimes.aarch64.onnxruntime import OnnxRuntimeAarch64

RUNTIMES = (OnnxRuntimeAarch64, ExecuTorchAarch64)

# It answers as our server does, and as our runner does.
QEMU = r"""#!/bin/sh
case "$*" in
--version) echo 'qemu-aarch64 version 9.9.9 (a fake)' ;;
*server.py*) printf '\002\000\000\000{}' ;;
*) echo 'usage: dkm_runner' >&2; exit 2 ;;
esac
"""

APT = """
import pathlib, shutil, sys
work = pathlib.Path(FOLDER)
arguments = dict(word.split("=", 1) for word in sys.argv if "=" in word)
archives = pathlib.Path(arguments["Dir::Cache::Archives"])
packages = sys.argv[sys.argv.index("--yes") + 1 :] if "--yes" in sys.argv else []
if packages:
    with (work / "calls").open("a") as log:
        print("apt", arguments.get("APT::Architecture", "native"), *packages, file=log)
shutil.copy(sys.argv[sys.argv.index("-c") + 1], work / "apt.conf")
assert pathlib.Path(arguments["Dir::State::Status"]).read_text() == ""
for package in (*packages, "libc6"):
    (archives / f"{package}_1%3a2_all.deb").touch()
"""

DPKG_DEB = """
import pathlib, sys
_, option, archive, folder = sys.argv
assert option == "--extract"
files = {
    "qemu-user-static": {"usr/bin/qemu-aarch64-static": QEMU},
    "python3-minimal": {"usr/bin/python3.11": "", "lib/libc.so.6": "", "usr/share/doc/x": ""},
    "libpython3-stdlib": {"usr/lib/python3.11/os.py": "x"},
    "g++-aarch64-linux-gnu": {f"usr/aarch64-linux-gnu/lib/{name}": "x" for name in LIBRARIES},
    "libc6": {"usr/lib/libc": ""},
}
for name, content in files.get(pathlib.Path(archive).name.split("_")[0], {}).items():
    file = pathlib.Path(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(0o755)
    if name.endswith("os.py"):
        (file.parent / "sitecustomize.py").symlink_to("/etc/python3.11/sitecustomize.py")
        (file.parent / "relative.py").symlink_to("os.py")
"""

PIP = """
import pathlib, sys
work = pathlib.Path(FOLDER)
options = dict(word.split("=", 1) for word in sys.argv if "=" in word)
requirements = pathlib.Path(options["--requirement"])
with (work / "calls").open("a") as log:
    print("pip", options["--python-version"], requirements.name, file=log)
assert "--require-hashes" in sys.argv
library = pathlib.Path(options["--target"], requirements.stem, "lib", "libexecutorch.so")
library.parent.mkdir(parents=True)
library.write_text("x")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dkm-export"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH, with an apt and a pip that log what they are asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    real = sys.executable
    names = f"FOLDER, QEMU, LIBRARIES = {str(tmp_path)!r}, {QEMU!r}, {LIBRARIES!r}"
    for name, script in (("apt-get", APT), ("dpkg-deb", DPKG_DEB), ("python", PIP)):
        program(folder / name, f"#!{real} -IS\n{names}\n{script}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "build", build)
    return folder


LIBRARIES = (
    *("ld-linux-aarch64.so.1", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6"),
    *("libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libasan.so.8"),
)


def build(folder: Path, settings: Sequence[str], environment: Mapping[str, str]) -> None:
    """In the place of a compiler."""
    values = dict(setting.split("=", 1) for setting in settings)
    assert values["-Dexecutorch_DIR"].endswith("/executorch/share/cmake")
    # the machine's own C library is the one that its loader fits
    assert not Path(values["-DCMAKE_SYSROOT"], "usr", "lib", "libc").exists()
    assert set(environment) == {"LD_LIBRARY_PATH"}
    folder.mkdir()
    (folder / native.RUNNER).write_text("x")


def program(file: Path, script: str) -> None:
    file.write_text(script)
    file.chmod(0o755)


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime.name)
def runtime(request: pytest.FixtureRequest) -> EmulatedRuntime:
    found: EmulatedRuntime = request.param()
    return found


def refuse(runtime: EmulatedRuntime, cache: Path) -> str:
    """The reason for which an installation fails; it leaves nothing."""
    with pytest.raises(Unsupported) as caught:
        runtime.install(lambda line: None)
    assert [*cache.glob("*/*")] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_installs_once_and_removes(
    runtime: EmulatedRuntime, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runtime.unavailable() == f"not installed: dkm runtimes install {runtime.name}"
    for _ in range(2):
        assert main(["runtimes", "install", runtime.name]) == 0
        assert runtime.unavailable() is None
        assert runtime.reported_version() == f"{runtime.name} {runtime.version}, qemu 9.9.9"
    assert (
        calls(tmp_path)
        == {
            "onnxruntime-aarch64": [
                "apt native qemu-user-static",
                "apt arm64 python3-minimal libpython3-stdlib libstdc++6",
                "pip 3.11 onnxruntime.txt",
            ],
            "executorch-aarch64": [
                "apt native qemu-user-static g++-aarch64-linux-gnu",
                "pip 3.11 executorch.txt",
            ],
        }[runtime.name]
    )
    assert main(["runtimes", "remove", runtime.name]) == 0
    assert [*cache.iterdir()] == []


def test_only_what_runs_is_kept() -> None:
    folders = []
    for runtime in (OnnxRuntimeAarch64(), ExecuTorchAarch64()):
        runtime.install(print)
        folders.append(runtime.installation.folder)
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        for folder in folders
    ]
    both = {"qemu-aarch64", "root/proc/cpuinfo", "root/etc/ld.so.cache", "dkm-export.json"}
    assert files[0] == both | {
        "root/usr/bin/python3.11",
        "root/lib/libc.so.6",
        "root/usr/lib/libc",
        "root/usr/lib/python3.11/os.py",
        "root/usr/lib/python3.11/relative.py",
        "site/onnxruntime/lib/libexecutorch.so",
    }
    kept = {name for name in LIBRARIES if name != "libasan.so.8"}
    assert files[1] == both | {f"root/lib/{name}" for name in kept} | {
        f"runner/{native.RUNNER}",
        "runner/libexecutorch.so",
    }


def test_apt_runs_none_of_the_machines_hooks_and_trusts_nothing_unsigned(tmp_path: Path) -> None:
    ExecuTorchAarch64().install(print)
    configuration = (tmp_path / "apt.conf").read_text()
    for hook in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"):
        assert f"#clear APT::Update::{hook};" in configuration
    assert 'AllowUnauthenticated "false"' in configuration
    assert 'AllowInsecureRepositories "false"' in configuration


def test_libraries_where_everything_is_below_usr(programs: Path) -> None:
    script = (programs / "dpkg-deb").read_text()
    program(programs / "dpkg-deb", script.replace('"lib/libc', '"usr/lib/libc'))
    runtime = OnnxRuntimeAarch64()
    runtime.install(print)
    assert (runtime.installation.folder / "root" / "lib" / "libc.so.6").is_file()
    assert runtime.unavailable() is None


def test_what_is_damaged_is_installed_again(runtime: EmulatedRuntime, tmp_path: Path) -> None:
    runtime.install(print)
    count = len(calls(tmp_path))
    qemu = runtime.installation.folder / "qemu-aarch64"
    qemu.write_text("")
    reason = f"damaged at {qemu}: dkm runtimes install {runtime.name}"
    assert runtime.unavailable() == reason
    runtime.install(print)
    assert runtime.unavailable() is None
    assert len(calls(tmp_path)) == 2 * count


def test_apt_without_a_network(runtime: EmulatedRuntime, programs: Path, cache: Path) -> None:
    program(
        programs / "apt-get",
        '#!/bin/sh\ncase "$*" in *update*) echo "W: Failed to fetch x: no network\nW: more" >&2;;\n'
        '*) echo "E: Unable to locate package y" >&2; exit 100;; esac\n',
    )
    assert refuse(runtime, cache) == (
        f"{runtime.name}: apt cannot get packages: Unable to locate package y: Failed to fetch x: "
        "no network: see with `apt-get update` whether it reaches sources that have them"
    )


def test_sources_without_arm64(programs: Path, cache: Path) -> None:
    script = (programs / "apt-get").read_text()
    stop = 'if arguments.get("APT::Architecture") and packages: sys.exit("E: no such package")\n'
    program(programs / "apt-get", f"{script}{stop}")
    assert refuse(OnnxRuntimeAarch64(), cache) == (
        "onnxruntime-aarch64: apt cannot get packages for arm64: no such package: see with "
        "`apt-get update` whether it reaches sources that have them (of Ubuntu, those at "
        "ports.ubuntu.com)"
    )


def test_pip_that_fails_or_is_missing(
    runtime: EmulatedRuntime, programs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs / "python", "#!/bin/sh\necho 'WARNING: x\nERROR: it is down' >&2; exit 1\n")
    package = runtime.name.partition("-")[0]
    assert refuse(runtime, cache) == (
        f"{runtime.name}: pip cannot get wheels for Python 3.11 on aarch64: it is down: see with "
        f"`pip download {package}` whether pip reaches its index"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "dkm_runtimes.aarch64.wheels.find_spec",
        lambda name: None if name == "pip" else find(name),
    )
    assert refuse(runtime, cache) == f"{runtime.name}: pip is not installed: python -m ensurepip"


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_systems_without_apt(
    missing: str, runtime: EmulatedRuntime, programs: Path, cache: Path
) -> None:
    (programs / missing).unlink()
    reason = (
        f"is made of packages of Debian or Ubuntu, and {missing} is not on the PATH: use such a "
        "system, or a container of one"
    )
    assert runtime.unavailable() == reason
    assert refuse(runtime, cache) == f"{runtime.name}: {reason}"


def test_machines_that_are_aarch64_themselves(
    runtime: EmulatedRuntime, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "this machine is aarch64 itself" in refuse(runtime, cache)


def test_what_does_not_start_is_not_installed(
    runtime: EmulatedRuntime, programs: Path, cache: Path
) -> None:
    script = (programs / "dpkg-deb").read_text()
    broken = repr("#!/bin/sh\necho 'no such CPU' >&2; exit 1\n")
    program(
        programs / "dpkg-deb", script.replace("import pathlib", f"QEMU = {broken}\nimport pathlib")
    )
    assert refuse(runtime, cache).endswith("no such CPU")


def test_archives_that_cannot_be_unpacked_or_lack_the_emulator(
    runtime: EmulatedRuntime, programs: Path, cache: Path
) -> None:
    script = (programs / "dpkg-deb").read_text()
    program(programs / "dpkg-deb", script.replace("qemu-aarch64-static", "qemu-other"))
    assert refuse(runtime, cache).endswith(
        "the package qemu-user-static of this system has no qemu-aarch64-static"
    )
    program(programs / "dpkg-deb", "#!/bin/sh\necho 'x\ndpkg-deb: disk full' >&2; exit 2\n")
    assert "_1%3a2_all.deb cannot be unpacked into " in refuse(runtime, cache)
    assert refuse(runtime, cache).endswith(": dpkg-deb: disk full")


def test_packages_of_apt_without_python(programs: Path, cache: Path) -> None:
    script = (programs / "dpkg-deb").read_text()
    program(programs / "dpkg-deb", script.replace("usr/bin/python3.11", "usr/bin/other"))
    assert "have no Python 3" in refuse(OnnxRuntimeAarch64(), cache)


def test_wheels_are_pinned_by_their_hashes() -> None:
    import dkm_runtimes.aarch64

    folder = Path(dkm_runtimes.aarch64.__path__[0])
    for runtime in RUNTIMES:
        package = runtime.name.removesuffix("-aarch64")
        text = (folder / f"{package}.txt").read_text().replace("\\\n", "")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines[0].startswith(f"{package}=={runtime.version} ")
        for line in lines:
            assert re.fullmatch(r"[a-z]+==[0-9.]+(\s+--hash=sha256:[0-9a-f]{64})+", line)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    pinned = project["optional-dependencies"]["executorch"]
    assert f"executorch=={ExecuTorchAarch64.version}" in pinned
