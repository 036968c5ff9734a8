"""The file of cards: every value with its source and date, names as people write them, and files of users' own."""

from pathlib import Path

import pytest

from topwork.common.errors import RequestError
from topwork.plan.devices import Device, Quoted, find_device, read_devices, shipped_devices

ASKED = (
    "T4", "RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "L4", "A10G", "A100 40GB", "A100 80GB", "H100", "H200",
    "B200",
)  # fmt: skip

OWN = """
sources:
  mine: {source: my own bill, date: 2026-11-01}
devices:
  RTX 4090:
    memory_mib: {value: 24564, from: mine}
    tflops: {value: 165, from: mine}
    bandwidth_gb: {value: 1008, from: mine}
    utilization: {value: 0.5, from: mine}
    price_per_hour: {value: 0.11, from: mine, where: my cellar}
  Cellar 9000:
    aliases: [the big one]
    memory_mib: {value: 1000, from: mine}
    tflops: {value: 1, from: mine}
    bandwidth_gb: {value: 1, from: mine}
    utilization: {value: 1, from: mine}
"""


def quoted(device: Device) -> list[Quoted]:
    price = [] if device.price is None else [device.price]
    return [device.memory, device.flops, device.bandwidth, device.utilization, *price]


def test_every_card_that_people_ask_for_is_there_with_a_source_and_a_date_for_every_value() -> None:
    assert list(shipped_devices()) == list(ASKED)
    for device in shipped_devices().values():
        for value in quoted(device):
            assert value.value > 0
            assert len(value.source) > 10
            assert value.date.year >= 2026
        assert device.price_per_hour is not None
        assert device.where


def test_values_are_in_bytes_and_operations() -> None:
    card = find_device("RTX 4090")
    assert card.memory_bytes == 24564 * 2**20
    assert card.flops_per_second == 165e12
    assert card.bytes_per_second == 1008e9
    assert find_device("T4").dtype == "float16"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("Tesla T4", "T4"),
        ("a100-80gb", "A100 80GB"), ("A100 40 GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L4", "L4"), (" h200 ", "H200"), ("b200", "B200"),
    ],
)  # fmt: skip
def test_a_card_is_found_by_what_people_and_drivers_call_it(name: str, meant: str) -> None:
    assert find_device(name).name == meant


def test_a_name_that_two_cards_have_is_refused_with_both() -> None:
    with pytest.raises(RequestError, match="may be A100 40GB or A100 80GB"):
        find_device("A100")


@pytest.mark.parametrize("name", ["RTX 4080", "GTX 4090 Ti", "RTX 4090 Laptop", "H1000", "", "  ", "nvidia"])
def test_an_unknown_card_is_refused_with_those_that_are_there(name: str) -> None:
    with pytest.raises(RequestError, match=r"there is no device .*there are T4, .*--devices FILE"):
        find_device(name)


def test_the_nearest_card_is_named() -> None:
    with pytest.raises(RequestError, match="did you mean 'H100'"):
        find_device("H1000")


def test_a_users_cards_go_before_the_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN, "utf-8")
    devices = read_devices(path)
    assert find_device("4090", devices).price_per_hour == 0.11
    assert find_device("the BIG one", devices).price_per_hour is None
    assert find_device("h100", devices) == find_device("h100")
    assert len(devices) == len(ASKED) + 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("value: 0.11", "value: -0.11", r"devices\.RTX 4090\.price_per_hour\.value is -0\.11; expected greater than 0|"
         r"devices\.RTX 4090\.price_per_hour\.value is -0\.11"),
        ("value: 0.11", "value: 0", r"devices\.RTX 4090\.price_per_hour\.value is 0"),
        ("value: 24564", "value: 0", r"devices\.RTX 4090\.memory_mib\.value is 0"),
        ("value: 24564", "value: .inf", r"devices\.RTX 4090\.memory_mib\.value is inf"),
        ("value: 24564", "value: .nan", r"devices\.RTX 4090\.memory_mib\.value is nan"),
        ("value: 24564", "value: '24564'", r"devices\.RTX 4090\.memory_mib\.value is '24564'"),
        ("value: 24564", "value: true", r"devices\.RTX 4090\.memory_mib\.value is True"),
        ("value: 165", "value: 1.0e+300", r"devices\.RTX 4090\.tflops is 1e\+300"),
        ("value: 0.5", "value: 1.5", r"devices\.RTX 4090\.utilization\.value is 1\.5"),
        ("{value: 24564, from: mine}", "24564", r"devices\.RTX 4090\.memory_mib is 24564; expected keys"),
        ("Cellar 9000:", "9000:", r"devices\.9000 is a number and no name; put it in quotes"),
        ("memory_mib: {value: 24564, from: mine}", "", r"devices\.RTX 4090\.memory_mib is missing"),
        ("memory_mib: {value: 24564", "memory: {value: 24564", r"devices\.RTX 4090\.memory(_mib)? is"),
        ("from: mine, where", "from: yours, where", r"price_per_hour\.from is 'yours'.*did you mean 'mine'|is 'yours'"),
        ("aliases: [the big one]", "aliases: [geforce 4090]", r"both go by"),
        ("date: 2026-11-01", "date: never", r"sources\.mine\.date is 'never'"),
        ("sources:", "source:", r"sources is missing|source is no key"),
        ("Cellar 9000:", "RTX 4090:", r"given twice"),
        ("sources:", "- sources:", r"holds no mapping|is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_entry_and_the_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    assert old in OWN
    path.write_text(OWN.replace(old, new, 1), "utf-8")
    with pytest.raises(RequestError, match=told):
        read_devices(path)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"devices: {}", b"[]", b"just text"])
def test_what_is_no_file_of_devices_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"mine\.yaml"):
        read_devices(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.yaml could not be read"):
        read_devices(tmp_path / "none.yaml")


def test_a_folder_is_refused_without_its_own_name_as_a_likely_one(tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").mkdir()
    (tmp_path / "card.yaml").touch()
    with pytest.raises(RequestError, match=r"a file is expected; its form") as told:
        read_devices(tmp_path / "cards.yaml")
    assert "did you mean" not in str(told.value)
