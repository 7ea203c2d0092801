"""The program as tests run it, in their own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dkm_export.cli.main import main

Dkm = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def dkm(capfd: pytest.CaptureFixture[str]) -> Dkm:
    """Run ``dkm ... --json``; returns the exit code and the object."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(capfd.readouterr().out)

    return run
