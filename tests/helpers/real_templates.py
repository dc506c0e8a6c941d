"""Chat templates of real models, with real tokenizers, out of the source archive of a registry package.

They are fetched once into the cache, for tests only; without the network the tests that need them skip.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

from ccm.data.archives import Archive
from ccm.errors import DataError, MissingPackageError
from ccm.models.packages import cache_dir

VOCABULARIES = ("llama-bpe", "qwen2", "llama-spm", "phi-3")
_MODELS = "vendor/llama.cpp/models"
ARCHIVE = Archive(
    "pypi",
    "llama-cpp-python",
    "0.3.36",
    (f"{_MODELS}/templates/*.jinja", *(f"{_MODELS}/ggml-vocab-{name}.gguf" for name in VOCABULARIES)),
    77,
)
#: Words that look like control tokens; a model's own vocabulary would have them.
_CONTROL = re.compile(
    r"<\|[^|<>\n ]{1,40}\|>|<｜[^｜<>\n]{1,60}｜>|\[/?[A-Z_]{3,20}\]|</?[a-z_:]{3,20}>|<(?:start|end)_of_turn>"
    r"|\]~!?b\[|\]~b\]|\[e~\[|<SPECIAL_\d+>|<\|turn>|<turn\|>|<\|?channel\|?>|〈\|EOS\|〉"
)
#: Of these only the words around them are control tokens in real vocabularies.
_PLAIN = re.compile(r"</?(?:think|tool|arg)")


@lru_cache(maxsize=1)
def folder() -> Path:
    """The folder of the templates; skips the test where it cannot be had."""
    try:
        return ARCHIVE.fetch() / _MODELS
    except (DataError, MissingPackageError) as error:
        pytest.skip(f"the archive with real templates is not there: {error}")


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """Templates by name."""
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted((folder() / "templates").glob("*"))
    }


def vocabulary_of(name: str) -> str:
    lower = name.lower()
    for words, vocabulary in (
        (("phi",), "phi-3"),
        (("mistral", "gemma"), "llama-spm"),
        (("llama",), "llama-bpe"),
    ):
        if any(word in lower for word in words):
            return vocabulary
    return "qwen2"


def tokenizer_of(name: str) -> Any:
    """A real tokenizer that has the control tokens of this template, and of those that share it."""
    vocabulary = vocabulary_of(name)
    tokenizer = _tokenizer(vocabulary)
    tokenizer.chat_template = sources()[name]
    return tokenizer


@lru_cache(maxsize=len(VOCABULARIES))
def _tokenizer(vocabulary: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(_converted(vocabulary))
    words: set[str] = set()
    for name, source in sources().items():
        if vocabulary_of(name) == vocabulary:
            tokenizer.chat_template = source
            words |= set(_CONTROL.findall(source + _written(tokenizer)))
    special = sorted(word for word in words if not _PLAIN.match(word))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(sorted(words - set(special)))
    return tokenizer


def _written(tokenizer: Any) -> str:
    """What the template writes; some put control tokens together from parts."""
    try:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return str(
            tokenizer.apply_chat_template([*said, said[0]], tokenize=False, add_generation_prompt=True)
        )
    except Exception:  # templates are programs and refuse what they like
        return ""


def _converted(vocabulary: str) -> Path:
    """The tokenizer of a GGUF file as a folder, which loads in a second and not in ten."""
    target = cache_dir() / "models" / f"tokenizer-{vocabulary}"
    if not target.is_dir():
        transformers.logging.set_verbosity_error()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temp:
            file = f"ggml-vocab-{vocabulary}.gguf"
            AutoTokenizer.from_pretrained(folder(), gguf_file=file).save_pretrained(Path(temp, "made"))
            shutil.rmtree(target, ignore_errors=True)
            Path(temp, "made").rename(target)
    return target
