"""What serve.yaml says of tenants, routes and feedback, put together for the server."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from topwork.serving.config import ServeConfig
from topwork.serving.endpoints import Ways, endpoints
from topwork.serving.feedback import Feedback
from topwork.serving.metrics import Metrics
from topwork.serving.routes import Routes
from topwork.serving.seams import Call, OpenGate, Parts
from topwork.serving.tenants import Tenants


def parts_of(
    config: ServeConfig,
    base_names: Sequence[str],
    saved_routes: Mapping[str, Any] | None = None,
    keep_routes: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Parts:
    """Gate, router, meter and endpoints.

    base_names    what the base is called: first the name that figures have, then others
    saved_routes  what `keep_routes` was given last, before this start
    """
    routes = Routes(config.routes, base_names, saved_routes or {}, keep_routes)
    metrics = Metrics(base_names[0])
    feedback = Feedback(
        routes, base_names[0], None if config.state_folder is None else Path(config.state_folder),
        config.feedback.answers_remembered, config.feedback.comment_characters, metrics.voted,
    )  # fmt: skip
    gate = Tenants(config.tenants) if config.tenants else OpenGate()
    return Parts(gate, routes, Counted(metrics, feedback), [endpoints(Ways(gate, routes, feedback, metrics))])


class Counted:
    """`seams.Meter` of a whole server: for Prometheus, for arms, and so that answers may be voted on."""

    def __init__(self, metrics: Metrics, feedback: Feedback) -> None:
        self.metrics, self.feedback = metrics, feedback
        self._under_way: set[str] = set()

    def began(self, call: Call) -> None:
        """It is handed to the engine."""
        self._under_way.add(call.id)
        self.metrics.began(call)
        self.feedback.remember(call)

    def token(self, call: Call, seconds: float) -> None:
        """A token came."""
        self.metrics.token(call, seconds)

    def ended(self, call: Call) -> None:
        """It has ended, or was refused; arms are not counted by what never reached the engine."""
        self.metrics.ended(call)
        self.feedback.ended(call)
        if call.id in self._under_way and call.target.route is not None:
            self.feedback.figures(call.target.route, str(call.target.arm)).count(call)
        self._under_way.discard(call.id)

    def stepped(self, statistics: Any) -> None:
        """The engine's figures."""
        self.metrics.stepped(statistics)
