"""The moments of a run's step, from what is held and what a pass takes."""

from topwork.training.memory_held import adapter_bytes, base_bytes, packed_layers, state_bytes
from topwork.training.memory_layers import (
    DOWN,
    GATES,
    INPUTS,
    OUTPUT,
    Layer,
    Need,
    boundary_bytes,
    fast_attention,
    fast_mlp,
    given_bytes,
    kinds_of,
    layers_of,
    runs_modules,
    total,
)
from topwork.training.memory_plain import experts, mixed_layer, plain_layer, written_out_attention
from topwork.training.memory_process import (
    CUDA_ALLOCATOR_BYTES,
    CUDA_CONTEXT_BYTES,
    EXPERTS_HEAP_SHARE,
    GRADIENTS_SHARE,
    HEAD_COPIES,
    HEAP_SHARE,
    HEAP_TOP_BYTES,
    KERNELS_BYTES,
    process_bytes,
)
from topwork.training.memory_setup import Part, PassShape, Setup, Usage

CHUNK_ROWS, CHUNK_BYTES = {"cpu": 384, "cuda": 1 << 14}, {"cpu": 48 << 20, "cuda": 512 << 20}
"""`ops/logprobs.py`'s, on a CPU those of AMX."""
PANEL_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""`ops/quantized_linear.py`'s: what of a packed weight is dense at a time."""
OPENED_BYTES = 32 << 20
"""`ops/parts.py`'s: what of a layer's packed weights may be dense together, on AMX."""

Parts = dict[Part, int]


def all_moments(setup: Setup, shape: PassShape, checkpointed_layers: int) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    held, need = held_parts(setup), pass_need(setup, shape, checkpointed_layers)
    logits, at_loss = logits_bytes(setup, shape)
    gradients = 4 * sum(member.values for member in setup.members)
    blocks = need.scratch + need.handoff + need.handback
    more = max(0, logits - need.scratch)  # a chunk of logits lies in the same block
    kept: Parts = {"activations": need.saved + need.heap + differences_bytes(setup), "scratch": blocks}
    holes = _holes(setup, need, shape.alone) if setup.device == "cpu" else CUDA_ALLOCATOR_BYTES
    return [
        Usage("loading", loading(setup, held)),
        Usage("forward", {**held, **kept}),
        Usage("loss", {
            **held, **kept, "logits": more + at_loss, "scratch": blocks + need.passing * bool(at_loss),
            "allocator": holes * bool(at_loss),  # as the step before left the heap, where the head takes more of it
        }),
        Usage("backward", {
            **held, **kept, "logits": more, "gradients": gradients + copies_gradient_bytes(setup),
            "scratch": blocks + need.passing, "allocator": holes,
        }),
        Usage("update", {
            **held, "activations": need.saved, "scratch": blocks, "logits": more, "gradients": gradients,
            "allocator": holes,
        }),
        Usage("saving", {**held, "activations": need.saved, "scratch": blocks, "logits": more}),
    ]  # fmt: skip


def _holes(setup: Setup, need: Need, alone: bool) -> int:
    """What stays free in a CPU's heap, less what is taken twice: a step's first gradients of modules that are trained
    whole fill what layers leave behind as they go. A layer that is run again takes its own for each."""
    whole = 4 * sum(sum(member.sizes[path]) for member in setup.members for path in member.whole) * alone
    filled = min(whole, int((HEAP_SHARE + GRADIENTS_SHARE) * need.heap))
    share = EXPERTS_HEAP_SHARE if any(layer.experts for layer in layers_of(setup)) else HEAP_SHARE
    return HEAP_TOP_BYTES + int(share * (need.heap + need.again)) - filled


def differences_bytes(setup: Setup) -> int:
    """Of PiSSA and OLoRA, whose pass goes through what A and B are beside what they began as: [A; A - A0] and
    [B - B0, B0], fp32, of twice their size, made anew in each pass and kept until it has gone backward."""
    return sum(2 * 4 * member.values for member in setup.members if member.adapter.keeps_beginnings)


def copies_gradient_bytes(setup: Setup) -> int:
    """For a moment, of the largest module that is trained whole: its gradient in the base's type before it is one in
    fp32, and where a head is the embedding's copy that of the one beside that of the other."""
    structure, largest = setup.structure, 0
    for member in setup.members:
        shared = structure.tied and {structure.head, structure.embedding} <= member.sizes.keys()
        for path in member.whole:
            narrow = setup.value_bytes * (setup.value_bytes == 2)
            both = 4 * (shared and path == structure.embedding)
            largest = max(largest, (narrow + both) * max(member.sizes[path], default=0))
    return largest


def held_parts(setup: Setup) -> Parts:
    """From step to step."""
    if "held" not in setup.known:
        setup.known["held"] = _held_parts(setup)
    return dict(setup.known["held"])


