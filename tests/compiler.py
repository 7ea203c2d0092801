"""Tests that build native code need a compiler, which `make test` does not ask for."""

from __future__ import annotations

import pytest

from dkm_exporters.executorch.native import unavailable

needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
