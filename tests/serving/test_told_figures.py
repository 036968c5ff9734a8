"""What Prometheus reads."""

from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from topwork.serving import metrics as metrics_module
from topwork.serving.metrics import Metrics
from topwork.serving.seams import Call, Caller, Target


@dataclass
class Figures:
    """The engine's, as the seam has them."""

    running: int = 3
    waiting: int = 2
    blocks_total: int = 100
    blocks_free: int = 30
    blocks_cached: int = 20
    prefix_queries: int = 50
    prefix_hits: int = 10
    preemptions: int = 1
    prompt_tokens: int = 0
    generated_tokens: int = 0


def call(id: str = "1", adapter: str | None = "sql", **values: Any) -> Call:
    return Call(id, "chat", Caller("ann"), "m", Target(adapter), arrived_at=100.0, prompt_tokens=11, **values)


def answered(metrics: Metrics, made: Call, finish: str = "stop") -> None:
    """Four tokens, the first after a quarter of a second, the others 20 ms apart."""
    metrics.began(made)
    since = made.arrived_at
    for now in (100.25, 100.27, 100.29, 100.31):
        made.first_token_at, made.last_token_at = made.first_token_at or now, now
        made.generated_tokens += 1
        metrics.token(made, now - since)
        since = now
    made.ended_at = 100.4
    made.finish.append(finish)
    metrics.ended(made)


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_a_request_under_vllms_names() -> None:
    metrics = Metrics("tiny")
    answered(metrics, call(started_at=100.1))
    found = read(metrics)
    sql = {"model_name": "sql"}
    assert of(found, "vllm:request_queue_time_seconds_sum", **sql) == pytest.approx(0.1)
    assert of(found, "vllm:request_prefill_time_seconds_sum", **sql) == pytest.approx(0.15)
    assert of(found, "vllm:prompt_tokens_total", **sql) == 11
    assert of(found, "vllm:generation_tokens_total", **sql) == 4
    assert of(found, "vllm:request_success_total", **sql, finished_reason="stop") == 1
    assert of(found, "vllm:time_to_first_token_seconds_sum", **sql) == pytest.approx(0.25)
    assert of(found, "vllm:inter_token_latency_seconds_count", **sql) == 3, "the first is none between two"
    assert of(found, "vllm:inter_token_latency_seconds_sum", **sql) == pytest.approx(0.06)
    assert of(found, "vllm:e2e_request_latency_seconds_sum", **sql) == pytest.approx(0.4)
    assert of(found, "vllm:request_decode_time_seconds_sum", **sql) == pytest.approx(0.06)
    assert of(found, "vllm:request_prompt_tokens_sum", **sql) == 11
    assert of(found, "topwork:requests_total", **sql, endpoint="chat", status="200") == 1
    assert of(found, "topwork:tenant_tokens_total", tenant="ann", kind="generated") == 4


def test_each_choices_first_token_is_none_between_two() -> None:
    metrics, made = Metrics("tiny"), call(choices=2)
    metrics.began(made)
    for now, seconds in ((100.2, 100.2 - 100.0), (100.3, 100.3 - 100.0), (100.4, 0.2), (100.41, 0.11)):
        made.first_token_at, made.last_token_at = made.first_token_at or now, now
        metrics.token(made, seconds)
    assert of(read(metrics), "vllm:inter_token_latency_seconds_count", model_name="sql") == 2


@pytest.mark.parametrize(
    ("finish", "told"),
    [("stop", "stop"), ("tool_calls", "stop"), ("length", "length"), ("cancelled", "abort"), ("failed", "error")],
)
def test_ends_are_called_as_there(finish: str, told: str) -> None:
    metrics = Metrics("tiny")
    answered(metrics, call(adapter=None), finish)
    assert of(read(metrics), "vllm:request_success_total", model_name="tiny", finished_reason=told) == 1


def test_the_engines_own_figures() -> None:
    metrics = Metrics("tiny")
    metrics.stepped(Figures())
    metrics.stepped(Figures(running=4, prefix_queries=70, preemptions=1))
    found = read(metrics)
    tiny = {"model_name": "tiny"}
    assert of(found, "vllm:num_requests_running", **tiny) == 4
    assert of(found, "vllm:num_requests_waiting", **tiny) == 2
    assert of(found, "vllm:kv_cache_usage_perc", **tiny) == pytest.approx(0.5)
    assert of(found, "vllm:prefix_cache_queries_total", **tiny) == 70
    assert of(found, "vllm:prefix_cache_hits_total", **tiny) == 10
    assert of(found, "vllm:num_preemptions_total", **tiny) == 1
    metrics.stepped(Figures(prefix_queries=5))  # an engine that began anew
    metrics.stepped(Figures(prefix_queries=9))
    assert of(read(metrics), "vllm:prefix_cache_queries_total", **tiny) == 74


def test_adapters_that_run_and_wait_are_told_while_they_do() -> None:
    metrics = Metrics("tiny", most_lora=8)
    running, waiting = call("1", "sql", first_token_at=101.0), call("2", "support")
    for made in (running, waiting, call("3", None)):
        metrics.began(made)
    info = [labels for name, labels in read(metrics) if name == "vllm:lora_requests_info"]
    assert [dict(labels) for labels in info] == [
        {"max_lora": "8", "running_lora_adapters": "sql", "waiting_lora_adapters": "support"}
    ]
    metrics.ended(running)
    metrics.ended(waiting)
    info = [labels for name, labels in read(metrics) if name == "vllm:lora_requests_info"]
    assert [dict(labels)["running_lora_adapters"] for labels in info] == [""]


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MOST_MODELS", 8)
    metrics = Metrics("tiny")
    for number in range(58):
        answered(metrics, call(str(number), f"adapter{number}"))
    counted = {labels: value for (name, labels), value in read(metrics).items() if name == "vllm:prompt_tokens_total"}
    assert len(counted) == 8
    assert counted[(("model_name", "other"),)] == 11 * 51


def test_arms_are_labels_of_their_own() -> None:
    metrics, made = Metrics("tiny"), call()
    made.target = Target("sql", "ab", "tuned")
    answered(metrics, made)
    metrics.voted("ab", "tuned", "up")
    found, arm = read(metrics), {"route": "ab", "arm": "tuned"}
    assert of(found, "topwork:arm_requests_total", **arm, finished_reason="stop") == 1
    assert of(found, "topwork:arm_time_to_first_token_seconds_sum", **arm) == pytest.approx(0.25)
    assert of(found, "topwork:arm_tokens_total", **arm, kind="prompt") == 11
    assert of(found, "topwork:feedback_total", **arm, kind="up") == 1


def test_what_was_refused_is_no_success() -> None:
    metrics = Metrics("tiny")
    metrics.ended(call(status=429))
    found = read(metrics)
    assert of(found, "topwork:requests_total", model_name="sql", endpoint="chat", status="429") == 1
    assert not [name for name, _ in found if name.startswith(("vllm:request_success", "vllm:prompt_tokens"))]


def test_two_servers_of_one_process_count_apart() -> None:
    one, other = Metrics("tiny"), Metrics("tiny")
    answered(one, call())
    assert ("vllm:prompt_tokens_total", (("model_name", "sql"),)) not in read(other)
