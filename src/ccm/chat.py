"""Turns as token ids, by the chat template of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import ConfigError

#: A first message that keeps templates from adding their default system prompt; cut off again.
_OPENING = ({"role": "system", "content": "."}, {"role": "user", "content": "."})


@dataclass(frozen=True)
class RenderedTurn:
    """One turn: header, content and closing tokens.

    Attributes:
        ids: all token ids of the turn.
        content: (start, stop) of what the speaker said and of the token that ends the turn: what is scored.
    """

    ids: tuple[int, ...]
    content: tuple[int, int]


@lru_cache(maxsize=64)
def _frame(tokenizer: Any, role: str) -> tuple[str, str]:
    """What the template writes before and after the content of a turn."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{role}: ", "\n"
    mark = "\u2063content\u2063"
    for opening in (_OPENING[:1], _OPENING, ()):
        try:
            before = tokenizer.apply_chat_template(list(opening), tokenize=False) if opening else ""
            message = {"role": role, "content": mark}
            whole = tokenizer.apply_chat_template([*opening, message], tokenize=False)
        except Exception:  # templates are programs and refuse what they like
            continue
        if whole.startswith(before) and mark in whole:
            head, tail = whole[len(before) :].split(mark)
            return head, tail
    raise ConfigError(f"the chat template of this tokenizer accepts no message with role {role!r}")


def header(tokenizer: Any, role: str) -> list[int]:
    """Token ids that open a turn of ``role``."""
    return tokenizer.encode(_frame(tokenizer, role)[0], add_special_tokens=False)


def closing(tokenizer: Any, role: str) -> list[int]:
    """Token ids that end a turn of ``role``."""
    return tokenizer.encode(_frame(tokenizer, role)[1], add_special_tokens=False)


def ends(tokenizer: Any) -> set[int]:
    """Token ids that end an answer."""
    special = set(closing(tokenizer, "assistant")) & set(tokenizer.all_special_ids)
    return special | {t for t in (tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None}


def render(tokenizer: Any, role: str, text: str) -> RenderedTurn:
    """A turn as tokens: template header, text, template closing.

    Raises:
        ConfigError: empty text, or a role that the template does not know.
    """
    if not text.strip():
        raise ConfigError(f"a turn of {role!r} has no text; give at least one character")
    head, tail = header(tokenizer, role), closing(tokenizer, role)
    body = tokenizer.encode(text, add_special_tokens=False)
    end = len(head) + len(body) + min(1, len(tail))
    return RenderedTurn((*head, *body, *tail), (len(head), end))
