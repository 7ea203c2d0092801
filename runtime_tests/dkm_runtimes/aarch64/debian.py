"""Packages of Debian or Ubuntu into a folder: from the machine's own sources, without root."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dkm_export.errors import Unsupported
from dkm_runtimes import installer

_PLAIN = {"LC_ALL": "C"}
"""Messages in English, whose form is known here."""

_CONFIGURATION = """
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Get::AllowUnauthenticated "false";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""
"""Read after the machine's own: nothing of its hooks, no more than is needed, all of it verified.

Only root can change to another user, who then could not write into our folder.
"""

_COMPLAINT = re.compile(r"^[EW]: (.+)", re.MULTILINE)


def missing_program() -> str | None:
    """Which program of Debian is not here, or None."""
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            return (
                f"is made of packages of Debian or Ubuntu, and {program} is not on the PATH: "
                "use such a system, or a container of one"
            )
    return None


def unpack(
    name: str,
    packages: Sequence[str],
    folder: Path,
    *,
    architecture: str | None = None,
    without: Sequence[str] = (),
) -> None:
    """Download packages with all that they depend on, and unpack them.

    apt verifies them as it does for an installation: the signature of each source, and through it
    the hash of each package. It has a state of its own, in which nothing is installed.

    Args:
        name: what they are for, for messages.
        packages: their names.
        folder: where their files go; beside it are apt's while it runs.
        architecture: as Debian calls it; None for the machine's.
        without: names of packages that are not unpacked.

    Raises:
        Unsupported: when apt cannot get them, or they cannot be unpacked, with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="apt-", dir=folder.parent) as work:
        state = Path(work)
        for part in ("lists/partial", "cache/archives/partial", "log"):
            (state / part).mkdir(parents=True)
        (state / "status").touch()
        (state / "apt.conf").write_text(_CONFIGURATION)
        updated = _apt(name, state, architecture, "update")
        done = _apt(name, state, architecture, "install", "--download-only", "--yes", *packages)
        if done.returncode:
            found = [_COMPLAINT.search(result.stderr) for result in (done, updated)]
            reason = ": ".join(match[1] for match in found if match) or f"exit {done.returncode}"
            where = f" for {architecture}" if architecture else ""
            ports = " (of Ubuntu, those at ports.ubuntu.com)" if architecture else ""
            raise Unsupported(
                f"{name}: apt cannot get packages{where}: {reason}: see with `apt-get update` "
                f"whether it reaches sources that have them{ports}"
            )
        for archive in sorted((state / "cache" / "archives").glob("*.deb")):
            if archive.name.partition("_")[0] not in without:
                _extract(name, archive, folder)


def _extract(name: str, archive: Path, folder: Path) -> None:
    command = ["dpkg-deb", "--extract", str(archive), str(folder)]
    done = installer.run(name, command, environment=_PLAIN)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit {done.returncode}"
        raise Unsupported(f"{name}: {archive.name} cannot be unpacked into {folder}: {reason}")


def _apt(
    name: str, state: Path, architecture: str | None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::Status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Cache::Archives": state / "cache" / "archives",
        "Dir::Log": state / "log",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    if architecture:
        chosen = (f"APT::Architecture={architecture}", f"APT::Architectures={architecture}")
        options += [part for option in chosen for part in ("-o", option)]
    configuration = str(state / "apt.conf")
    command = ["apt-get", "-c", configuration, "-q", *options, *arguments]
    return installer.run(name, command, environment=_PLAIN)
