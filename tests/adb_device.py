"""The device's side of adb on loopback, for tests with the real adb client and server.

It is not an Android device: its programs run on this machine's kernel, C library and CPU, or under
an emulator of the CPU. What it shows is that we and adb understand each other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

needs_adb = pytest.mark.skipif(
    shutil.which("adb") is None, reason="adb is not installed (Debian: apt-get install adb)"
)

_LARGEST = 256 * 1024
_VERSION = 0x01000001
_FEATURES = "shell_v2,cmd"

# Packets of the shell protocol.
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)


def _command(name: bytes) -> int:
    return int.from_bytes(name, "little")


_CNXN, _OPEN, _OKAY, _CLSE, _WRTE, _AUTH = map(
    _command, (b"CNXN", b"OPEN", b"OKAY", b"CLSE", b"WRTE", b"AUTH")
)


class LoopbackDevice:
    """Listens on a port until it is closed or dies.

    Args:
        root: a folder that stands for the device's file system.
        properties: what ``getprop`` answers.
        run_with: a command for programs that are built for another CPU, such as
            ``qemu-aarch64-static -L <sysroot>``.

    Attributes:
        serial: the name by which adb knows it once it is connected.
        unauthorized: nobody has allowed this computer on its screen.
        storage: bytes that it has room for, or None for any number.
        hangs_at: it never answers to commands with this text; ``sync:`` is a transfer of files.
        dies_after: it vanishes at the command after so many, with all that runs on it.
        commands: how many there were.
    """

    def __init__(self, root: Path, properties: dict[str, str], run_with: str = "") -> None:
        self.root = root
        self.run_with = run_with
        self.unauthorized = False
        self.storage: int | None = None
        self.hangs_at: str | None = None
        self.dies_after: int | None = None
        self.commands = 0
        self._connections: list[socket.socket] = []
        self._processes: set[subprocess.Popen[bytes]] = set()
        programs = root / "system" / "bin"
        programs.mkdir(parents=True)
        (root / "data" / "local").mkdir(parents=True)
        cases = "".join(f"{name}) echo '{value}';;\n" for name, value in properties.items())
        (programs / "getprop").write_text(f'#!/bin/sh\ncase "$1" in\n{cases}*) echo;;\nesac\n')
        (programs / "getprop").chmod(0o755)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def local(self, path: str) -> Path:
        """Where a file of the device is on this machine."""
        return self.root / path.lstrip("/")

    def die(self) -> None:
        """Vanish; what is stored stays."""
        # shutdown wakes the threads that wait on a socket, which close alone does not
        for end in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for process in list(self._processes):
            _kill(process)

    def starts(self, script: str) -> subprocess.Popen[bytes]:
        """A process of the device's shell; all absolute paths in ``script`` are below /data."""
        script = script.replace("/data/", f"{self.root}/data/")
        if self.run_with:
            script = script.replace("exec ./", f"exec {self.run_with} ./")
        path = f"{self.root}/system/bin:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": path},
            start_new_session=True,
        )
        self._processes.add(process)
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """Forget a process that has ended."""
        self._processes.discard(process)

    def counts(self, command: str) -> bool:
        """Whether the device takes up a command, or has died of it."""
        self.commands += 1
        if self.dies_after is not None and self.commands > self.dies_after:
            self.die()
            return False
        return self.hangs_at is None or self.hangs_at not in command

    def takes(self, count: int) -> bool:
        """Whether there is room for so many more bytes, which are then gone."""
        if self.storage is None:
            return True
        self.storage -= count
        return self.storage >= 0

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                threading.Thread(target=_Connection(self, connection).serve, daemon=True).start()


class _Connection:
    """The connection with one adb server, and the streams in it."""

    def __init__(self, device: LoopbackDevice, end: socket.socket) -> None:
        self.device = device
        self._end = end
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        header = struct.pack(
            "<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF
        )
        with self._lock, contextlib.suppress(OSError):
            self._end.sendall(header + data)

    def closed(self, stream: _Stream) -> None:
        if self._streams.pop(stream.number, None):
            self.send(_CLSE, stream.number, stream.peer)

    def serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, first, second, count, _, _ = struct.unpack("<6I", self._read(24))
                self._handle(command, first, second, self._read(count))
        for stream in list(self._streams.values()):
            stream.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._end.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if self.device.unauthorized and command in (_CNXN, _AUTH):
            # to a signature and to a key it only says once more that it knows nobody
            if command == _CNXN or first == 2:
                self.send(_AUTH, 1, 0, bytes(20))
        elif command == _CNXN:
            banner = f"device::ro.product.name=loopback;features={_FEATURES}"
            self.send(_CNXN, _VERSION, _LARGEST, banner.encode())
        elif command == _OPEN:
            stream = _Stream(self, len(self._streams) + 1, first, data.rstrip(b"\0").decode())
            while stream.number in self._streams:
                stream.number += 1
            self._streams[stream.number] = stream
            self.send(_OKAY, stream.number, stream.peer)
            threading.Thread(target=stream.serve, daemon=True).start()
        elif second in self._streams:
            stream = self._streams[second]
            if command == _WRTE:
                stream.received.put(data)
                self.send(_OKAY, stream.number, stream.peer)
            elif command == _OKAY:
                stream.taken.release()
            elif command == _CLSE:
                del self._streams[second]
                stream.close()


