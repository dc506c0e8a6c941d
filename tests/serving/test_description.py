"""schemathesis over the OpenAPI description of a live server: no 5xx, and no answer beside the description."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from services import serving, tiny_service

SEED = 3
#: What an answer must be; those of schemathesis that mean something here.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "use_after_free",
    "ensure_resource_availability",
)


def run(folder: Path, examples: int) -> dict[str, int]:
    """Fails with what schemathesis found; counts of requests by status otherwise."""
    with serving(tiny_service(folder, input_tokens=4096)) as running:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.url}/openapi.json"]
        options = {
            "checks": ",".join(CHECKS),
            "seed": SEED,
            "max-examples": examples,
            "request-timeout": 60,
            "warnings": "off",
        }
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [
            "--generation-deterministic",
            "--continue-on-failure",
            "--no-color",
            "--suppress-health-check=all",
        ]
        hooks = {
            "SCHEMATHESIS_HOOKS": "known_sessions",
            "CCM_TESTED_URL": running.url,
            "PYTHONPATH": str(Path(__file__).parent.parent / "helpers"),
        }
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env={**os.environ, **hooks}
        )
        text = running.service.metrics.text().decode()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("ccm_requests_total{"):
            labels, value = line.rsplit(" ", 1)
            status = labels.split('status="')[1][:3]
            counts[status] = counts.get(status, 0) + int(float(value))
    return counts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_answer_is_described(tmp_path, record_property):
    counts = run(tmp_path, 12)
    record_property("requests", sum(counts.values()))
    for status, number in sorted(counts.items()):
        record_property(f"status {status}", number)
    assert not [status for status in counts if status >= "500"], counts
    assert counts["200"] > 20 and counts["400"] > 20 and counts["404"] > 5  # it reached something
