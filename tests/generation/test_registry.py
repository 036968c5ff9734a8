"""Names, versions, and what stands in the base: swapped, unloaded, evicted and brought back, never the wrong one."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

from reference.families import logits, randomise, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError, UnknownAdapterError
from topwork.generation.registry import Registry
from topwork.generation.versions import Absent, Capacity, Change, ChangedAdapterError, NoRoomError, Version
from topwork.models.base import Base
from topwork.ops.batch import batch_of

SMALL = {"r": 1, "target_modules": ["q_proj"]}


def write(folder: Path, seed: int, base: Base | None = None, **config: Any) -> Path:
    """An adapter's folder, whose tensors depend on the seed."""
    base = base or tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**(config or SMALL)), seed)
    randomise(adapters, "a", seed)
    write_adapter(folder, adapters, "a", BaseId(base.name, base.fingerprint))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of equal shapes and different tensors."""
    place = tmp_path_factory.mktemp("adapters")
    return [write(place / str(seed), seed) for seed in range(4)]


@pytest.fixture
def registry() -> Registry:
    return made()


def made(dtype: torch.dtype = torch.float32, **values: Any) -> Registry:
    base = tiny_base(dtype=dtype)
    registry = Registry(base, Adapters(base.module), **{"reserved": ("base",), **values})
    registry.served = base  # type: ignore[attr-defined]
    return registry


def put(registry: Registry, name: str, folder: Path, **how: Any) -> None:
    registry.install(registry.prepare(name, folder), **how)


def admitted(registry: Registry, name: str) -> Version:
    version = registry.admit(name)
    assert isinstance(version, Version)
    return version


def said(registry: Registry, version: Version) -> Tensor:
    """What the base gives with it."""
    return logits(registry.served, batch_of(sequences(), version.adapter))  # type: ignore[attr-defined]


def expected(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of a base that has nothing else, by the ordinary way."""
    base = tiny_base(dtype=dtype)
    load_adapter(Adapters(base.module), "only", read_adapter(folder), BaseId(base.name, base.fingerprint))
    return logits(base, batch_of(sequences(), "only"))


