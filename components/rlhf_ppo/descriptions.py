"""The meaning of each parameter in words, for the pipeline's form, the components and the README."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from rlhf_ppo.fields import Parameter
from rlhf_ppo.parameters import PARAMETERS

Function = TypeVar("Function", bound=Callable[..., object])


def describe(parameter: Parameter) -> str:
    """Meaning, unit, valid values, and the value that stands for None at a KFP boundary."""
    parts = [parameter.declaration.help]
    if parameter.declaration.unit:
        parts.append(f"Unit: {parameter.declaration.unit}.")
    valid = parameter.declaration.valid()
    none = '"" for none' if parameter.type is str else "0.0 for off"
    if valid and parameter.optional:
        parts.append(f"Valid: {valid}, or {none}.")
    elif valid:
        parts.append(f"Valid: {valid}.")
    elif parameter.optional:
        parts.append("Empty: not given." if parameter.type is str else f"Valid: any, or {none}.")
    return " ".join(parts)


def documented(function: Function) -> Function:
    """Add the description of each of ``function``'s arguments that is a parameter to its docstring, where KFP looks."""
    text, returns, of_returns = (inspect.getdoc(function) or "").partition("\n\nReturns:")
    if "\nArgs:\n" not in text:
        text += "\n\nArgs:"
    for name in inspect.signature(function).parameters:
        if name in PARAMETERS and f"\n    {name}: " not in text:
            text += f"\n    {name}: {describe(PARAMETERS[name])}"
    function.__doc__ = text + returns + of_returns
    return function
