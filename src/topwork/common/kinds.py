"""The kinds of a model's modules, by which a base's structure is told and an adapter's places are chosen."""

from typing import Literal, NamedTuple

Kind = Literal["linear", "embedding", "norm", "other"]
"""`other` is whatever is none of these: attention blocks, lists of layers, experts held in one tensor, activations."""


class Matrix(NamedTuple):
    """A parameter of a module that is no linear layer, which its rows are multiplied with: a router's weight, or a
    matrix for each of its experts in one tensor.

    experts  how many matrices it holds
    inputs   and `outputs`, of each of them, whichever way round it lies
    """

    name: str
    experts: int
    inputs: int
    outputs: int
