"""Settings: read a YAML file into a pydantic model, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from forgetcast.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(path: Path, schema: type[Settings]) -> Settings:
    """Read a YAML or JSON file into a pydantic model.

    Raises
    ------
    ConfigError
        If the file cannot be read or a field is invalid; one line that names the file and the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return check_settings(content if content is not None else {}, schema, where=str(path), folder=path.parent)


def check_settings(content: Any, schema: type[Settings], *, where: str, folder: Path | None = None) -> Settings:
    """Validate settings, with paths relative to `folder`.

    Raises
    ------
    ConfigError
        If a field is invalid; one line that names `where` and the field.
    """
    try:
        return schema.model_validate(content, context=folder)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the content"
        raise ConfigError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
