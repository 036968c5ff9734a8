"""Every kernel beside its truth: at an 8B model's sizes, with what it takes, and on all the cases of the tests."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from grouped import Layer, one_by_one
from torch import Tensor

from gpu.card import Card
from gpu.marked import ROOT, all_cases, marked_files, run_marked, try_cases
from gpu.operation import Operation, Sizes
from gpu.operations import operations
from gpu.profile import kernel_names
from gpu.result import Result, main
from reference.measure import apart, relative
from topwork.ops.grouped import Product, grouped_products, grouped_products_reference

TINY = Sizes(5, 32, 48, 2, 1, 16, 64, 4)
TOKENS = (4096, 16384)
STAGES = ("S = n A'", "out += S B'", "G = dy B", "dA, dB", "dn += G A")
GROUPED = [(16384, 1), (16384, 6), (4096, 1)]
"""Tokens and members of the grouped products."""
AFTER = {"operations": 70.0, "grouped products": 35.0, "tests": 10.0}
"""Seconds that have to be left where these begin, for what comes after them."""


def part(result: Result) -> None:
    with result.section("ceilings"):
        result.put("ceilings", ceilings(result.card))
    with result.section("operations"):
        at_size(result)
    with result.section("cases"):
        all_cases(result)
    with result.section("4-bit beside bitsandbytes"):
        beside_bitsandbytes(result)
    with result.section("grouped products"):
        grouped_at_size(result)
    with result.section("tests marked gpu"):
        tests = ROOT / "tests"
        if result.in_time("tests marked gpu", AFTER["tests"]):
            run_marked(result, "tests", marked_files([tests / "ops"] if result.tiny else own_tests()))


def own_tests() -> list[Any]:
    """All folders of tests but the golden rows, which the next part runs."""
    return [folder for folder in sorted((ROOT / "tests").iterdir()) if folder.is_dir() and folder.name != "golden"]


def ceilings(card: Card) -> dict[str, float]:
    """What this card does at its best: a large copy, bytes read and written a second, and a large product in bf16."""
    side, values = (8192, 1 << 30) if card.measured else (64, 1 << 10)
    one, other = (torch.randn(side, side, device=card.device).bfloat16() for _ in range(2))
    out = torch.empty_like(one)
    product = 2 * side**3 / card.seconds([lambda: torch.mm(one, other, out=out)])
    source = torch.randint(0, 255, (values,), dtype=torch.uint8, device=card.device).view(torch.int32)
    target = torch.empty_like(source)
    return {
        "copy_bytes_per_second": 2 * values / card.seconds([lambda: target.copy_(source)]),
        "product_flops_per_second": product,
    }


def at_size(result: Result) -> None:
    """Operations of a layer and of the loss, in bf16 at both sizes of a pass and in fp32 at the smaller."""
    card = result.card
    runs = [(torch.bfloat16, tokens) for tokens in TOKENS] + [(torch.float32, TOKENS[0])]
    for dtype, tokens in runs if card.measured else [(torch.bfloat16, TINY.tokens)]:
        size = Sizes(tokens) if card.measured else TINY
        for operation in operations(size, dtype, card.device):
            name = f"{operation.name}, {size.tokens} tokens, {str(dtype).removeprefix('torch.')}"
            if not result.in_time(name, AFTER["operations"]):
                continue
            with result.section(name):
                tried(result, name, operation)


def tried(result: Result, name: str, operation: Operation) -> None:
    """One operation: how far from its truth, and how fast."""
    card, inputs = result.card, operation.make()
    expected = [tensor.clone() for tensor in operation.truth(*(tensor.clone() for tensor in inputs))]
    kernels = kernel_names(card, partial(operation.ours, *(tensor.clone() for tensor in inputs)))
    found = operation.ours(*inputs)
    far = max(relative(one, other, 1e-30) for one, other in zip(found, expected, strict=True))
    allowed = operation.tolerance * (1 if card.measured else 2)  # the interpreter cuts off where a card rounds
    if not operation.tolerance and not card.measured:
        allowed = 8e-3
    result.check(name, far, allowed)
    del expected, found
    seconds = card.seconds(rotated(card, operation.ours, operation.make, inputs))
    result.add("operations", {
        "name": name, "apart": far, "tolerance": allowed, "microseconds": 1e6 * seconds, "kernels": kernels,
        **rates(result, operation.moved, operation.flops, seconds),
    })  # fmt: skip


def rates(result: Result, moved: float, flops: float, seconds: float) -> dict[str, float]:
    """Of the ceilings, and the share of whichever is nearer: what is left of it is the kernel's own doing."""
    best = result.values.get("ceilings") or {
        "copy_bytes_per_second": float("nan"),
        "product_flops_per_second": float("nan"),
    }
    by_memory, by_products = (
        moved / seconds / best["copy_bytes_per_second"], flops / seconds / best["product_flops_per_second"],
    )  # fmt: skip
    return {
        "bytes_per_second": moved / seconds, "flops_per_second": flops / seconds,
        "of_ceiling": max(by_memory, by_products),
    }  # fmt: skip


