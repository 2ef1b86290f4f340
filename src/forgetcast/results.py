"""Results as JSON files: one way to save, load and show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from forgetcast.errors import DataError
from forgetcast.faults import in_words
from forgetcast.files import read_json, write_json

Model = TypeVar("Model", bound=BaseModel)


class Result:
    """Base of results, which are frozen dataclasses."""

    kind: ClassVar[str] = "result"

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON; NaN and infinities become None."""
        assert is_dataclass(self)
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(Path(path), self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            If the file cannot be read, or a field is missing or has another type.
        """
        content = read_json(Path(path))
        try:
            return cls.from_dict(content)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Read what `as_dict` returned; figures that are derived from the fields are ignored.

        Raises
        ------
        DataError
            If a field is missing or has another type.
        """
        assert is_dataclass(cls)
        if not isinstance(content, Mapping):
            raise DataError(f"this is not a {cls.kind}: a JSON object is needed, not a {type(content).__name__}")
        kept = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        try:
            return TypeAdapter(cls).validate_python(kept)
        except ValidationError as error:
            raise DataError(f"this is not a {cls.kind}: {in_words(error, cls)}") from None
        except (OverflowError, RecursionError) as error:  # a whole number that no float can hold
            raise DataError(f"this is not a {cls.kind}: {error}") from None


def validated(schema: type[Model], content: object, where: str) -> Model:
    """Check what was read from a file against a pydantic model.

    Raises
    ------
    DataError
        If a field is missing or invalid; one line that names `where` and the field.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{where}: {in_words(error, schema)}") from None


def plain(value: Any) -> Any:
    """Turn dataclasses, named tuples, mappings and sequences into dictionaries and lists; NaN becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
