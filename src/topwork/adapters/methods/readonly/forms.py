"""What PEFT's other methods keep of an adapter at each linear layer, by their options. Free of torch.

These methods are read, run, merged and served; what they do is in `updates.py` and `turns.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Options = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class Layer(NamedTuple):
    """A linear layer's path, inputs and outputs."""

    path: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Form:
    """What a method's files hold.

    learned   the shapes of a layer's learned tensors, by PEFT's names
    defaults  the options that decide what they mean, as PEFT has them where a file says nothing
    only      options that can be read with one value alone, their default; `never` with any but these
    fixed     the shapes of tensors that the file holds of a layer and nobody learns
    shared    the shapes of tensors that all layers share, of which `widest` has the most inputs and the most outputs;
              and for each the tensor beside which a layer needs it
    """

    learned: Callable[[Options, Layer], Shapes]
    defaults: Options
    only: Options = field(default_factory=dict)
    never: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: Callable[[Options, Layer], Shapes] = lambda *_: {}
    shared: Callable[[Options, Layer], Shapes] = lambda *_: {}
    beside: Mapping[str, str] = field(default_factory=dict)


def _adalora(options: Options, layer: Layer) -> Shapes:
    kept = (options["rank_pattern"] or {}).get(f"{layer.path}.lora_E")  # what is left of init_r, by a list of bools
    r = options["init_r"] if kept is None else sum(kept)
    return {"lora_A": (r, layer.inputs), "lora_B": (layer.outputs, r), "lora_E": (r, 1)}


def _gralora(options: Options, layer: Layer) -> Shapes:
    k, r, more = options["gralora_k"], options["r"], options["hybrid_r"]
    general = {"gralora_A_general.weight": (more, layer.inputs), "gralora_B_general.weight": (layer.outputs, more)}
    own = {"gralora_A": (k, layer.inputs // k, r), "gralora_B": (k, r, layer.outputs // k)}
    return {**own, **(general if more else {})}


def _vblora(options: Options, layer: Layer) -> Shapes:
    r, length, vectors = options["r"], options["vector_length"], options["num_vectors"]
    return {
        "vblora_logits_A": (r, layer.inputs // length, vectors),
        "vblora_logits_B": (layer.outputs // length, r, vectors),
    }


def _miss(options: Options, layer: Layer) -> Shapes:
    mini = options["init_weights"] == "mini"
    return {"miss_block": (options["r"], options["mini_r"] if mini else layer.outputs)}


def _c3a(options: Options, layer: Layer) -> Shapes:
    size = options["block_size"]
    return {"c3a_kernel": (layer.outputs // size, layer.inputs // size, size)}


def _shira_values(options: Options, layer: Layer) -> int:
    return int(options["r"]) * (layer.inputs + layer.outputs)


def _boft(options: Options, layer: Layer) -> Shapes:
    """The butterfly is of one factor without PEFT's CUDA extension, whatever its config says."""
    size = options["boft_block_size"] or layer.inputs // options["boft_block_num"]
    return {"boft_R": (1, layer.inputs // size, size, size), "boft_s": (layer.outputs, 1)}


def _road(options: Options, layer: Layer) -> Shapes:
    share = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}[options["variant"]]
    count = layer.outputs * share[0] // share[1]
    return {"road_theta": (count,), "road_alpha": (count,)}


def _low_rank(name: str) -> Callable[[Options, Layer], Shapes]:
    return lambda options, layer: {
        f"{name}_A": (options["r"], layer.inputs), f"{name}_B": (layer.outputs, options["r"]),
    }  # fmt: skip


def _spectrum(name: str) -> Callable[[Options, Layer], Shapes]:
    return lambda options, _: {f"{name}_spectrum": (options["n_frequency"],)}


FORMS: dict[str, Form] = {
    "ADALORA": Form(
        _adalora,
        {"init_r": 12, "lora_alpha": 8, "rank_pattern": None, "total_step": None},
        {"use_dora": False, "use_rslora": False},
    ),
    "BOFT": Form(_boft, {"boft_block_size": 4, "boft_block_num": 0}),
    "C3A": Form(_c3a, {"block_size": 256}, {"block_size_pattern": {}}),
    "DELORA": Form(
        lambda options, layer: {**_low_rank("delora")(options, layer), "delora_lambda": (1,)},
        {"r": 8},
        {"rank_pattern": {}},
        fixed=lambda _, layer: {"delora_w_norm": (layer.inputs,)},
    ),
    "FOURIERFT": Form(
        _spectrum("fourierft"),
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        {"n_frequency_pattern": {}},
    ),
    "GRALORA": Form(_gralora, {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2}),
    "HIRA": Form(_low_rank("hira"), {"r": 32}, {"rank_pattern": {}}),
    "HRA": Form(lambda options, layer: {"hra_u": (layer.inputs, options["r"])}, {"r": 8}, {"apply_GS": False}),
    "MISS": Form(_miss, {"r": 64, "mini_r": 1, "init_weights": True}, never={"init_weights": ("bat",)}),
    "PVERA": Form(
        lambda options, layer: {"pvera_lambda_b": (layer.outputs,), "pvera_lambda_d": (2 * options["r"],)},
        {"r": 256},
        {"sample_at_inference": False, "save_projection": True},
        shared=lambda options, widest: {
            "pvera_A": (2 * options["r"], widest.inputs), "pvera_B": (widest.outputs, options["r"]),
        },
        beside={"pvera_A": "pvera_lambda_b", "pvera_B": "pvera_lambda_b"},
    ),
    "ROAD": Form(_road, {"variant": "road_1", "group_size": 64}),
    "SHIRA": Form(
        lambda options, layer: {"shira_weight": (_shira_values(options, layer),)},
        {"r": 32},
        fixed=lambda options, layer: {"shira_indices": (2, _shira_values(options, layer))},
    ),
    "VBLORA": Form(
        _vblora,
        {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2},
        {"save_only_topk_weights": False},
        shared=lambda options, _: {"vblora_vector_bank": (options["num_vectors"], options["vector_length"])},
        beside={"vblora_vector_bank": "vblora_logits_A"},
    ),
    "WAVEFT": Form(
        _spectrum("waveft"),
        {"n_frequency": 2592, "scaling": 25.0, "random_loc_seed": 777, "use_idwt": True},
        {"wavelet_family": "db1", "n_frequency_pattern": {}, "proportional_parameters": False},
    ),
}  # fmt: skip
"""By PEFT's type."""
