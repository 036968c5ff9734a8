"""What mergekit made of full models, and of which: tests/merging/data/mergekit.safetensors, which
tools/mergekit_reference.py describes. Values come in fp64."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FILE = Path(__file__).parents[1] / "merging" / "data" / "mergekit.safetensors"
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
SOURCES = ("0", "1", "2")


@dataclass(frozen=True)
class Run:
    """One merge. settings: mergekit's method and its parameters; sources, where not all."""

    name: str
    settings: dict[str, Any]

    @property
    def sources(self) -> list[str]:
        return self.settings.get("sources", list(SOURCES))

    def merged(self, module: str) -> Tensor:
        """The merged model's weight [out, in]."""
        return _stored()[1][f"result.{self.name}.{module}"].double()

    def masks(self, module: str) -> Tensor | None:
        """What a random method kept [n, out, in]; None of the others."""
        names = [f"mask.{self.name}.{source}.{module}" for source in self.sources]
        return torch.stack([_stored()[1][name] for name in names]) if names[0] in _stored()[1] else None


def runs() -> dict[str, Run]:
    return {name: Run(name, settings) for name, settings in _stored()[0].items()}


def base(module: str) -> Tensor:
    """W [out, in]."""
    return _stored()[1][f"base.{module}"].double()


def factors(source: str, module: str) -> tuple[Tensor, Tensor]:
    """b [out, r] and a [r, in]."""
    b, a = (_stored()[1][f"{part}.{source}.{module}"].double() for part in "ba")
    return b, a


def delta(source: str, module: str) -> Tensor:
    """ΔW [out, in], without any rounding."""
    b, a = factors(source, module)
    return b @ a


@cache
def _stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["runs"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
