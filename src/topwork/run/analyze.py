"""`topwork quantize MODEL --analyze`: what every data type and block size would do to a model's weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.common.errors import ModelError, RequestError
from topwork.common.files import write_bytes, write_json
from topwork.evaluation.perplexity import read_windows, window_losses
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import DTYPES
from topwork.models.skeleton import skeleton
from topwork.models.source import Source, find_source
from topwork.models.weights import quantizable, stored_weights, weight_shape
from topwork.plan.built import config_of
from topwork.plan.footprint import FootprintRow, as_table, footprint
from topwork.quantization.error import FormatErrors, Packing, Sums, dequantized, measure, normal_weights, sweep
from topwork.reporting.curves import png_bytes
from topwork.reporting.quantization import quantization_chart
from topwork.run.folder import check_place
from topwork.run.loading import open_base

WINDOWS = 32
SCORED = (
    Packing("nf4", 64), Packing("nf4", 64, double_quant=True), Packing("fp4", 64), Packing("e2m1", 64),
    Packing("int4", 64), Packing("int8", 64), Packing("int8", None),
)  # fmt: skip
"""Formats whose perplexity is measured, and that are shown by kind of layer."""
COLUMNS = (
    f"{'type':12} {'block':>5} {'bits/param':>10} {'MiB':>10} {'MSE':>10} {'max error':>10} {'correlation':>11} "
    f"{'SNR dB':>8} {'normal SNR':>10}"
)
NOTES = (
    "SNR is 10 log10(sum of squared weights / sum of squared errors). normal SNR: the same format on normally "
    "distributed weights.\nbits/param are codes and constants; MiB has the 1 KiB map of each double-quantized layer "
    "too. e2m1 is the textbook's 4-bit float, fp4\nbitsandbytes' (whose smallest codes nearly are zero)."
)

Log = Callable[[str], None]


@dataclass(frozen=True)
class TextScores:
    """Losses in nats per token of a text's first windows, by format; under `base` the base's own."""

    text: str
    window_tokens: int
    by_window: dict[str, list[float]]

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self.by_window["base"])

    @property
    def losses(self) -> dict[str, float]:
        """Means over the windows, which are of one length."""
        return {name: mean(losses) for name, losses in self.by_window.items()}

    @property
    def perplexities(self) -> dict[str, float]:
        """exp of the losses."""
        return {name: math.exp(loss) for name, loss in self.losses.items()}

    def more(self, name: str, than: str = "base") -> tuple[float, float]:
        """By how much a format's loss is above another's, and that difference's standard error, window by window."""
        differences = [a - b for a, b in zip(self.by_window[name], self.by_window[than])]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return mean(differences), error

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "windows": self.windows, "losses": self.losses, "perplexities": self.perplexities}


@dataclass(frozen=True)
class Analysis:
    """A model's linear layers in every format. `dtype` is the type of the weights that the errors are against."""

    model: str
    dtype: str
    layers: int
    parameters: int
    formats: list[FormatErrors]
    footprint: list[FootprintRow]
    scores: TextScores | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        scores = self.scores
        return {
            **{name: getattr(self, name) for name in ("model", "dtype", "layers", "parameters")},
            "formats": [_format_json(row) for row in self.formats],
            "footprint": [{**asdict(row), "total_bytes": row.total_bytes} for row in self.footprint],
            "perplexity": None if scores is None else scores.as_json(),
        }

    def as_text(self) -> str:
        """Tables for people."""
        head = f"{self.model}: {self.layers} linear layers, {self.parameters:,} parameters, against {self.dtype}"
        parts = [head, "\n".join([COLUMNS, *map(_format_line, self.formats), NOTES]), self._by_kind()]
        parts += [f"All weights in memory:\n{as_table(self.footprint)}", self._scored()]
        return "\n\n".join(parts)

    def _by_kind(self) -> str:
        measured = {row.format: row for row in self.formats}
        shown = [measured[form] for form in SCORED]
        lines = [f"SNR dB by layer, blocks of 64:\n{'layer':20}" + "".join(f"{row.format.name:>13}" for row in shown)]
        for kind in shown[0].by_kind:
            lines.append(f"{kind:20}" + "".join(f"{_plain(row.by_kind[kind].snr_db, 2):>13}" for row in shown))
        return "\n".join(lines)

    def _scored(self) -> str:
        if self.scores is None:
            return "No perplexity: give a text file with --text."
        scores = self.scores
        lines = [
            f"Perplexity of {scores.text}, {scores.windows} windows of {scores.window_tokens} tokens, blocks of 64:",
            f"{'type':12} {'perplexity':>10} {'nats/token':>11} {'above the base':>20}",
        ]
        for name, loss in scores.losses.items():
            above, error = scores.more(name)
            told = "" if name == "base" else f"{above:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
            lines.append(f"{name:12} {math.exp(loss):10.3f} {loss:11.4f} {told:>20}")
        return "\n".join([*lines, "± is one standard error of the difference, window by window."])


