"""OFT: the inputs of a layer are turned, block by block, before it sees them (Qiu et al., arXiv 2306.07280, in the form
of arXiv 2506.19847, which turns inputs and not weights).

    y = W (R' x) + bias        R block-diagonal, each block the Cayley transform of a skew-symmetric Q, which is learned

R = (I - Q)(I + Q)^-1, or the first terms of its series in Q (`use_cayley_neumann`). Q begins at zero, so R as the
identity. With `coft` each Q is held within a ball of radius eps / sqrt(blocks); as in PEFT, gradients pass that over.
"""

from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import OftConfig
from topwork.adapters.files import Files, Grafted, names_of, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.factored_places import oft_blocks, oft_sizes
from topwork.adapters.module import AdapterModule
from topwork.adapters.peft_options_other import oft_options


class Oft(AdapterModule):
    """The upper triangles of every block's Q at one linear layer, [blocks, size (size - 1) / 2], or [1, …] for all."""

    merges = ("weight",)

    def __init__(self, blocks: int, size: int, config: OftConfig) -> None:
        super().__init__()
        self.oft_R = nn.Parameter(torch.zeros(1 if config.block_share else blocks, size * (size - 1) // 2))
        self.blocks, self.size = blocks, size
        self.eps, self.terms = _setting(config)

    @property
    def setting(self) -> tuple[float | None, int | None]:
        return self.eps, self.terms

    def rotation(self) -> Tensor:
        """R, [blocks or 1, size, size], in fp32."""
        q = _skew(self.oft_R, self.size)
        if self.eps is not None:
            q = q + (_within(q.detach(), self.eps) - q.detach())
        identity = torch.eye(self.size, device=q.device, dtype=q.dtype).expand_as(q)
        if self.terms is None:
            return torch.linalg.solve(identity + q, identity - q, left=False)
        return _series(q, identity, self.terms)

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        """Turned in fp32 and rounded once, as in PEFT."""
        turned: Tensor = base_layer(self.turned(x, self.rotation()).to(x.dtype))
        return turned

    def turned(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [n, in] with each block's values times its matrix."""
        blocks = x.float().unflatten(-1, (self.blocks, self.size))
        return torch.einsum("nkb,kbc->nkc", blocks, rotation.expand(self.blocks, -1, -1)).flatten(1)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"oft_R.weight": self.oft_R}

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rotation = self.rotation().detach().to(weight.device)
        return self.turned(weight, rotation.transpose(1, 2)), bias


def _setting(config: OftConfig) -> tuple[float | None, int | None]:
    """How far a rotation may go, and of how many terms it is; None where that is not asked for."""
    terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
    return (config.eps if config.coft else None), terms


def _skew(triangles: Tensor, size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    upper = triangles.new_zeros(len(triangles), size, size)
    upper = upper.index_put((torch.arange(len(triangles), device=triangles.device)[:, None], rows, columns), triangles)
    return upper - upper.transpose(1, 2)


def _within(q: Tensor, eps: float) -> Tensor:
    """Each block scaled back to length eps / sqrt(blocks) where it is longer."""
    most = eps / len(q) ** 0.5
    lengths = q.norm(dim=(1, 2), keepdim=True)
    return torch.where(lengths <= most, q, most * (q / lengths))


def _series(q: Tensor, identity: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + … + Q^(terms - 1), whose last term is taken once; PEFT's has Q^3 with three terms too."""
    found, power = identity, q
    if terms > 1:
        found = found + 2 * q
    if terms > 2:
        for _ in range(max(1, terms - 3)):
            power = power @ q
            found = found + 2 * power
        found = found + power @ q
    return found


def oft_plan(bare: Bare, config: OftConfig) -> Plan:
    """A rotation of the inputs at every target."""

    def at(path: str, values: int) -> Planned:
        blocks, size = oft_blocks(bare.seen.by_path[path].columns, config)
        return Planned(lambda: Oft(blocks, size, config), values, _setting(config))

    return {path: at(path, sum(sizes)) for path, sizes in oft_sizes(bare.seen, config).items()}


def _keys(adapter: Grafted[OftConfig]) -> dict[str, Any]:
    config = adapter.config
    paths = [path for path, part in adapter.parts.items() if isinstance(part, Oft)]
    return {
        **peft_keys("OFT"),
        "r": config.r,
        "oft_block_size": 0 if config.r else config.oft_block_size,
        "module_dropout": 0.0,
        "target_modules": names_of(paths, adapter.modules),
        "fan_in_fan_out": False,
        "bias": "none",
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted_or_none(config.modules_to_save),
        "coft": config.coft,
        "eps": config.eps,
        "block_share": config.block_share,
        "use_cayley_neumann": config.use_cayley_neumann,
        "num_cayley_neumann_terms": config.num_cayley_neumann_terms,
    }


OFT = Method(OftConfig, oft_plan, Files("OFT", _keys, oft_options))
