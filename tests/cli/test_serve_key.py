"""`topwork serve-key`."""

import json
from collections.abc import Callable

import pytest
import yaml

from run.fixtures import Said
from topwork.serving.config import ServeConfig
from topwork.serving.tenants import Tenants

Command = Callable[..., Said]


def test_the_key_opens_what_its_lines_are_put_into(topwork: Command) -> None:
    said = topwork("serve-key", "ann")
    assert said.code == 0, said.err
    shown, _, lines = said.out.partition("for serve.yaml:")
    key = shown.split()[-1]
    assert key not in lines
    config = ServeConfig.model_validate({"model": {"model_name_or_path": "tiny"}, **yaml.safe_load(lines)})
    assert Tenants(config.tenants).identify({"authorization": f"Bearer {key}"}).name == "ann"


def test_for_programs(topwork: Command) -> None:
    one, other = (json.loads(topwork("serve-key", "ann", "--json").out) for _ in range(2))
    assert one["key"] != other["key"]
    assert set(one) == {"name", "key", "key_sha256"}


@pytest.mark.parametrize("name", ["a b", "", "x" * 65, "../a"])
def test_a_name_that_no_tenant_can_have(topwork: Command, name: str) -> None:
    said = topwork("serve-key", name)
    assert said.code == 2
    assert "cannot be a tenant's name" in said.err
