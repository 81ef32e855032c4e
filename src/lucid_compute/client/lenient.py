"""Decode responses of an older or a newer service where that is safe.

Unknown fields are ignored. An unknown name of an enumeration (of a newer service) becomes a member that equals its text
and no other member. A missing field (of an older service) is None where None is allowed. Everything else is refused: no
result is better than a wrong one.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Shape = TypeVar("Shape", bound=BaseModel)
Unknown = TypeVar("Unknown", bound=StrEnum)


def read_leniently(shape: type[Shape], data: Any, error: ValidationError) -> Any | None:
    """Return the shape of `data`, with the faults in `error` fixed; None when one can't be fixed."""
    faults = error.errors(include_url=False)
    if data is None or not all(_fix(shape, data, fault["type"], fault["loc"]) for fault in faults):
        return None
    try:
        return shape.model_validate(data, extra="ignore")
    except ValidationError:
        return None


def unknown_member(kind: type[Unknown], text: str) -> Unknown:
    """Return a new value of `kind` that equals its text and none of the members."""
    member = str.__new__(kind, text)
    member._name_ = text
    member._value_ = text
    return member


def _fix(shape: type[BaseModel], data: Any, fault: str, loc: Sequence[int | str]) -> bool:
    """Fix one fault in place. Return whether that was possible."""
    if not loc:
        return False
    holder, annotation = data, shape
    for part in loc[:-1]:
        holder, annotation = holder[part], _step(annotation, part)
    part = loc[-1]
    branches = _branches(_step(annotation, part))
    if fault == "missing" and types.NoneType in branches:
        holder[part] = None
        return True
    kinds = [branch for branch in branches if isinstance(branch, type) and issubclass(branch, StrEnum)]
    if fault == "enum" and kinds and isinstance(holder[part], str):
        holder[part] = unknown_member(kinds[0], holder[part])
        return True
    return False


def _step(annotation: Any, part: int | str) -> Any:
    """Return the type of the value at `part` of a value of this type; None when it is unknown."""
    for branch in _branches(annotation):
        if get_origin(branch) in {list, dict}:
            return get_args(branch)[-1]
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            for name, field in branch.model_fields.items():
                if part in {name, field.alias}:
                    return field.annotation
    return None


def _branches(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(branch for argument in get_args(annotation) for branch in _branches(argument))
    return (annotation,)
