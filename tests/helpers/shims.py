"""Programs for shell blocks of the documentation: ``ccm`` itself, a little shorter, and stand-ins for others.

A shim is a script that begins with the path of this file; its name is that of the program. What it does is in
``shims.json`` beside it: ``less`` (pattern -> words that make a command of ccm short), ``left_out`` (pattern -> why a
command is not run).
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

#: What is said to a chat that nothing is piped into.
SAID = "Hello, I am Nadia.\n/exit\n"


def install(folder: Path, programs: list[str], less: dict[str, list[str]], left_out: dict[str, str]) -> None:
    """Scripts of these names, or at these paths, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shims.json").write_text(json.dumps({"less": less, "left_out": left_out}))
    for program in programs:
        script = folder / program
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" "{folder}" {program} "$@"\n'
        )
        script.chmod(0o755)


def main(folder: str, program: str, *words: str) -> int:
    """Run a command, or say why not."""
    settings = json.loads((Path(folder) / "shims.json").read_text())
    line = " ".join((program, *words))
    for pattern, reason in settings["left_out"].items():
        if re.search(pattern, line):
            print(f"left out: {line} ({reason})")
            return 0
    more = [word for pattern, added in settings["less"].items() if re.search(pattern, line) for word in added]
    if program == "torchrun":
        return subprocess.call([sys.executable, "-m", "torch.distributed.run", *words, *more])
    command = [sys.executable, "-m", "ccm", *words, *more]
    if words[0] == "serve":
        return _serve(command)
    piped = stat.S_ISFIFO(os.fstat(0).st_mode)
    said = SAID if words[0] == "chat" and not piped else None
    return subprocess.run(command, input=said, text=True, check=False).returncode


def _serve(command: list[str]) -> int:
    """Until it says where it listens."""
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        first = running.stdout.readline() if running.stdout else ""
        print(first, end="", flush=True)
        running.send_signal(signal.SIGTERM)
        return running.wait(60) if "http://" in first else 1
    finally:
        running.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
