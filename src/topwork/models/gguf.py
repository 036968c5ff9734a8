"""`.gguf` files as bases: converted once to an ordinary Hugging Face folder, then read from there.

transformers can read GGUF itself, slowly and with traps; each is met here, where the file is read, so that no other
part has to know that a base ever was a GGUF file:

- the model comes out quantized, neither trainable nor saveable, unless it is dequantized by name
- vocabularies whose digits stand alone (SmolLM2, StarCoder, Command R) come out with GPT-2's rule, which joins them
- `model_max_length` is 1e30 although the file states the context
- the file's title lands in the config as `_model_name_or_path`
- scaled rotary frequencies are dropped, and weights that the file lacks are random ones, both silently
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from topwork.common.cache import make_cache
from topwork.common.errors import ModelError, RunError
from topwork.common.files import usual_modes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when a conversion would come out differently."""

SPLIT_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Values of `tokenizer.ggml.pre` for which llama.cpp cuts every digit off before it applies GPT-2's rule."""

GPT2_RULE = {"", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "roberta-bpe", "gigachat"}
"""Values for which GPT-2's rule alone is right: transformers' fallback needs no correction."""

SAMPLES = 4096
SAMPLE_BYTES = 4096
Log = Callable[[str], None]


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, as far as it is needed here."""

    architecture: str
    context_length: int
    pre_tokenizer: str
    value_count: int
    rotary_factors: tuple[float, ...]
    """By what Llama 3 divides each rotary frequency; empty where the file has no such tensor."""


def convert_gguf(path: Path, cache: Path, log: Log) -> Path:
    """The Hugging Face folder (bf16 safetensors, tokenizer, chat template) of a `.gguf` file, made at the first call.

    It is written aside and renamed, so a killed conversion leaves nothing that looks whole; a lock keeps two processes
    from converting the same file. Raises ModelError for what is no readable model, RunError where the disk is too full.
    """
    _check_magic(path)
    folder = _folder(path, cache)
    if _is_whole(folder):
        return folder
    make_cache(folder.parent)
    with FileLock(f"{folder}.lock"):
        if _is_whole(folder):
            return folder
        partial = folder.with_name(f"{folder.name}.partial")
        for leftover in (folder, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            _convert(path, partial, log)
            usual_modes(partial)  # other users may share the cache
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def converted_folder(path: Path, cache: Path) -> Path | None:
    """What an earlier `convert_gguf` made of a file; None where it has not been converted, or cannot be read."""
    try:
        folder = _folder(path, cache)
    except OSError:
        return None
    return folder if _is_whole(folder) else None


def _folder(path: Path, cache: Path) -> Path:
    return cache / "gguf" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', path.stem)}-{cache_key(path)}"


def convert_into(path: Path, folder: Path, log: Log) -> None:
    """The same into an empty folder of the caller's, who sees to it that it appears whole. Raises as `convert_gguf`."""
    _check_magic(path)
    _convert(path, folder, log)


def cache_key(path: Path) -> str:
    """16 hex digits over the size and 4,096 evenly spaced pages, head and tail included.

    Two fine-tunes of one base share head and often tail; the pages between tell them apart without reading it all.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"topwork-gguf-{CONVERTER_VERSION}-{size}".encode())
    with path.open("rb") as file:
        last = max(0, size - SAMPLE_BYTES)
        for start in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file: it begins with {start!r}, expected b'GGUF'. The download may be an error page "
            "or a Git LFS pointer; fetch the file again"
        )


def read_header(path: Path) -> Header:
    """Read a GGUF file's own description; ModelError for a damaged file or one that is no complete language model."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading {path.name} needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; "
            "install with: pip install gguf accelerate"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is cut short or damaged ({error}); fetch the file again") from error

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    architecture = value("general.architecture", "")
    kind = value("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path} holds a GGUF {kind!r}, expected a whole language model; give the base model's file")
    if value("split.count", 1) > 1:
        raise ModelError(f"{path} is one of {value('split.count', 1)} parts; join them with: llama-gguf-split --merge")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    scaling = {"rope_factors_long.weight", "rope_factors_short.weight"} & set(tensors)
    scaling |= {value(f"{architecture}.rope.scaling.type", "none")} - {"none"}
    if scaling:
        raise ModelError(_scaled_rotary(path, ", ".join(sorted(scaling))))
    return Header(
        architecture=architecture,
        context_length=int(value(f"{architecture}.context_length", 0)),
        pre_tokenizer=value("tokenizer.ggml.pre", ""),
        value_count=sum(int(tensor.n_elements) for tensor in reader.tensors),
        rotary_factors=tuple(tensors["rope_freqs.weight"].data.tolist()) if "rope_freqs.weight" in tensors else (),
    )


