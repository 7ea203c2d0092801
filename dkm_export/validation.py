"""Plain data from files into models; pydantic's findings as one line for the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from dkm_export.errors import InvalidInput

_Model = TypeVar("_Model", bound=BaseModel)
_UNKNOWN = "extra_forbidden"


def read_json(file: Path, way_out: str) -> Any:
    """The content of a JSON file.

    Args:
        file: to read.
        way_out: what to do when it is missing or not JSON, for the error.

    Raises:
        InvalidInput: when it is.
    """
    try:
        return from_json(file.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}: {way_out}") from error
    except ValueError as error:
        raise InvalidInput(f"{file}: not JSON: {error}: {way_out}") from error


def validated(data: Any, model: type[_Model], owner: object) -> _Model:
    """Plain data as an instance of ``model``.

    Raises:
        InvalidInput: with ``owner``, the key and what is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InvalidInput(f"{owner}: {explain(error, model)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first finding: the key's full path, what is wrong, and how many more there are.

    Args:
        error: what validating ``model`` raised.
        model: knows the keys that are allowed beside an unknown one.
    """
    # An unknown key first: a required one may be missing because its name is misspelt.
    findings = sorted(error.errors(include_url=False), key=lambda f: f["type"] != _UNKNOWN)
    first, *rest = findings
    key = ".".join(str(part) for part in first["loc"]) or "the whole"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == _UNKNOWN:
        allowed = _model_at(model, first["loc"][:-1]).model_fields
        message = f"unknown key, allowed: {', '.join(allowed) or 'none'}"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"'{key}': {message}{more}"


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    for part in path:
        if part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            nested = [annotation, *get_args(annotation)]
            models = [x for x in nested if isinstance(x, type) and issubclass(x, BaseModel)]
            model = models[0] if models else model
    return model
