"""Sentence embeddings, by sentence-transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forgetcast.errors import ConfigError, MissingExtraError


def sentence_embeddings(model: str | Path, texts: Sequence[str]) -> np.ndarray:
    """Embed texts with a model of the sentence-transformers library, on the CPU or a GPU.

    A text longer than the model's limit is cut there; a warning says how many were.

    Parameters
    ----------
    model : str or Path
        A folder with the model's files.
    texts : sequence of str

    Returns
    -------
    array of float32, shape (n, d)

    Raises
    ------
    ConfigError
        If the folder has no such model.
    MissingExtraError
        If sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("similarity", error) from error
    if not (Path(model) / "modules.json").is_file():  # without it, the library would make up a model of another kind
        raise ConfigError(f"{model} holds no sentence-transformers model: there is no file modules.json")
    try:
        loaded = SentenceTransformer(str(model), local_files_only=True)
        limit = loaded.max_seq_length
        cut = 0
        if limit:
            lengths = loaded.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
            cut = sum(len(ids) > limit for ids in lengths)
        rows = np.asarray(loaded.encode(list(texts), show_progress_bar=False), dtype=np.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"the embedding model {model} cannot be used: {str(error).splitlines()[0]}") from None
    if cut:
        warnings.warn(f"{cut} of {len(texts)} texts were cut to the embedding's {limit} tokens", stacklevel=2)
    return rows