def _scaled_rotary(path: Path, how: str) -> str:
    return (
        f"{path} scales its rotary frequencies ({how}), which transformers drops when it reads GGUF: the model would "
        "be another one. Give the model's Hub id or its safetensors folder instead"
    )


def _convert(path: Path, partial: Path, log: Log) -> None:
    header = read_header(path)
    needed_gib = (2 * header.value_count + 64 * 2**20) / 2**30
    free_gib = shutil.disk_usage(partial).free / 2**30
    if free_gib < needed_gib:
        raise RunError(
            f"converting {path.name} needs {needed_gib:.1f} GiB in {partial.parent}, {free_gib:.1f} GiB are free; "
            "make room, or set TOPWORK_CACHE to a folder on a larger disk"
        )
    log(f"converting {path.name} to bf16 safetensors (kept in {partial.parent})")
    with _alone(path, partial) as place, _quiet_transformers():
        tokenizer = _load_tokenizer(place, header, log)
        model = _load_model(place, path)
        _restore_llama3_rotary(model.config, header.rotary_factors, path)
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
    _tidy_json(partial / "config.json", drop=("_model_name_or_path",))
    _tidy_json(partial / "tokenizer_config.json", drop=("is_local", "local_files_only", "name_or_path"))
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


@contextmanager
def _alone(path: Path, partial: Path) -> Iterator[Path]:
    """The file where no neighbour (a chat_template.jinja, a tokenizer_config.json) can speak for it."""
    link = partial / "gguf" / "model.gguf"
    link.parent.mkdir()
    try:
        link.symlink_to(path.resolve())
    except OSError:  # Windows without the privilege: the neighbours are the lesser evil
        link = path
    try:
        yield link
    finally:
        shutil.rmtree(partial / "gguf")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings inside the block; afterwards as before. Errors get through."""
    from transformers.utils import logging

    from topwork.models.quiet import without_bars

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars(), redirect_stderr(StringIO()):  # its GGUF reader draws a bar that heeds no setting
            yield
    finally:
        logging.set_verbosity(verbosity)


def _load_tokenizer(place: Path, header: Header, log: Log) -> "PreTrainedTokenizerBase":
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with _reading(header.architecture, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
    backend = tokenizer.backend_tokenizer
    if header.pre_tokenizer in SPLIT_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif header.pre_tokenizer not in GPT2_RULE and _has_gpt2_rule(backend):
        log(
            f"warning: transformers does not know this file's pre-tokenizer {header.pre_tokenizer!r} and reads it as "
            "GPT-2's; some texts may be cut into other tokens than the model has learned"
        )
    if header.context_length:
        tokenizer.model_max_length = header.context_length
    return tokenizer


def _has_gpt2_rule(backend: Any) -> bool:
    pre_tokenizer = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)


def _load_model(place: Path, path: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with _reading(path.name, "weights"):
        read: Any = AutoModelForCausalLM.from_pretrained(
            place.parent,
            gguf_file=place.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    model, loaded = read
    wrong = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{path} gives no weights for {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''} "
            f"({len(wrong)} in all), expected a whole model; use the model's Hub id or safetensors folder"
        )
    return model


def _restore_llama3_rotary(config: "PretrainedConfig", factors: tuple[float, ...], path: Path) -> None:
    """Write back the scaling that Llama 3.1 and later were trained with; ModelError where it is some other scaling."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if all(factor == 1.0 for factor in factors):
        return
    theta = config.rope_parameters["rope_theta"]
    unscaled = theta ** -(torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": max(factors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != unscaled.shape or not torch.allclose(
        scaled * torch.tensor(factors), unscaled, rtol=1e-4, atol=0
    ):
        raise ModelError(_scaled_rotary(path, "rope_freqs.weight, other than Llama 3's"))


@contextmanager
def _reading(what: str, part: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise ModelError(
            f"transformers cannot read the {part} of this GGUF file ({what}): {error}. "
            "Use the model's Hub id or safetensors folder instead"
        ) from error


def _tidy_json(file: Path, drop: tuple[str, ...]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in drop}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
