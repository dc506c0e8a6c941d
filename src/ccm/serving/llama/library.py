"""llama.cpp through its public calls: a model from a GGUF file, and contexts that hold sequences."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CCMError, ConfigError, MissingPackageError

log = logging.getLogger(__name__)

#: Release of llama-cpp-python that this is tested with.
TESTED = "0.3.36"
#: Most tokens of one call.
BATCH = 2048
#: Types of keys and values, by the names that llama.cpp gives them, and its numbers for them.
TYPES = {"f32": 0, "f16": 1, "q8_0": 8}

_NEEDED = (
    "llama_adapter_lora_init",
    "llama_decode",
    "llama_init_from_model",
    "llama_memory_seq_rm",
    "llama_model_load_from_file",
    "llama_n_ctx_seq",
    "llama_set_adapters_lora",
    "llama_state_seq_get_data",
    "llama_state_seq_get_size",
    "llama_state_seq_set_data",
)
_WARNING = 3  # of ggml's log levels; an error is 4
_said: list[str] = []  # by llama.cpp, of what went wrong in the newest call


class LlamaError(CCMError):
    """llama.cpp failed on a call that should have worked."""


def library() -> Any:
    """The module ``llama_cpp``.

    Raises:
        MissingPackageError: it is not installed, or its library does not load.
        ConfigError: it has not all the calls that are needed.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPackageError(
            f"llama.cpp is not usable here ({error}): pip install 'compressed-context-memory[llama]'"
        ) from error
    check_calls(llama_cpp)
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    return llama_cpp


def check_calls(module: Any) -> None:
    """Raises ConfigError unless a build of llama-cpp-python has the calls that are needed."""
    if missing := [name for name in _NEEDED if not hasattr(module, name)]:
        raise ConfigError(
            f"llama-cpp-python {module.__version__} has no {missing[0]}, which memories need: install {TESTED}"
        )


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, data: Any) -> None:
    message = text.decode(errors="replace").strip()
    if level >= _WARNING and message:
        _said.append(message)
        log.info("llama.cpp: %s", message)


def _why() -> str:
    return _said[0] if _said else "it does not say why"


class Model:
    """The weights of a GGUF file, on whatever this build of llama.cpp runs on.

    Raises:
        ConfigError: llama.cpp cannot load the file, or the model has a state that holds more than keys and values.
        MissingPackageError: see :func:`library`.
    """

    def __init__(self, path: str):
        self.path, self.lib = path, library()
        if not Path(path).is_file():
            raise ConfigError(f"--llama {path}: no such file, expected a model as GGUF")
        self.lib.llama_backend_init()
        _said.clear()
        self.pointer = self.lib.llama_model_load_from_file(
            path.encode(), self.lib.llama_model_default_params()
        )
        if not self.pointer:
            raise ConfigError(f"--llama {path}: llama.cpp cannot load it ({_why()})")
        weakref.finalize(self, self.lib.llama_model_free, self.pointer)
        if self.lib.llama_model_is_recurrent(self.pointer) or self.lib.llama_model_is_hybrid(self.pointer):
            raise self.refused("its state is more than keys and values")
        if self.lib.llama_model_n_swa(self.pointer):
            raise self.refused("its layers forget what is behind a sliding window, so a memory would be lost")

    def refused(self, why: str) -> ConfigError:
        """The error for a model that cannot carry a memory."""
        return ConfigError(
            f"--llama {self.path}: a memory has no place in {self.architecture} models ({why}): leave --llama out"
        )

    @property
    def architecture(self) -> str:
        """Its name in the GGUF file."""
        return self.value("general.architecture")

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.pointer)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size of the vocabulary, hidden size, layers and KV heads."""
        counts = ("llama_model_n_embd", "llama_model_n_layer", "llama_model_n_head_kv")
        width, layers, heads = (int(getattr(self.lib, name)(self.pointer)) for name in counts)
        return self.words, width, layers, heads

    @property
    def context(self) -> int:
        """Most positions that it was trained for."""
        return int(self.lib.llama_model_n_ctx_train(self.pointer))

    def value(self, key: str) -> str:
        """A value of the file's header, as text; empty if it is not there."""
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def adapter(self, path: Path) -> Any:
        """A LoRA from a GGUF file, which may go once it is loaded; it lives as long as the model."""
        found = self.lib.llama_adapter_lora_init(self.pointer, str(path).encode())
        if not found:
            raise ConfigError(f"--llama {self.path}: the adapter does not fit this model ({_why()})")
        return found


@dataclass(frozen=True)
class Part:
    """What one sequence reads: token ids (T,) in int32 or embeddings (T, d) in float32, at positions ``at``, ...."""

    sequence: int
    at: int
    content: NDArray[Any]


