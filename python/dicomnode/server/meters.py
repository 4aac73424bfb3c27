"""What a node counts and times, as numbers that a monitoring system can fetch.

Solves that a call site is one line and costs next to nothing: each meter has its own lock and no
other state. Labels are statuses, states and endpoints, never anything of a patient.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Counter:
    """A number, or one for each value of a label."""

    kind = "counter"

    def __init__(self, name: str, told: str, label: str = "") -> None:
        self.name = name
        self._told = told
        self._label = label
        self._lock = threading.Lock()
        self._values: dict[str, float] = {} if label else {"": 0.0}

    def add(self, amount: float = 1, label: str = "") -> None:
        """Count something; of what kind it is, where there are several."""
        with self._lock:
            self._values[label] = self._values.get(label, 0.0) + amount

    def value(self, label: str = "") -> float:
        """What was counted by now."""
        with self._lock:
            return self._values.get(label, 0.0)

    def lines(self) -> Iterator[str]:
        """In the text format of Prometheus."""
        with self._lock:
            values = dict(self._values)
        yield from sample_lines(self.name, self._told, self.kind, self._label, values)


class Gauge(Counter):
    """A number that goes up and down."""

    kind = "gauge"


class Histogram:
    """How long something took: how often at most so many seconds, and the sum."""

    def __init__(self, name: str, told: str) -> None:
        self.name = name
        self._told = told
        self._lock = threading.Lock()
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Something took so long."""
        with self._lock:
            self._counts[bisect_left(_SECONDS, seconds)] += 1
            self._sum += seconds

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Measure what runs inside, also where it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - start)

    def lines(self) -> Iterator[str]:
        """In the text format of Prometheus."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        yield from _head(self.name, self._told, "histogram")
        below = 0
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {total:.6f}"
        yield f"{self.name}_count {below}"


class Meters:
    """All meters of one node."""

    def __init__(self) -> None:
        self.associations = Counter(
            "dicomnode_associations_total", "Associations that were asked for", "outcome"
        )
        self.associations_open = Gauge(
            "dicomnode_associations_open", "Associations that are open now"
        )
        self.instances = Counter(
            "dicomnode_instances_total",
            "C-STORE requests by the status that was answered",
            "status",
        )
        self.bytes_received = Counter(
            "dicomnode_received_bytes_total", "Bytes of the datasets of C-STORE requests"
        )
        self.grind_seconds = Histogram("dicomnode_grind_seconds", "Time to grind a case")
        self.process_seconds = Histogram("dicomnode_process_seconds", "Time of process() of a case")
        self.export_seconds = Histogram(
            "dicomnode_export_seconds", "Time to send the results of a case to one endpoint"
        )
        self.results_sent = Counter(
            "dicomnode_results_sent_total", "Results that an endpoint acknowledged", "endpoint"
        )
        self.results_failed = Counter(
            "dicomnode_results_failed_total", "Results that could not be delivered", "endpoint"
        )
        self.failures = Counter("dicomnode_failures_total", "How often a case became FAILED")
        self.without_room = Gauge(
            "dicomnode_cases_without_room", "Cases that wait for room for their results"
        )
        self.workers_busy = Gauge("dicomnode_workers_busy", "Cases that are being processed now")

    def lines(self) -> Iterator[str]:
        """All of them in the text format of Prometheus."""
        for meter in vars(self).values():
            yield from meter.lines()


def sample_lines(
    name: str, told: str, kind: str, label: str, values: Mapping[str, float]
) -> Iterator[str]:
    """One metric in the text format of Prometheus; `values` by label, or under an empty one."""
    yield from _head(name, told, kind)
    for key, value in sorted(values.items()):
        labels = f'{{{label}="{_escaped(key)}"}}' if label else ""
        yield f"{name}{labels} {value:.15g}"


def _head(name: str, told: str, kind: str) -> Iterable[str]:
    return f"# HELP {name} {told}", f"# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
