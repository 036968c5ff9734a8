"""llama.cpp itself, where the package xllamacpp is installed: what it makes of a file that was written."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.common.errors import RunError


def is_installed() -> bool:
    """Whether xllamacpp can be asked."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF model in this process, perhaps with a GGUF adapter; keys and values in fp32, one thread."""

    def __init__(self, model: Path, adapter: Path | None = None, context: int = 256) -> None:
        """Raises RunError where llama.cpp does not load the files."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.verbosity = False, -1
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.adapted = adapter is not None
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            files = f"{model.name}" + (f" with {adapter.name}" if adapter is not None else "")
            raise RunError(f"llama.cpp does not load {files}: {error}") from error

    def log_probabilities(self, prompt: Sequence[int] | str, vocabulary: int, scale: float = 1.0) -> Tensor:
        """Of the next token, over the whole vocabulary [V]; -inf for tokens that are left out.

        prompt  token ids as they are, or a text, which llama.cpp tokenizes with the special tokens it spells
        scale   a user's own, of the adapter
        """
        asked: dict[str, Any] = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt), "n_predict": 1, "n_probs": vocabulary,
            "temperature": -1.0, "samplers": [], "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip
        if self.adapted:
            asked["lora"] = [{"id": 0, "scale": scale}]
        answer = self._server.handle_completions(asked)
        if "choices" not in answer:
            raise RunError(f"llama.cpp answers {str(answer)[:300]}")
        found = torch.full((vocabulary,), -torch.inf)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found
