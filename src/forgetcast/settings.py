"""Settings: read a YAML file into a pydantic model, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from forgetcast.defaults import MAX_SEED
from forgetcast.errors import ConfigError
from forgetcast.faults import in_words
from forgetcast.files import neighbour

Settings = TypeVar("Settings", bound=BaseModel)

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
"""A seed of random choices."""

MOST_BYTES = 1 << 20
"""Largest file of settings; a larger one is something else."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which the last would count without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_settings(path: Path, schema: type[Settings]) -> Settings:
    """Read a YAML or JSON file into a pydantic model.

    Raises
    ------
    ConfigError
        If the file cannot be read or a field is invalid; one line that names the file and the field.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES:,} bytes: it is no file of settings")
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        hint = neighbour(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: {error.strerror}{hint}") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path} is not read: it is nested too deeply") from None
    except (
        Exception
    ) as error:  # PyYAML lets through what its constructors raise: of KeyError, ValueError, TypeError, ...
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return check_settings(content if content is not None else {}, schema, where=str(path), folder=path.parent)


def check_settings(content: Any, schema: type[Settings], *, where: str, folder: Path | None = None) -> Settings:
    """Validate settings, with paths relative to `folder`.

    Raises
    ------
    ConfigError
        If fields are unknown, missing or invalid; one line that names `where` and all of them.
    """
    try:
        return schema.model_validate(content, context=folder)
    except ValidationError as error:
        raise ConfigError(f"{where}: {in_words(error, schema)}") from None
