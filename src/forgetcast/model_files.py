"""Where a model's files are, by its name: told without PyTorch, so that a wrong name is an error within seconds."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from forgetcast.errors import DataError
from forgetcast.files import neighbour

HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
"""Arguments of Transformers that say where the files are, and so concern the tokenizer too."""

SECONDS_FOR_THE_HUB = 4.0
"""How long its first answer is waited for."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_CONFIGURATIONS = ("config.json", "adapter_config.json")


def find(name: str) -> tuple[str, str | None]:
    """Return the directory or hub id of a model, and the name of its GGUF file if it is one.

    Raises
    ------
    DataError
        If there is no such file or directory, or it holds no model.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        source, _, file = name.rpartition("/")
        if not path.is_file() and (source.count("/") != 1 or path.is_absolute() or name.startswith(".")):
            raise DataError(f"{name}: there is no such file{neighbour(path)}")
        if importlib.util.find_spec("gguf") is None:
            raise DataError(f"{name}: reading GGUF files needs the package gguf; run: pip install 'forgetcast[gguf]'")
        return source or ".", file
    if path.is_dir():
        if not any((path / file).is_file() for file in _CONFIGURATIONS):
            if found := sorted(path.glob("*.gguf")):
                raise DataError(f"{name} is not a model directory, but holds GGUF files; name one, such as {found[0]}")
            raise DataError(f"{name} is not a model directory: config.json is missing")
        if not has_tokenizer(path) and (path / "config.json").is_file():
            raise DataError(f"{name} has no tokenizer; save the model's tokenizer into the same directory")
    elif path.is_file():
        raise DataError(f"{name} is a file; give the model's directory, or a GGUF file (.gguf)")
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise DataError(f"{name}: there is no such directory{neighbour(path)}")
    return name, None


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer is saved in a directory."""
    return any((directory / file).is_file() for file in _TOKENIZER_FILES)


def check_name(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Check that there is such a model, as far as that is told without loading it; see `find` and `where_on_hub`."""
    source, _ = find(name)
    where_on_hub(source, options or {})


def where_on_hub(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Transformers is to be told beside `options` to find a model on the Hub, asking it once.

    Parameters
    ----------
    source : str
        A directory, about which there is nothing to say, or a hub id.
    options : mapping
        Of `HUB_OPTIONS`, as the user gave them.

    Returns
    -------
    dict
        `local_files_only` where the Hub cannot be reached, and a copy is in its cache.

    Raises
    ------
    DataError
        If the model is neither there nor in the cache.
    """
    if Path(source).is_dir() or options.get("local_files_only"):
        return {}
    from huggingface_hub import is_offline_mode

    cached = _in_cache(source, options)
    if is_offline_mode():
        if not cached:
            raise DataError(
                f"{source}: there is no such directory, nor a copy in the cache of the Hub, which is switched off "
                f"(HF_HUB_OFFLINE); where it can be reached, run: hf download {source}{neighbour(Path(source))}"
            )
        return {}
    known = {name: options[name] for name in ("revision", "token") if isinstance(options.get(name), str | bool)}
    reason = _asked(source, tuple(sorted(known.items())))
    if reason is not None and not cached:
        raise DataError(
            f"{source}: there is no such directory, nor a copy in the cache of the Hub, and {reason}"
            f"{neighbour(Path(source))}"
        )
    return {} if reason is None else {"local_files_only": True}


def _in_cache(source: str, options: Mapping[str, Any]) -> bool:
    """Whether the configuration of a model is in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = options.get("subfolder") or ""
    where = {name: options[name] for name in ("cache_dir", "revision") if options.get(name) is not None}
    try:
        return any(
            isinstance(try_to_load_from_cache(source, f"{folder}/{file}".strip("/"), **where), str)
            for file in (*_CONFIGURATIONS, "tokenizer_config.json")
        )
    except HFValidationError:
        raise DataError(f"{source}: there is no such directory, nor can a hub id be called so") from None


@cache
def _asked(source: str, options: tuple[tuple[str, Any], ...]) -> str | None:
    """Ask the Hub for a model; return why it is not there, None if it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    found: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(source, timeout=SECONDS_FOR_THE_HUB, **dict(options))
            found.append(None)
        except GatedRepoError:
            found.append("the Hub asks for a login and the consent to its terms: see its page, then run: hf auth login")
        except RevisionNotFoundError:
            found.append("the Hub has no such revision of it")
        except RepositoryNotFoundError:
            found.append("the Hub has no such model, or it is private; then run: hf auth login")
        except HfHubHTTPError as error:
            found.append(f"the Hub answers with an error: {(str(error).splitlines() or [''])[0][:200]}")
        except Exception as error:  # of the connection: each library below has its own classes
            found.append(f"the Hub cannot be reached ({(str(error).splitlines() or [type(error).__name__])[0][:100]})")

    # In a thread that nobody waits for: looking up a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_FOR_THE_HUB)
    return found[0] if found else f"the Hub has not answered within {SECONDS_FOR_THE_HUB:g} seconds"
