"""What strangers may send: each kind of harm in real bytes, refused by a line that tells what is wrong and no path."""

import json
import os
import re
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from reference.families import randomise, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.foreign import allowed_folder, content_of, read_foreign
from topwork.adapters.foreign_patterns import check_patterns
from topwork.adapters.foreign_tensors import ReadLimits
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.peft_format import BaseId, fitted, read_adapter, write_adapter
from topwork.common.errors import AdapterError, UnknownAdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL = ReadLimits(config_bytes=10_000, header_bytes=20_000, tensor_bytes=100_000, tensors=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter, where no other test looks."""
    place = tmp_path / "secret place" / "adapter"
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=2, target_modules=["q_proj"]))
    randomise(adapters, "a")
    write_adapter(place, adapters, "a", BaseId("owner/base", None))
    return place


def refused(folder: Path, told: str, **how: Any) -> None:
    with pytest.raises(AdapterError, match=told) as error:
        read_foreign(folder, "adapter 'x'", **{"limits": SMALL, **how})
    text = str(error.value)
    assert text.startswith("adapter 'x'")
    assert "secret place" not in text
    assert len(text) < 700
    text.encode()


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder: Path, head: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def changed(folder: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """The file with one entry of its header changed."""
    head, data = header(folder)
    change(head, next(name for name in sorted(head) if name != "__metadata__"))
    write(folder, head, data)


def configured(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_folder_reads_as_ever(folder: Path) -> None:
    found, plain = read_foreign(folder, "a", limits=SMALL), read_adapter(folder)
    assert found.saved.config == plain.config
    assert found.saved.base == plain.base
    assert found.saved.tensors.keys() == plain.tensors.keys()
    for key, tensor in plain.tensors.items():
        assert torch.equal(found.saved.tensors[key], tensor)
    assert re.fullmatch("sha256:[0-9a-f]{64}", found.content)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_type_of_number_is_read_as_the_library_reads_it(dtype: torch.dtype, folder: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)
    found = read_foreign(folder, "a", limits=SMALL).saved.tensors
    for key, tensor in tensors.items():
        assert torch.equal(found[key.removeprefix("base_model.model.")].float(), tensor.float())


def test_mixed_types_at_odd_places(folder: Path) -> None:
    """An F32 that begins at a byte which is no multiple of four."""
    one, two = torch.randn(3).to(torch.float8_e4m3fn), torch.randn(2, 2)
    head = {
        "a.one": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "a.two": {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]},
    }
    write(folder, head, one.view(torch.uint8).numpy().tobytes() + two.numpy().tobytes())
    found = read_foreign(folder, "a", limits=SMALL).saved.tensors
    assert torch.equal(found["a.one"].float(), one.float())
    assert torch.equal(found["a.two"], two)


@pytest.mark.parametrize(
    ("length", "told"),
    [(2**64 - 1, "claims 18,446,744,073,709,551,615 bytes"), (10**6, "claims 1,000,000"), (0, "is not JSON")],
)
def test_the_headers_length_is_not_believed(length: int, told: str, folder: Path) -> None:
    head, data = header(folder)
    write(folder, head, data, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, told)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(
    ("data", "told"), [(b"", "8 bytes too early"), (b"torn", "4 bytes too early"), (b"\2" + bytes(7), "claims 2 bytes")]
)
def test_torn_files(data: bytes, told: str, folder: Path) -> None:
    (folder / TENSORS).write_bytes(data)
    refused(folder, told)


def entry(key: str, value: Any) -> Callable[[dict[str, Any], str], None]:
    return lambda head, name: head[name].update({key: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (entry("data_offsets", [0, 10**15]), "claims the bytes 0 to 1000000000000000 of"),
        (entry("data_offsets", [-8, 0]), "no short lists of whole numbers"),
        (entry("data_offsets", [8, 0]), "claims the bytes 8 to 0"),
        (entry("data_offsets", [0, 4.0]), "no short lists of whole numbers"),
        (entry("data_offsets", [0, True]), "no short lists of whole numbers"),
        (entry("data_offsets", [0]), "no short lists of whole numbers"),
        (entry("data_offsets", "all"), "no short lists of whole numbers"),
        (entry("shape", [2**40, 2**40]), "for which the file has no bytes"),
        (entry("shape", [10**30]), "no short lists of whole numbers"),
        (entry("shape", [0, 2**62]), "for which the file has no bytes"),
        (entry("shape", [1] * 9), "no short lists of whole numbers"),
        (entry("shape", [3]), r"has 512 bytes, and its type and shape \[3\] take 12"),
        (entry("shape", None), "no short lists of whole numbers"),
        (entry("dtype", "F64"), "its type and shape"),
        (entry("dtype", "I64"), "is of type 'I64'; expected F64, F32"),
        (entry("dtype", ["F32"]), "is of type"),
        (entry("more", 1), "has no dtype, shape and data_offsets"),
        (lambda head, name: head.update({name: []}), "has no dtype, shape and data_offsets"),
        (lambda head, name: head.update(other=dict(head[name])), "overlaps the one before it"),
        (lambda head, name: head.pop(name) and None, "leaves a hole before it|belong to no tensor"),
        (lambda head, _: head.clear(), r"has 0 tensors; expected 1 to 40"),
        (lambda head, name: head.update({f"n{i}": head[name] for i in range(50)}), "tensors; expected 1 to 40"),
    ],
)
def test_a_header_that_lies(change: Callable[[dict[str, Any], str], None], told: str, folder: Path) -> None:
    changed(folder, change)
    refused(folder, told)


def test_bytes_behind_the_last_tensor(folder: Path) -> None:
    head, data = header(folder)
    write(folder, head, data + bytes(3))
    refused(folder, "3 bytes at the file's end belong to no tensor")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "has the key 'b' twice"),
        (b'{"a": ' + b"[" * 4000 + b"]" * 4000 + b"}", "nested too deep"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1e999}', "no finite number"),
        (b'{"a": ' + b"9" * 6000 + b"}", "number that is too long"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"", "is not JSON"),
        (b'{"\\ud800": 1, "\\ud800": 1}', "twice"),
    ],
)
@pytest.mark.parametrize("where", [CONFIG, "topwork.json", TENSORS])
def test_json_that_no_reader_should_follow(text: bytes, told: str, where: str, folder: Path) -> None:
    if where == TENSORS:
        write(folder, text, b"")
    else:
        (folder / where).write_bytes(text)
    refused(folder, told)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none(value: float, dtype: torch.dtype, folder: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / TENSORS).items()}
    last = sorted(tensors)[-1]
    tensors[last].view(-1)[-1] = value
    save_file(tensors, folder / TENSORS)
    refused(folder, rf"'{last}' holds values that are not finite")


def test_files_that_are_too_large(folder: Path) -> None:
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(10**12)  # a hole, of no bytes on the disk
    refused(folder, "has 1,000,000,000,000 bytes, and at most 100,000 are read")
    (folder / CONFIG).write_text(json.dumps({"a": "b" * 20_000}))
    refused(folder, "adapter_config.json has more than 10,000 bytes")


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "weights.pth", "a.pkl"])
def test_a_pickle_is_named_and_not_opened(name: str, folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "went off"),)

    (folder / TENSORS).unlink()
    torch.save({"a": Bomb()}, folder / name)
    refused(folder, f"holds its tensors in '{name}', and reading a pickle runs code")
    (folder / name).rename(folder / TENSORS)  # under the other name it is a header of absurd length
    refused(folder, "the header claims")
    assert not (tmp_path / "went off").exists()


def test_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS).unlink()
    refused(folder, f"it has no {TENSORS}")
    (folder / CONFIG).unlink()
    refused(folder, f"it has no {CONFIG}")
    for nowhere in (tmp_path / "secret place" / "nowhere", folder / "topwork.json"):
        with pytest.raises(UnknownAdapterError, match="adapter 'x': there is no such folder"):
            read_foreign(nowhere, "adapter 'x'")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "topwork.json"])
def test_links_lead_where_they_may(name: str, folder: Path, tmp_path: Path) -> None:
    inside, outside = folder.parent / "blob", tmp_path / "outside"
    (folder / name).rename(inside)
    (folder / name).symlink_to(inside)
    read_foreign(folder, "a", [folder.parent], SMALL)  # as the Hub's cache has it
    inside.rename(outside)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    refused(folder, f"{name} is a link that leads out of the folders", within=[folder.parent])
    read_foreign(folder, "a", None, SMALL)  # named by whoever runs this
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, "it has no|cannot be read", within=[folder.parent])


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_or_a_device_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is no ordinary file|{name}: {name} is no ordinary file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, "is no ordinary file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, "is no ordinary file|Is a directory")


@pytest.mark.parametrize(
    "given",
    ["../other", "a/../../other", "/etc", "/", "link", "link/b", "a/../../root/../other", "~", "ring", "x" * 300],
)
def test_paths_lead_nowhere_else(given: str, tmp_path: Path) -> None:
    """And an error tells nothing of what there is elsewhere."""
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "a").mkdir(parents=True)
    (other / "b").mkdir(parents=True)
    (root / "link").symlink_to(other)
    (root / "ring").symlink_to(root / "ring")
    with pytest.raises(AdapterError) as error:
        allowed_folder(given, [root])
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("given", ["", "a\0b", "x/" * 3000, "\ud800"])
def test_what_is_no_path(given: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as error:
        allowed_folder(given, [tmp_path])
    assert len(str(error.value).encode()) < 400


def test_allowed_paths(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "a").mkdir(parents=True)
    (two / "b" / "c").mkdir(parents=True)
    (one / "over").symlink_to(two / "b")
    roots = [one, two]
    assert allowed_folder("a", roots) == one / "a"
    assert allowed_folder("b/c", roots) == two / "b" / "c"
    assert allowed_folder(str(two / "b"), roots) == two / "b"
    assert allowed_folder("over", roots) == two / "b"
    assert allowed_folder("./a/../a", roots) == one / "a"
    with pytest.raises(UnknownAdapterError, match="no folder 'nowhere'"):
        allowed_folder("nowhere", roots)
    with pytest.raises(AdapterError, match="no folder is allowed"):
        allowed_folder("a", [])
    outside = [str(tmp_path), str(tmp_path / "nowhere"), "/root/.ssh"]
    told = set()
    for path in outside:
        with pytest.raises(AdapterError) as error:
            allowed_folder(path, roots)
        assert not isinstance(error.value, UnknownAdapterError)
        told.add(str(error.value).replace(repr(path), ""))
    assert len(told) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9}, {"r": 10**400}, {"r": -1}, {"r": None, "rank_pattern": {"q_proj": 10**12}}, {"r": "2"},
        {"lora_alpha": "inf"}, {"lora_alpha": 10**400}, {"lora_alpha": -1}, {"lora_alpha": [1]},
        {"target_modules": "("}, {"target_modules": {"a": 1}}, {"target_modules": ["nowhere"]}, {"target_modules": []},
        {"alpha_pattern": {"(": 1}}, {"layers_pattern": "(a)", "layers_to_transform": [0]},
        {"trainable_token_indices": list(range(10**5))}, {"trainable_token_indices": {"a": {"b": [1]}}},
        {"trainable_token_indices": [-1]}, {"peft_type": ["LORA"]}, {"peft_type": "x" * 9000}, {"topwork_method": {}},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9}, {"peft_type": "PROMPT_TUNING"},
        {"peft_type": "IA3", "feedforward_modules": "("}, {"target_modules": ["lm_head"]},
        {"bias": "x" * 9000}, {"layer_replication": [[0, 4], [2, 5]]}, {"use_dora": True}, {"use_rslora": "perhaps"},
        {"base_model_name_or_path": {"a": "b"}, "r": 3}, {"topwork_method": "full", "peft_type": None},
    ],
)  # fmt: skip
def test_configs_that_fit_nothing_end_in_one_line(values: dict[str, Any], folder: Path) -> None:
    """Through all of `Registry.prepare`: never anything but AdapterError, and never a long wait or much memory."""
    from topwork.generation.registry import Registry

    configured(folder, **values)
    base = tiny_base()
    registry = Registry(base, Adapters(base.module), reserved=("base",))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if values == {"r": "2"}:  # which pydantic reads as the number it is
        assert registry.prepare("x", folder)
        return
    with pytest.raises(AdapterError) as error:
        registry.prepare("x", folder)
    text = str(error.value)
    assert text.startswith("adapter 'x'")
    assert "secret place" not in text
    assert len(text.encode()) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert time.monotonic() - began < 30
    assert not registry.adapters.configs


def test_patterns_that_would_run_for_ever(folder: Path) -> None:
    paths = list(bare_modules(tiny_base().module))
    check_patterns(
        AdapterConfig(target_modules=r".*\.(q_proj|v_proj)", rank_pattern={r".*\.1\.mlp\.up_proj": 3}), paths
    )
    evil = r"(.*)*(.*)*(.*)*x"
    for values in ({"target_modules": evil}, {"rank_pattern": {evil: 2}}, {"layers_pattern": evil}):
        with pytest.raises(AdapterError, match="take too long to match; name its modules in a list"):
            check_patterns(AdapterConfig(**values), paths, seconds=0.3)
    with pytest.raises(AdapterError, match="names modules 20,000 times"):
        check_patterns(AdapterConfig(target_modules=["a"] * 20_000), paths)


def test_what_was_checked_is_what_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once: another that takes its place meanwhile is not looked at."""
    from topwork.adapters import foreign

    expected = read_foreign(folder, "a", limits=SMALL)
    read = foreign.read_tensors

    def swapped(file: Any, limits: ReadLimits) -> dict[str, Tensor]:
        (folder / "other").write_bytes(b"\xff" * 100)
        (folder / "other").replace(folder / TENSORS)
        return read(file, limits)

    monkeypatch.setattr(foreign, "read_tensors", swapped)
    assert read_foreign(folder, "a", limits=SMALL).content == expected.content


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_is_read_as_the_library_reads_it_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(save({"a.x": torch.ones(2, 3), "a.y": torch.ones(4, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) - 2, len(raw)))]
    (folder / TENSORS).write_bytes(raw)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}')
    try:
        found = read_foreign(folder, "x", limits=SMALL).saved.tensors
    except AdapterError:
        return
    theirs = load_file(folder / TENSORS)  # stricter than ours in nothing
    assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    assert all(torch.equal(found[key].float(), theirs[key].float()) for key in found)


def test_parts_are_made_without_the_model(folder: Path) -> None:
    """What is fitted to a base does not change it."""
    base = tiny_base()
    before = dict(base.module.named_modules())
    adapters = Adapters(base.module)
    fitted(adapters.bare(), read_foreign(folder, "a", limits=SMALL).saved)
    assert dict(base.module.named_modules()) == before
    assert not adapters.configs


def test_the_order_of_names_says_nothing_and_that_of_tokens_does(folder: Path) -> None:
    """PEFT writes target_modules out of a set: one adapter that is saved twice is the same."""
    saved = read_adapter(folder)

    def contents(name: str, values: list[Any]) -> set[str]:
        orders = (values, values[::-1])
        return {content_of(replace(saved, config=saved.config.model_copy(update={name: one}))) for one in orders}

    assert len(contents("target_modules", ["q_proj", "v_proj", "k_proj"])) == 1
    assert len(contents("modules_to_save", ["norm", "lm_head"])) == 1
    assert len(contents("trainable_token_indices", [3, 7])) == 2