class Context:
    """Sequences of one model, each with its own keys and values.

    Args:
        model: whose.
        positions: most of one sequence.
        sequences: so many.
        kind: type of keys and values, one of :data:`TYPES`.
        threads: of the CPU.
        adapter: a LoRA that is always on.

    Raises:
        ConfigError: llama.cpp refuses these sizes or this type.
    """

    def __init__(
        self, model: Model, *, positions: int, sequences: int, kind: str, threads: int, adapter: Any = None
    ):
        self.model, self.lib = model, model.lib
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = positions * sequences, sequences
        params.n_batch, params.n_ubatch = BATCH, 512
        params.n_outputs_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES[kind]
        params.kv_unified = False
        # on CPUs flash attention is the slower one; quantized values cannot do without
        flash = kind == "q8_0" or self.lib.llama_supports_gpu_offload()
        params.flash_attn_type = int(flash)
        _said.clear()
        self.pointer = self.lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise ConfigError(
                f"--llama {model.path}: llama.cpp makes no context of {sequences} sequences of {positions} positions "
                f"in {kind} ({_why()}): give it fewer, or another type"
            )
        weakref.finalize(self, self.lib.llama_free, self.pointer)
        self.sequences = sequences
        self.positions = int(self.lib.llama_n_ctx_seq(self.pointer))
        if adapter is not None:
            self.lib.llama_set_adapters_lora(
                self.pointer,
                (self.lib.llama_adapter_lora_p_ctypes * 1)(adapter),
                1,
                (ctypes.c_float * 1)(1.0),
            )

    def read(self, parts: Sequence[Part], logits: bool = False) -> list[NDArray[np.float32]]:
        """Read the parts; all are token ids, or all are embeddings.

        Returns:
            with ``logits`` those after each part's last token, (V,) each; they are copies.

        Raises:
            LlamaError: llama.cpp failed; the sequences may hold a part of it.
        """
        found: dict[int, NDArray[np.float32]] = {}
        queue = [(i, part, 0) for i, part in enumerate(parts) if len(part.content)]
        while queue:
            taken: list[tuple[int, Part, int, int]] = []
            room = BATCH
            while queue and room:
                i, part, start = queue.pop(0)
                count = min(room, len(part.content) - start)
                taken.append((i, part, start, count))
                room -= count
                if start + count < len(part.content):
                    queue.insert(0, (i, part, start + count))
            last = self._decode([(part, start, count) for _, part, start, count in taken], logits)
            for (i, part, start, count), at in zip(taken, last, strict=True):
                if logits and start + count == len(part.content):
                    found[i] = self._logits(at)
        return [found[i] for i in range(len(parts))] if logits else []

    def _decode(self, pieces: Sequence[tuple[Part, int, int]], logits: bool) -> list[int]:
        """One call; where the last token of each piece stands in it."""
        content = np.ascontiguousarray(np.concatenate([p.content[s : s + n] for p, s, n in pieces]))
        counts = [n for _, _, n in pieces]
        total, last = sum(counts), np.cumsum(counts) - 1
        position = np.concatenate([np.arange(p.at + s, p.at + s + n, dtype=np.int32) for p, s, n in pieces])
        sequence = np.repeat(np.array([p.sequence for p, _, _ in pieces], np.int32), counts)
        one = np.ones(total, np.int32)
        pointers = sequence.ctypes.data + 4 * np.arange(total, dtype=np.uint64)
        wanted = np.zeros(total, np.int8)
        if logits:
            wanted[[at for at, (p, s, n) in zip(last, pieces, strict=True) if s + n == len(p.content)]] = 1
        int32, given = ctypes.POINTER(ctypes.c_int32), content.ctypes
        batch = self.lib.llama_batch(
            n_tokens=total,
            token=given.data_as(int32) if content.ndim == 1 else None,
            embd=given.data_as(ctypes.POINTER(ctypes.c_float)) if content.ndim == 2 else None,
            pos=position.ctypes.data_as(int32),
            n_seq_id=one.ctypes.data_as(int32),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(int32)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        _said.clear()
        if (code := self.lib.llama_decode(self.pointer, batch)) != 0:
            raise LlamaError(f"llama.cpp failed to read {total} tokens (code {code}: {_why()})")
        return [int(at) for at in last]

    def _logits(self, at: int) -> NDArray[np.float32]:
        pointer = self.lib.llama_get_logits_ith(self.pointer, at)
        return np.ctypeslib.as_array(pointer, shape=(self.model.words,)).copy()

    def cut(self, sequence: int, length: int) -> None:
        """Forget everything of a sequence from a position on."""
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.pointer), sequence, length, -1)

    def state(self, sequence: int) -> NDArray[np.uint8]:
        """The bytes of a sequence (``layout``)."""
        size = self.lib.llama_state_seq_get_size(self.pointer, sequence)
        blob = np.empty(size, np.uint8)
        if self.lib.llama_state_seq_get_data(self.pointer, _bytes(blob), size, sequence) != size:
            raise LlamaError(f"llama.cpp did not give the state of a sequence ({_why()})")
        return blob

    def put(self, sequence: int, blob: NDArray[np.uint8]) -> None:
        """The sequence from such bytes, in place of what it holds."""
        _said.clear()
        if self.lib.llama_state_seq_set_data(self.pointer, _bytes(blob), len(blob), sequence) != len(blob):
            raise LlamaError(f"llama.cpp did not take the state of a sequence ({_why()})")


def _bytes(blob: NDArray[np.uint8]) -> Any:
    return blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
