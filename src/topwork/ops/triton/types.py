"""What kernels multiply in."""

import torch
import triton.language as tl

from topwork.ops.triton.load import INTERPRETED

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Of a product's operands. The interpreter multiplies the bits of bf16 as whole numbers: it is given fp32."""
    return tl.float32 if INTERPRETED else TYPES[dtype]
