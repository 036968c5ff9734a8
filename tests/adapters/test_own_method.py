"""A method that a user brings along (`toy.py`, a row of `sheet.py`) needs nothing in src: its record is given."""

import json
from pathlib import Path

import pytest
import torch

from adapters.toy import WITH_TOY, Toy, ToyConfig
from reference.families import learning_batch, logits, sequences, tiny_base
from reference.measure import relative
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge
from topwork.ops.batch import batch_of

CONFIG = ToyConfig(target_modules=["q_proj", "down_proj"], strength=2.0)


def test_from_options_to_a_merged_model(tmp_path: Path) -> None:
    base = tiny_base()
    adapters = Adapters(base.module, methods=WITH_TOY)
    assert len(adapters.add("mine", CONFIG)) == 4
    assert all(isinstance(part, Toy) and part.strength == 2 for part in adapters.parts("mine").values())
    before = logits(base, batch_of(sequences(), "mine"))
    optimizer = torch.optim.Adam(adapters.parameters("mine").values(), lr=0.05)
    batch, losses = learning_batch(sequences(), "mine"), []
    for _ in range(5):
        weights = batch.labels.loss_weights
        loss = -(weights * base.log_probabilities(batch, -weights)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    trained = logits(base, batch_of(sequences(), "mine"))
    assert relative(trained, before) > 1e-3

    write_adapter(tmp_path, adapters, "mine", BaseId(base.name, base.fingerprint))
    told = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (told["topwork_method"], told["strength"], told["target_modules"]) == ("toy", 2.0, ["q_proj", "down_proj"])
    other = tiny_base()
    others = Adapters(other.module, methods=WITH_TOY)
    saved = read_adapter(tmp_path, WITH_TOY)
    assert saved.config == CONFIG
    load_adapter(others, "theirs", saved, BaseId(other.name, other.fingerprint))
    assert torch.equal(logits(other, batch_of(sequences(), "theirs")), trained)

    merge(other, others, "theirs")
    assert relative(logits(other, batch_of(sequences())), trained) < 1e-5


def test_without_its_record_it_is_refused_and_told_how_to_give_it(tmp_path: Path) -> None:
    base = tiny_base()
    with pytest.raises(AdapterError, match=r"method toy is not known here; lora, .*methods=METHODS \| \{'toy': …\}"):
        Adapters(base.module).add("mine", CONFIG)
    adapters = Adapters(base.module, methods=WITH_TOY)
    adapters.add("mine", CONFIG)
    write_adapter(tmp_path, adapters, "mine", BaseId("base"))
    with pytest.raises(AdapterError, match="holds an adapter of method 'toy'"):
        read_adapter(tmp_path)


def test_other_methods_options_are_refused_with_its_own() -> None:
    assert ToyConfig.model_validate({"method": "toy", "r": 16, "lora_dropout": 0.0}) == ToyConfig()
    with pytest.raises(ValueError, match=r"r says nothing to method toy, which knows .*strength, target_modules"):
        ToyConfig.model_validate({"r": 4})
