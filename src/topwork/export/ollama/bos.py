"""Who writes the token that begins a text: a TEMPLATE does, as the chat template did in training, so the GGUF file must
not tell llama.cpp to put another in front."""

from pathlib import Path

from topwork.common.errors import RequestError
from topwork.export.gguf.package import gguf_package

_KEY = "tokenizer.ggml.add_bos_token"
_PRE_ADDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
"""Pre-tokenizers with which llama.cpp adds it where the file does not say."""


def leave_bos_to_template(path: Path) -> bool:
    """Have a GGUF file, which is changed in place, add no BOS of its own. Returns whether it did before. Raises
    RequestError for a file that lacks the key, where llama.cpp would add one."""
    reader = gguf_package().GGUFReader(path, "r+")
    field = reader.get_field(_KEY)
    if field is not None:
        value = field.parts[field.data[0]]
        added = bool(value[0])
        value[0] = False
        reader.data.flush()
        return added
    model, pre = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if (model is not None and model.contents() == "llama") or (pre is not None and pre.contents() in _PRE_ADDS):
        raise RequestError(
            f"{path.name} does not say whether a text begins with the BOS token ({_KEY}), and llama.cpp would add one "
            "to the chat template's own; export from the model's safetensors folder instead"
        )
    return False
