"""Every figure of a run's metrics rows as a gauge of Ray, which its dashboard and Prometheus show (`cluster/grafana.json`).

Prometheus sees `env_steps` as `ray_millrace_env_steps`, with the run's name in the tag `run`. What a row says of several things
of one kind is one gauge with another tag: `time/actor/env_s` is `ray_millrace_seconds{role="actor", state="env"}`,
`eval/task/walk/success` is `ray_millrace_eval_task_success{task="walk"}`, `family/sums/pass_rate` is
`ray_millrace_family_pass_rate{family="sums"}`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from functools import lru_cache

from ray.util.metrics import Gauge

PREFIX = "millrace_"
MOST_TAGGED = 256  # tasks or families of one figure that are told of; each is a time series of its own in Prometheus
_SECONDS = re.compile(r"time/(?P<role>[a-z]+)/(?P<state>\w+)_s")
_PART = re.compile(r"(?:(?P<of>.+)/)?(?P<kind>task|family)/(?P<name>.+)/(?P<figure>[^/]+)")

log = logging.getLogger(__name__)


class RayMetrics:
    """Hands the rows of a run to Ray; a row costs what its figures cost, about 3 µs each, and never raises."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._tagged: dict[str, set[str]] = {}  # gauge → the tasks or families told of
        self._has_failed = False

    def row(self, row: Mapping[str, float | None]) -> None:
        """Tell of the finite figures of one metrics row."""
        if self._has_failed:
            return
        try:
            for key, value in row.items():
                if value is not None and math.isfinite(value):
                    self._set(key, float(value))
        except Exception:  # figures for people to watch: training goes on without
            self._has_failed = True
            log.exception("Ray's metrics get no more figures of this run")

    def _set(self, key: str, value: float) -> None:
        name, tags = gauge_of(key)
        if "task" in tags or "family" in tags:
            told = self._tagged.setdefault(name, set())
            if key not in told and len(told) >= MOST_TAGGED:
                return
            told.add(key)
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, _described(key, tags), tag_keys=("run", *tags))
        gauge.set(value, tags={"run": self._run, **tags})


@lru_cache(maxsize=65_536)
def gauge_of(key: str) -> tuple[str, dict[str, str]]:
    """Name of the gauge that tells a row's figure, as Ray takes it, and its tags besides the run."""
    if match := _SECONDS.fullmatch(key):
        return f"{PREFIX}seconds", match.groupdict()
    if match := _PART.fullmatch(key):
        words = [word for word in (match["of"], match["kind"], match["figure"]) if word]
        return _sanitised("_".join(words)), {match["kind"]: match["name"]}
    return _sanitised(key), {}


def _sanitised(key: str) -> str:
    return PREFIX + re.sub(r"[^A-Za-z0-9_]", "_", key)


def _described(key: str, tags: Mapping[str, str]) -> str:
    for tag, value in tags.items():
        key = key.replace(value, f"<{tag}>", 1)
    return f"Millrace's {key}"
