"""What the server counts, in the text format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "align_requests",
            "Requests by route and status; 499 = the client hung up.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._stages = Histogram(
            "align_stage_seconds",
            "Time of a request by stage: encode (the model), search (the index), total.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "align_encoder_batch_size",
            "Queries in one encoder call.",
            buckets=_SIZES,
            registry=self.registry,
        )
        self._waiting = Gauge(
            "align_encoder_queue", "Queries that wait for the encoder.", registry=self.registry
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        known = method if method in ("GET", "POST", "HEAD") else "other"
        self._requests.labels(route, known, str(status)).inc()
        if status == 200:
            self.took("total", seconds)

    def took(self, stage: str, seconds: float) -> None:
        """Note how long a stage of a request took."""
        self._stages.labels(stage).observe(seconds)

    def batch(self, size: int) -> None:
        """Note the size of a batch that the encoder was given."""
        self._batches.observe(size)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Tell how many queries wait, each time somebody asks."""
        self._waiting.set_function(length)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
