"""One run of `planned.py`: a training whose largest resident size is read moment by moment.

    python -m planned_worker RECIPE [RECIPE …]

The system's own mark (VmHWM) is read and set back at the end of each moment; the largest of all is the run's peak. The
last line printed is what was found, as JSON.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Watch:
    """The largest resident size of each moment."""

    def __init__(self) -> None:
        self.moment, self.peaks = "loading", {}  # type: ignore[var-annotated]
        self.ends: list[tuple[str, int, int]] = []

    def enter(self, moment: str) -> None:
        """What comes from here on is another moment's."""
        largest, now = marks()
        self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), largest)
        self.ends.append((self.moment, largest, now))
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        self.moment = moment

    def around(self, owner: Any, name: str, during: str | None, then: str | None) -> None:
        """While a function runs it is one moment, behind it another."""
        real: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(real)
        def watched(*given: Any, **named: Any) -> Any:
            if during:
                self.enter(during)
            found = real(*given, **named)
            if then:
                self.enter(then)
            return found

        setattr(owner, name, watched)


def marks() -> tuple[int, int]:
    """(VmHWM, VmRSS) in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024


def main() -> None:
    from topwork.models.base import Base
    from topwork.recipe.recipe import load_recipe
    from topwork.run import train as run_train
    from topwork.run import training
    from topwork.training import loop, step, trial

    watch = Watch()
    watch.around(run_train, "open_session", None, "made")
    watch.around(training, "_looped", "forward", "ended")
    watch.around(loop, "train_step", "forward", None)
    watch.around(Base, "hidden_rows", "forward", "loss")
    watch.around(Base, "log_probabilities", None, "backward")
    watch.around(step, "_updated", "update", "between")
    watch.around(trial, "save_checkpoint", "saving", "between")
    begun = time.perf_counter()
    recipes = [load_recipe(Path(path)) for path in sys.argv[1:]]
    done = run_train.train_together(recipes, overwrite=True, log=lambda *_: None)
    watch.enter("ended")
    steps = [json.loads(line) for line in (done[0].folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [record for record in steps if record["kind"] == "train"]
    print(json.dumps({
        "peaks": watch.peaks, "ends": watch.ends, "seconds": [record["seconds"] for record in trained],
        "pass_tokens": [record.get("pass_tokens", record["tokens"]) for record in trained],
        "learned_tokens": [record["learned_tokens"] for record in trained],
        "all_seconds": time.perf_counter() - begun,
        "checkpointed_layers": done[0].result["checkpointed_layers"], "weights": done[0].result["base_weights_bytes"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
