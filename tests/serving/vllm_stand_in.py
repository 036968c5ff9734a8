"""Behaves as `vllm serve` does where `serving/backends/vllm.py` looks at it (vLLM 0.32, read and run), and
answers with a sign of the adapter that it read: `python vllm_stand_in.py MODEL --port … --lora-modules name=path …`.

A prompt says what else it does: "wait" lets a stream stand after its first piece until POST /go, "break" closes the
connection in the middle, "fail" reports an error in the middle, "500" and "400" are refused so. GET /seen tells what it
was asked, and which streams lost their reader.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

REFUSED_KEYS = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
"""vLLM refuses the first and the third; the others no folder of ours is to have."""


class StandIn:
    """Its state."""

    def __init__(self, served: str, max_rank: int, key: str | None, unready: int, updating: bool) -> None:
        self.served, self.max_rank, self.key, self.unready, self.updating = served, max_rank, key, unready, updating
        self.loaded: dict[str, tuple[str, str]] = {}
        self.seen: list[list[Any]] = []
        self.go = asyncio.Event()

    def load(self, name: str, path: str) -> Response | None:
        """None where it was loaded."""
        place = Path(path)
        if name in self.loaded:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (place / "adapter_config.json").is_file():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        config = json.loads((place / "adapter_config.json").read_text())
        if any(config.get(key) for key in REFUSED_KEYS) or config["r"] > self.max_rank:
            return refusal(400, f"Loading lora {name} from {path} failed: it is not supported")
        sign = hashlib.sha256((place / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]
        self.loaded[name] = (sign, path)
        self.seen.append(["load", name, path])
        return None

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health), Route("/v1/models", self.models), Route("/metrics", self.metrics),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/go", self.going, methods=["POST"]), Route("/seen", self.told),
            Route("/forget", self.forget, methods=["POST"]),
        ]  # fmt: skip

    async def health(self, _: Request) -> Response:
        self.unready -= 1
        return Response(status_code=503 if self.unready >= 0 else 200)

    async def models(self, request: Request) -> Response:
        if (wrong := self.wrong_key(request)) is not None:
            return wrong
        cards = [{"id": self.served, "root": self.served, "parent": None, "max_model_len": 77}]
        cards += [{"id": n, "root": path, "parent": self.served} for n, (_, path) in self.loaded.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse("# TYPE vllm:a gauge\nvllm:a 1.0\npython_gc 2\n")

    async def load_adapter(self, request: Request) -> Response:
        if not self.updating:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = await request.json()
        wrong = self.wrong_key(request) or self.load(body["lora_name"], body["lora_path"])
        return wrong or PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        if not self.updating:
            return JSONResponse({"detail": "Not Found"}, 404)
        name = (await request.json())["lora_name"]
        if name not in self.loaded:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        self.seen.append(["unload", name])
        return PlainTextResponse("Success")

    async def answer(self, request: Request) -> Response:
        if (wrong := self.wrong_key(request)) is not None:
            return wrong
        body = await request.json()
        self.seen.append(["ask", body])
        model, prompt = body["model"], body.get("prompt") or body["messages"][-1]["content"]
        if model != self.served and model not in self.loaded:
            return refusal(404, f"The model `{model}` does not exist.", "model")
        if prompt in ("500", "400"):
            told = f"{model} cannot: {self.loaded.get(model)}"
            return refusal(int(prompt), told, "prompt") if prompt == "400" else Response(told, 500)
        sign = self.loaded[model][0] if model in self.loaded else "base"
        if body.get("stream"):
            return StreamingResponse(self.pieces(request, model, prompt, sign), media_type="text/event-stream")
        choice = {"index": 0, "text": sign, "finish_reason": "stop"}
        return JSONResponse({"id": "cmpl-theirs", "model": model, "choices": [choice], "usage": USAGE})

    async def pieces(self, request: Request, model: str, prompt: str, sign: str) -> AsyncIterator[bytes]:
        def chunk(**more: Any) -> bytes:
            return b"data: " + json.dumps({"id": "cmpl-theirs", "model": model, **more}).encode() + b"\n\n"

        try:
            yield chunk(choices=[{"index": 0, "text": sign[:4], "finish_reason": None}])
            if prompt == "wait":
                await self.go.wait()
            if prompt == "break":
                raise ConnectionError
            if prompt == "fail":
                yield b'data: {"error": {"message": "it broke", "type": "x", "param": null, "code": 500}}\n\n'
                yield b"data: [DONE]\n\n"
                return
            yield chunk(choices=[{"index": 0, "text": sign[4:], "finish_reason": "stop"}])
            yield chunk(choices=[], usage=USAGE)
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.seen.append(["gone", model])
            raise

    async def going(self, _: Request) -> Response:
        self.go.set()
        return Response()

    async def forget(self, _: Request) -> Response:
        """As one that was started anew."""
        self.loaded.clear()
        return Response()

    async def told(self, _: Request) -> Response:
        return JSONResponse(self.seen)

    def wrong_key(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def refusal(status: int, message: str, param: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": param, "code": status}}, status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for option in ("--served-model-name", "--host", "--dtype", "--max-loras", "--max-cpu-loras", "--chat-template"):
        parser.add_argument(option)
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--unready", type=int, default=0)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    asked = parser.parse_args()
    assert asked.enable_lora
    if asked.die:
        print("ValueError: the architecture is not supported", flush=True)
        sys.exit(3)
    assert (Path(asked.model) / "config.json").is_file()
    updating = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"
    key = os.environ.get("VLLM_API_KEY")
    stand_in = StandIn(asked.served_model_name, asked.max_lora_rank, key, asked.unready, updating)
    for module in asked.lora_modules:
        name, _, path = module.partition("=")
        assert stand_in.load(name, path) is None, module
    uvicorn.run(Starlette(routes=stand_in.routes()), host=asked.host, port=asked.port, log_level="error")


if __name__ == "__main__":
    main()