def rotated(
    card: Card, call: Callable[..., Any], make: Callable[[], Sequence[Tensor]], first: Sequence[Tensor]
) -> list[Callable[[], Any]]:
    """The same call on so many inputs that none is in the cache any more when its turn comes."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in first)
    sets = min(8, 1 + 3 * card.cache_bytes() // max(1, own)) if card.measured else 1
    return [partial(call, *inputs) for inputs in (first, *(make() for _ in range(sets - 1)))]


def grouped_at_size(result: Result) -> None:
    """The small products of adapters stage by stage, beside cuBLAS, one call for each."""
    size = Sizes(0) if result.card.measured else TINY
    d, f, keys = size.hidden, size.inner, size.key_heads * size.head
    layers = {"q, k, v": (d, (d, keys, keys)), "o": (d, (d,)), "gate, up": (d, (f, f)), "down": (f, (d,))}
    runs = GROUPED if result.card.measured else [(6, 2)]
    for tokens, members in runs:
        for group, (width, outputs) in layers.items() if result.card.measured else list(layers.items())[-1:]:
            name = f"{group}, {members} members, {tokens} tokens"
            if not result.in_time(name, AFTER["grouped products"]):
                continue
            with result.section(name):
                with torch.device(result.card.device):
                    layer = Layer(width, outputs, tokens, members)
                grouped_stages(result, name, layer, tokens, members)


def grouped_stages(result: Result, name: str, layer: Layer, tokens: int, members: int) -> None:
    """Each stage by our kernel and by cuBLAS."""
    card = result.card
    with torch.device(card.device):
        stages = layer.stages([tokens * at // members for at in range(members + 1)])
    for stage, products in zip(STAGES, stages, strict=True):
        far, tolerance = grouped_apart(products)
        result.check(f"{name}, {stage}", far, tolerance * (1 if card.measured else 2))
        seconds = {
            "ours": card.seconds([partial(grouped_products, products)]),
            "cublas": card.seconds([partial(one_by_one, products)]),
        }
        moved = sum(x.numel() * x.element_size() for p in products for x in p[:3])
        flops = sum(2.0 * p.out.numel() * p.left.shape[1] for p in products)
        result.add("grouped", {
            "name": name, "stage": stage, "products": len(products), "apart": far,
            **{f"{side}_microseconds": 1e6 * spent for side, spent in seconds.items()},
            **rates(result, moved, flops, seconds["ours"]),
        })  # fmt: skip


def grouped_apart(products: Sequence[Product]) -> tuple[float, float]:
    """How far a stage's outputs are from the truth, and may be."""
    before = [product.out.clone() for product in products]
    truth = [product._replace(out=out.clone()) for product, out in zip(products, before)]
    grouped_products_reference(truth)
    grouped_products(products)
    far = max(relative(one.out, other.out, 1e-30) for one, other in zip(products, truth))
    for product, out in zip(products, before):
        product.out.copy_(out)
    deep = max(product.left.shape[1] for product in products)
    return far, max(apart(1, deep), 8e-3 if products[0].out.dtype == torch.bfloat16 else 2e-6)


def beside_bitsandbytes(result: Result) -> None:
    """Unpacking a weight of the MLP in NF4 as bitsandbytes does it, where it is installed."""
    try:
        from bitsandbytes import functional
    except Exception as error:  # it raises what its library raises
        result.tell(f"bitsandbytes is not to be had here: {type(error).__name__}")
        return
    size = Sizes(0) if result.card.measured else TINY
    weight = torch.randn(size.inner, size.hidden, device=result.card.device).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    seconds = result.card.seconds([lambda: functional.dequantize_4bit(packed, state)])
    result.put("bitsandbytes_unpacking_microseconds", 1e6 * seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cases"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--cases")
        parser.add_argument("--tiny", action="store_true")
        given = parser.parse_args()
        print(json.dumps(try_cases(given.cases, given.tiny)))
    else:
        main(part)
