"""One declaration per parameter: type, default, meaning and range stand together, once.

Everything else (pipeline signature, command line, README table, checks) is derived from these declarations.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.errors import InputError


@dataclass(frozen=True)
class Declaration:
    """What is known of one parameter apart from its name, type and default."""

    help: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    runtime: bool = False

    def valid(self) -> str:
        """The valid values in words, or an empty string where everything of the type is valid."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        limits = [
            f"{sign} {limit:.12g}"
            for sign, limit in ((">", self.above), (">=", self.minimum), ("<=", self.maximum))
            if limit is not None
        ]
        return " and ".join(limits)

    def accepts(self, value: Any) -> bool:
        """Whether ``value``, already of the right type, lies in the declared range."""
        if self.choices:
            return value in self.choices
        return not (
            (self.above is not None and not value > self.above)
            or (self.minimum is not None and not value >= self.minimum)
            or (self.maximum is not None and not value <= self.maximum)
        )


def declare(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[Any] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its declaration; ``default`` may be an empty dict or list, made anew per instance."""
    declaration = Declaration(help, unit, tuple(choices), minimum, above, maximum)
    metadata = {"declaration": declaration}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=type(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def runtime(help: str) -> Any:
    """A field that the trainer fills; it can't be given to the constructor."""
    return dataclasses.field(default=None, init=False, metadata={"declaration": Declaration(help, runtime=True)})


@dataclass(frozen=True)
class Parameter:
    """One settable field as the outside sees it: ``optional`` means that None is among its values."""

    name: str
    type: type
    optional: bool
    default: Any
    declaration: Declaration

    def problem(self, value: Any) -> str | None:
        """The sentence that says what is wrong with ``value``, or None."""
        if value is None and self.optional:
            return None
        expected = self.declaration.valid()
        kind = expected if self.declaration.choices else f"{_KINDS[self.type]} {expected}".strip()
        kind += " (or None)" if self.optional else ""
        if not _is_a(value, self.type):
            return f"{self.name}={value!r} is not valid: give {kind}"
        if self.type is float and not math.isfinite(value):
            return f"{self.name}={value!r} is not valid: give {kind}, finite"
        if not self.declaration.accepts(value):
            return f"{self.name}={value!r} is not valid: give {kind}"
        return None


_KINDS: dict[type, str] = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a JSON object",
    list: "a JSON list",
}


def _is_a(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def parameters_of(cls: type) -> tuple[Parameter, ...]:
    """The settable fields of a declared dataclass, in the order of their declaration."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        declaration = field.metadata["declaration"]
        if declaration.runtime:
            continue
        kind, optional = _plain_type(hints[field.name])
        default = kind() if field.default is dataclasses.MISSING else field.default
        found.append(Parameter(field.name, kind, optional, default, declaration))
    return tuple(found)


def runtime_fields_of(cls: type) -> tuple[tuple[str, str], ...]:
    """Name and meaning of the fields that only the trainer fills."""
    declared = ((field.name, field.metadata["declaration"]) for field in dataclasses.fields(cls))
    return tuple((name, declaration.help) for name, declaration in declared if declaration.runtime)


def _plain_type(hint: Any) -> tuple[type, bool]:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = True
    return typing.get_origin(hint) or hint, optional


class Checked:
    """Base of the declared dataclasses: reports every problem of a new object in one InputError."""

    def __post_init__(self) -> None:
        problems = [
            problem
            for parameter in parameters_of(type(self))
            if (problem := parameter.problem(getattr(self, parameter.name))) is not None
        ]
        # A relation between fields is only looked at where each field by itself is valid.
        problems += self.relations() if not problems else []
        if problems:
            raise InputError(problems)

    def relations(self) -> list[str]:
        """The problems that concern more than one field."""
        return []
