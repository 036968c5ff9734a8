"""The files of a model's processor, which makes numbers of pictures: whoever reads a merged folder needs them too."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from topwork.models.source import Source

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""The last holds the chat template where an older model has none in a file of its own."""
PARTS = ("vision_config", "audio_config")


def keep_processor(source: Source, config: Mapping[str, Any], folder: Path) -> None:
    """Copy them beside a model that was made of `source`, whose config.json says that it reads more than text. A chat
    template that is there already stays the only one."""
    if not any(config.get(part) for part in PARTS):
        return
    names = FILES[:-1] if (folder / "chat_template.jinja").exists() else FILES
    for name in names:
        found = cached_file(
            source.folder, name, revision=source.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is not None:
            shutil.copyfile(found, folder / name)
