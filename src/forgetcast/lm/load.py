"""A language model with its tokenizer, from a directory, a hub id, or loaded objects."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from forgetcast.data.pool import Example
from forgetcast.data.rendering import DEFAULT_RENDERING, Rendering
from forgetcast.errors import DataError
from forgetcast.files import read_json
from forgetcast.lm.tokens import Encoded, encode, template_hash, tokenizer_hash

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_DEFAULT_CONTEXT = 2048
"""For models without a limit, such as those without positions."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model and its tokenizer.

    Raises
    ------
    DataError
        If the tokenizer has tokens that the model has no embedding for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "a loaded model"
    rendering: Rendering = DEFAULT_RENDERING

    def __post_init__(self) -> None:
        """Check that the model has an embedding for every token."""
        rows = embedding_rows(self.model)
        # Models pad their vocabulary, so fewer tokens than rows are usual; more cannot be looked up.
        if len(self.tokenizer) > rows:
            raise DataError(f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens, the model only {rows}")

    def __repr__(self) -> str:
        parameters, dtype = (
            sum(p.numel() for p in self.model.parameters()),
            str(self.model.dtype).removeprefix("torch."),
        )
        return f"LanguageModel({self.name!r}, {parameters:,} parameters, {dtype}, {self.model.device})"

    @property
    def context(self) -> int:
        """Longest input, in tokens."""
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT
        return int(min(longest, self.tokenizer.model_max_length))

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and values of all parameters (64 hexadecimal digits)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def text_settings(self) -> dict[str, Any]:
        """What the tokens of an example depend on: hashes of tokenizer and chat template, and the rendering."""
        hashes = {"tokenizer": tokenizer_hash(self.tokenizer), "template": template_hash(self.tokenizer)}
        return {**hashes, **asdict(self.rendering)}

    def encode(self, example: Example, context: int | None = None, *, end: bool = False) -> Encoded:
        """Tokenise an example; see `tokens.encode`."""
        return encode(example, self.tokenizer, context, end=end, rendering=self.rendering)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of token embeddings, padding rows included."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable the progress bars of Transformers, which would mix with ours."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    model : str or path
        A directory of a Hugging Face model or PEFT adapter, or a hub id.
    device : str, optional
        Default: the first GPU (the process's GPU if there are several processes), else the CPU. 'auto' distributes the
        layers of a model that is too large for one GPU over all GPUs and the CPU.
    dtype : str, optional
        Such as 'float32' or 'bfloat16'. Default: float32, which fine-tuning needs and which makes scores exact.
    trust_remote_code : bool
        Whether code that ships with the model may run.

    Raises
    ------
    DataError
        If the model, its tokenizer, some of its weights or an adapter's base model are missing.
    """
    name = str(model)
    directory = Path(model)
    if directory.is_dir():
        if not any((directory / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise DataError(f"{name} is not a model directory: config.json is missing")
        if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
            raise DataError(f"{name} has no tokenizer; save the model's tokenizer into the same directory")
        _check_adapter(directory)
    elif directory.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise DataError(f"{name}: there is no such directory")
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    torch_dtype = getattr(torch, dtype or "float32", None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise DataError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            result: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch_dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                device_map="auto" if device == "auto" else None,
            )
        loaded, notes = result
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(notes["missing_keys"]):
        # Transformers only warns, and initialises them at random.
        raise DataError(f"{name}: the weights of {missing[0]} and {len(missing) - 1} other parameter(s) are missing")
    if device == "auto":
        if any(parameter.is_meta for parameter in loaded.parameters()):
            raise DataError(f"{name} does not fit into the memory of the devices")
        return LanguageModel(loaded.eval(), tokenizer, name)
    return LanguageModel(loaded.to(device).eval(), tokenizer, name)


def _check_adapter(directory: Path) -> None:
    """Raise DataError if an adapter's base model should be in a directory that does not exist."""
    if not (directory / "adapter_config.json").is_file() or (directory / "config.json").is_file():
        return
    base = str(read_json(directory / "adapter_config.json").get("base_model_name_or_path"))
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise DataError(
            f"{directory} is an adapter, and its base model {base} does not exist; put it there, or correct "
            "base_model_name_or_path in adapter_config.json"
        )
