"""A base that reads pictures too, small enough to be trained in a second, with a tokenizer and a processor's files."""

from pathlib import Path
from typing import Any

from data.family_tokenizers import build_tokenizer
from reference.families import tiny_model
from run.tiny import CONTEXT

PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
}


def write_model(folder: Path, kind: str = "gemma3", **values: Any) -> Path:
    """A random fp32 model as a Hugging Face folder."""
    tokenizer = build_tokenizer("smollm2", None)
    model = tiny_model(
        kind, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **values,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in PROCESSOR.items():
        (folder / name).write_text(text, "utf-8")
    return folder
