"""llama.cpp itself, where its Python build `xllamacpp` is installed: a GGUF file opened on one thread, in fp32.

Keys and values are kept in fp32 and attention is computed without FlashAttention, so that what is left between it and
us is the file.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from topwork.common.errors import RunError

_PATIENCE_SECONDS = 300
"""For one answer of a few tokens."""


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
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib, params.warmup, params.ctx_shift = 0, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0) for adapter in adapters]
        try:
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"llama.cpp does not load {path}: {error}") from error
        self._letter = self._post("tokenize", {"content": "a"})["tokens"][-1]

    def logprobs(self, prompt: Sequence[int], top: int, scale: float | None = None) -> dict[int, float]:
        """Of the `top` likeliest tokens after a prompt of ids, the likeliest first. `scale` is the first adapter's."""
        # the server tells nothing of a token that is half a letter, so it is made to take another after they are read
        found = self._complete(prompt, 1, scale, n_probs=top, logit_bias=[[self._letter, 1e4]])
        likeliest = found["completion_probabilities"][0]["top_logprobs"]
        if any(each["logprob"] is None for each in likeliest):  # JSON has no NaN
            raise RunError("llama.cpp answers NaN; look whether the adapter holds values that are far too large")
        return {int(each["id"]): float(each["logprob"]) for each in likeliest}

    def greedy(self, prompt: Sequence[int], length: int, scale: float | None = None) -> list[int]:
        """The likeliest tokens one after the other, to one that ends the answer or to `length`."""
        found = self._complete(prompt, length, scale, cache_prompt=False)  # a cached beginning moves the last bits
        return [int(number) for number in found["tokens"]]

    def _complete(self, prompt: Sequence[int], length: int, scale: float | None, **options: Any) -> dict[str, Any]:
        lora = [] if scale is None else [{"id": 0, "scale": scale}]
        body = {"prompt": list(prompt), "n_predict": length, "temperature": 0, "return_tokens": True, "lora": lora}
        found: dict[str, Any] = self._post("completion", {**body, **options})
        return found

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's ids, with what the tokenizer adds before and after; `special` tokens that it spells are read."""
        return list(self._post("tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"])

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation by the file's own chat template, with the assistant's turn opened."""
        return str(self._post("apply-template", {"messages": list(messages)})["prompt"])

    def _post(self, endpoint: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{endpoint}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise RunError(f"llama.cpp refuses {endpoint}: {error.read()[:300].decode(errors='replace')}") from error
        except OSError as error:
            raise RunError(f"llama.cpp does not answer {endpoint} ({error})") from error
