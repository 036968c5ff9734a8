"""The moments of a run's step, from what is held and what a pass takes."""

from topwork.training.memory_held import adapter_bytes, base_bytes, state_bytes, tensor_sizes
from topwork.training.memory_layers import Need, fast_layer, plain_layer, total
from topwork.training.memory_process import HOLES_BYTES, process_bytes
from topwork.training.memory_setup import Part, PassShape, Setup, Usage

CHUNK_ROWS, CHUNK_BYTES = {"cpu": 256, "cuda": 1 << 14}, {"cpu": 48 << 20, "cuda": 512 << 20}
"""`ops/logprobs.py`'s."""

Parts = dict[Part, int]


def all_moments(setup: Setup, shape: PassShape, checkpointed_layers: int) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    held = held_parts(setup)
    need = pass_need(setup, shape, checkpointed_layers)
    logits = logits_bytes(setup, shape)
    trained = 4 * sum(member.values for member in setup.members)
    kept: Parts = {"activations": need.saved + need.heap}
    blocks: Parts = {"activations": need.saved, "scratch": need.scratch + need.handoff}
    update: Parts = {**held, "gradients": trained}
    return [
        Usage("loading", {part: held[part] for part in ("weights", "constants", "process")}),
        Usage("forward", {**held, **kept, "scratch": need.scratch + need.handoff + need.passing}),
        Usage("loss", {**held, **kept, "logits": logits, "scratch": need.scratch}),
        Usage("backward", {
            **held, **kept, "gradients": trained, "scratch": need.scratch + need.handoff + need.passing,
        }),
        Usage("update", {**update, **blocks}),
        Usage("saving", {**held, **blocks}),
    ]  # fmt: skip


def held_parts(setup: Setup) -> Parts:
    """From step to step."""
    weights, constants = base_bytes(setup)
    structure = setup.structure
    return {
        "weights": weights,
        "constants": constants,
        "adapter": sum(adapter_bytes(member, structure) for member in setup.members),
        "optimizer": sum(state_bytes(member.optim, tensor_sizes(member, structure)) for member in setup.members),
        "allocator": HOLES_BYTES,
        "process": process_bytes(structure.vocabulary) if setup.process_bytes is None else setup.process_bytes,
    }


def pass_need(setup: Setup, shape: PassShape, checkpointed_layers: int) -> Need:
    """What a pass takes at its end, of all layers."""
    s = setup.structure
    numbers = range(s.layers)
    plain = not s.fast or any(member.adapter.runs_plain for member in setup.members)

    def layer(number: int) -> Need:
        last = number == s.layers - 1
        if plain:
            return plain_layer(setup, number, shape.tokens)
        return fast_layer(setup, number, shape.tokens, shape.learned_tokens if last else shape.tokens)

    boundary = shape.tokens * s.hidden * (setup.value_bytes if plain else 4)
    kept = total(layer(number) for number in numbers[checkpointed_layers:])
    if checkpointed_layers:
        again = layer(0)
        kept = kept + Need(0, checkpointed_layers * boundary, 0, 0, again.saved + again.heap + again.passing)
    ends = shape.learned_tokens * s.hidden * (4 + 2 * setup.value_bytes)
    return kept + Need(0, boundary + ends)


def logits_bytes(setup: Setup, shape: PassShape) -> int:
    """A chunk of the head's products."""
    e = setup.value_bytes
    rows = max(16, min(CHUNK_ROWS[setup.device], CHUNK_BYTES[setup.device] // (e * setup.structure.vocabulary)))
    return min(rows, shape.learned_tokens) * e * setup.structure.vocabulary
