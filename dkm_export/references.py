"""Python objects named in recipes and checkpoints as ``package.module:object``.

Importing a module runs it: whoever can name a module can run any that Python finds, the working
directory's included. What is called after that is limited to model factories and tasks.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import Field
from torch import nn

from dkm_export.errors import InvalidInput
from dkm_export.spec import Frozen
from dkm_export.task import Task, user_code


def build_module(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the model factory ``reference`` with ``arguments``.

    A checkpoint names its factory, so the name must not be able to run just anything that happens
    to be importable (``os:system``): only an ``nn.Module`` class, or a function whose return
    annotation is one, is called.

    Raises:
        InvalidInput: when the factory does not import, is not a model factory or fails.
    """
    factory = _resolve(reference)
    if not _returns(reference, factory, nn.Module):
        raise InvalidInput(
            f"model factory '{reference}' is neither an nn.Module class nor a function annotated "
            "'-> nn.Module': add the annotation"
        )
    with user_code(f"model factory '{reference}'"):
        module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"model factory '{reference}' returned {type(module).__name__}")
    return module


class TaskSource(Frozen):
    """How to make a task.

    Attributes:
        factory: ``package.module:Class`` of a `dkm_export.Task`.
        arguments: its keyword arguments, plain JSON values.
    """

    factory: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    def load(self) -> Task:
        """Make the task.

        Raises:
            InvalidInput: when it does not import, is not a `Task` class or fails.
        """
        task = _resolve(self.factory)
        if not (inspect.isclass(task) and issubclass(task, Task)):
            raise InvalidInput(f"task '{self.factory}' is not a subclass of dkm_export.Task")
        with user_code(f"task '{self.factory}'"):
            made: Task = task(**self.arguments)
        if not isinstance(getattr(made, "metric_name", None), str):
            raise InvalidInput(f"task '{self.factory}' has no metric_name")
        return made


def _resolve(reference: str) -> Any:
    module_name, colon, attribute = reference.partition(":")
    names = (*module_name.split("."), attribute)
    if not (colon and all(name.isidentifier() for name in names)):
        raise InvalidInput(f"'{reference}' does not name an object: write package.module:object")
    # The user's own package is found from the working directory; last, so that a folder there
    # cannot take the place of an installed package.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        raise InvalidInput(
            f"'{reference}' does not import: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise InvalidInput(f"module '{module_name}' has no '{attribute}'")
    return getattr(module, attribute)


def _returns(reference: str, factory: Any, kind: type) -> bool:
    if inspect.isclass(factory):
        return issubclass(factory, kind)
    if not inspect.isfunction(factory):
        return False
    try:
        annotation = get_type_hints(factory).get("return")
    except Exception as error:  # an annotation is code too
        raise InvalidInput(
            f"the annotations of '{reference}' do not resolve: {type(error).__name__}: {error}: "
            "import what they name, '-> nn.Module' for the model"
        ) from error
    return inspect.isclass(annotation) and issubclass(annotation, kind)
