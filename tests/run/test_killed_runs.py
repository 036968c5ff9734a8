"""A few kills at random moments; `benchmarks/kills.py` makes hundreds."""

import random
from pathlib import Path

from run.kills import Kills
from run.processes import Commands


def test_killed_in_a_few_phases_nothing_is_lost(
    commands: Commands, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    told = Kills(commands, tiny_llama, tickets, tmp_path, seed).run(4, 6)
    assert told.wrong == [], f"seed {seed}"
    assert sum(told.kills.values()) >= 4
