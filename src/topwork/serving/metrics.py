"""Figures for Prometheus, under the names that vLLM gave them.

The prefix is vLLM's too: dashboards, autoscalers and gateways that are there ask for `vllm:num_requests_waiting` and
its like, letter for letter, and what is measured is the same. What vLLM has no name for (arms, tenants, refusals)
begins with `topwork:`. `model_name` is the adapter's public name, the base's own where there is none; only names that
answered a request become labels, and of these the first `MOST_MODELS`: later ones are counted together as "other".
"""

from collections.abc import Iterator
from functools import partial
from time import time
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from topwork.serving.seams import Call

CONTENT_TYPE = CONTENT_TYPE_LATEST
MOST_MODELS = 256
OTHER = "other"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0)  # fmt: skip
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort", "failed": "error"}


class Metrics:
    """`seams.Meter` that Prometheus reads. Runs on the event loop's thread.

    base_name  the base's label
    most_lora  how many adapters the engine holds at once, if there is a bound
    """

    def __init__(self, base_name: str, most_lora: int | None = None) -> None:
        self.base_name, self.most_lora = base_name, most_lora
        self.registry = CollectorRegistry()
        self._models = {base_name}
        self._running: dict[str, Call] = {}
        self._seen: dict[str, int] = {}
        self._make_requests()
        self._make_engine()
        self._make_own()
        self.registry.register(_Adapters(self))

    def began(self, call: Call) -> None:
        """It is handed to the engine."""
        self._running[call.id] = call

    def token(self, call: Call, seconds: float) -> None:
        """Each choice's first, which is told from the arrival on, is no time between tokens."""
        if call.last_token_at is None or seconds < call.last_token_at - call.arrived_at:
            self._between.labels(self.label(call)).observe(seconds)

    def ended(self, call: Call) -> None:
        """It has ended, or was refused after its model was known."""
        reached_engine = self._running.pop(call.id, None) is not None
        model = self.label(call)
        self._answered.labels(model, call.endpoint, str(call.status)).inc()
        if call.caller.name:
            self._tenant_requests.labels(call.caller.name, str(call.status)).inc()
        if not reached_engine:
            return
        self._count(call, model)
        self._times(call, model)
        if call.target.route is not None:
            self._count_arm(call, call.target.route, str(call.target.arm))

    def stepped(self, statistics: Any) -> None:
        """What the engine counts itself."""
        self._gauge_running.labels(self.base_name).set(statistics.running)
        self._gauge_waiting.labels(self.base_name).set(statistics.waiting)
        free = statistics.blocks_free + statistics.blocks_cached
        self._gauge_cache.labels(self.base_name).set(1 - free / max(1, statistics.blocks_total))
        for name, counter in self._of_engine.items():
            value = getattr(statistics, name)
            counter.labels(self.base_name).inc(max(0, value - self._seen.get(name, 0)))
            self._seen[name] = value

    def voted(self, route: str, arm: str, kind: str) -> None:
        """A vote on an arm's answer: up, down or score."""
        self._votes.labels(route, arm, kind).inc()

    def exposition(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self.registry)

    def label(self, call: Call) -> str:
        """Who answered, in a bounded number of labels."""
        name = self.base_name if call.target.adapter is None else call.target.adapter
        if name not in self._models:
            if len(self._models) >= MOST_MODELS:
                return OTHER
            self._models.add(name)
        return name

    def adapters(self) -> Iterator[tuple[str, bool]]:
        """Of each request that is under way: its adapter, and whether a token has come."""
        for call in list(self._running.values()):  # a look may come from another thread
            if call.target.adapter is not None:
                yield self.label(call), call.first_token_at is not None

    def _make_requests(self) -> None:
        vllm = partial(_named, "vllm", self.registry, ("model_name",))
        self._prompt = vllm(Counter, "prompt_tokens", "Tokens of prompts.")
        self._generated = vllm(Counter, "generation_tokens", "Tokens of answers.")
        self._success = _named(
            "vllm",
            self.registry,
            ("model_name", "finished_reason"),
            Counter,
            "request_success",
            "Choices, by their end.",
        )
        self._first = vllm(Histogram, "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._between = vllm(Histogram, "inter_token_latency_seconds", "From a token to the next.", _BETWEEN)
        self._whole = vllm(Histogram, "e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._queue = vllm(Histogram, "request_queue_time_seconds", "From arrival to the engine's first step.", _WHOLE)
        self._prefill = vllm(Histogram, "request_prefill_time_seconds", "From there to the first token.", _WHOLE)
        self._decode = vllm(Histogram, "request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self._prompts = vllm(Histogram, "request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._answers = vllm(Histogram, "request_generation_tokens", "Tokens of a request's answers.", _TOKENS)

    def _make_engine(self) -> None:
        vllm = partial(_named, "vllm", self.registry, ("model_name",))
        self._gauge_running = vllm(Gauge, "num_requests_running", "Sequences that run.")
        self._gauge_waiting = vllm(Gauge, "num_requests_waiting", "Sequences that wait for their turn.")
        self._gauge_cache = vllm(Gauge, "kv_cache_usage_perc", "Part of the key-value blocks in use; 1 is all.")
        self._of_engine: dict[str, Counter] = {
            "prefix_queries": vllm(Counter, "prefix_cache_queries", "Tokens looked up in the prefix cache."),
            "prefix_hits": vllm(Counter, "prefix_cache_hits", "Tokens found there."),
            "preemptions": vllm(Counter, "num_preemptions", "Sequences that gave way and are computed again."),
        }

    def _make_own(self) -> None:
        own, arm = partial(_named, "topwork", self.registry), ("route", "arm")
        answered = "Answered requests whose model was known."
        self._answered = own(("model_name", "endpoint", "status"), Counter, "requests", answered)
        self._tenant_requests = own(("tenant", "status"), Counter, "tenant_requests", answered)
        self._tenant_tokens = own(("tenant", "kind"), Counter, "tenant_tokens", "Tokens of prompts and answers.")
        self._arm_requests = own((*arm, "finished_reason"), Counter, "arm_requests", "Choices, by their end.")
        self._arm_tokens = own((*arm, "kind"), Counter, "arm_tokens", "Tokens of prompts and answers.")
        first, whole = "arm_time_to_first_token_seconds", "arm_e2e_request_latency_seconds"
        self._arm_first = own(arm, Histogram, first, "From arrival to the first token.", _SECONDS)
        self._arm_whole = own(arm, Histogram, whole, "From arrival to the end.", _WHOLE)
        self._votes = own((*arm, "kind"), Counter, "feedback", "Votes on an arm's answers.")

    def _count(self, call: Call, model: str) -> None:
        self._prompt.labels(model).inc(call.prompt_tokens)
        self._generated.labels(model).inc(call.generated_tokens)
        self._prompts.labels(model).observe(call.prompt_tokens)
        self._answers.labels(model).observe(call.generated_tokens)
        for reason in call.finish:
            self._success.labels(model, _REASONS.get(reason, OTHER)).inc()
        if call.caller.name:
            self._tenant_tokens.labels(call.caller.name, "prompt").inc(call.prompt_tokens)
            self._tenant_tokens.labels(call.caller.name, "generated").inc(call.generated_tokens)

    def _times(self, call: Call, model: str) -> None:
        if call.ended_at is not None:
            self._whole.labels(model).observe(call.ended_at - call.arrived_at)
        if call.first_token_at is None:
            return
        self._first.labels(model).observe(call.first_token_at - call.arrived_at)
        if call.started_at is not None:
            self._queue.labels(model).observe(call.started_at - call.arrived_at)
            self._prefill.labels(model).observe(call.first_token_at - call.started_at)
        if call.last_token_at is not None:
            self._decode.labels(model).observe(call.last_token_at - call.first_token_at)

    def _count_arm(self, call: Call, route: str, arm: str) -> None:
        for reason in call.finish or ["failed"]:
            self._arm_requests.labels(route, arm, _REASONS.get(reason, OTHER)).inc()
        self._arm_tokens.labels(route, arm, "prompt").inc(call.prompt_tokens)
        self._arm_tokens.labels(route, arm, "generated").inc(call.generated_tokens)
        if call.first_token_at is not None:
            self._arm_first.labels(route, arm).observe(call.first_token_at - call.arrived_at)
        if call.ended_at is not None:
            self._arm_whole.labels(route, arm).observe(call.ended_at - call.arrived_at)


Kind = TypeVar("Kind", Counter, Gauge, Histogram)


def _named(
    prefix: str, registry: CollectorRegistry, labels: tuple[str, ...], kind: type[Kind], name: str, told: str,
    buckets: tuple[float, ...] | None = None,
) -> Kind:  # fmt: skip
    more: dict[str, Any] = {} if buckets is None else {"buckets": buckets}
    return kind(f"{prefix}:{name}", told, labels, registry=registry, **more)


class _Adapters:
    """vllm:lora_requests_info: which adapters run and wait, as labels of the one sample that holds now."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Asked for with each look."""
        running: set[str] = set()
        waiting: set[str] = set()
        for name, runs in list(self.metrics.adapters()):
            (running if runs else waiting).add(name)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters that answer and that wait; the time of the look.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )  # fmt: skip
        most = "0" if self.metrics.most_lora is None else str(self.metrics.most_lora)
        family.add_metric((most, ",".join(sorted(waiting)), ",".join(sorted(running))), time())
        yield family