class _Stream:
    """One service that the client has opened: a shell, or transfers of files."""

    def __init__(self, connection: _Connection, number: int, peer: int, service: str) -> None:
        self.number = number
        self.peer = peer
        self.received: queue.Queue[bytes | None] = queue.Queue()
        self.taken = threading.Semaphore(0)
        self._connection = connection
        self._device = connection.device
        self._service = service
        self._buffer = b""
        self._open = True
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """The client, or the connection to it, is gone: a shell then gets SIGHUP."""
        self._open = False
        self.received.put(None)
        self.taken.release()
        if self._process is not None:
            _kill(self._process)

    def serve(self) -> None:
        with contextlib.suppress(EOFError):
            if not self._device.counts(self._service):
                return  # without a word
            if self._service.startswith("sync:"):
                self._synchronize()
            elif self._service.startswith("shell,v2"):
                self._shell(self._service.partition(":")[2])
        self._connection.closed(self)

    def _write(self, data: bytes) -> None:
        with self._lock:
            for start in range(0, len(data), _LARGEST):
                if not self._open:
                    raise EOFError
                part = data[start : start + _LARGEST]
                self._connection.send(_WRTE, self.number, self.peer, part)
                self.taken.acquire()

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self.received.get()
            if data is None:
                raise EOFError
            self._buffer += data
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    # Shells

    def _shell(self, script: str) -> None:
        process = self._process = self._device.starts(script)
        if not self._open:
            _kill(process)
        readers = [
            threading.Thread(target=self._forward, args=(pipe, kind), daemon=True)
            for pipe, kind in ((process.stdout, _STDOUT), (process.stderr, _STDERR))
        ]
        threading.Thread(target=self._feed, args=(process,), daemon=True).start()
        for reader in readers:
            reader.start()
        code = process.wait()
        for reader in readers:
            reader.join()
        self._device.ended(process)
        self._write(struct.pack("<BIB", _EXIT, 1, code & 0xFF))

    def _forward(self, pipe: Any, kind: int) -> None:
        with pipe, contextlib.suppress(EOFError):
            while data := os.read(pipe.fileno(), 65536):
                self._write(struct.pack("<BI", kind, len(data)) + data)

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, count = struct.unpack("<BI", self._read(5))
                data = self._read(count)
                if kind == _STDIN:
                    process.stdin.write(data)
                    process.stdin.flush()
                elif kind == _CLOSE_STDIN:
                    break
        with contextlib.suppress(OSError):
            process.stdin.close()

    # Files

    def _synchronize(self) -> None:
        while True:
            kind, count = struct.unpack("<4sI", self._read(8))
            if kind == b"QUIT":
                return
            argument = self._read(count).decode()
            try:
                self._transfer(kind, argument)
            except OSError as error:
                text = (error.strerror or str(error)).encode()
                self._write(struct.pack("<4sI", b"FAIL", len(text)) + text)

    def _transfer(self, kind: bytes, argument: str) -> None:
        if kind == b"STAT":
            try:
                found = self._device.local(argument).stat()
                fields = (found.st_mode, found.st_size, int(found.st_mtime))
            except OSError:
                fields = (0, 0, 0)
            self._write(struct.pack("<4sIII", b"STAT", *fields))
        elif kind == b"SEND":
            self._take(self._device.local(argument.rpartition(",")[0]))
            self._write(struct.pack("<4sI", b"OKAY", 0))
        elif kind == b"RECV":
            data = self._device.local(argument).read_bytes()
            parts = [data[start : start + 65536] for start in range(0, len(data), 65536)]
            framed = [struct.pack("<4sI", b"DATA", len(part)) + part for part in parts]
            self._write(b"".join(framed) + struct.pack("<4sI", b"DONE", 0))
        else:
            raise OSError(errno.ENOSYS, f"the device does not know {kind!r}")

    def _take(self, file: Path) -> None:
        """A file of the client. Its bits are not kept: not all devices let them be set."""
        full = False
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            while True:
                kind, count = struct.unpack("<4sI", self._read(8))
                if kind == b"DONE":  # count is the time of its last change
                    break
                data = self._read(count)
                full = full or not self._device.takes(len(data))
                if not full:
                    stream.write(data)
        if full:
            file.unlink()
            raise OSError(errno.ENOSPC, "write failed: No space left on device")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGHUP)


class AdbServer:
    """A private adb server, and loopback devices that are connected to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.devices: list[LoopbackDevice] = []

    def add(
        self,
        model: str = "Loopback",
        *,
        abi: str = "x86_64",
        emulated: bool = False,
        unauthorized: bool = False,
        run_with: str = "",
    ) -> LoopbackDevice:
        """Connect a device that says so of itself."""
        properties = {
            "ro.product.model": model,
            "ro.product.cpu.abi": abi,
            "ro.boot.qemu": "1" if emulated else "",
        }
        root = self._folder / f"device{len(self.devices)}"
        device = LoopbackDevice(root, properties, run_with)
        self.devices.append(device)
        device.unauthorized = unauthorized
        self.adb("connect", device.serial)
        if not unauthorized:
            self.adb("-s", device.serial, "wait-for-device")
            device.commands = 0
        return device

    def adb(self, *arguments: str) -> str:
        done = subprocess.run(["adb", *arguments], capture_output=True, text=True, timeout=60)
        return done.stdout


@contextlib.contextmanager
def adb_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdbServer]:
    """A server on a port of its own, with keys of its own, which sees no real device."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = folder / "home"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    for name, value in {
        "ANDROID_ADB_SERVER_PORT": str(port),
        "XDG_CACHE_HOME": cache,
        "HOME": str(home),
        "ANDROID_USER_HOME": str(home / ".android"),
        "ADB_USB": "0",
        "ADB_MDNS": "0",
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "0",
        "TMPDIR": str(folder),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ADB_VENDOR_KEYS", raising=False)
    server = AdbServer(folder)
    server.adb("start-server")
    try:
        yield server
    finally:
        server.adb("kill-server")
        for device in server.devices:
            device.die()
