"""The runs whose losses are golden: one recipe or two in one pass, ten steps each, on tiny bases that a seed makes.

They go through `topwork.train_together` alone, from a folder with weights to metrics.jsonl and the adapter's file, so
that whatever changes between these two, the losses and the bytes may not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import topwork
from data.family_tokenizers import build_tokenizer
from reference.families import tiny_model
from run.tiny import rows, write_rows
from topwork.recipe.recipe import make_recipe

STEPS, CONTEXT = 10, 512


@dataclass(frozen=True)
class Row:
    """The adapters of one pass (one run each), the base they stand on, and how it is held."""

    adapters: tuple[dict[str, Any], ...]
    family: str = "llama"
    dtype: str = "float32"
    quantization: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def one(family: str = "llama", dtype: str = "float32", nf4: bool = False, layers: int = 2,
        training: dict[str, Any] | None = None, **adapter: Any) -> Row:  # fmt: skip
    """A row of a single run."""
    values = {} if layers == 2 else {"num_hidden_layers": layers}
    return Row((adapter,), family, dtype, {"load_in_4bit": True} if nf4 else {}, training or {}, values)


ROWS: dict[str, Row] = {
    "lora": one(),
    "lora over nf4": one(nf4=True),
    "lora on qwen3": one(family="qwen3"),
    "lora on gemma2": one(family="gemma2"),
    "rslora on gpt2": one(family="gpt2", use_rslora=True),
    "lora with dropout": one(lora_dropout=0.2),
    "lora, head and norms saved": one(modules_to_save=["lm_head", "norm"]),
    "dora": one(use_dora=True),
    "dora over nf4": one(use_dora=True, nf4=True),
    "pissa": one(init_lora_weights="pissa"),
    "ia3": one(method="ia3", training={"learning_rate": 5e-2}),
    "prefix on qwen3": one(family="qwen3", method="prefix", num_virtual_tokens=3, training={"learning_rate": 5e-2}),
    "prompt": one(method="prompt", num_virtual_tokens=3, training={"learning_rate": 5e-2}),
    "bitfit on gpt2": one(family="gpt2", method="bitfit"),
    "full": one(method="full", training={"learning_rate": 1e-3}),
    "two members in one pass": Row(({}, {"use_dora": True, "r": 8, "lora_dropout": 0.1})),
    "checkpointed": one(training={"activation_checkpointing": 3}, layers=4),
    "dora with dropout, checkpointed": one(
        use_dora=True, lora_dropout=0.1, layers=4, training={"activation_checkpointing": "full"}
    ),
    "checkpointed gpt2": one(family="gpt2", training={"activation_checkpointing": 2}),
    "bf16": one(dtype="bfloat16", use_dora=True),
    "bf16, dora checkpointed over nf4": one(
        dtype="bfloat16", use_dora=True, nf4=True, layers=4, training={"activation_checkpointing": 3}
    ),
}  # fmt: skip
"""Name -> row. The 16-bit rows go through the kernels that only 16 bits have."""


def run_row(row: Row, base: Path, place: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """Train a row's adapters; of each the losses of its steps and the SHA-256 of its file."""
    data = write_rows(place / "rows.jsonl", rows(24))
    recipes = [
        make_recipe({
            "model": {"model_name_or_path": str(base), "dtype": row.dtype, "device": device},
            "quantization": row.quantization,
            "adapter": adapter if "method" in adapter else {"r": 4, "lora_alpha": 8, **adapter},
            "data": {"train": str(data), "eval_fraction": 0.0},
            "training": {
                "learning_rate": 1e-2, "max_steps": STEPS, "batch_size": 4, "tokens_per_pass": 300, "warmup_steps": 1,
                "seed": number, "activation_checkpointing": "off", **row.training,
            },
            "output_dir": str(place / f"run{number}"),
        })
        for number, adapter in enumerate(row.adapters)
    ]  # fmt: skip
    runs = topwork.train_together(recipes, log=lambda _: None)
    return [told(run.folder) for run in runs]


def told(folder: Path) -> dict[str, Any]:
    """What a run came to."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == STEPS
    return {"losses": losses, "sha256": sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()}


def bases(folder: Path) -> Callable[[Row], Path]:
    """Rows' bases as Hugging Face folders, each written once."""

    def base_of(row: Row) -> Path:
        name = "-".join([row.family, *(f"{key}{value}" for key, value in row.values.items())])
        if not (folder / name).exists():
            tokenizer = build_tokenizer("smollm2")
            ids = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
            size = "n_positions" if row.family == "gpt2" else "max_position_embeddings"
            model = tiny_model(row.family, vocab_size=len(tokenizer), **{size: CONTEXT}, **ids, **row.values)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return base_of
