"""What a recipe may say about the base model."""

from typing import Literal

from topwork.common.options import Options


class ModelConfig(Options):
    model_name_or_path: str
    """An alias (`smollm2-135m`), a Hub id, a local folder, or a `.gguf` file."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """The type in which the frozen base is held and multiplied; `auto` takes the checkpoint's."""
    revision: str | None = None
    """A branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you ask for it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