def analyze(
    model: ModelConfig | str,
    text: Path | None = None,
    windows: int = WINDOWS,
    out: Path | None = None,
    log: Log = print,
) -> Analysis:
    """Measure every format on a model's linear layers, and those of blocks of 64 on a text where one is given.

    The weights are read one at a time; a whole model is loaded only for `text`. With `out`, FOLDER/analysis.json and
    analysis.png are written. Raises ModelError for a model that cannot be read or is quantized already, and DataError
    for a text that cannot be read or is too short.
    """
    if out is not None:
        check_place(out, "OUT")
    config = model if isinstance(model, ModelConfig) else ModelConfig(model_name_or_path=model)
    source = find_source(config, log)
    bare = _unquantized_skeleton(source, config)
    scores = _score(config, text, windows, log) if text is not None else None
    formats = _measure_all(source, bare, config, log)
    shapes = [weight_shape(layer) for layer in quantizable(bare).values()]
    parameters = sum(rows * columns for rows, columns in shapes)
    analysis = Analysis(source.name, config.dtype, len(shapes), parameters, formats, footprint(bare), scores)
    if out is not None:
        _write(analysis, out, log)
    return analysis


def _unquantized_skeleton(source: Source, config: ModelConfig) -> PreTrainedModel:
    known = config_of(source.folder, source.revision, config.trust_remote_code)
    if getattr(known, "quantization_config", None) is not None:
        raise ModelError(
            f"{source.name} is quantized already, and errors are measured against 16-bit weights; give the model that "
            "it was made from"
        )
    return skeleton(known, config.trust_remote_code)


def _measure_all(source: Source, bare: PreTrainedModel, config: ModelConfig, log: Log) -> list[FormatErrors]:
    dtype: Any = DTYPES[config.dtype]
    formats = sweep()
    kinds: dict[str, dict[Packing, Sums]] = {}
    total = len(quantizable(bare))
    if not total:
        raise ModelError(f"{source.name} has no linear layer that could be quantized")
    for done, (path, weight) in enumerate(stored_weights(source, bare, None if isinstance(dtype, str) else dtype)):
        sums = kinds.setdefault(path.rpartition(".")[2], dict.fromkeys(formats, Sums()))
        weight = weight.float()
        for form in formats:
            try:
                sums[form] += measure(weight, form)
            except ValueError as error:
                raise ModelError(f"{path}: {error}") from error
        if (done + 1) * 10 // total > done * 10 // total:
            log(f"{done + 1} of {total} layers measured")
    shapes = [weight_shape(layer) for layer in quantizable(bare).values()]
    return [_in_all(form, {kind: sums[form] for kind, sums in sorted(kinds.items())}, shapes) for form in formats]


def _in_all(form: Packing, by_kind: Mapping[str, Sums], shapes: Sequence[tuple[int, int]]) -> FormatErrors:
    whole = sum(by_kind.values(), Sums())
    held = sum(form.code_bytes(shape) + form.constant_bytes(shape) for shape in shapes)
    return FormatErrors(
        format=form,
        bits_per_parameter=8 * held / whole.count,
        held_bytes=sum(form.held_bytes(shape) for shape in shapes),
        whole=whole.figures(),
        by_kind={kind: sums.figures() for kind, sums in by_kind.items()},
        normal_snr_db=measure(normal_weights(), form).figures().snr_db,
    )


def _score(config: ModelConfig, text: Path, windows: int, log: Log) -> TextScores:
    base = open_base(config, log)
    read = read_windows(base, text, windows)
    if len(read) < windows:
        log(f"{text} fills {len(read)} windows of {len(read[0])} tokens, fewer than the {windows} asked for")
    losses = {"base": window_losses(base, read)}
    for form in SCORED:
        with _through(base, form):
            losses[form.name] = window_losses(base, read)
        log(f"{form.name}: {mean(losses[form.name]):.4f} nats per token (base {mean(losses['base']):.4f})")
    return TextScores(str(text), len(read[0]), losses)


@contextmanager
def _through(base: Base, form: Packing) -> Iterator[None]:
    """Every quantizable weight as it comes back from a format; the originals again when the block ends."""
    layers: dict[str, Any] = quantizable(base.module)
    originals = {path: layer.weight.data for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.weight.data = _replaced(path, layer, form)
        yield
    finally:
        for path, layer in layers.items():
            layer.weight.data = originals[path]


def _replaced(path: str, layer: nn.Module, form: Packing) -> Any:
    weight: Any = layer.weight.data
    turned = isinstance(layer, Conv1D)
    try:
        values = dequantized(weight.t() if turned else weight, form)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    return values.t() if turned else values


def _write(analysis: Analysis, out: Path, log: Log) -> None:
    write_json(out / "analysis.json", analysis.as_json())
    perplexities = analysis.scores.perplexities if analysis.scores else None
    try:
        figure = quantization_chart(analysis.formats, perplexities, analysis.model)
    except RequestError as error:
        log(f"{out / 'analysis.json'} is written and no analysis.png: {error}")
        return
    write_bytes(out / "analysis.png", png_bytes(figure))


def _format_json(row: FormatErrors) -> dict[str, Any]:
    return {
        "name": row.format.name,
        **asdict(row.format),
        "bits_per_parameter": row.bits_per_parameter,
        "held_bytes": row.held_bytes,
        "normal_snr_db": row.normal_snr_db,
        **asdict(row.whole),
        "by_kind": {kind: asdict(errors) for kind, errors in row.by_kind.items()},
    }


def _format_line(row: FormatErrors) -> str:
    whole = row.whole
    return (
        f"{row.format.name:12} {row.format.block_size or 'row':>5} {row.bits_per_parameter:10.3f} "
        f"{row.held_bytes / 2**20:10,.1f} {whole.mse:10.3e} {whole.max_error:10.3e} {_plain(whole.correlation, 6):>11} "
        f"{_plain(whole.snr_db, 2):>8} {_plain(row.normal_snr_db, 2):>10}"
    )


def _plain(value: float | None, digits: int) -> str:
    return "exact" if value is None else f"{value:.{digits}f}"
