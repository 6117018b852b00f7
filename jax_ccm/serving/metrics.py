"""What a server counts, in the text form of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter

_COUNTS = {
    "requests": "Requests by path and status.",
    "tokens_read": "Tokens of turns that were read.",
    "tokens_made": "Tokens of answers.",
    "evictions": "Sessions that left their row for another one.",
    "loads": "Sessions that came back from disk.",
}
_DISTRIBUTIONS = {
    "batch": ("Turns that were answered side by side.", (1, 2, 4, 8, 16, 32, 64)),
    "first_token": ("Seconds from a request to the first token.", (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)),
}


class Metrics:
    """Counters and distributions; may be used by several threads."""

    def __init__(self):
        """Begins at zero."""
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter({(name, ""): 0 for name in _COUNTS if name != "requests"})
        self._sums = {name: [0.0, 0, [0] * len(bounds)] for name, (_, bounds) in _DISTRIBUTIONS.items()}

    def add(self, name: str, count: int, labels: str = "") -> None:
        """Counts something; labels as Prometheus writes them."""
        with self._lock:
            self._counts[name, labels] += count

    def observe(self, name: str, value: float) -> None:
        """Takes a value into a distribution."""
        with self._lock:
            entry = self._sums[name]
            entry[0] += value
            entry[1] += 1
            # Buckets of Prometheus are cumulative: each counts all values up to its bound.
            for place, bound in enumerate(_DISTRIBUTIONS[name][1]):
                entry[2][place] += value <= bound

    def text(self, **gauges: float) -> str:
        """All of it; ``gauges`` are values of now."""
        lines = []
        with self._lock:
            for name, what in _COUNTS.items():
                lines += [f"# HELP jax_ccm_{name}_total {what}", f"# TYPE jax_ccm_{name}_total counter"]
                for (other, labels), count in sorted(self._counts.items()):
                    if other == name:
                        lines.append(f"jax_ccm_{name}_total{'{' + labels + '}' if labels else ''} {count}")
            for name, (what, bounds) in _DISTRIBUTIONS.items():
                total, count, within = self._sums[name]
                lines += [f"# HELP jax_ccm_{name} {what}", f"# TYPE jax_ccm_{name} histogram"]
                lines += [f'jax_ccm_{name}_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, within, strict=True)]
                lines += [f'jax_ccm_{name}_bucket{{le="+Inf"}} {count}']
                lines += [f"jax_ccm_{name}_sum {total}", f"jax_ccm_{name}_count {count}"]
            for name, value in gauges.items():
                lines += [f"# TYPE jax_ccm_{name} gauge", f"jax_ccm_{name} {value}"]
        return "\n".join(lines) + "\n"
