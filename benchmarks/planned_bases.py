"""A random base of `planned_cases.py`, with SmolLM2's tokenizer beside it: `python -m planned_bases FOLDER NAME`."""

import json
import sys
from pathlib import Path

from planned_cases import SHAPES, TOKENIZER
from random_base import write_weights
from transformers import AutoConfig, AutoTokenizer

from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.plan.built import config_of


def main() -> None:
    folder, values = Path(sys.argv[1]), dict(SHAPES[sys.argv[2]])
    shape, family = values.pop("shape", None), values.pop("model_type", None)
    config = config_of(shape) if shape else AutoConfig.for_model(family)
    source = find_source(ModelConfig(model_name_or_path=TOKENIZER), lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    for name, value in values.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    folder.mkdir(parents=True, exist_ok=True)
    written = write_weights(folder, config, 0)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"made": str(folder.name), "bytes": written}))


if __name__ == "__main__":
    main()
