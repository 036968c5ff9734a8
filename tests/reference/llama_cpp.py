"""What llama.cpp (xllamacpp) makes of a GGUF model, with a GGUF adapter or without: log-probabilities in fp32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor


class Asked:
    """A model on one thread, keys and values in fp32, attention without FlashAttention (which rounds to 16 bits)."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 128, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.cache_ram_mib = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [] if adapter is None else [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)
        self._adapted = adapter is not None

    def log_probabilities(
        self, prompt: Sequence[int], vocabulary: int, letter: int, scale: float = 1.0, top: int | None = None
    ) -> Tensor:
        """Of the token after a prompt of ids [V]; NaN for those that are not among the `top` likeliest.

        letter  the id of an ordinary letter, which is forced as the answer: those that end it, and bytes that are no
                text, would be given back without their probabilities (which are taken before)
        """
        asked: dict[str, Any] = {
            "prompt": list(prompt), "n_predict": 1, "n_probs": top or vocabulary, "temperature": 0,
            "cache_prompt": False, "logit_bias": [[letter, 1e6]],
        }  # fmt: skip
        if self._adapted:
            asked["lora"] = [{"id": 0, "scale": scale}]
        answer = self._server.handle_completions(asked)
        places = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full((vocabulary,), torch.nan)
        for each in places:
            found[each["id"]] = each["logprob"]
        return found
