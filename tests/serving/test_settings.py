"""serve.yaml and what the command line lays over it."""

from pathlib import Path

import pytest

from topwork.common.errors import RequestError
from topwork.serving.settings import load_config, make_config

FILE = """
model: {model_name_or_path: base, dtype: float32}
adapters: {one: one, two: elsewhere}
adapters_folder: shelf
engine: {batch_size: 4}
limits: {grace_seconds: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("base", "one", "shelf"):
        (tmp_path / name).mkdir()
    path = tmp_path / "serve.yaml"
    path.write_text(FILE)
    return path


def test_what_stands_beside_the_file_is_taken_from_there(file: Path) -> None:
    config = load_config(file)
    assert config.model.model_name_or_path == str(file.parent / "base")
    assert config.adapters == {"one": str(file.parent / "one"), "two": "elsewhere"}
    assert config.adapters_folder == str(file.parent / "shelf")
    assert (config.engine.batch_size, config.engine.max_waiting, config.limits.grace_seconds) == (4, 256, 1)


def test_the_command_line_goes_before_the_file_and_single_options_before_both(file: Path) -> None:
    given = {
        "model": {"model_name_or_path": "other"},
        "port": 1,
        "adapters": {"three": "3"},
        "engine": {"batch_size": 5},
    }
    config = load_config(file, ["engine.batch_size=6", "limits.body_bytes=2048"], given)
    assert (config.model.model_name_or_path, config.model.dtype, config.port) == ("other", "float32", 1)
    assert list(config.adapters) == ["one", "two", "three"]
    assert (config.engine.batch_size, config.limits.body_bytes, config.limits.grace_seconds) == (6, 2048, 1)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make_config({"model": "tiny", "state_folder": "~/state", "adapters_folder": "~/shelf"}, "test")
    assert (config.state_folder, config.adapters_folder) == (str(tmp_path / "state"), str(tmp_path / "shelf"))


def test_vllms_list_of_adapters_and_a_model_by_its_name_alone_are_read(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: tiny\nadapters: [{name: a, path: x}, {name: b, path: y}]\n")
    config = load_config(path)
    assert config.model.model_name_or_path == "tiny"
    assert config.adapters == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: tiny\nport: many\n", "'port'"),
        ("model: tiny\nadapter: {a: b}\n", "did you mean 'adapters'"),
        ("model: tiny\nlimits: {body_byte: 5}\n", "did you mean 'body_bytes'"),
        ("model: tiny\nengine: {batch_size: 0}\n", "'engine.batch_size'"),
        ("port: 5\n", "no model"),
        ("model: tiny\nadapters: [{name: a}]\n", "name, path"),
        ("model: tiny\nadapters: {a: x}\nserved_model_name: a\n", "'a' is the name of the base and of an adapter"),
        ("model: tiny\nmodel: other\n", "given twice"),
        ("- model\n", "holds list"),
        ("model: {model_name_or_path: tiny, dtypo: x}\n", "did you mean 'dtype'"),
        ("model: {dtype: float32}\n", "'model.model_name_or_path' is needed"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=told):
        load_config(path)


def test_a_file_that_is_not_there_and_an_option_that_is_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(RequestError, match=r"expected a\.b=value"):
        load_config(None, ["port"], {"model": "tiny"})
    with pytest.raises(RequestError, match="no model"):
        make_config({}, "here")


def test_the_package_has_its_server_and_its_engine() -> None:
    import topwork
    from topwork.generation.engine import Engine
    from topwork.serving.extra import serve

    assert topwork.Engine is Engine
    assert topwork.serve is serve
