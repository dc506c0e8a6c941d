"""All benchmarks of the server, one after the other; each also runs by itself.

python benchmarks/serving [--quick] [--threads N] [PART ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import parser

PARTS = ("exactness", "first_token", "throughput", "load", "kills", "fuzz", "clients")


def main() -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    chosen = arguments.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        arguments.error(f"no part {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    options = ["--threads", str(chosen.threads), *(["--quick"] if chosen.quick else [])]
    missed = []
    for part in chosen.parts or PARTS:
        print(f"== {part}", flush=True)
        script = Path(__file__).with_name(f"{part}.py")
        if subprocess.run([sys.executable, str(script), *options]).returncode:
            missed.append(part)
    print("all reached" if not missed else f"not reached: {', '.join(missed)}")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
