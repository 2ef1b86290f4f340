"""Sentence embeddings, by sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forgetcast.errors import ConfigError, MissingExtraError


def sentence_embeddings(model: str | Path, texts: Sequence[str]) -> tuple[np.ndarray, str]:
    """Embed texts with a model of the sentence-transformers library, on the CPU or a GPU.

    Parameters
    ----------
    model : str or Path
        A folder with the model's files.
    texts : sequence of str

    Returns
    -------
    rows : array of float32, shape (n, d)
    note : str
        How many texts were longer than the model's limit, and cut there; empty if none was.

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
    return rows, f"{cut} of {len(texts)} texts were cut to the {limit} tokens of the embedding model" if cut else ""
