"""Where a model runs and in which type."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hub
from ..errors import ConfigError, MissingPackageError, UnknownNameError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")
#: Quantized weights, and the package that makes each.
LOAD_IN = {"4bit": "bitsandbytes", "8bit": "torchao"}
#: From which weights answers are written: the model's own, or a copy that is read in less time.
OWN = "model"
#: The model's own weights, by a CUDA graph.
GRAPH = "graph"
DECODE_IN = (AUTO, OWN, "float16", "int8", GRAPH)
#: Ways to spread the layers, as accelerate names them.
DEVICE_MAPS = (AUTO, "balanced", "balanced_low_0", "sequential")
#: The embedded model.
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEVICE = re.compile(r"(auto|cpu|cuda|mps|xpu|npu|hpu|mtia|meta)(:\d+)?")


@dataclass(frozen=True)
class Placement:
    """What options come to on this machine.

    Attributes:
        device: of the model, or of its first layers where it is spread.
        dtype: of the weights; None leaves it to the checkpoint.
        auto: a checkpoint's float16 becomes float32 on a CPU, which is slow with it.
        load_in, device_map, decode_in: as they were asked for.
    """

    device: torch.device
    dtype: torch.dtype | None
    auto: bool = False
    load_in: str | None = None
    device_map: Any = None
    decode_in: str = OWN

    def dtype_of(self, stored: torch.dtype | None) -> torch.dtype | None:
        """The type of weights that are stored in another one, None if that is not known."""
        import torch

        if self.dtype is not None:
            return self.dtype
        return torch.float32 if self.auto and stored is torch.float16 else stored


def place(
    model: str | None = None,
    dtype: str | torch.dtype | None = AUTO,
    device: str | torch.device | None = AUTO,
    load_in: str | None = None,
    device_map: Any = None,
    decode_in: str = OWN,
) -> Placement:
    """Where a model goes and in which type, before anything heavy is loaded.

    Args:
        model: its name; of a GGUF file the weights cannot be quantized once more.
        dtype: a type or its name; None is the checkpoint's, "auto" the one that suits the device.
        device: a device or its name; None is the CPU, "auto" the accelerator if there is one.
        load_in: None, "4bit" or "8bit".
        device_map: None, one of :data:`DEVICE_MAPS`, or a mapping of modules to devices.
        decode_in: one of :data:`DECODE_IN`.

    Raises:
        ConfigError: an unknown device or type, one that is not there, or options that exclude each other.
        MissingPackageError: the package that quantizes is not installed.
    """
    check_names(model, dtype, device, load_in, device_map, decode_in)
    device = AUTO if device_map is not None else device
    where = _device(device)
    auto = dtype == AUTO
    kind = None if auto or dtype is None else _dtype(dtype)
    if auto and where.type != "cpu":
        kind = _fastest(where)
    elif kind is not None and not _can(where, kind):
        name = str(kind).removeprefix("torch.")
        raise ConfigError(f"dtype {name}: device {where} cannot do it; give another, or auto")
    if decode_in == GRAPH and where.type != "cuda":
        raise ConfigError(f"decode in {GRAPH}: it is for CUDA devices, this is {where}; leave it out")
    if decode_in not in (AUTO, OWN, GRAPH) and not can_pack(where):
        raise ConfigError(
            f"decode in {decode_in}: torch has its products on x86 processors alone, this is {where}; leave it out"
        )
    return Placement(where, kind, auto, load_in, device_map, decode_in)


def can_pack(device: torch.device) -> bool:
    """Whether torch multiplies with packed copies of weights there."""
    import torch

    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def check_names(
    model: str | None = None,
    dtype: Any = AUTO,
    device: Any = AUTO,
    load_in: str | None = None,
    device_map: Any = None,
    decode_in: str = OWN,
) -> None:
    """What can be told of the arguments of :func:`place` at once, before torch is imported; raises as it does."""
    if is_gguf(model):
        if not Path(str(model)).is_file():
            raise ConfigError(f"no file {str(model)!r}: expected a GGUF file of this name")
    elif not is_default(model) and not hub.is_folder(str(model), "model", "config.json"):
        hub.is_online(str(model), "model", "config.json")
    if load_in is not None:
        _check_quantized(str(model), load_in)
    if device_map is not None:
        if device not in (None, AUTO):
            raise ConfigError(
                f"device {str(device)!r} with a device map: the map says where each layer goes; give one of the two"
            )
        if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
            raise UnknownNameError("device map", device_map, list(DEVICE_MAPS))
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UnknownNameError("type of weights", dtype, list(DTYPES))
    if decode_in not in DECODE_IN:
        raise UnknownNameError("kind of weights to decode from", decode_in, list(DECODE_IN))
    if isinstance(device, str) and not _DEVICE.fullmatch(device):
        raise ConfigError(f"device {device!r}: no such device; expected auto, cpu, cuda, cuda:1 or mps")
    if isinstance(device, str) and "torch" not in sys.modules and (why := _absent(device.partition(":")[0])):
        raise ConfigError(f"device {device!r} is not there: {why}")


def _absent(kind: str) -> str:
    """Why no device of this kind can be here; empty if one may be. Files tell: to import torch takes seconds."""
    if kind == "mps" and sys.platform != "darwin":
        return "it is the GPU of a Mac; give auto or cpu"
    if kind != "cuda":
        return ""
    built = _torch_built_for()
    if built == set():
        return "this torch is built for processors alone; install its build for your GPU, or give auto or cpu"
    if built == {"cuda"} and sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "no driver of NVIDIA is found (libcuda.so.1); give auto or cpu"
    return ""


def _torch_built_for() -> set[str] | None:
    """Those of cuda and hip that the installed torch was built for; None if its files do not say."""
    try:
        found = importlib.util.find_spec("torch")
        text = (Path(str(found and found.origin)).parent / "version.py").read_text()
    except (ImportError, OSError, ValueError):
        return None
    said = dict(re.findall(r"^(cuda|hip)\b[^=\n]*= *(\S+)", text, re.MULTILINE))
    return {name for name, value in said.items() if value != "None"} if "cuda" in said else None


def is_default(name: str | None) -> bool:
    """Whether the name is that of the embedded model."""
    return name in (None, "default", DEFAULT_MODEL)


def is_gguf(name: str | None) -> bool:
    """Whether the name is that of a GGUF file, whether or not it is there."""
    return str(name).endswith(".gguf")


def _check_quantized(name: str, load_in: str) -> None:
    if load_in not in LOAD_IN:
        raise UnknownNameError("kind of quantized weights", load_in, list(LOAD_IN))
    if is_gguf(name):
        raise ConfigError(
            f"load in {load_in} with the GGUF file {name}: its weights were rounded once, and are read as floats; "
            f"leave out {load_in}, or load the model that the file was made from"
        )
    if importlib.util.find_spec(LOAD_IN[load_in]) is None:
        raise MissingPackageError(
            f"loading in {load_in} needs {LOAD_IN[load_in]}: pip install 'compressed-context-memory[quant]'"
        )


def _device(wanted: str | torch.device | None) -> torch.device:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted is None or (wanted == AUTO and found is None):
        return torch.device("cpu")
    if wanted == AUTO:
        return torch.device(found)
    known = "cpu" if found is None else f"cpu or {found.type}"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r}: no such device; here it is auto, {known}") from error
    if device.type == "cpu":
        return device
    if found is None or device.type != found.type:
        raise ConfigError(f"device {str(device)!r} is not there: here it is auto, {known}")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(f"device {str(device)!r} is not there: this machine has {count}, counted from 0")
    return device


def _dtype(wanted: str | torch.dtype) -> torch.dtype:
    import torch

    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in DTYPES:
        raise UnknownNameError("type of weights", wanted, list(DTYPES))
    return getattr(torch, wanted)


def _fastest(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on an accelerator that has no units for it."""
    import torch

    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fits = _can(device, torch.bfloat16)
    return torch.bfloat16 if fits else torch.float16


def _can(device: torch.device, dtype: torch.dtype) -> bool:
    import torch

    try:
        one = torch.ones(2, 2, device=device, dtype=dtype)
        return bool((one @ one)[0, 0] == 2)
    except (RuntimeError, TypeError):
        return False
