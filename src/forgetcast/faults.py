"""Faults of settings and files in our own words: what pydantic finds, said by the names that the user wrote."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from forgetcast.text import did_you_mean, visible

_KINDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
"""What a value must be, by pydantic's name of the fault."""

_CHOICES = ("path", "str", "int", "float", "bool")
"""How pydantic calls the plain types that a value may be of, in its places."""

_CHOICE = re.compile(r"[a-z-]+\[.*\]")
"""And those that are made of others."""

MOST_FAULTS = 8
"""So many are said in one line."""


def in_words(error: ValidationError, schema: Any = None) -> str:
    """Return all faults on one line, unknown and missing fields first, each with its place.

    Parameters
    ----------
    error : ValidationError
    schema : type, optional
        The pydantic model or dataclass that was checked against, for the names that there are.
    """
    unknown: dict[str, str] = {}
    missing: list[str] = []
    wrong: dict[str, list[Mapping[str, Any]]] = {}
    for fault in error.errors():
        place = _place(fault["loc"], schema)
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            unknown[place] = did_you_mean(str(fault["loc"][-1]), _known(fault["loc"], schema))
        elif fault["type"] in ("missing", "missing_argument"):
            missing.append(place)
        else:
            wrong.setdefault(place, []).append(fault)
    said = [f"there is no field '{visible(place)}'{hint}" for place, hint in unknown.items()]
    said += [
        f"the field {place!r} is missing"
        for place in missing
        if not any(hint == f"; did you mean {place.rpartition('.')[2]}?" for hint in unknown.values())
    ]
    said += [f"{visible(place)}: {_wrong(faults)}" if place else _wrong(faults) for place, faults in wrong.items()]
    more = [f"and {len(said) - MOST_FAULTS} more"] if len(said) > MOST_FAULTS else []
    return "; ".join([*said[:MOST_FAULTS], *more])


def _wrong(faults: Sequence[Mapping[str, Any]]) -> str:
    """Say what a value must be instead; where it may be of several types, each has a fault."""
    needed, choices = dict[str, None](), list[str]()
    for fault in faults:
        context = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
        if fault["type"] in ("literal_error", "enum"):
            choices = re.findall(r"'([^']*)'", str(context["expected"]))
            needed[f"one of {', '.join(choices)}"] = None
        elif fault["type"] in _KINDS:
            needed[_KINDS[fault["type"]].format(**context)] = None
        else:
            said = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
            if not said.startswith("Input should be "):
                return said
            needed[said.removeprefix("Input should be ")] = None
    value = faults[0]["input"]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"must be {' or '.join(needed)}, not {_shown(value)}{hint}"


def _plain(value: Any) -> Any:
    """Write 0.0 as 0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: object) -> str:
    """Write a value as in a file of settings, on one line and not at length."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | int | float):
        text = f"'{visible(value)}'" if isinstance(value, str) else repr(value)
        return text if len(text) <= 60 else f"{text[:59]}…"
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else "that"


def _place(location: Sequence[int | str], schema: Any) -> str:
    """Return the place as the user wrote it: a choice among types is a part of pydantic's, too."""
    parts: list[str] = []
    here = schema
    for part in location:
        names = _names(here)
        if isinstance(part, str) and (
            _CHOICE.fullmatch(part) or (parts and here is not None and not names and part in _CHOICES)
        ):
            continue
        parts.append(str(part))
        here = names.get(part) if isinstance(part, str) else here
    return ".".join(parts)


def _known(location: Sequence[int | str], schema: Any) -> list[str]:
    """Return the fields that there are where an unknown one was found."""
    here = schema
    for part in location[:-1]:
        here = _names(here).get(str(part), here)
    return list(_names(here))


def _names(schema: Any) -> dict[str, Any]:
    """Return the fields of the model or dataclass in a type, and their types."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return {field.alias or name: field.annotation for name, field in schema.model_fields.items()}
    if isinstance(schema, type) and is_dataclass(schema):
        return {field.name: field.type for field in fields(schema)}
    for part in typing.get_args(schema):
        if found := _names(part):
            return found
    return {}
