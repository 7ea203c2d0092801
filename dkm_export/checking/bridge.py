"""The contract of a bridge, a way to devices that are connected to this machine, such as adb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from dkm_export.checking.runtime import Runtime
from dkm_export.errors import InvalidInput
from dkm_export.plugins import DEVICES, discover, select


class Bridge(ABC):
    """Makes runtimes of devices. A subclass takes no arguments, and an entry point names it."""

    @abstractmethod
    def connect(self, address: str, runner: Path | None) -> Runtime:
        """The runtime that a device is, which the report names by its address.

        A device that is named and cannot be used is a runtime that is `unavailable`.

        Args:
            address: which device; empty for the only one.
            runner: a program, built for the device, that runs artifacts there; None when the user
                named none.

        Raises:
            InvalidInput: when the address names no device, or the runner cannot be used.
            Unsupported: when there is no device, or nothing here that reaches one.
        """


def connect(addresses: Sequence[str], runner: Path | None) -> list[Runtime]:
    """The runtimes of devices, each once.

    Args:
        addresses: ``<bridge>`` or ``<bridge>:<address>``.
        runner: see `Bridge.connect`.

    Raises:
        InvalidInput: when there is no such bridge or device, or the runner cannot be used.
        Unsupported: when there is no device, or nothing here that reaches one.
    """
    if not addresses:
        if runner is not None:
            raise InvalidInput(f"{runner} is for devices: name one with --device")
        return []
    runtimes = {}
    bridges: dict[str, Bridge] = discover(DEVICES)
    for name, _, address in (text.partition(":") for text in addresses):
        (bridge,) = select(bridges, [name], "kind of device")
        runtime = bridge.connect(address, runner)
        runtimes[runtime.name] = runtime
    return list(runtimes.values())
