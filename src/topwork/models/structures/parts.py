"""The words that layouts are written in: a tree of named modules, in the order in which transformers registers them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from topwork.common.kinds import Kind, Matrix
from topwork.models.structure import Module
from topwork.models.structures.values import Values


@dataclass(frozen=True)
class Node:
    """A module and what is inside; fields as `Module` has them. `whole` says that it is given more than a row, `layers`
    how many layers that can be checkpointed are in it as a list."""

    kind: Kind = "other"
    rows: int = 0
    columns: int = 0
    bias: bool = False
    tensors: tuple[int, ...] = ()
    attends: bool = False
    whole: bool = False
    layers: int = 0
    matrices: tuple[Matrix, ...] = ()
    inside: Mapping[str, "Node"] = field(default_factory=dict)


NOTHING = Node()
"""An activation, a dropout, rotary positions: no parameters."""


def block(own: tuple[int, ...] = (), /, **inside: Node) -> Node:
    """A module that holds others, and may have parameters of its own."""
    return Node(tensors=own, inside=inside)


def listed(nodes: Sequence[Node]) -> Node:
    """A list of layers."""
    return Node(layers=len(nodes), inside={str(number): node for number, node in enumerate(nodes)})


def linear(outputs: int, inputs: int, bias: bool = False) -> Node:
    """A linear layer, either way round."""
    return Node("linear", outputs, inputs, bias, (outputs * inputs, outputs) if bias else (outputs * inputs,))


def embedding(entries: int, width: int, whole: bool = False) -> Node:
    """A table of vectors."""
    return Node("embedding", entries, width, tensors=(entries * width,), whole=whole)


def norm(width: int, bias: bool = False, weight: bool = True) -> Node:
    """An RMS norm, or with a bias a layer norm; without a weight, a norm that learns nothing."""
    return Node("norm", bias=bias and weight, tensors=((width, width) if bias else (width,)) if weight else ())


def attention(own: tuple[int, ...] = (), /, **inside: Node) -> Node:
    """An attention's projections and norms."""
    return Node(tensors=own, attends=True, inside=inside)


def norms(width: int, *names: str) -> dict[str, Node]:
    """RMS norms of one width, by name."""
    return {name: norm(width) for name in names}


def projections(c: Values, qkv_bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> dict[str, Node]:
    """Queries, keys, values, and the way back."""
    width, narrow = c.heads * c.head_dim, c.key_value_heads * c.head_dim
    return {
        "q_proj": linear(width, c.hidden, qkv_bias),
        "k_proj": linear(narrow, c.hidden, qkv_bias),
        "v_proj": linear(narrow, c.hidden, qkv_bias),
        out: linear(c.hidden, width, out_bias),
    }


def gated(c: Values, inner: int | None = None, bias: bool = False) -> Node:
    """Gate, up and down."""
    inner = inner or c.inner
    return block(
        gate_proj=linear(inner, c.hidden, bias),
        up_proj=linear(inner, c.hidden, bias),
        down_proj=linear(c.hidden, inner, bias),
        act_fn=NOTHING,
    )


def fused_gated(c: Values) -> Node:
    """The same with gate and up in one layer."""
    return block(gate_up_proj=linear(2 * c.inner, c.hidden), down_proj=linear(c.hidden, c.inner), activation_fn=NOTHING)


def experts(c: Values, number: int, inner: int) -> Node:
    """All experts' layers in two tensors."""
    return replace(
        block((number * 2 * inner * c.hidden, number * c.hidden * inner), act_fn=NOTHING),
        matrices=expert_matrices(c, number, inner),
    )


def expert_matrices(c: Values, number: int, inner: int) -> tuple[Matrix, ...]:
    """What of all experts rows are multiplied with: gate and up together, and down."""
    return Matrix("gate_up_proj", number, c.hidden, 2 * inner), Matrix("down_proj", number, inner, c.hidden)


def router(number: int, width: int, bias: bool = False) -> Node:
    """What chooses a token's experts."""
    tensors = (number * width, number) if bias else (number * width,)
    return Node(tensors=tensors, matrices=(Matrix("weight", 1, width, number),))


def modules_of(root: Node, tied: str | None) -> tuple[Module, ...]:
    """Flat, as `named_modules` gives them; `tied` is the path of a head whose weight is the embedding's."""

    def visit(path: str, node: Node) -> Iterator[Module]:
        weights = node.tensors[1:] if path == tied else node.tensors
        if path:
            yield Module(
                path, node.kind, node.rows, node.columns, sum(weights), node.bias, node.tensors, _attends(node),
                bool(node.tensors) and not node.inside and not node.whole, node.matrices,
            )  # fmt: skip
        for name, inner in node.inside.items():
            yield from visit(f"{path}.{name}" if path else name, inner)

    return tuple(visit("", root))


def layers_in(node: Node) -> int:
    """How many layers can be checkpointed."""
    return node.layers + sum(map(layers_in, node.inside.values()))


def _attends(node: Node) -> bool:
    return node.attends or any(map(_attends, node.inside.values()))