@pytest.mark.parametrize(
    "config", [SMALL, {"r": 4, "use_dora": True}, {"method": "ia3"}, {"method": "prefix", "num_virtual_tokens": 2}]
)
def test_what_is_installed_gives_what_the_adapter_gives(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", 3, **config)
    registry = made(torch.bfloat16)
    put(registry, "owner/some.thing:v2", folder)
    version = admitted(registry, "owner/some.thing:v2")
    assert torch.equal(said(registry, version), expected(folder, torch.bfloat16))
    assert version.name == "owner/some.thing:v2"
    assert "." not in version.adapter
    assert str(folder) not in repr(version)


def test_a_run_is_taken_by_its_folder(folders: list[Path], registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "adapter", 0)
    put(registry, "run", tmp_path / "run")
    assert torch.equal(said(registry, admitted(registry, "run")), expected(folders[0]))


def test_a_swap_repoints_the_name_at_once_and_the_old_version_drains(folders: list[Path], registry: Registry) -> None:
    put(registry, "support", folders[0])
    old = admitted(registry, "support")
    with pytest.raises(AdapterError, match="the name 'support' is taken"):
        put(registry, "support", folders[1])
    put(registry, "support", folders[1], replace=True)
    new = admitted(registry, "support")
    assert new.adapter != old.adapter
    assert torch.equal(said(registry, old), expected(folders[0]))
    assert torch.equal(said(registry, new), expected(folders[1]))
    registry.release(old)
    assert registry.versions() == [new]
    assert list(registry.adapters.configs) == [new.adapter]
    registry.release(new)
    assert registry.versions() == [new]  # its name stands


def test_an_unloaded_name_is_gone_at_once_and_its_weights_at_zero(folders: list[Path], registry: Registry) -> None:
    put(registry, "support", folders[0])
    version = admitted(registry, "support")
    part = weakref.ref(next(iter(registry.adapters.parts(version.adapter).values())))
    registry.unload("support")
    with pytest.raises(UnknownAdapterError) as error:
        registry.admit("support")
    assert isinstance(error.value, LookupError)
    with pytest.raises(UnknownAdapterError):
        registry.unload("support")
    assert torch.equal(said(registry, version), expected(folders[0]))
    registry.release(version)
    gc.collect()
    assert part() is None
    assert not registry.versions()
    assert not registry.contents
    assert not adapted_layers(registry.adapters.model)
    with pytest.raises(RuntimeError, match="more often"):
        registry.release(version)


def test_one_content_is_one_version_whatever_its_names(folders: list[Path], registry: Registry, tmp_path: Path) -> None:
    put(registry, "one", folders[0])
    put(registry, "two", write(tmp_path / "copy", 0))
    assert len(registry.versions()) == 1
    version = admitted(registry, "two")
    put(registry, "one", folders[0], replace=True)  # reloaded unchanged: what was cached of it stays right
    assert admitted(registry, "one") is version
    registry.release(version)
    registry.release(version)
    registry.unload("one")
    assert registry.contents == {version.adapter: version.content}
    registry.unload("two")
    assert not registry.versions()


def test_one_content_comes_back_for_all_its_names(folders: list[Path]) -> None:
    registry = made(capacity=Capacity(resident=1))
    for name, folder in (("one", folders[0]), ("two", folders[0]), ("other", folders[1])):
        put(registry, name, folder)
    registry.restore(registry.prepare_again(registry.admit("one")))  # type: ignore[arg-type]
    assert admitted(registry, "two") is admitted(registry, "one")


def test_content_tells_adapters_apart(folders: list[Path], registry: Registry, tmp_path: Path) -> None:
    contents = {registry.prepare("a", folder).content for folder in folders}
    assert len(contents) == len(folders)
    other = write(tmp_path / "alpha", 0, **SMALL, lora_alpha=7)
    assert registry.prepare("a", other).content not in contents
    assert registry.prepare("other name", folders[0]).content in contents


def test_the_one_asked_for_longest_ago_leaves_and_comes_back(folders: list[Path]) -> None:
    registry = made(capacity=Capacity(resident=2))
    for name, folder in zip("abc", folders):
        put(registry, name, folder)
    assert [version.name for version in registry.versions()] == ["b", "c"]
    registry.release(admitted(registry, "b"))
    absent = registry.admit("a")
    assert isinstance(absent, Absent)
    assert str(absent.place.folder) not in repr(absent)
    registry.restore(registry.prepare_again(absent))
    assert [version.name for version in registry.versions()] == ["b", "a"]  # c it was, not b
    back = admitted(registry, "a")
    assert torch.equal(said(registry, back), expected(folders[0]))
    assert registry.names() == ["a", "b", "c"]
    assert back.adapter not in ("v1", "v2", "v3")  # never used again


def test_what_is_used_or_pinned_stays(folders: list[Path]) -> None:
    registry = made(capacity=Capacity(resident=2))
    put(registry, "pinned", folders[0], pinned=True)
    put(registry, "used", folders[1])
    used = admitted(registry, "used")
    entry = registry.install(registry.prepare("third", folders[2]))  # loaded, but outside
    assert entry.version is None
    absent = registry.admit("third")
    assert isinstance(absent, Absent)
    prepared = registry.prepare_again(absent)
    with pytest.raises(NoRoomError, match="try again later"):
        registry.restore(prepared)
    registry.release(used)
    registry.restore(prepared)
    assert [version.name for version in registry.versions()] == ["pinned", "third"]
    assert torch.equal(said(registry, admitted(registry, "third")), expected(folders[2]))


def test_a_swap_needs_no_room_beside_what_it_replaces(folders: list[Path]) -> None:
    registry = made(capacity=Capacity(resident=2))
    put(registry, "a", folders[0])
    put(registry, "b", folders[1])
    put(registry, "b", folders[2], replace=True)  # a was asked for longer ago, and stays
    assert [version.name for version in registry.versions()] == ["a", "b"]
    a, b = admitted(registry, "a"), admitted(registry, "b")
    put(registry, "b", folders[3], replace=True)  # nobody may leave: the name stands for the new one all the same
    assert isinstance(registry.admit("b"), Absent)
    registry.release(b)
    registry.restore(registry.prepare_again(registry.admit("b")))  # type: ignore[arg-type]
    assert torch.equal(said(registry, admitted(registry, "b")), expected(folders[3]))
    registry.release(a)


def test_bytes_are_a_limit_as_well(folders: list[Path]) -> None:
    size = made().prepare("a", folders[0]).memory_bytes
    registry = made(capacity=Capacity(memory_bytes=2 * size + 1))
    for name, folder in zip("abc", folders):
        put(registry, name, folder)
    assert registry.memory_bytes == 2 * size
    assert [version.name for version in registry.versions()] == ["b", "c"]


def test_memory_is_what_serving_takes(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", 0, r=4, target_modules=["q_proj"])
    in_file = sum(tensor.nbytes for tensor in read_adapter(folder).tensors.values())
    registry = made(torch.bfloat16)
    put(registry, "a", folder)
    assert registry.memory_bytes == in_file / 2
    assert not any(p.requires_grad for p in registry.adapters.model.parameters())


def test_a_folder_that_changed_meanwhile_is_never_taken_for_the_old_one(tmp_path: Path) -> None:
    registry = made(capacity=Capacity(resident=1))
    folder = write(tmp_path / "a", 0)
    put(registry, "a", folder)
    put(registry, "b", write(tmp_path / "b", 1))
    absent = registry.admit("a")
    assert isinstance(absent, Absent)
    write(folder, 2)
    with pytest.raises(ChangedAdapterError, match="'a' is not what it was when it was loaded"):
        registry.prepare_again(absent)
    put(registry, "a", folder, replace=True)
    assert torch.equal(said(registry, admitted(registry, "a")), expected(folder))


def test_what_was_prepared_for_a_name_that_has_gone_is_not_put_in(folders: list[Path]) -> None:
    registry = made(capacity=Capacity(resident=1))
    put(registry, "a", folders[0])
    put(registry, "b", folders[1])
    absent = registry.admit("a")
    assert isinstance(absent, Absent)
    prepared = registry.prepare_again(absent)
    registry.unload("a")
    registry.restore(prepared)
    assert [version.name for version in registry.versions()] == ["b"]
    put(registry, "a", folders[2])  # stands for another by now
    put(registry, "b", folders[3], replace=True)
    registry.restore(prepared)
    with_a = registry.admit("a")
    assert isinstance(with_a, Absent)
    assert with_a.content != prepared.content


def test_changes_are_told_and_contents_follow(folders: list[Path], registry: Registry) -> None:
    told: list[tuple[str, str, bool]] = []

    def hear(change: Change) -> None:
        told.append((change.kind, change.version.adapter, change.version.adapter in registry.adapters.configs))

    registry.on_change(hear)
    put(registry, "a", folders[0])
    put(registry, "a", folders[1], replace=True)
    registry.unload("a")
    assert told == [("grafted", "v1", True), ("grafted", "v2", True), ("removed", "v1", True), ("removed", "v2", True)]


@pytest.mark.parametrize("name", ["", "  ", "base", "a\nb", "\ud800", "a" * 257, "\x7f"])
def test_names_that_cannot_be(name: str, folders: list[Path], registry: Registry) -> None:
    with pytest.raises(AdapterError) as error:
        registry.prepare(name, folders[0])
    str(error.value).encode()


def test_another_bases_adapter_is_refused_without_a_path(tmp_path: Path, folders: list[Path]) -> None:
    theirs = tiny_base(hidden_size=32)
    folder = write(tmp_path / "other", 0, theirs)
    with pytest.raises(AdapterError, match="trained on 'tiny', and this base is 'base'") as error:
        made().prepare("a", folder)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(AdapterError, match="of another shape"):
        made().prepare("a", folder, force=True)
    with pytest.raises(UnknownAdapterError, match="there is no such folder") as gone:
        made().prepare("a", tmp_path / "nowhere")
    assert str(tmp_path) not in str(gone.value)


def test_preparing_goes_on_beside_a_running_base(folders: list[Path], registry: Registry) -> None:
    """On another thread, while names come and go and passes run; nothing that runs is disturbed."""
    put(registry, "stays", folders[0])
    stays, wanted = admitted(registry, "stays"), expected(folders[0])
    prepared: list[Any] = []
    thread = threading.Thread(
        target=lambda: prepared.extend(registry.prepare(f"n{i}", folders[1 + i % 3]) for i in range(12))
    )
    thread.start()
    while thread.is_alive():
        put(registry, "comes", folders[3], replace=True)
        assert torch.equal(said(registry, stays), wanted)
        registry.unload("comes")
    thread.join()
    assert len(prepared) == 12
    for each in prepared:
        registry.install(each)
    assert torch.equal(said(registry, admitted(registry, "n4")), expected(folders[2]))


class Life(RuleBasedStateMachine):
    """Everything that may happen to a registry of two places, beside the plainest account of what it should be."""

    folders: list[Path]
    contents: list[str]
    make: Callable[[], Registry]

    def __init__(self) -> None:
        super().__init__()
        self.registry = self.make()
        self.names: dict[str, str] = {}
        self.running: list[tuple[Version, str]] = []

    @initialize()
    def begin(self) -> None:
        for which, name in enumerate("abcd"):
            self.load(name, which, False, 9)

    @rule(name=st.sampled_from("abcd"), which=st.integers(0, 3), replace=st.booleans(), pinned=st.integers(0, 9))
    def load(self, name: str, which: int, replace: bool, pinned: int) -> None:
        prepared = self.registry.prepare(name, self.folders[which])
        assert prepared.content == self.contents[which]
        if name in self.names and not replace:
            with pytest.raises(AdapterError):
                self.registry.install(prepared)
            return
        self.registry.install(prepared, replace, pinned=pinned == 0)
        self.names[name] = prepared.content

    @rule(name=st.sampled_from("abcd"))
    def unload(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(UnknownAdapterError):
                self.registry.unload(name)
            return
        self.registry.unload(name)
        del self.names[name]

    @rule(name=st.sampled_from("abcd"))
    def ask(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(UnknownAdapterError):
                self.registry.admit(name)
            return
        found = self.registry.admit(name)
        if isinstance(found, Absent):
            try:
                self.registry.restore(self.registry.prepare_again(found))
            except NoRoomError:
                entries = self.registry.entries()
                pinned = {entry.version for entry in entries if entry.pinned and entry.version is not None}
                assert all(version.uses or version in pinned for version in self.registry.versions())
                return
            found = self.registry.admit(name)
        assert isinstance(found, Version)
        self.running.append((found, self.names[name]))

    @rule(at=st.integers(0, 100))
    def end(self, at: int) -> None:
        if self.running:
            version, content = self.running.pop(at % len(self.running))
            assert self.registry.contents[version.adapter] == version.content == content
            self.registry.release(version)

    @invariant()
    def balanced(self) -> None:
        versions = self.registry.versions()
        assert len(versions) <= 2
        assert len({version.content for version in versions}) == len(versions)
        assert {version.adapter for version in versions} == set(self.registry.adapters.configs)
        assert self.registry.contents == {version.adapter: version.content for version in versions}
        assert {entry.name: entry.content for entry in self.registry.entries()} == self.names
        for version in versions:
            assert version.uses == sum(one is version for one, _ in self.running)
            assert version.uses or version.content in self.names.values()
        parts = [part for layer in adapted_layers(self.registry.adapters.model).values() for part in layer.adapters]
        assert sorted(parts) == sorted(2 * list(self.registry.adapters.configs))


def test_any_life(folders: list[Path]) -> None:
    base = tiny_base()
    adapters = Adapters(base.module)

    def make() -> Registry:
        for name in list(adapters.configs):
            adapters.remove(name)
        return Registry(base, adapters, Capacity(resident=2))

    contents = [make().prepare("a", folder).content for folder in folders]
    machine = type("Machine", (Life,), {"folders": folders, "contents": contents, "make": staticmethod(make)})
    how = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=how)
