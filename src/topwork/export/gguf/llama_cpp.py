"""llama.cpp itself, where its Python build `xllamacpp` is installed: a GGUF file opened on one thread, in fp32.

Keys and values are kept in fp32 and attention is computed without FlashAttention, so that what is left between it and
us is the file.
"""

import json
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from topwork.common.errors import RunError


def is_installed() -> bool:
    """Whether `xllamacpp` is there; nothing is imported."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A model, and adapters of it that are off until asked for. Raises RunError where llama.cpp refuses the file."""

    def __init__(self, path: Path, context: int = 512, adapters: Sequence[Path] = ()) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.n_gpu_layers, params.verbosity = 1, context, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.cache_ram_mib, params.warmup, params.ctx_shift = 0, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0) for adapter in adapters]
        try:
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"llama.cpp does not load {path}: {error}") from error

    def places(
        self, prompt: Sequence[int], length: int, top: int, scale: float | None = None
    ) -> list[dict[int, float]]:
        """Greedy: of each place of an answer of at most `length` tokens, the `top` likeliest tokens' log-probabilities,
        the likeliest (which is taken) first. A token that ends the answer is the last. `scale` is the first adapter's.
        """
        answer: Any = self._server.handle_completions({
            "prompt": list(prompt), "max_tokens": length, "temperature": 0, "logprobs": top, "cache_prompt": True,
            "lora": [] if scale is None else [{"id": 0, "scale": scale}],
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            raise RunError(f"llama.cpp answers nothing: {str(answer)[:300]}")
        content = (answer["choices"][0]["logprobs"] or {}).get("content") or []
        return [{int(each["id"]): float(each["logprob"]) for each in place["top_logprobs"]} for place in content]

    def greedy(self, prompt: Sequence[int], length: int) -> list[int]:
        """The likeliest tokens one after the other, to one that ends the answer or to `length`."""
        return [next(iter(place)) for place in self.places(prompt, length, 1)]

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's ids, with what the tokenizer adds before and after; `special` tokens that it spells are read."""
        return list(self._post("tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"])

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation by the file's own chat template, with the assistant's turn opened."""
        return str(self._post("apply-template", {"messages": list(messages)})["prompt"])

    def _post(self, endpoint: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{endpoint}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.loads(response.read())
