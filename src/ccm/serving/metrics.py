"""What the server counts, for Prometheus; one registry for each server, so that tests may have many."""

from __future__ import annotations

from ..errors import MissingPackageError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError as error:
    raise MissingPackageError(
        "the server needs more packages: pip install 'compressed-context-memory[serve]'"
    ) from error

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms by what they measure; seconds and bytes throughout."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"ccm_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ccm_{name}", text, labels, registry=self.registry)

        self.jobs = Gauge("ccm_turns", "Turns that are running or waiting", registry=self.registry)
        self.occupancy = Histogram(
            "ccm_batch_rows",
            "Conversations in one step",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.waited = seconds("queue", "From the arrival of a turn to its first step")
        self.first = seconds("first_token", "From the arrival of a turn to its first token")
        self.between = seconds("inter_token", "Between two tokens of an answer")
        self.folding = seconds("take_in", "One batch of segments read and folded")
        self.commits = seconds("commit", "One commit to the store")
        self.conflicts = count("conflicts", "Commits that came too late")
        self.refused = count("refused", "Turns refused because the queue was full")
        self.cancelled = count("cancelled", "Turns cancelled before their end")
        self.folded = count("folded_tokens", "Tokens folded into slots")
        self.written = count("written_tokens", "Tokens of answers")
        self.stored = count("stored_bytes", "Bytes of memories written to the store")
        self.expired = count("evictions", "Conversations removed because their time was over")
        self.requests = count("requests", "Requests by route and status", "method", "route", "status")

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
