"""What a session file says beside its memory, whether a session wrote it or the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat.dialogue import Dialogue
from .base import Method
from .inside import Said, as_saved
from .spec import parse


def metadata_of(
    method: Method, turns: int, dialogue: Dialogue, said: Sequence[Said], pins: Sequence[str]
) -> dict[str, str]:
    """String metadata for :meth:`ccm.Memory.save`.

    Args:
        method: that made the memory.
        turns: how many there were.
        dialogue: as far as it has come.
        said: the newest turns.
        pins: what is pinned.
    """
    state = {
        "memory": method.text,
        "budget": method.sizes(),
        "turns": turns,
        "dialogue": dialogue.as_dict(),
        "said": as_saved(said),
        "pins": list(pins),
    }
    return {"session": json.dumps(state)}


def options_of(state: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """What the method of a saved session is set to; files from before any method could be saved have sizes alone.

    Args:
        state: of the session.
        method: that it is opened with. What the same method is set to in the file counts, its defaults included; the
            adapter may have moved meanwhile.
    """
    if "memory" not in state:
        return dict(state["budget"])
    saved = parse(state["memory"])
    same = saved.name == parse(method.text).name
    options = {**(method.defaults() if same else {}), **saved.options}
    options.pop("adapter", None)
    return options
