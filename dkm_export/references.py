"""Python objects named in recipes and checkpoints as ``package.module:object``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from dkm_export.errors import InvalidInput
from dkm_export.task import Task


def build_module(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the model factory ``reference`` with ``arguments``.

    A checkpoint names its factory, so the name must not be able to run just anything that happens
    to be importable (``os:system``): only an ``nn.Module`` class, or a function whose return
    annotation is one, is called.

    Raises:
        InvalidInput: when the factory does not import, is not a model factory or fails.
    """
    factory = _resolve(reference)
    if not _returns(factory, nn.Module):
        raise InvalidInput(
            f"model factory '{reference}' is neither an nn.Module class nor a function annotated "
            "'-> nn.Module': add the annotation"
        )
    module = _call(factory, reference, arguments)
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"model factory '{reference}' returned {type(module).__name__}")
    return module


def load_task(reference: str) -> Task:
    """Make the task ``reference``, a `Task` class that takes no arguments.

    Raises:
        InvalidInput: when it does not import, is not a `Task` class or fails.
    """
    task = _resolve(reference)
    if not (inspect.isclass(task) and issubclass(task, Task)):
        raise InvalidInput(f"task '{reference}' is not a subclass of dkm_export.Task")
    made: Task = _call(task, reference, {})
    return made


def _resolve(reference: str) -> Any:
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute.isidentifier()):
        raise InvalidInput(f"'{reference}' does not name an object: write package.module:object")
    # The user's own package is found from the working directory, as with `python -m`; last, so
    # that a folder there cannot take the place of an installed package.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InvalidInput(f"'{reference}' does not import: {error}") from error
    except AttributeError as error:
        raise InvalidInput(f"module '{module_name}' has no '{attribute}'") from error


def _returns(factory: Any, kind: type) -> bool:
    if inspect.isclass(factory):
        return issubclass(factory, kind)
    if not inspect.isfunction(factory):
        return False
    try:
        annotation = get_type_hints(factory).get("return")
    except NameError:
        return False
    return inspect.isclass(annotation) and issubclass(annotation, kind)


def _call(function: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise InvalidInput(f"'{reference}' failed: {type(error).__name__}: {error}") from error
