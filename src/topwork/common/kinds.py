"""The kinds of a model's modules, by which a base's structure is told and an adapter's places are chosen."""

from typing import Literal

Kind = Literal["linear", "embedding", "norm", "other"]
"""`other` is whatever is none of these: attention blocks, lists of layers, experts held in one tensor, activations."""
