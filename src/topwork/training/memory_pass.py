"""The moments of a run's step, from what is held and what a pass takes."""

from topwork.training.memory_held import adapter_bytes, base_bytes, state_bytes, whole
from topwork.training.memory_layers import (
    Layer,
    Need,
    boundary_bytes,
    fast_attention,
    fast_mlp,
    layers_of,
    runs_modules,
    total,
)
from topwork.training.memory_plain import experts, mixed_layer, plain_layer, written_out_attention
from topwork.training.memory_process import HEAD_COPIES, HEAP_SHARE, HEAP_TOP_BYTES, KERNELS_BYTES, process_bytes
from topwork.training.memory_setup import Part, PassShape, Setup, Usage

CHUNK_ROWS, CHUNK_BYTES = {"cpu": 256, "cuda": 1 << 14}, {"cpu": 48 << 20, "cuda": 512 << 20}
"""`ops/logprobs.py`'s."""
PANEL_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""`ops/quantized_linear.py`'s: what of a packed weight is dense at a time."""

Parts = dict[Part, int]


def all_moments(setup: Setup, shape: PassShape, checkpointed_layers: int) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    held, need = held_parts(setup), pass_need(setup, shape, checkpointed_layers)
    logits, at_loss = logits_bytes(setup, shape)
    gradients = 4 * sum(member.values for member in setup.members)
    blocks = need.scratch + need.handoff
    more = max(0, logits - need.scratch)  # a chunk of logits lies in the same block
    kept: Parts = {"activations": need.saved + need.heap, "scratch": blocks}
    holes = HEAP_TOP_BYTES + int(HEAP_SHARE * (need.heap + need.again)) if setup.device == "cpu" else 0
    return [
        Usage("loading", loading(setup, held)),
        Usage("forward", {**held, **kept}),
        Usage("loss", {**held, **kept, "logits": more + at_loss}),
        Usage("backward", {
            **held, **kept, "logits": more, "gradients": gradients, "scratch": blocks + need.passing,
            "allocator": holes,
        }),
        Usage("update", {
            **held, "activations": need.saved, "scratch": blocks, "logits": more, "gradients": gradients,
            "allocator": holes,
        }),
        Usage("saving", {**held, "activations": need.saved, "scratch": blocks, "logits": more}),
    ]  # fmt: skip


def held_parts(setup: Setup) -> Parts:
    """From step to step."""
    weights, constants = base_bytes(setup)
    structure = setup.structure
    process = process_bytes(structure.vocabulary) if setup.process_bytes is None else setup.process_bytes
    sizes = [(member.optim, [size for own in member.sizes.values() for size in own]) for member in setup.members]
    return {
        "weights": weights,
        "constants": constants,
        "adapter": sum(adapter_bytes(member, structure) for member in setup.members),
        "optimizer": sum(state_bytes(optim, own) for optim, own in sizes),
        "process": process + (KERNELS_BYTES if setup.device == "cpu" else 0),
    }


def loading(setup: Setup, held: Parts) -> Parts:
    """The base as it is read: where it comes in another type than its file's, the file's pages stand beside it; and the
    layer that is being joined, or the largest weight, is there twice."""
    structure = setup.structure
    largest = setup.value_bytes * max(module.weights for module in structure.modules)
    told = str(structure.config.get("dtype") or structure.config.get("torch_dtype") or setup.dtype)
    stored = 4 if "float32" in told else 2
    file = 0 if setup.quantization.active or stored == setup.value_bytes else stored * structure.parameters
    parts: Parts = {part: held[part] for part in ("weights", "constants", "process")}
    return {**parts, "scratch": max(file, largest)}


def pass_need(setup: Setup, shape: PassShape, checkpointed_layers: int) -> Need:
    """What a pass takes at its end, of all layers."""
    s, e = setup.structure, setup.value_bytes
    layers = layers_of(setup)
    kept = total(layer_need(layer, shape) for layer in layers[checkpointed_layers:])
    boundary = shape.tokens * boundary_bytes(s, e)
    if checkpointed_layers:
        again = max((layer_need(layer, shape) for layer in layers[:checkpointed_layers]), key=_whole)
        kept = kept + Need(0, checkpointed_layers * boundary, 0, 0, _whole(again) + again.passing, again.heap)
    panel = PANEL_BYTES[setup.device] if setup.quantization.active else 0
    attention = written_out_attention(setup, shape)
    return kept + Need(0, boundary + _around(setup, shape), kept.scratch + panel, 0, kept.passing + attention)


def _whole(need: Need) -> int:
    return need.saved + need.heap + need.scratch + need.handoff


def layer_need(layer: Layer, shape: PassShape) -> Need:
    """Of one decoder layer."""
    setup, tokens = layer.setup, shape.tokens
    last = layer.number == setup.structure.layers - 1
    if not layer.fast_attention:
        return plain_layer(layer, tokens)
    rows = shape.learned_tokens if last and setup.structure.fast else tokens
    if any(map(runs_modules, setup.members)):
        return mixed_layer(layer, tokens, rows)
    return fast_attention(layer, tokens, rows) + (experts(layer, rows) if layer.experts else fast_mlp(layer, rows))


def _around(setup: Setup, shape: PassShape) -> int:
    """Embedded tokens, rotary tables, the last norm, and the learned rows on their way to the head."""
    s, e = setup.structure, setup.value_bytes
    rows = shape.learned_tokens if s.fast else shape.tokens
    return rows * 4 * s.hidden + shape.learned_tokens * 2 * e * s.hidden + shape.tokens * 2 * e * s.head_dim


def logits_bytes(setup: Setup, shape: PassShape) -> tuple[int, int]:
    """(a chunk of the head's products, what its way costs beside it): where a head is trained, autograd keeps logits in
    fp32 and makes them again."""
    structure, e = setup.structure, setup.value_bytes
    learns = any(structure.head in whole(member) or structure.embedding in whole(member) for member in setup.members)
    rows = chunk_rows(setup, 4 if learns else e)
    count = -(-shape.learned_tokens // max(1, -(-shape.learned_tokens // rows)))
    values = count * structure.vocabulary
    if learns:
        return 0, values * (e + 3 * 4)
    packed = setup.quantization.active and setup.quantization.head != "16bit" and setup.device == "cpu"
    return values * e * (1 + HEAD_COPIES * packed), 0


def chunk_rows(setup: Setup, value_bytes: int) -> int:
    """Rows of a chunk."""
    return max(
        16, min(CHUNK_ROWS[setup.device], CHUNK_BYTES[setup.device] // (value_bytes * setup.structure.vocabulary))
    )
