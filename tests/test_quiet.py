from __future__ import annotations

import os
import sys
import warnings

import pytest

from dkm_export.cli.terminal import Terminal
from dkm_export.errors import DkmWarning
from dkm_export.quiet import quiet


def test_only_our_own_warnings_reach_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal().own_warnings():
        with quiet():
            os.write(1, b"a library\n")
            os.write(2, b"a library\n")
            warnings.warn("a library", UserWarning, stacklevel=2)
            warnings.warn("about the model", DkmWarning, stacklevel=2)
        print("after", file=sys.stderr)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["dkm: warning: about the model", "after"]


def test_an_error_comes_alone(capfd: pytest.CaptureFixture[str]) -> None:
    @quiet()
    def fail() -> None:
        warnings.warn("about the model", DkmWarning, stacklevel=2)
        raise ValueError("wrong")

    with Terminal().own_warnings(), pytest.raises(ValueError, match="wrong"):
        fail()
    assert capfd.readouterr() == ("", "")