def _held_parts(setup: Setup) -> Parts:
    weights, constants = base_bytes(setup)
    structure = setup.structure
    process = setup.process_bytes
    if process is None and setup.device == "cuda":
        process = CUDA_CONTEXT_BYTES
    elif process is None:
        process = process_bytes(structure.vocabulary, setup.tokenizer_bytes)
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
    layer that is being joined, or the largest weight, is there twice. Where nothing is joined, weights stay in the
    mapped file, of which an embedding takes only what rows look at: it is counted whole."""
    structure = setup.structure
    parts: Parts = {part: held[part] for part in ("weights", "constants", "process")}
    if setup.quantization.active:  # the embedding comes first; then one layer at a time is dense
        packed = packed_layers(structure, setup.quantization)
        dense = max((module.weights for module in structure.modules if module.path in packed), default=0)
        table = structure.by_path[structure.embedding].weights if structure.embedding else 0
        beside = 2 * setup.value_bytes * table - parts["weights"] - parts["constants"]
        return {**parts, "scratch": max(setup.value_bytes * dense, beside)}
    joined = any(layer.joins for layer in layers_of(setup))
    largest = setup.value_bytes * max(module.weights for module in structure.modules) * joined
    told = str(structure.config.get("dtype") or structure.config.get("torch_dtype") or setup.dtype)
    stored = 4 if "float32" in told else 2
    file = 0 if stored == setup.value_bytes else stored * structure.parameters
    return {**parts, "scratch": max(file, largest)}


def pass_need(setup: Setup, shape: PassShape, checkpointed_layers: int) -> Need:
    """What a pass takes at its end, of all layers."""
    s, e = setup.structure, setup.value_bytes
    layers = layers_of(setup)
    known: dict[tuple[int, bool, bool], Need] = {}
    needs = []
    for number, (layer, kind) in enumerate(zip(layers, kinds_of(setup))):
        runs_again = number < checkpointed_layers
        key = kind, layer is layers[-1], runs_again
        if key not in known:
            known[key] = layer_need(layer, shape, runs_again)
        needs.append(known[key])
    kept = total(needs[checkpointed_layers:])
    boundary = shape.tokens * boundary_bytes(s, e)
    if checkpointed_layers:
        again = max(needs[:checkpointed_layers], key=_whole)
        given = shape.tokens * given_bytes(s, e, checkpointed_layers)
        kept = kept + Need(0, given, 0, 0, _whole(again) + again.passing, again.heap)
    panel = max(PANEL_BYTES[setup.device], _opened(setup)) if setup.quantization.active else 0
    attention = written_out_attention(setup, shape)
    return kept + Need(0, boundary + _around(setup, shape), kept.scratch + panel, 0, kept.passing + attention)


def _opened(setup: Setup) -> int:
    """The packed weights of a layer, or of a group of it, that are made dense together; planned wherever it may be
    so."""
    if setup.device != "cpu" or not setup.structure.fast or setup.value_bytes != 2:
        return 0
    packed = packed_layers(setup.structure, setup.quantization)
    sizes = []
    for layer in layers_of(setup):
        groups = {
            name: sum(2 * module.weights for module in layer.group(name) if module.path in packed)
            for name in (INPUTS, OUTPUT, GATES, DOWN)
        }
        sizes += [*groups.values(), groups[GATES] + groups[DOWN], sum(groups.values())]
    return max((size for size in sizes if size <= OPENED_BYTES), default=0)


def _whole(need: Need) -> int:
    return need.saved + need.heap + need.scratch + need.handoff + need.handback


def layer_need(layer: Layer, shape: PassShape, again: bool = False) -> Need:
    """Of one decoder layer, or of one that is run again going backward."""
    setup, tokens = layer.setup, shape.tokens
    last = layer.number == setup.structure.layers - 1
    if not layer.fast_attention:
        return plain_layer(layer, tokens)
    rows = shape.learned_tokens if last and setup.structure.fast else tokens
    if any(map(runs_modules, setup.members)):
        return mixed_layer(layer, tokens, rows)
    attention, in_workspace = fast_attention(layer, tokens, rows), setup.device == "cpu" and not again
    return attention + (experts(layer, rows) if layer.experts else fast_mlp(layer, rows, in_workspace))


def _around(setup: Setup, shape: PassShape) -> int:
    """Embedded tokens, rotary tables, the last norm, and the learned rows on their way to the head."""
    s, e = setup.structure, setup.value_bytes
    rows = shape.learned_tokens if s.fast else shape.tokens
    return rows * 4 * s.hidden + shape.learned_tokens * 2 * e * s.hidden + shape.tokens * 2 * e * s.head_dim


def logits_bytes(setup: Setup, shape: PassShape) -> tuple[int, int]:
    """(a chunk of the head's products, what its way costs beside it). Where a head learns, autograd makes a chunk's
    logits again: in fp32 with their exponentials and gradient, a cast of its weight, and that weight's gradient. Logits
    that are capped are in fp32 too, with what the cap makes of them."""
    structure, e = setup.structure, setup.value_bytes
    learns = any(structure.head in member.sizes for member in setup.members)
    rows = chunk_rows(setup, 4 if learns else e)
    count = -(-shape.learned_tokens // max(1, -(-shape.learned_tokens // rows)))
    values = count * structure.vocabulary
    if learns:
        whole = any(structure.head in member.whole for member in setup.members)
        weight = whole * structure.vocabulary * structure.hidden
        cast = e * (e == 2)
        return 0, cast * weight + max(values * (e + 3 * 4), values * e + (cast + 4) * weight)
    if structure.config.get("final_logit_softcapping"):
        return values * e, values * 3 * 4
    packed = setup.quantization.active and setup.quantization.head != "16bit" and setup.device == "cpu"
    return values * e * (1 + HEAD_COPIES * packed), 0


def chunk_rows(setup: Setup, value_bytes: int) -> int:
    """Rows of a chunk."""
    return max(
        16, min(CHUNK_ROWS[setup.device], CHUNK_BYTES[setup.device] // (value_bytes * setup.structure.vocabulary))
    )
