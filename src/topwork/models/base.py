"""The frozen base: one loaded model, run over flat batches."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from topwork.common.devices import limit_kernel_caches
from topwork.common.errors import ModelError
from topwork.models.attention import use_flat_attention
from topwork.models.config import ModelConfig
from topwork.models.fingerprint import Sampled, fingerprint
from topwork.models.head_norms import tell_head_norms
from topwork.models.probe import PROVEN, probe
from topwork.models.quantized import is_packed, left_dense, misfit, quantize_head, read_packed, written_here
from topwork.models.quiet import without_bars
from topwork.models.recognise import make_fast
from topwork.models.source import Source, find_source
from topwork.models.tokenizer import context_length, load_tokenizer
from topwork.models.virtual import virtual_tokens, with_virtual_tokens
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext, running
from topwork.ops.logprobs import Head, LogitRule, dense_head, log_probabilities
from topwork.ops.workspace import Workspace
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedLinear

DTYPES: dict[str, Any] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A model whose own weights never change, with its tokenizer.

    `name` is what people call it and what adapters record; `fingerprint` tells its weights from another's.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    context_length: int
    logit_rule: LogitRule
    workspace: Workspace | None = field(default_factory=Workspace, kw_only=True, repr=False, compare=False)
    """What training passes share, one after the other."""

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.module.device

    @property
    def head(self) -> nn.Module:
        """The output head, adapted or not."""
        return self.module.get_output_embeddings()

    def virtual_tokens(self, adapter: str | None) -> int:
        """How many of the context's positions an adapter takes for itself in every sequence."""
        found = virtual_tokens(self.module.get_input_embeddings(), adapter)
        return found.count if found is not None else 0

    def pass_over(self, batch: Batch) -> PassContext:
        """A pass over a batch as it runs, with its adapters' virtual tokens in it; whoever keeps keys and values
        between passes (`models/generate.py`) needs to know it.

        Raises ModelError where a sequence and its virtual tokens are longer than the context.
        """
        context = with_virtual_tokens(self.module.get_input_embeddings(), batch)
        assert context.batch is not None
        if context.given_rows is not None and context.batch.longest > self.context_length:
            raise ModelError(
                f"a sequence with its virtual tokens has {context.batch.longest} tokens, and the context of "
                f"{self.name} is {self.context_length}; lower data.max_length or adapter.num_virtual_tokens"
            )
        return context

    def text(self, tokens: list[int]) -> str:
        """What token ids say, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [T, d] after the last norm."""
        context = self.pass_over(batch)
        if context.given_rows is not None and context.batch is not None and context.batch.output_positions is None:
            context = replace(context, batch=replace(context.batch, output_positions=context.given_rows))
        return self.run(context)

    def run(self, context: PassContext) -> Tensor:
        """The hidden states [T, d] of a pass after the last norm."""
        assert context.batch is not None
        with context.active():
            positions = context.batch.positions[None]
            out = self.module.base_model(**self._given(context), position_ids=positions, use_cache=False)
        return context.back(out.last_hidden_state[0].to(self.module.dtype))

    def hidden_rows(self, batch: Batch, rows: Tensor) -> Tensor:
        """Hidden states [n, d] of some rows [n] of the batch, which rise; the last layer computes only these where it
        can (what is before its attention, for all)."""
        found = self.hidden(replace(batch, output_positions=rows))
        return found if len(found) == len(rows) else found[rows]

    def log_probabilities(self, batch: Batch, gradient: Tensor | None = None) -> Tensor:
        """fp32 log-probabilities [N] of the batch's targets, with `gradient` as in `ops.logprobs`."""
        rows = self.hidden_rows(batch, batch.labels.positions)
        if (head := _head_alone(self.head)) is not None:
            return log_probabilities(rows, head, batch.labels.targets, self.logit_rule, gradient)
        vocabulary = self.module.config.get_text_config().vocab_size
        parts = [
            log_probabilities(
                rows[at],
                Head(vocabulary, self._head_of(batch, adapter, batch.labels.positions[at])),
                batch.labels.targets[at],
                self.logit_rule,
            )
            for adapter, at in _rows_by_segment(batch, batch.labels.positions)
        ]
        return torch.cat(parts) if parts else rows.float().sum(-1)

    def logits(self, batch: Batch, rows: Tensor) -> Tensor:
        """fp32 logits [n, V] of some rows [n] of the batch, which rise."""
        return self.logits_of(batch, self.hidden(batch), rows)

    def logits_of(self, batch: Batch, hidden: Tensor, rows: Tensor) -> Tensor:
        """fp32 logits [n, V] from hidden states [T, d] that are already at hand."""
        parts = [
            self.logit_rule(self._head_of(batch, adapter, rows[at])(hidden[rows[at]], 0))
            for adapter, at in _rows_by_segment(batch, rows)
        ]
        return torch.cat(parts)

    def _given(self, context: PassContext) -> dict[str, Tensor]:
        """What the model reads: tokens, or their embeddings where some of these are learned."""
        assert context.batch is not None
        learned = [(virtual, e) for virtual in context.virtual if (e := virtual.embeddings) is not None]
        if not learned:
            return {"input_ids": context.batch.tokens[None]}
        x = self.module.get_input_embeddings()(context.batch.tokens[None])[0]
        for virtual, embeddings in learned:
            x = virtual.over(x, embeddings)
        return {"inputs_embeds": x[None]}

    def _head_of(self, batch: Batch, adapter: str | None, rows: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The head for some rows [n] of one adapter, in chunks of any size; a backward pass may call it again later."""
        seeds = None if batch.dropout_seeds is None else batch.dropout_seeds[rows]

        def head(hidden: Tensor, first: int) -> Tensor:
            own = None if seeds is None else seeds[first : first + len(hidden)]
            chunk = replace(batch, segments=(Segment(0, len(hidden), adapter),), dropout_seeds=own)
            with running(chunk):
                return self.head(hidden)

        return head


def _head_alone(head: nn.Module) -> Head | None:
    """The head where no adapter is on it, dense or packed."""
    if type(head) is nn.Linear:
        return dense_head(head.weight, head.bias)
    if type(head) is QuantizedLinear and (head.bias is None or not head.bias.requires_grad):
        return Head(head.out_features, lambda rows, _: head(rows), head.input_gradient)
    return None


def _rows_by_segment(batch: Batch, rows: Tensor) -> list[tuple[str | None, slice]]:
    """For each segment its adapter and the part of `rows` (which rise) in it, where there is one."""
    parts = zip(batch.segments, batch.by_segment(rows))
    return [(segment.adapter, part) for segment, part in parts if part.stop > part.start]


def load_base(
    config: ModelConfig, report: Callable[[str], None] = print, quantization: QuantizationConfig | None = None
) -> Base:
    """Find, read and freeze the base that `config` names, set to flat batches; an unproven family is probed.

    With `quantization` its linear layers are packed as they are read, never whole in 16 bits; a checkpoint that is
    quantized already is taken as it is.
    """
    limit_kernel_caches()
    source = find_source(config, report)
    device = pick_device(config.device)
    wanted = quantization or QuantizationConfig()
    module, identity = _read(source, config, wanted)
    if wanted.head != "16bit":
        quantize_head(module, wanted.head)
    if wanted.active and (told := left_dense(module)):
        report(f"{source.name}: {told}")
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    return as_base(module.to(device), tokenizer, source.name, report, identity)  # type: ignore[arg-type]


def as_base(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    report: Callable[[str], None] = print,
    identity: str | None = None,
    fast: bool = True,
) -> Base:
    """Freeze a loaded Hugging Face causal model, set it to flat batches and make its layers fast where they can be.
    `identity` is its fingerprint, where it was taken already."""
    module.requires_grad_(False).eval()
    config = module.config.get_text_config()
    whole = context_length(module.config)
    length = _steady_length(config, whole)
    if length < whole:
        report(
            f"{config.model_type}: its rotary positions (longrope) change for a whole pass with its longest sequence; "
            f"sequences are kept to {length} tokens, below which they do not, instead of {whole}"
        )
    base = Base(module, tokenizer, name, identity or fingerprint(module), length, _logit_rule(config))
    if config.model_type in PROVEN:
        use_flat_attention(module)
    else:
        probe(base, use_flat_attention)
        report(f"{config.model_type}: not in the table of proven families; probed, and its sequences stay apart")
    tell_head_norms(module)
    if fast:
        make_fast(module, report)
    return base


def _read(source: Source, config: ModelConfig, wanted: QuantizationConfig) -> tuple[PreTrainedModel, str]:
    """The model, in host memory, and its fingerprint."""
    remote: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    samples: dict[str, Sampled] = {}
    info: Any
    loaded: Any
    try:
        known = AutoConfig.from_pretrained(source.folder, revision=source.revision, **remote)
        dtype = DTYPES[config.dtype]
        if is_packed(known, source.name) or wanted.active:
            dtype = (known.dtype or torch.float32) if dtype == "auto" else dtype
            module, info, samples = read_packed(source, known, wanted, dtype, config.trust_remote_code)
        else:
            with without_bars():
                loaded = AutoModelForCausalLM.from_pretrained(
                    source.folder, revision=source.revision, dtype=dtype, use_safetensors=True,
                    output_loading_info=True, ignore_mismatched_sizes=True, **remote,
                )  # fmt: skip
            module, info = loaded
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{source.name} could not be read as a causal language model with safetensors weights: {error}"
        ) from error
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise misfit(key, found, expected)
    lacking = sorted(info["missing_keys"])
    if lacking:  # transformers would go on with random values
        raise ModelError(
            f"{source.name} lacks {len(lacking)} weights that its config asks for (first {lacking[0]}); was the "
            "download finished, and is it a causal language model?"
        )
    return module, written_here(source.folder) or fingerprint(module, samples)


def _steady_length(config: PreTrainedConfig, whole: int) -> int:
    """How long a sequence may be, of at most `whole`, before it changes the positions of its neighbours in a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # one for each layer type, or one
    return min([whole, *(r["original_max_position_embeddings"] for r in ropes if r.get("rope_type") == "longrope")])


def _logit_rule(config: object) -> LogitRule:
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device: {name!r} is not to be had here ({error}); try auto or cpu") from error
    return device
