"""A language model with its tokenizer, from a directory, a GGUF file, a hub id, or loaded objects."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from forgetcast.data.pool import Example
from forgetcast.data.rendering import DEFAULT_RENDERING, Rendering
from forgetcast.errors import ConfigError, DataError, ForgetcastError
from forgetcast.lm import adapters
from forgetcast.lm.sizes import check_count, check_sizes
from forgetcast.lm.tokens import Encoded, encode, template_hash, tokenizer_hash
from forgetcast.model_files import HUB_OPTIONS, find, has_tokenizer, where_on_hub

_DEFAULT_CONTEXT = 2048
"""For models without a limit, such as those without positions."""

_OWN_OPTIONS = ("device_map", "dtype", "torch_dtype", "trust_remote_code", "gguf_file", "output_loading_info", "config")
"""Members of `model_kwargs` that other arguments of `load` set."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model and its tokenizer.

    Attributes
    ----------
    model : PreTrainedModel
        Or a PEFT model around one.
    tokenizer : PreTrainedTokenizerBase
    name : str
    loading : mapping
        What the metadata of its scores say of how it was loaded: 'quantization', with the 'method' of the file and
        whether the weights were 'dequantised' for this device; 'model_kwargs'; 'compiled'.

    Raises
    ------
    DataError
        If the tokenizer has tokens that the model has no embedding for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "a loaded model"
    rendering: Rendering = DEFAULT_RENDERING
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the model has an embedding for every token."""
        rows = embedding_rows(self.model)
        # Models pad their vocabulary, so fewer tokens than rows are usual; more cannot be looked up.
        tokens = max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values(), default=-1))
        if tokens > rows:
            raise DataError(f"{self.name}: the tokenizer has {tokens} tokens, the model only {rows}")
        if self.context < 2:
            raise DataError(f"{self.name}: its context is {self.context} tokens; see max_position_embeddings")

    def __repr__(self) -> str:
        parameters, dtype = (
            sum(p.numel() for p in self.model.parameters()),
            str(self.model.dtype).removeprefix("torch."),
        )
        return f"LanguageModel({self.name!r}, {parameters:,} parameters, {dtype}, {self.model.device})"

    @property
    def context(self) -> int:
        """Longest input, in tokens, besides the virtual tokens of a prompt-learning adapter."""
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT
        return int(min(longest - adapters.virtual_tokens(self.model), self.tokenizer.model_max_length))

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantised in memory, so that they cannot be trained themselves."""
        return bool(getattr(adapters.base_model(self.model), "is_quantized", False))

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and values of all parameters (64 hexadecimal digits).

        With an adapter, over names and hashes of the parameters, so that those of a shared base are hashed once.
        """
        if adapters.base_model(self.model) is not self.model:
            return hash_of_parts(self.model, {})
        digest = hashlib.sha256()
        with torch.inference_mode(False):  # in which quantised weights cannot be listed
            for name, value in sorted(self.model.state_dict().items()):
                _add_to(digest, name, value)
        return digest.hexdigest()

    @cached_property
    def text_settings(self) -> dict[str, Any]:
        """What the tokens of an example depend on: hashes of tokenizer and chat template, and the rendering."""
        hashes = {"tokenizer": tokenizer_hash(self.tokenizer), "template": template_hash(self.tokenizer)}
        return {**hashes, **asdict(self.rendering)}

    def encode(self, example: Example, context: int | None = None, *, end: bool = False) -> Encoded:
        """Tokenise an example; see `tokens.encode`."""
        return encode(example, self.tokenizer, context, end=end, rendering=self.rendering)

    def merged(self) -> LanguageModel:
        """Return the model with its adapter merged into its weights, in place; itself if it has none.

        The hash remains, because the model computes the same.

        Raises
        ------
        ConfigError
            If its weights cannot take the adapter in.
        """
        hash_before = self.weights_hash
        model = adapters.merged(self.model, self.name)
        if model is self.model:
            return self
        merged = replace(self, model=model)
        vars(merged)["weights_hash"] = hash_before
        return merged


def _add_to(digest: Any, name: str, value: Any) -> None:
    """Add a named entry of a state dict to a digest; of a quantised tensor, its components."""
    if not isinstance(value, torch.Tensor):  # extra state of a module
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    if hasattr(value, "__tensor_flatten__"):
        for part in sorted(value.__tensor_flatten__()[0]):
            _add_to(digest, f"{name}.{part}", getattr(value, part))
    else:
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


Address = tuple[int, torch.dtype, torch.Size]


def part_hashes(model: Any) -> dict[Address, str]:
    """Return the hash of each parameter and buffer of a model by where it is in memory."""
    return {address: _part_hash(value) for value in _parts(model).values() if (address := _address(value))}


def hash_of_parts(model: Any, known: Mapping[Address, str]) -> str:
    """Return a hash over the names and hashes of all parameters; those that are `known` are not hashed again."""
    digest = hashlib.sha256()
    for name, value in sorted(_parts(model).items()):
        address = _address(value)
        found = known.get(address) if address is not None else None
        digest.update(f"{name} {found or _part_hash(value)} ".encode())
    return digest.hexdigest()


def _parts(model: Any) -> dict[str, Any]:
    with torch.inference_mode(False):  # in which quantised weights cannot be listed
        return dict(model.state_dict())


def _address(value: Any) -> Address | None:
    """Return where a tensor is in memory; None for what has no address of its own, as a tensor made of others."""
    if not isinstance(value, torch.Tensor) or hasattr(value, "__tensor_flatten__") or not value.data_ptr():
        return None
    return value.data_ptr(), value.dtype, value.shape


def _part_hash(value: Any) -> str:
    digest = hashlib.sha256()
    _add_to(digest, "", value)
    return digest.hexdigest()


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of token embeddings, padding rows included."""
    embeddings: Any = model.get_input_embeddings()
    # The weights of a quantised layer may be packed, so their shape is not the number of tokens.
    rows = getattr(embeddings, "num_embeddings", None)
    return int(rows if rows is not None else embeddings.weight.shape[0])


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
    load_in: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    compile: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    model : str or path
        A directory of a Hugging Face model or PEFT adapter, a GGUF file, or a hub id. Quantised models need the library
        that they were quantised with.
    device : str, optional
        Default: the first GPU (the process's GPU if there are several processes), else the CPU. 'auto' distributes the
        layers of a model that is too large for one GPU over all GPUs and the CPU.
    dtype : str, optional
        Such as 'float32' or 'bfloat16'. Default: float32, which fine-tuning needs and which makes scores exact; of a
        quantised model, the type that its configuration names, because its kernels may need it.
    trust_remote_code : bool
        Whether code that ships with the model may run.
    load_in : '4bit' or '8bit', optional
        Quantise the weights with bitsandbytes while they are loaded.
    model_kwargs : mapping, optional
        Further arguments of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation` or `revision`.
    compile : bool
        Compile the model's blocks for scoring and training: faster after the first batches, the same up to rounding.

    Raises
    ------
    ConfigError
        If `dtype`, `load_in` or `model_kwargs` are invalid, or the model cannot be compiled here.
    DataError
        If the model, its tokenizer, some of its weights, an adapter's base model or a library are missing.

    Warns
    -----
    UserWarning
        If quantised weights are dequantised, so that the scores are not those of the quantised model; if weights in the
        files have no place in the model.
    """
    name, extra = str(model), dict(model_kwargs or {})
    if odd := sorted(set(extra) & set(_OWN_OPTIONS)):
        raise ConfigError(f"model_kwargs: {odd[0]} cannot be given there; see the other options")
    if load_in not in (None, "4bit", "8bit"):
        raise ConfigError(f"load_in is 4bit or 8bit, not {load_in!r}")
    wanted = getattr(torch, dtype or "float32", None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise DataError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    hub = {key: extra[key] for key in HUB_OPTIONS if key in extra}
    source, file = find(name)
    hub |= where_on_hub(source, hub)
    with _one_line(name), without_bars():
        adapter = adapters.find(source, hub) if file is None else None
        base = adapter.base if adapter is not None else source
        if adapter is None:
            extra |= hub
        else:  # where its files are says nothing about the base model's
            extra = {key: value for key, value in extra.items() if key not in HUB_OPTIONS} | where_on_hub(base, {})
            hub |= where_on_hub(base, {})
        config = PreTrainedConfig.get_config_dict(base, **hub)[0] if file is None else {}
        check_sizes(base, config)
        method = _method(base, file, hub, config)
        tokenizer = _tokenizer(source, base, {**hub, "trust_remote_code": trust_remote_code}, file)
        if load_in is not None:
            extra["quantization_config"] = _bits_and_bytes(name, load_in, wanted, method)
        result: Any = AutoModelForCausalLM.from_pretrained(
            base,
            **extra,
            **{"gguf_file": file} if file is not None else {},
            dtype="auto" if dtype is None and method not in (None, "gguf") else wanted,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # What is quantised cannot be moved afterwards.
            device_map={"cpu": None, "auto": "auto"}.get(device, {"": device}),
        )
        loaded, notes = result
        if missing := sorted(notes["missing_keys"]):
            # Transformers only warns, and initialises them at random.
            raise DataError(
                f"{name}: the weights of {missing[0]} and {len(missing) - 1} other parameter(s) are missing"
            )
        if unused := sorted(notes["unexpected_keys"]):
            warnings.warn(
                f"{name}: the weights {unused[0]} and {len(unused) - 1} other(s) have no place in the model, and are "
                "not used",
                stacklevel=2,
            )
        if file is not None and all(parameter.is_floating_point() for parameter in loaded.parameters()):
            # Transformers goes on to call it quantised, and would neither train nor save it.
            loaded.hf_quantizer.remove_quantization_config(loaded)
        if file is not None:
            loaded.name_or_path = ""  # an adapter could not name the file as its base model
        if adapter is not None:
            loaded = adapters.attach(loaded, adapter, tokenizer, hub)
    if device == "auto" and any(parameter.is_meta for parameter in loaded.parameters()):
        raise DataError(f"{name} does not fit into the memory of the devices")
    loading: dict[str, Any] = {"model_kwargs": dict(model_kwargs)} if model_kwargs else {}
    if method is not None or load_in is not None:
        dequantised = not getattr(adapters.base_model(loaded), "is_quantized", False)
        loading["quantization"] = {"method": method or f"bitsandbytes {load_in}", "dequantised": dequantised}
        if dequantised:
            warnings.warn(
                f"{name}: the {method} weights were dequantised, because this device cannot compute with them; the "
                "scores are not those of the quantised model",
                stacklevel=2,
            )
    if compile:
        compile_blocks(loaded)
        loading["compiled"] = True
    return LanguageModel(loaded.eval(), tokenizer, name, loading=loading)


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile the forward pass of each of a model's blocks, by `torch.compile`, for inputs of any length.

    Blocks are alike, so one compilation serves all, whatever wraps the model. Copies of the model are not compiled.

    Raises
    ------
    ConfigError
        If the model does not name its blocks, or PyTorch finds no compiler for the device.
    """
    inner = adapters.base_model(model)
    names = set(inner._no_split_modules or ())
    blocks = [module for module in inner.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"compile: {type(inner).__name__} does not say which of its modules are its blocks; leave it out"
        )
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2, device=inner.device))
    except Exception as error:  # of a missing compiler, by many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"compile: torch.compile does not work on this machine ({reason}); leave it out") from error
    for block in blocks:
        block.compile(dynamic=True, backend=backend)


class SharedBase:
    """Loads models one after another; adapters of one base model share it in memory.

    Parameters
    ----------
    rendering : Rendering
        How conversations are rendered.
    **options
        Of `load`.
    """

    def __init__(self, rendering: Rendering = DEFAULT_RENDERING, **options: Any) -> None:
        self._rendering, self._options = rendering, options
        kwargs = dict(options.get("model_kwargs") or {})
        self._hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        # Where the adapter's files are says nothing about the base model's.
        self._of_base = options | {"model_kwargs": {k: v for k, v in kwargs.items() if k not in HUB_OPTIONS}}
        self._bases: dict[str, LanguageModel] = {}
        self._hashes: dict[Address, str] = {}

    def base_name(self, model: str) -> str | None:
        """Return the name of the base model of an adapter; None if `model` is not an adapter.

        Raises
        ------
        DataError
            If there is no such model, the adapter's configuration is malformed, or its base model does not exist.
        """
        adapter = self._adapter(model)
        return adapter.base if adapter is not None else None

    def _adapter(self, model: str) -> adapters.Adapter | None:
        source, file = find(model)
        with _one_line(model):
            return adapters.find(source, self._at(source)) if file is None else None

    def _at(self, source: str) -> dict[str, Any]:
        """Return the options by which a model or adapter is found on the Hub, or in its cache alone."""
        return self._hub | where_on_hub(source, self._hub)

    def base(self, name: str) -> LanguageModel:
        """Return a base model by its name; it is loaded unless it is the one in memory.

        Raises
        ------
        ConfigError, DataError
            As `load` does.
        """
        if name not in self._bases:
            self._forget()  # before the next one needs the memory
            self._bases[name] = replace(load(name, **self._of_base), rendering=self._rendering)
        return self._bases[name]

    @contextmanager
    def model(self, name: str) -> Iterator[LanguageModel]:
        """Load a model for as long as the block lasts; of an adapter, only its weights are read.

        Raises
        ------
        ConfigError, DataError
            As `load` does.
        """
        adapter = self._adapter(name)
        base = self.base(adapter.base) if adapter is not None else None
        if adapter is None or base is None or adapters.is_adapted(base.model):
            self._forget()
            yield replace(load(name, **self._options), rendering=self._rendering)
            return
        _ = base.weights_hash  # of the weights alone
        self._hashes = self._hashes or part_hashes(base.model)
        hub = self._at(adapter.source)
        options = {**hub, "trust_remote_code": self._options.get("trust_remote_code", False)}
        before = adapters.parameters(base.model)
        adapted: Any = None
        try:
            with _one_line(name), without_bars():
                tokenizer = _tokenizer(adapter.source, adapter.base, options, None)
                adapted = adapters.attach(base.model, adapter, tokenizer, hub)
            language_model = LanguageModel(adapted, tokenizer, name, self._rendering, base.loading)
            # A base model that was resized is hashed whole, because memory that it gave back may be in use again.
            known = self._hashes if adapters.shares(adapted, before) else {}
            vars(language_model)["weights_hash"] = hash_of_parts(adapted, known)
            yield language_model
        finally:
            if adapted is not None:
                adapters.detach(adapted)
            # An adapter may have resized or changed the base model's weights, or been attached in part.
            if adapters.parameters(base.model) != before:
                self._forget()

    def _forget(self) -> None:
        """Give the memory of the base model back."""
        self._bases.clear()
        self._hashes.clear()


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what the libraries raise for a folder that they cannot load, whatever its class, into one line."""
    try:
        yield
    except ForgetcastError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{name} cannot be loaded: its weights are pickled with objects that could run code; convert them to "
            "safetensors where you trust them"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, OSError) and not Path(name).exists():
            reason += f"; for a copy of all of its files in the cache, run: hf download {name}"
        if name.endswith(".gguf"):
            reason += "; use the model that the file was converted from, in safetensors"
        raise DataError(f"{name} cannot be loaded: {reason}") from error


def _tokenizer(source: str, base: str, options: Mapping[str, Any], file: str | None) -> Any:
    """Load the tokenizer of a model, of a GGUF file, or of an adapter, which may have to be its base model's."""
    if file is not None:
        return AutoTokenizer.from_pretrained(source, gguf_file=file, **options)
    if base == source or has_tokenizer(Path(source)):
        return AutoTokenizer.from_pretrained(source, **options)
    if not Path(source).is_dir():
        try:
            return AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError):
            pass
    warnings.warn(f"{source} has no tokenizer; its base model's is used: {base}", stacklevel=4)
    return AutoTokenizer.from_pretrained(base, trust_remote_code=options["trust_remote_code"])


def _method(base: str, file: str | None, hub: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return how a model's files are quantised, None if they are not.

    Raises
    ------
    DataError
        If Transformers does not know it: it would read the packed numbers as weights.
    """
    if file is not None:
        return "gguf" if _is_quantized_gguf(base, file, hub) else None
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise DataError(f"{base}: quantization_config in config.json must be an object")
    method = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else found.get("quant_method")
    if not AutoHfQuantizer.supports_quant_method(found):
        raise DataError(f"{base} is quantised with {method!r}, which this version of Transformers cannot load")
    return str(method)


def _is_quantized_gguf(source: str, file: str, hub: Mapping[str, Any]) -> bool:
    """Whether a GGUF file holds anything but plain floating-point numbers."""
    from gguf import GGMLQuantizationType, GGUFReader
    from transformers.utils.hub import cached_file

    plain = {GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
    path: Any = cached_file(source, file, **hub)
    reader = GGUFReader(path)
    for name, found in reader.fields.items():
        if name.endswith(".block_count"):
            check_count(f"{path}: {name}", int(found.parts[found.data[0]][0]), len(reader.tensors))
    return any(tensor.tensor_type not in plain for tensor in reader.tensors)


def _bits_and_bytes(name: str, load_in: str, dtype: torch.dtype, method: str | None) -> BitsAndBytesConfig:
    """Return the settings of a quantisation while loading."""
    if method is not None:
        raise ConfigError(f"{name} is quantised already ({method}); leave out --load-in")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DataError("--load-in needs the package bitsandbytes, and usually a GPU; run: pip install bitsandbytes")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
