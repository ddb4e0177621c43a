"""Figures of a server for Prometheus: requests, times, tokens, and what the engine has in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

TIMES = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {"running", "waiting", "slots", "cache_tokens", "cache_idle_tokens", "cache_capacity"}


class Gauges:
    """In a registry of their own; `stats` gives an engine's numbers for each model."""

    def __init__(self, stats: Callable[[], dict[str, dict[str, float]]]):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self._requests = Counter(
            "luthier_http_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "luthier_http_request_seconds", "From a request's first line to the end of its answer.", ["route"],
            buckets=TIMES, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "luthier_time_to_first_token_seconds", "From a request to the first token of its answer.", ["model"],
            buckets=TIMES, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "luthier_tokens", "Tokens of prompts and of answers.", ["model", "kind"], registry=self.registry
        )
        self.registry.register(_Engines(stats))  # type: ignore[arg-type]

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status or 499)).inc()
        self._seconds.labels(route).observe(seconds)

    def used(self, model: str, prompt: int, answer: int, first: float | None) -> None:
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "answer").inc(answer)
        if first is not None:
            self._first.labels(model).observe(first)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _Engines:
    """Asked when the figures are."""

    def __init__(self, stats: Callable[[], dict[str, dict[str, float]]]):
        self.stats = stats

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        made: dict[str, Any] = {}
        for engine, numbers in self.stats().items():
            for name, number in numbers.items():
                if name not in made:
                    kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
                    told = f"The engine's {name.replace('_', ' ')}."
                    made[name] = kind(f"luthier_engine_{name}", told, labels=["engine"])
                made[name].add_metric([engine], number)
        return made.values()
