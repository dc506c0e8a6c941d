"""The process of contenders: commands come in as JSON lines, results go out as JSON lines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from . import machine
from .contenders import Contender, Setting, history, named
from .sizes import ANSWER, FOLD, HEAD, LONGEST, PREFILL, QUESTION


class Commands:
    """What a worker can be asked for of one contender."""

    def __init__(self, contender: Contender):
        self.contender = contender
        ids = history(LONGEST + QUESTION + HEAD, contender.vocabulary)
        self.history = ids[:LONGEST]
        self.question, self.head = ids[LONGEST : LONGEST + QUESTION], ids[LONGEST + QUESTION :]

    def about(self) -> dict[str, Any]:
        """Weights, and how far it is measured."""
        own = self.contender
        return {
            "weight_bytes": own.weight_bytes,
            "parameters": own.parameters,
            "reach": own.reach,
            "crowd": own.crowd,
            "folds": own.folds,
            **({"device": own.device_name} if own.in_torch else {}),
            "packages": {name: version for name in own.packages if (version := _version(name))},
        }

    def take(self, tokens: int) -> dict[str, Any]:
        """Be as behind a history of so many tokens; the seconds count where it is read for that."""
        own = self.contender
        began = own.clock()
        own.take(self.history[:tokens])
        seconds = own.clock() - began
        return {"kv_bytes": own.kv_bytes, **({"read": seconds} if own.reads else {})}

    def turn(self) -> dict[str, Any]:
        """One turn: seconds, tokens and bytes."""
        return asdict(self.contender.turn(self.question, self.head))

    def prefill(self) -> dict[str, Any]:
        """Seconds in which a long text is read behind nothing."""
        return {"prefill": self.contender.prefill(self.history[:PREFILL])}

    def fold(self) -> dict[str, Any]:
        """Beside a plain prefill of the same tokens."""
        own: Any = self.contender
        return {"fold": own.fold(self.history[:FOLD]), "prefill_of_it": own.prefill(self.history[:FOLD])}

    def restore(self) -> dict[str, Any]:
        """Seconds from the bytes of a memory to the first token behind it."""
        own: Any = self.contender
        return {"restore": own.restore(self.head)}

    def answer(self, count: int) -> dict[str, Any]:
        """New tokens per second of so many conversations at once."""
        return {"tokens_per_second": count * ANSWER / self.contender.answer(count, self.question, self.head)}

    def peak(self) -> dict[str, Any]:
        """Most bytes that the process has held."""
        return {"peak_bytes": machine.peak_bytes(self.contender.device)}

    def limits(self) -> dict[str, Any]:
        """What the machine can do at most: bytes and operations a second."""
        own = self.contender
        return {
            "bandwidth": machine.bandwidth(own.threads, own.device),
            "operations": machine.operations(own.threads, own.device, own.dtype),
        }


@torch.inference_mode()
def main() -> None:
    """Until the end of input. Its settings are the first argument, as JSON."""
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    names = settings.pop("names")
    commands = {name: Commands(named(name)(Setting(**settings))) for name in names}
    print(json.dumps({name: each.about() for name, each in commands.items()}), file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        call: Callable[..., dict[str, Any]] = getattr(commands[order.pop("of")], order.pop("do"))
        print(json.dumps(call(**order)), file=out, flush=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
