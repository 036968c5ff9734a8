"""A family that no test has proven is probed: refused by name where sequences are not kept apart, else accepted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reference.families import alone, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.common.errors import ModelError
from topwork.models.attention import FLAT
from topwork.models.load import as_base
from topwork.models.proven import PROVEN
from topwork.models.source import Source
from topwork.models.tokenizer import load_config, usable_length
from topwork.ops.batch import batch_of


def unlisted(model: PreTrainedModel, name: str = "newcomer") -> PreTrainedModel:
    """The same model under a family's name that no test has proven."""
    assert name not in PROVEN
    model.config.model_type = name
    return model


def loaded(model: PreTrainedModel) -> list[str]:
    """What a user is told while `model` is made a base."""
    told: list[str] = []
    as_base(model, None, "tiny", told.append)  # type: ignore[arg-type]
    return told


class Mixing(nn.Module):
    """An MLP that also looks at the token before, as a short convolution does."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner = inner
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.share * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("family", ["cohere", "glm4", "stablelm", "olmo3"])
def test_a_good_family_is_accepted_and_said_to_be_probed(family: str) -> None:
    assert family not in PROVEN
    model = tiny_model(family)
    told = [line for line in loaded(model) if "plain modules" not in line]
    assert told == [f"{family}: not in the table of proven families; probed, and its sequences stay apart"]
    assert model.config._attn_implementation == FLAT


def test_a_proven_family_is_not_probed() -> None:
    assert loaded(tiny_model("llama")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_alone_is_no_difference(dtype: torch.dtype) -> None:
    assert loaded(unlisted(tiny_model("llama")).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_that_leaks_is_refused_by_name(dtype: torch.dtype) -> None:
    """Attention is exchangeable and keeps sequences apart; the MLP does not."""
    model = unlisted(tiny_model("llama")).to(dtype)
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, share=1.0)
    with pytest.raises(ModelError, match=r"^newcomer: two sequences in one batch give other logits .*trained wrongly"):
        loaded(model)


def test_attention_with_a_bias_of_its_own_is_refused() -> None:
    """ALiBi in a model that looks like any other: its scores hold a term that the flat batch does not know."""
    model = unlisted(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def with_alibi(hidden_states: Tensor, **kwargs: object) -> object:
        length = hidden_states.shape[1]
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        if model.config._attn_implementation == "eager":
            kwargs["attention_mask"] = kwargs["attention_mask"] + 0.5 * distance.clamp(max=0)
        return plain(hidden_states, **kwargs)

    attention.forward = with_alibi
    with pytest.raises(ModelError, match=r"^newcomer: two sequences in one batch give other logits"):
        loaded(model)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_alibi_is_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=f"^{family}: .*choose another base"):
        loaded(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "kind"), [("mamba", "linear_attention"), ("lfm2", "conv"), ("qwen3_next", "linear_attention")]
)
def test_recurrent_and_linear_layers_are_refused_by_name(family: str, kind: str) -> None:
    with pytest.raises(ModelError, match=f"^{family}: layers of type {kind} carry state"):
        loaded(tiny_model(family))


def test_a_model_that_breaks_on_a_stream_is_refused_by_name() -> None:
    model = unlisted(tiny_model("llama"))
    norm = model.model.norm
    plain = norm.forward

    def fussy(x: Tensor) -> Tensor:
        if x.shape[1] > 11:
            raise IndexError("no more than 11 tokens")
        return plain(x)

    norm.forward = fussy
    with pytest.raises(ModelError, match=r"^newcomer: could not be run as a flat batch \(no more than 11 tokens\)"):
        loaded(model)


def test_a_base_is_frozen_and_silent_about_dropout() -> None:
    model = tiny_model("llama").train().requires_grad_(True)
    base = as_base(model, None, "tiny", lambda _: None)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert not any(module.training for module in base.module.modules())
    assert base.context_length == 64


def test_longrope_is_kept_to_the_length_at_which_it_is_steady(tmp_path: Path) -> None:
    """Beyond it one long sequence would change the positions of all others in its pass."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    values = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    told: list[str] = []
    base = as_base(tiny_model("phi3", **values), None, "tiny", told.append)  # type: ignore[arg-type]
    assert base.context_length == 16
    base.module.config.save_pretrained(tmp_path)
    assert usable_length(load_config(Source("tiny", str(tmp_path), None), False)) == 16, "the same without weights"
    assert len(told) == 1
    assert "longrope" in told[0]
    assert "kept to 16 tokens, below which they do not, instead of 64" in told[0]
    parts = sequences((16, 3, 9))
    with torch.no_grad():
        found = base.logits(batch_of(parts), torch.arange(28))
        assert relative(found, alone(tiny_model("phi3", **values), parts)) < 1e-5
        parts = sequences((17, 3, 9))
        found = base.logits(batch_of(parts), torch.arange(29))
        assert relative(found, alone(tiny_model("phi3", **values), parts)) > 1e-3  # where this fails, lift the limit


def test_a_stream_needs_base_to_be_run() -> None:
    base = tiny_base()
    with pytest.raises(RuntimeError, match="called without a batch"):
        base.module(input_ids=torch.tensor([[3, 4]]))


def test_rows_may_be_any_of_the_stream() -> None:
    base = tiny_base("gemma2")
    parts = sequences()
    rows = torch.tensor([0, 5, 13, 14, 20, 44])
    whole = base.logits(batch_of(parts), torch.arange(45))
    assert torch.allclose(base.logits(batch_of(parts), rows), whole[rows], atol=1e-6)
    assert whole.shape == (45, 99)
    assert whole.abs().max() <= base.module.config.final_logit_softcapping
