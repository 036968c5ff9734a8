"""`/v1/models`, and vLLM's endpoints to load and unload adapters while the server runs."""

import logging
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from topwork.common.errors import AdapterError, RequestError, UnknownAdapterError, quoted
from topwork.serving.backends.backend import Card
from topwork.serving.errors import ApiError, without_paths
from topwork.serving.openai import LoadAdapter, UnloadAdapter
from topwork.serving.reading import checked, read_json
from topwork.serving.schema import gives, takes
from topwork.serving.service import Service

log = logging.getLogger("topwork.serving")


def models(service: Service) -> APIRouter:
    """What may be asked for, and changing it."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", **gives("application/json"))
    async def list_models(request: Request) -> JSONResponse:
        """The base, its adapters, the routes: those that this key may use."""
        seen = service.cards(service.caller(request))
        return JSONResponse({"object": "list", "data": [_as_json(card) for card in seen.values()]})

    @router.get("/v1/models/{model:path}", **gives("application/json"))
    async def one_model(request: Request, model: str) -> JSONResponse:
        """One of them."""
        seen = service.cards(service.caller(request))
        if model in service.base_names and service.base.id in seen:
            model = service.base.id
        if model not in seen:
            raise service.unknown(model, seen)
        return JSONResponse(_as_json(seen[model]))

    @router.post("/v1/load_lora_adapter", **takes(LoadAdapter, "text/plain"))
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        """Have a name stand for an adapter from a folder on the server."""
        _may_change(service, request)
        asked = checked(LoadAdapter, await read_json(request))
        await _load(service, asked)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", **takes(UnloadAdapter, "text/plain"))
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        """The name is gone at once; answers that it has begun go on to their end."""
        _may_change(service, request)
        asked = checked(UnloadAdapter, await read_json(request))
        loaded = {card.id: card for card in service.backend.cards() if card.parent is not None}
        if asked.lora_name not in loaded:
            raise _not_loaded(service, asked.lora_name)
        await service.backend.unload(asked.lora_name)
        service.kept.unloaded(asked.lora_name)
        log.info("adapter %s unloaded", asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


async def _load(service: Service, asked: LoadAdapter) -> None:
    """As vLLM: 400 for a taken name and an adapter that does not fit, 404 for a folder that is not there."""
    base = service.base
    taken = {base.id, *service.base_names, *service.parts.router.names()}
    if asked.lora_name in taken:
        raise ApiError(400, f"{quoted(asked.lora_name)} is the name of the base or of a route", "lora_name")
    loaded = {card.id for card in service.backend.cards()}
    if asked.lora_name in loaded and not asked.load_inplace:
        told = f"an adapter {quoted(asked.lora_name)} is loaded already; load_inplace: true replaces it"
        raise ApiError(400, told, "lora_name", "already_loaded")
    if asked.base_model_name is not None and asked.base_model_name not in {base.id, *service.base_names}:
        raise ApiError(404, f"the base here is {base.id!r}", "base_model_name", "model_not_found")
    folder = allowed_folder(service.config.adapters_folder, asked.lora_path)
    try:
        card = await service.backend.load(asked.lora_name, folder, asked.load_inplace)
    except UnknownAdapterError as error:
        raise ApiError(404, without_paths(str(error), folder), "lora_path", "adapter_not_found") from error
    except (AdapterError, RequestError) as error:
        raise ApiError(400, without_paths(str(error), folder), "lora_path", "adapter_refused") from error
    service.kept.loaded(card, folder)
    log.info("adapter %s loaded", asked.lora_name)


def allowed_folder(allowed: str | None, path: str) -> Path:
    """The folder of a path that a request gave, below the one that is allowed, wherever links lead. What lies elsewhere
    is refused alike, whether it is there or not."""
    assert allowed is not None
    root = Path(allowed).resolve()
    if "\0" in path:
        raise ApiError(400, "lora_path has a zero byte", "lora_path")
    try:
        folder = (root / path).resolve()
        there = root not in folder.parents or folder.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, links in a ring
        there = False
    if not there:
        told = f"no adapter at {quoted(path)}; give its path from the folder that adapters are loaded from"
        raise ApiError(404, told, "lora_path", "adapter_not_found")
    if root not in folder.parents:
        told = "lora_path leads out of the folder that adapters may be loaded from; give a path below it"
        raise ApiError(403, told, "lora_path", "path_not_allowed")
    return folder


def _may_change(service: Service, request: Request) -> None:
    """Raises ApiError: 401, 403."""
    if not service.caller(request).admin:
        raise ApiError(403, "loading and unloading adapters asks for an admin's key", code="admin_only")
    if service.config.adapters_folder is None:
        told = "this server changes no adapters while it runs; it has to be started with --adapters-folder"
        raise ApiError(403, told, code="not_enabled")


def _not_loaded(service: Service, name: str) -> ApiError:
    if name in {service.base.id, *service.base_names, *service.parts.router.names()}:
        told = f"{quoted(name)} is the name of the base or of a route, and no adapter; these cannot be unloaded"
        return ApiError(404, told, "lora_name", "model_not_found")
    loaded = [card.id for card in service.backend.cards() if card.parent is not None]
    error = service.unknown(name, dict.fromkeys(loaded))
    return ApiError(404, error.message, "lora_name", "model_not_found")


def _as_json(card: Card) -> dict[str, object]:
    return {
        "id": card.id, "object": "model", "created": card.created, "owned_by": "topwork", "root": card.root,
        "parent": card.parent, "max_model_len": card.context_length, "permission": [],
    }  # fmt: skip
