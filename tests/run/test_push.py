"""`topwork push`: real requests of huggingface_hub's own client to a stand-in of the Hub."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from run import tiny
from run.fixtures import Said
from run.hub_stand_in import TOKEN, HubStandIn
from topwork.common.errors import RequestError, RunError
from topwork.generation.sampling import Sampling
from topwork.run.chat import answer
from topwork.run.given import given_adapter
from topwork.run.push import push

BASE = "somebody/tiny-llama"
REPO = "ada/tickets"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    server = HubStandIn()
    constants = {
        "ENDPOINT": server.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }  # fmt: skip
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub: HubStandIn, branch: str = "main", repo: str = REPO) -> dict[str, bytes]:
    return hub.repos[repo].newest(branch)[1]


def quiet(_: str) -> None:
    return None


def test_a_run_arrives_whole_in_one_commit(hub: HubStandIn, trained: Path) -> None:
    done = push(trained, REPO, base_name=BASE, log=quiet)
    files = pushed(hub)
    assert set(done["files"]) == set(files) - {".gitattributes"} >= {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json", "topwork.json", "training/provenance.json", "training/recipe.yaml",
        "training/result.json",
    }  # fmt: skip
    assert done["files"] == {name: len(content) for name, content in files.items() if name != ".gitattributes"}
    assert len(hub.repos[REPO].branches["main"]) == 2  # made, and one commit
    assert done["commit"] == f"{hub.address}/{REPO}/commit/{hub.repos[REPO].newest('main')[0]}"
    assert files["adapter_model.safetensors"] == (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert b"ada/tickets" in files["README.md"]


def test_nothing_tells_of_this_machine(trained: Path, tmp_path: Path, tiny_llama: Path) -> None:
    push(trained, REPO, base_name=BASE, dry_run=tmp_path / "out", log=quiet)
    written = tiny.folder_bytes(tmp_path / "out")
    places = [str(trained.parent), str(tiny_llama.parent), str(Path.home()) + "/", TOKEN]
    assert [(name, place) for name, content in written.items() for place in places if place.encode() in content] == []
    assert len(written) > 8


def test_peft_reads_what_was_pushed_and_writes_prompts_as_training_did(
    trained: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    out = tmp_path / "out"
    push(trained, REPO, base_name=BASE, dry_run=out, log=quiet)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits
    ours = PeftModel.from_pretrained(base, out)(ids).logits
    kept = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), trained / "adapter")(ids).logits
    assert torch.equal(ours, kept)
    assert not torch.equal(ours, before)
    assert AutoTokenizer.from_pretrained(out).chat_template == (trained / "chat_template.jinja").read_text("utf-8")


def test_the_cards_code_answers_as_the_run_does(
    trained: Path, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    push(trained, REPO, base_name=BASE, dry_run=out, log=quiet)
    (block,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)
    question = "Order 3: my lamp leaks."
    for written, here in {BASE: tiny_llama, REPO: out, "Your question": question, "=256": "=12"}.items():
        assert written in block
        block = block.replace(written, str(here))
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    said = answer(trained, question, sampling=Sampling(max_new_tokens=12))
    assert capsys.readouterr().out.strip() == said.strip() != ""


def test_a_dry_run_sends_nothing_and_its_folder_pushes_as_the_run_does(
    hub: HubStandIn, trained: Path, tmp_path: Path, topwork: Callable[..., Said]
) -> None:
    out = tmp_path / "out"
    said = topwork("push", trained, REPO, "--base-name", BASE, "--dry-run", out)
    assert (said.code, hub.seen) == (0, [])
    assert "adapter_model.safetensors" in said.out
    assert f"nothing was uploaded; all of it lies in {out}" in said.out
    push(trained, REPO, base_name=BASE, log=quiet)
    push(out, "ada/again", log=quiet)
    assert pushed(hub) == pushed(hub, repo="ada/again")
    assert given_adapter(out).recipe is None, "whoever downloads it has an adapter's folder, and no run's"


def test_a_card_that_somebody_wrote_is_kept(hub: HubStandIn, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    push(trained, REPO, base_name=BASE, dry_run=out, log=quiet)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nhf download OWNER/NAME\n", "utf-8")
    push(out, REPO, log=quiet)
    assert pushed(hub)["README.md"] == b"---\nlicense: mit\n---\n# Mine\n\nhf download ada/tickets\n"
    (out / "README.md").write_text("# Model Card\n\n[More Information Needed]\n", "utf-8")
    push(out, REPO, log=quiet)
    assert b"# tickets" in pushed(hub)["README.md"]
    assert b"OWNER/NAME" not in pushed(hub)["README.md"]
    for front in ("base_model: /home/ada/models/base", "tags: [a", "- a\n- list"):
        (out / "README.md").write_text(f"---\n{front}\n---\n# Mine\n", "utf-8")
        with pytest.raises(RequestError, match=r"README\.md"):
            push(out, REPO, log=quiet)


def test_an_adapter_alone_brings_its_bases_tokenizer_where_that_is_here(
    hub: HubStandIn, trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("its own", "utf-8")
    push(adapter, REPO, base_name=BASE, log=quiet)
    assert {"tokenizer.json", "tokenizer_config.json", "adapter_model.safetensors"} <= set(pushed(hub))
    assert pushed(hub)["chat_template.jinja"] == b"its own"
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": BASE}), "utf-8")
    told: list[str] = []
    push(adapter, "ada/other", log=told.append)
    assert told[0].startswith("without a tokenizer, which is the base's: ")
    assert "tokenizer.json" not in pushed(hub, repo="ada/other")
    assert b'AutoTokenizer.from_pretrained("somebody/tiny-llama")' in pushed(hub, repo="ada/other")["README.md"]


def test_what_an_earlier_push_left_is_removed_and_what_others_put_there_stays(hub: HubStandIn, trained: Path) -> None:
    before = {"adapter_model.bin": b"x", "training/evaluation.json": b"{}", "picture.png": b"p", "LICENSE": b"MIT"}
    hub.put(REPO, {**before, "adapter_config.json": json.dumps({"base_model_name_or_path": BASE}).encode()})
    done = push(trained, REPO, base_name=BASE, log=quiet)
    assert done["removed"] == ["adapter_model.bin", "training/evaluation.json"]
    assert {"picture.png", "LICENSE"} <= set(pushed(hub))
    assert not {"adapter_model.bin", "training/evaluation.json"} & set(pushed(hub))
    again = push(trained, REPO, base_name=BASE, log=quiet)
    assert again["commit"].endswith(hub.repos[REPO].newest("main")[0])
    assert len(hub.repos[REPO].branches["main"]) == 2, "the same again is no new commit"


def test_a_branch_is_made_and_main_stays(hub: HubStandIn, trained: Path) -> None:
    push(trained, REPO, revision="v2", message="second", private=True, base_name=BASE, log=quiet)
    assert "README.md" in pushed(hub, "v2")
    assert "README.md" not in pushed(hub)
    assert hub.repos[REPO].private


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"adapter_config.json": b'{"base_model_name_or_path": "other/base"}'}, "holds an adapter of other/base"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "holds a whole model"),
    ],
)
def test_a_repository_of_something_else_is_refused(
    hub: HubStandIn, trained: Path, there: dict[str, bytes], told: str
) -> None:
    hub.put(REPO, there)
    with pytest.raises(RequestError, match=told):
        push(trained, REPO, base_name=BASE, log=quiet)
    assert len(hub.repos[REPO].branches["main"]) == 1
    push(trained, REPO, base_name=BASE, force=True, log=quiet)
    assert not there.keys() & {"model.safetensors"} & pushed(hub).keys()


def test_private_is_no_promise_that_is_not_kept(hub: HubStandIn, trained: Path) -> None:
    hub.put(REPO, {})
    with pytest.raises(RequestError, match="is public"):
        push(trained, REPO, private=True, base_name=BASE, log=quiet)


@pytest.mark.parametrize("repo", ["tickets", "ada/tick ets", "https://huggingface.co/ada/tickets", "a/b/c", "ada/.."])
def test_a_repository_is_named_by_owner_and_name(trained: Path, repo: str) -> None:
    with pytest.raises(RequestError, match="expected OWNER/NAME"):
        push(trained, repo, base_name=BASE, log=quiet)


@pytest.mark.parametrize(
    ("refuse", "kind", "told"),
    [
        ({"POST /api/repos": (403, "no rights")}, RequestError, "may not write"),
        ({"GET /api/models": (500, "broken")}, RunError, "push again later"),
        ({"POST /api/validate-yaml": (400, "bad tag")}, RunError, "refuses the upload"),
        ({"POST /api/models/ada/tickets/commit": (412, "A commit has happened since")}, RunError, "push again"),
    ],
)
def test_the_hubs_refusals_are_told(
    hub: HubStandIn, trained: Path, refuse: dict[str, tuple[int, str]], kind: type[Exception], told: str
) -> None:
    hub.refuse = refuse
    with pytest.raises(kind, match=told):
        push(trained, REPO, base_name=BASE, log=quiet)
    assert all(len(repo.branches["main"]) == 1 for repo in hub.repos.values())


def test_tokens(hub: HubStandIn, trained: Path, monkeypatch: pytest.MonkeyPatch, topwork: Callable[..., Said]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    said = topwork("push", trained, REPO, "--base-name", BASE)
    assert said.code == 2
    assert "does not accept the token" in said.err
    assert "hf_of_somebody_else" not in said.err + said.out
    monkeypatch.delenv("HF_TOKEN")
    said = topwork("push", trained, REPO, "--base-name", BASE)
    assert said.code == 2
    assert "hf auth login" in said.err


def test_no_network(hub: HubStandIn, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="cannot be reached"):
        push(trained, REPO, base_name=BASE, log=quiet)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((RequestError, RunError), match="HF_HUB_OFFLINE"):
        push(trained, REPO, base_name=BASE, log=quiet)


def test_a_base_that_nobody_else_finds_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"base is tiny-llama, .*--base-name OWNER/NAME"):
        push(trained, REPO, dry_run=tmp_path / "out", log=quiet)
    with pytest.raises(RequestError, match="--base-name here: expected the id"):
        push(trained, REPO, base_name="here", dry_run=tmp_path / "out", log=quiet)


def test_what_is_not_whole_is_refused(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="there is no folder"):
        push(tmp_path / "none", REPO, dry_run=out, log=quiet)
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(RequestError, match="NaN or infinity"):
        push(run, REPO, base_name=BASE, dry_run=out, log=quiet)
    shutil.rmtree(run / "adapter")
    with pytest.raises(RequestError, match="no finished adapter"):
        push(run, REPO, base_name=BASE, dry_run=out, log=quiet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="neither an adapter"):
        push(tmp_path / "empty", REPO, dry_run=out, log=quiet)
    assert not out.exists()


def test_a_key_in_the_rows_stays_here(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    sample = {"prompt": f"my key is {TOKEN}", "reference": "ok", "after": "ok", "correct_after": True}
    scored = {"rows": 1, "grader": "exact_match", "data": "rows.jsonl", "after": {"exact_match": 1.0}}
    (run / "evaluation.json").write_text(json.dumps({**scored, "samples": [sample]}), "utf-8")
    with pytest.raises(RequestError, match=r"README\.md holds what looks like a key \(hf_a…aa\)"):
        push(run, REPO, base_name=BASE, dry_run=tmp_path / "out", log=quiet)
    push(run, REPO, base_name=BASE, samples=0, dry_run=tmp_path / "out", log=quiet)
    assert TOKEN.encode() not in b"".join(tiny.folder_bytes(tmp_path / "out").values())
    assert json.loads((tmp_path / "out" / "training" / "evaluation.json").read_text("utf-8"))["samples"] == []


def test_a_models_own_code_goes_up_and_what_tells_where_it_lay_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    model, out = shutil.copytree(tiny_llama, tmp_path / "merged"), tmp_path / "out"
    for name, more in (
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
        ("tokenizer_config.json", {"special_tokens_map_file": "/home/ada/.cache/special_tokens_map.json"}),
    ):
        values = json.loads((model / name).read_text("utf-8"))
        (model / name).write_text(json.dumps(values | more), "utf-8")
    (model / "modeling_x.py").write_text("from .layers_x import Layer\n", "utf-8")
    for name in ("layers_x.py", "upload_all.py"):
        (model / name).write_text("KEY = 1\n", "utf-8")
    told: list[str] = []
    push(model, REPO, dry_run=out, log=told.append)
    assert told == ["not uploaded: upload_all.py"]
    assert {path.name for path in out.glob("*.py")} == {"modeling_x.py", "layers_x.py"}
    assert "/home/ada" not in (out / "tokenizer_config.json").read_text("utf-8")
    (model / "Modelfile").write_text(f'SYSTEM """use {TOKEN}"""\n', "utf-8")
    with pytest.raises(RequestError, match=r"Modelfile holds what looks like a key"):
        push(model, REPO, dry_run=tmp_path / "other", log=quiet)


def test_prompt_tunings_tokenizer_is_the_bases(trained: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["tokenizer_name_or_path"] = "/home/ada/models/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    push(adapter, REPO, base_name=BASE, dry_run=tmp_path / "out", log=quiet)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["tokenizer_name_or_path"] == BASE


def test_a_model_folder_goes_up_without_what_is_not_the_models(
    hub: HubStandIn, tiny_llama: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "merged")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tiny_llama)}), "utf-8")
    for name in ("optimizer.pt", "notes.txt", ".topwork-new-x"):
        (model / name).write_bytes(b"x")
    told: list[str] = []
    done = push(model, REPO, log=told.append)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(done["files"])
    assert told[0] == "not uploaded: .topwork-new-x, notes.txt, optimizer.pt"
    assert str(tiny_llama).encode() not in pushed(hub)["config.json"]
    push(model, REPO, dry_run=tmp_path / "out", log=quiet)
    (tmp_path / "out" / "README.md").write_text("# Mine\n", "utf-8")
    push(tmp_path / "out", REPO, log=quiet)
    assert pushed(hub)["README.md"] == b"# Mine\n"
    (tmp_path / "out" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(RequestError, match=r"config\.json is truncated"):
        push(tmp_path / "out", REPO, log=quiet)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}', "utf-8")
    with pytest.raises(RequestError, match=r"model-2\.safetensors is missing"):
        push(model, REPO, log=quiet)
