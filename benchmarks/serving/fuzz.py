"""The fuzz tests of the server and its store, with more examples than the quick suite has, and a record of them.

schemathesis over the OpenAPI description, hypothesis' state machine of the store against a dictionary, and damage to
stored and exported memories; all are tests below ``tests/`` with fixed seeds.

    python benchmarks/serving/fuzz.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness import ROOT, parser, store

SUITES = {
    "description": ["tests/serving/test_description.py"],
    "store": [
        *(f"tests/test_store_{name}.py" for name in ("model", "damage", "codec")),
        *("-k", "random_operations or damaged"),
    ],
    "damage": ["tests/serving/test_damage.py"],
}


def run(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run tests; how many passed, what failed, and the numbers that they recorded."""
    with tempfile.TemporaryDirectory() as home:
        report = Path(home) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--timeout",
            "1800",
            f"--junitxml={report}",
            *arguments,
        ]
        settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        status = subprocess.run(command, cwd=ROOT, env=settings).returncode
        suite = ElementTree.parse(report).getroot()[0]
    failed = [case.attrib["name"] for case in suite.iter("testcase") if len(case) and _bad(case)]
    counts = {
        f"{case.attrib['name']}: {entry.attrib['name']}": int(entry.attrib["value"])
        for case in suite.iter("testcase")
        for entry in case.iter("property")
    }
    numbers = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {
        **numbers,
        "seconds": round(float(suite.attrib["time"]), 1),
        "exit_status": status,
        "failed": failed,
        "recorded": counts,
    }


def _bad(case: ElementTree.Element) -> bool:
    return any(child.tag in ("failure", "error") for child in case)


def main() -> bool:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    arguments.threads = 1
    quick = ["-m", "not slow"] if arguments.quick else []
    suites = {name: run([*tests, *quick], arguments.threads) for name, tests in SUITES.items()}
    result = {
        "task": "fuzz tests of the server and its store",
        "versions": {name: version(name) for name in ("hypothesis", "schemathesis")},
        "suites": suites,
        "criterion": "every test passes: no 5xx not meant, no answer beside the description, no damage unseen",
        "reached": all(suite["exit_status"] == 0 for suite in suites.values()),
    }
    return store("fuzz", result, arguments)


if __name__ == "__main__":
    sys.exit(not main())
