"""Write tests/merging/data/mergekit.safetensors: what mergekit makes of full models, to hold our functions to.

    python -m venv /tmp/mergekit
    echo SITE_PACKAGES_OF_TOPWORK > /tmp/mergekit/lib/python3.11/site-packages/topwork.pth
    /tmp/mergekit/bin/pip install --no-deps mergekit==0.1.5 immutables sentencepiece scipy
    /tmp/mergekit/bin/python tools/mergekit_reference.py

A tiny llama and three more, which are it plus ΔW = b a in some of its layers. All values are whole numbers over powers
of two, so that fp32 holds base, ΔW and their sum without rounding. mergekit reads them as folders, as its users do.
What drops at random is caught as it happens and stored as masks beside the result.

    base.MODULE  b.SOURCE.MODULE  a.SOURCE.MODULE       the models
    result.RUN.MODULE  mask.RUN.SOURCE.MODULE           what mergekit wrote and what it kept
    metadata: "runs", JSON: each run's method, sources, weights, density and other parameters; "versions"
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parents[1] / "tests" / "merging" / "data" / "mergekit.safetensors"
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
RANKS = {"0": 2, "1": 3, "2": 4}
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": [0.7, 0.2, 0.4]},
    "task_arithmetic": {"method": "task_arithmetic", "weights": [0.7, 1.3, -0.5]},
    "task_arithmetic_lambda": {"method": "task_arithmetic", "weights": [0.7, 1.3, -0.5], "lambda": 0.6},
    "slerp": {"method": "slerp", "sources": ["0", "1"], "t": 0.3},
    "nuslerp": {"method": "nuslerp", "sources": ["0", "1"], "weights": [0.7, 0.3]},
    "nuslerp_unnormalized": {"method": "nuslerp", "sources": ["1", "2"], "weights": [0.5, 1.5]},
    "ties": {"method": "ties", "weights": [0.7, 1.3, 0.4], "density": [0.2, 0.5, 0.8]},
    "ties_ones": {"method": "ties", "weights": [1.0, 1.0, 1.0], "density": [0.4, 0.4, 0.4]},
    "ties_all_negative": {"method": "ties", "weights": [-0.5, -1.0, -0.25], "density": [0.4, 0.4, 0.4]},
    "ties_one_negative": {"method": "ties", "weights": [1.0, -0.8, 0.5], "density": [0.4, 0.4, 0.4]},
    "ties_lambda": {"method": "ties", "weights": [0.7, 1.3, 0.4], "density": [0.2, 0.5, 0.8], "lambda": 0.6},
    "dare_linear": {"method": "dare_linear", "weights": [0.7, 1.3, -0.4], "density": [0.3, 0.5, 0.8]},
    "dare_ties": {"method": "dare_ties", "weights": [0.7, 1.3, -0.4], "density": [0.3, 0.5, 0.8]},
    "della": {"method": "della", "weights": [0.7, 1.3, 0.4], "density": [0.3, 0.5, 0.8], "epsilon": 0.1},
    "breadcrumbs": {"method": "breadcrumbs", "weights": [0.7, 1.3, -0.4], "density": [0.3, 0.5, 0.9], "gamma": 0.05},
    "breadcrumbs_all": {"method": "breadcrumbs", "weights": [1.0, 1.0, 1.0], "density": [0.9, 0.97, 1.0], "gamma": 0.1},
    "magnitude_prune": {"method": "breadcrumbs", "weights": [0.7, 1.3, -0.4], "density": [0.3, 0.5, 1.0], "gamma": 0.0},
}  # fmt: skip


def main() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=8, tie_word_embeddings=False, dtype=torch.float32,
        )
    )  # fmt: skip
    stored = drawn(model)
    with tempfile.TemporaryDirectory() as place:
        write_models(model, stored, Path(place))
        for run, settings in RUNS.items():
            merged, masks = merge(Path(place), run, settings, stored)
            stored |= {f"result.{run}.{module}": merged[weight_of(module)] for module in MODULES}
            stored |= {f"mask.{run}.{key}": mask for key, mask in masks.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("mergekit", "torch", "transformers")}
    save_file(stored, OUT, metadata={"runs": json.dumps(RUNS), "versions": json.dumps(versions)})
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def weight_of(module: str) -> str:
    return f"model.layers.0.{module}.weight"


def drawn(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Base and factors; products of a rank of 4 are whole numbers over 2^16, below 2^18 over it."""
    noise, stored = torch.Generator().manual_seed(0), {}
    for module in MODULES:
        out, inner = model.state_dict()[weight_of(module)].shape
        stored[f"base.{module}"] = torch.randint(-(2**15), 2**15, (out, inner), generator=noise) / 2.0**16
        for source, rank in RANKS.items():
            stored[f"b.{source}.{module}"] = torch.randint(-256, 257, (out, rank), generator=noise) / 2.0**8
            stored[f"a.{source}.{module}"] = torch.randint(-256, 257, (rank, inner), generator=noise) / 2.0**8
            delta = stored[f"b.{source}.{module}"] @ stored[f"a.{source}.{module}"]
            assert torch.equal(stored[f"base.{module}"] + delta - stored[f"base.{module}"], delta)
    return stored


def write_models(model: LlamaForCausalLM, stored: Mapping[str, Tensor], place: Path) -> None:
    for name in ("base", *RANKS):
        for module in MODULES:
            weight = stored[f"base.{module}"]
            if name != "base":
                weight = weight + stored[f"b.{name}.{module}"] @ stored[f"a.{name}.{module}"]
            model.get_parameter(weight_of(module)).data.copy_(weight)
        model.save_pretrained(place / name)


def merge(
    place: Path, run: str, settings: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The merged model's weights, and the masks by source and module."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    sources = settings.get("sources", list(RANKS))
    models: list[dict[str, Any]] = []
    for i, source in enumerate(sources):
        own = {"weight": settings.get("weights"), "density": settings.get("density")}
        own = {name: values[i] for name, values in own.items() if values}
        models.append({"model": str(place / source), "parameters": own})
    shared = {key: settings[key] for key in ("lambda", "epsilon", "gamma", "t") if key in settings}
    config: dict[str, Any] = {
        "merge_method": settings["method"], "models": models, "parameters": shared, "dtype": "float32",
    }  # fmt: skip
    if settings["method"] != "linear":
        config["base_model"] = str(place / ("0" if settings["method"] == "slerp" else "base"))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    with caught_masks(stored) as masks:
        run_merge(MergeConfiguration.model_validate(config), str(place / f"merged-{run}"), options)
    return load_file(place / f"merged-{run}" / "model.safetensors"), masks


@contextmanager
def caught_masks(stored: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What the random ones keep: their ΔW have no zeros, so a zero is what was dropped."""
    from mergekit.merge_methods import generalized_task_arithmetic as methods

    names = {
        (stored[f"b.{source}.{module}"] @ stored[f"a.{source}.{module}"]).numpy().tobytes(): f"{source}.{module}"
        for module in MODULES
        for source in RANKS
    }
    own, masks = methods.sparsify, {}

    def watched(tensor: Tensor, *given: Any, **options: Any) -> Tensor:
        result = own(tensor, *given, **options)
        name = names.get(tensor.numpy().tobytes())
        if name and options["method"].value in ("random", "della_magprune"):
            assert tensor.all()
            masks[name] = result != 0
        return result

    methods.sparsify = watched
    try:
        yield masks
    finally:
        methods.sparsify = own


if __name__ == "__main__":
    main()
