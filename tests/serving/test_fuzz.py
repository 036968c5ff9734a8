"""Requests that schemathesis makes up from the server's own OpenAPI document, and what people send who mean harm: an
answer or a proper error, and the server as it was.

TOPWORK_FUZZ_EXAMPLES=500 makes so many of each kind for each endpoint, other ones each time.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from reference.families import tiny_base
from serving.live import Live, check_balance, check_refusal, live
from serving.scripted import BASE, adapter_folder
from topwork.models.base import Base
from topwork.serving.keys import new_key

schemathesis.openapi.from_dict({"openapi": "3.1.0", "info": {"title": "", "version": ""}, "paths": {}})
"""It loads most of itself only now, and pytest parses what it loads. CPython 3.11 counts the depth of all threads that
parse in one place: beside a server, whose threads parse too, that ends in a SystemError now and then."""
EXAMPLES = int(os.environ.get("TOPWORK_FUZZ_EXAMPLES", "0"))
BODY_BYTES = 200_000
TENSORS = "adapter_model.safetensors"
KEYS = {name: new_key() for name in ("admin", "small")}
TOLD = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection",
)  # fmt: skip
"""Of schemathesis' checks; that all valid data is taken is not one: a name that nobody has is a 404."""


@pytest.fixture(scope="module")
def folder(base: Base, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may be loaded: a sound adapter, and all kinds of others."""
    place = tmp_path_factory.mktemp("allowed")
    adapter_folder(base, place / "sound", 7)
    adapter_folder(tiny_base("llama", hidden_size=64), place / "other_shapes", 1)
    config = (place / "sound" / "adapter_config.json").read_text()
    raw = (place / "sound" / TENSORS).read_bytes()
    sound = load_file(place / "sound" / TENSORS)
    first = next(iter(sound))

    def made(name: str, tensors: bytes | None) -> Path:
        (place / name).mkdir()
        (place / name / "adapter_config.json").write_text(config)
        if tensors is not None:
            (place / name / TENSORS).write_bytes(tensors)
        return place / name

    torch.save(sound, made("pickle", None) / "adapter_model.bin")
    made("pickle_renamed", (place / "pickle" / "adapter_model.bin").read_bytes())
    made("cut", raw[: len(raw) // 2])
    made("endless_header", struct.pack("<Q", 2**63) + raw[8:])
    huge = json.dumps({first: {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}).encode()
    made("larger_than_the_file", struct.pack("<Q", len(huge)) + huge + b"\0" * 64)
    save_file({**sound, first: torch.full_like(sound[first], float("nan"))}, made("nan", None) / TENSORS)
    (made("deep_config", raw) / "adapter_config.json").write_text("[" * 100_000)
    other = json.loads(config) | {"base_model_name_or_path": "somebody/else-7b"}
    (made("other_base", raw) / "adapter_config.json").write_text(json.dumps(other))
    (place / "other_base" / "topwork.json").write_text('{"base_model": "somebody/else-7b", "base_fingerprint": "0"}')
    (place / "link_out").symlink_to(adapters / "one")
    return place


@pytest.fixture(scope="module")
def served(base: Base, adapters: Path, folder: Path) -> Iterator[Live]:
    """Two adapters and a route, open to all; answers of three tokens."""
    with live({
        "model": {"model_name_or_path": base.name, "dtype": "float32", "device": "cpu"}, "served_model_name": BASE,
        "adapters": {name: str(adapters / name) for name in ("one", "two")}, "adapters_folder": str(folder),
        "routes": [{"name": "ab", "arms": [{"name": "a", "model": "one"}, {"name": "b", "model": "two"}]}],
        "limits": {"max_tokens": 3, "default_max_tokens": 3, "body_bytes": BODY_BYTES},
    }) as found:  # fmt: skip
        yield found


@pytest.fixture
def client(served: Live) -> Iterator[httpx.Client]:
    """Of the server; afterwards that answers as before, and nothing runs in it."""
    asking = {"prompt": "Once upon", "max_tokens": 3, "temperature": 0}
    with httpx.Client(base_url=served.address, timeout=60) as found:

        def said() -> list[str]:
            answers = [found.post("/v1/completions", json={"model": name, **asking}) for name in (BASE, "one", "two")]
            return [answer.json()["choices"][0]["text"] for answer in answers]

        before = said()
        yield found
        check_balance(served)
        assert said() == before


NAMES = {"model": [BASE, "one", "two", "ab"], "lora_name": ["x", "y"], "lora_path": ["sound", "cut", ".."]}
"""What is there: names that are made up hit nothing."""


def examples(served: Live, mode: GenerationMode, usual: int) -> None:
    """Asks every endpoint what is made up for it."""
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ in TOLD]
    assert len(checks) == len(TOLD)
    how = settings(
        max_examples=EXAMPLES or usual, derandomize=not EXAMPLES, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    tried = 0
    for found in schemathesis.openapi.from_url(f"{served.address}/openapi.json").get_all_operations():
        operation = found.ok()

        @how
        @given(operation.as_strategy(generation_mode=mode), st.data())
        def ask(case: Any, data: Any) -> None:
            nonlocal tried
            tried += 1
            if mode is GenerationMode.POSITIVE:
                for name in sorted(NAMES.keys() & case.body.keys() if isinstance(case.body, dict) else ()):
                    case.body[name] = data.draw(st.sampled_from(NAMES[name]))
                if "name" in (case.path_parameters or {}) and data.draw(st.booleans()):
                    case.path_parameters["name"] = "ab"
            response = case.call(base_url=served.address, timeout=60)
            case.validate_response(response, checks=checks)
            if response.status_code >= 400:
                sent = response.request
                headers = [(name, value) for name, values in response.headers.items() for value in values]
                name = str((case.path_parameters or {}).get("name", ""))  # what was sent may be told again
                content = response.content.replace(name.encode(), b"name") if name else response.content
                told = httpx.Response(response.status_code, headers=headers, content=content)
                try:
                    check_refusal(told)
                except AssertionError as error:
                    raise AssertionError(f"{sent.method} {sent.url} {sent.body!r}: {error}") from error

        if mode is GenerationMode.POSITIVE or operation.body or operation.query:
            ask()
    assert tried > 5 * usual


@pytest.mark.usefixtures("client")
def test_what_the_document_allows_is_answered_or_refused_properly(served: Live) -> None:
    examples(served, GenerationMode.POSITIVE, 6)


@pytest.mark.usefixtures("client")
def test_what_the_document_does_not_allow_is_refused(served: Live) -> None:
    examples(served, GenerationMode.NEGATIVE, 8)


COMPLETIONS, CHAT, LOAD = "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"
DEEP = '{"type":"array","items":' * 3000 + "{}" + "}" * 3000
FORMAT = '{"model":"one","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
RAW = [
    (CHAT, b'{"a":' * 30_000, 400),
    (CHAT, b"[" * 190_000, 400),
    (CHAT, b'{"model":"one","messages":[{"role":"user","content":' + b"[" * 5000 + b"]" * 5000 + b"}]}", 400),
    (CHAT, b'{"model":"one","messages":[{"role":"user","content":"\\ud800"}]}', 400),
    (CHAT, b'{"model":"one","messages":[{"role":"user","content":"\xff\xfe"}]}', 400),
    (CHAT, b'{"model":"one","messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"messages":1}}', None),
    (CHAT, b'{"model":"one","messages":[{"role":"user","content":"a","tool_calls":"{{ 7*7 }}"}]}', 400),
    (CHAT, f'{FORMAT}"json_schema":{{"name":"a","schema":{DEEP}}}}}}}'.encode(), 400),
    (CHAT, f'{FORMAT}"json_schema":{{"name":"a","schema":{{"$ref":"#"}}}}}}}}'.encode(), 400),
    (CHAT, f'{FORMAT}"json_schema":{{"name":"a","schema":{{"pattern":"(a*)*(b|c"}}}}}}}}'.encode(), 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","temperature":NaN}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","temperature":Infinity}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","temperature":1e999}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","seed":' + b"9" * 5000 + b"}", 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","seed":9223372036854775808}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":"a","max_tokens":99999999999999999999}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":[99999999999999999999]}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":[2147483647]}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":[' + b",".join([b"5"] * 10_000) + b"]}", 400),
    (COMPLETIONS, b'{"model":"one","prompt":"' + b"word " * 10_000 + b'"}', 400),
    (COMPLETIONS, b'{"model":"one","prompt":"' + b"a" * 190_000 + b'"}', None),
    (COMPLETIONS, b'{"model":"one","prompt":"a\\u0000b"}', 200),
    (COMPLETIONS, b'{"model":"one","prompt":"a","stop":["' + b'","'.join([b"x" * 1000] * 16) + b'"]}', 200),
    (COMPLETIONS, b'{"model":"one","prompt":"a","logit_bias":{"-1":1}}', 400),
    (COMPLETIONS, b'{"model":"' + b"x" * 100_000 + b'","prompt":"a"}', 400),
    (COMPLETIONS, b'{"model":"../one","prompt":"a"}', 404),
    (COMPLETIONS, b'{"model":"v1","prompt":"a"}', 404),
    (COMPLETIONS, b'{"model":"One","prompt":"a"}', 404),
    (COMPLETIONS, b'{"model":"one","prompt":"a","model":"nobody"}', 404),
    (COMPLETIONS, b" " * (BODY_BYTES + 1), 413),
]


def test_hostile_bodies(client: httpx.Client, served: Live) -> None:
    for number, (path, sent, status) in enumerate(RAW):
        response = client.post(path, content=sent, headers={"content-type": "application/json"})
        assert status is None or response.status_code == status, (number, response.text[:500])
        if response.status_code != 200:
            assert response.status_code < 500, (number, response.text[:500])
            check_refusal(response)
        check_balance(served)


HARMFUL = {
    "nowhere": 404, "..": 403, "/etc": 403, "sound/../..": 403, "sound\0": 400, "link_out": 403, ".": 403,
    "pickle": 400, "pickle_renamed": 400, "cut": 400, "endless_header": 400, "larger_than_the_file": 400, "nan": 400,
    "deep_config": 400, "other_base": 400, "other_shapes": 400,
}  # fmt: skip


def test_harmful_adapters(client: httpx.Client, served: Live) -> None:
    for path, status in HARMFUL.items():
        error = check_refusal(response := client.post(LOAD, json={"lora_name": "harm", "lora_path": path}))
        assert response.status_code == status, (path, error)
        assert error["param"] == "lora_path", path
        assert "harm" not in served.registry.names()
        check_refusal(client.post(COMPLETIONS, json={"model": "harm", "prompt": "a"}))


def test_keys_open_what_is_their_own(base: Base, adapters: Path, folder: Path) -> None:
    """Nothing of another's adapter is told: it is as if it were not there."""
    tenants = [
        {"name": "admin", "key_sha256": KEYS["admin"][1], "admin": True},
        {"name": "small", "key_sha256": KEYS["small"][1], "models": ["one"]},
    ]
    with (
        live({
            "model": {"model_name_or_path": base.name, "dtype": "float32", "device": "cpu"}, "tenants": tenants,
            "served_model_name": BASE, "adapters": {name: str(adapters / name) for name in ("one", "two")},
            "adapters_folder": str(folder), "limits": {"max_tokens": 2},
        }) as served,
        httpx.Client(base_url=served.address, timeout=60) as client,
    ):  # fmt: skip
        asking: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        wrong = ["", "Bearer", "Bearer sk-wrong", f"Basic {KEYS['small'][0]}", f"Bearer {KEYS['small'][1]}"]
        wrong += [f"Bearer {KEYS['small'][0]}x", f"Bearer {KEYS['small'][0][:-1]}", "Bearer " + "x" * 5000]
        for header in [None, *wrong]:
            headers = {} if header is None else {"authorization": header}
            for method, path in (("GET", "/v1/models"), ("POST", COMPLETIONS), ("POST", LOAD), ("GET", "/metrics")):
                body = {"json": {"model": "one", **asking}} if method == "POST" else {}
                response = client.request(method, path, headers=headers, **body)
                check_refusal(response)
                assert response.status_code == 401
        small = {"authorization": f"Bearer {KEYS['small'][0]}"}
        good = client.post(COMPLETIONS, json={"model": "one", **asking}, headers=small)
        assert good.status_code == 200
        told = [client.post(COMPLETIONS, json={"model": name, **asking}, headers=small) for name in ("two", "too")]
        assert [response.status_code for response in told] == [404, 404]
        messages = [check_refusal(response)["message"] for response in told]
        assert messages[0].replace("two", "too") == messages[1]
        for path, body in (
            (LOAD, {"lora_name": "x", "lora_path": "sound"}),
            ("/v1/unload_lora_adapter", {"lora_name": "one"}),
        ):
            response = client.post(path, json=body, headers=small)
            check_refusal(response)
            assert response.status_code == 403
        check_balance(served)
