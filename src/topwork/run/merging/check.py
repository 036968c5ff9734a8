"""Is the merged model the one that was trained? Base and adapter run first, are let go of, and then the new folder."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path

from topwork.common.errors import RequestError
from topwork.merging.verify import KEPT_BYTES, Measurement, Verification, compare, measure, verify
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import Given
from topwork.run.loading import refuse_large
from topwork.run.merging.inputs import Inputs, Log
from topwork.run.merging.plan import MergePlan, opened

BESIDE_BYTES = 512 << 20
"""What running a model takes beside its weights, the inputs being short."""


def refuse_small_disk(out: Path, model_bytes: int) -> None:
    """Before anything is merged; what is to be replaced stands until the new folder does. Raises RequestError."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if model_bytes > free:
        raise RequestError(
            f"the merged weights take {model_bytes / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free where {out} "
            "is to be; free some space, name a place on another disk, or merge in 16 bits (--dtype bfloat16)"
        )


def refuse_small_memory(model_bytes: int, log: Log, kept: int = 2) -> None:
    """Before anything is merged. Raises RequestError where the machine cannot hold the model that the check runs, and
    the logits that are `kept` of so many."""
    refuse_large(
        model_bytes + kept * KEPT_BYTES + BESIDE_BYTES, "running the model in the check after the merge",
        "The merge itself needs little: leave the check out with --check 0, or give more memory", log,
    )  # fmt: skip


@dataclass(frozen=True)
class Before:
    """Base with adapter as it was trained, measured, and how far that is from the bare base (KL in nats a token);
    `beside` is of the adapter on the weights that it is merged onto, where these are others."""

    measured: Measurement
    adapter_kl: float
    beside: Measurement | None = None


def before_merge(adapter: Given, plan: MergePlan, inputs: Inputs, force: bool, log: Log) -> Before:
    """Base and adapter as the adapter was trained, in the merged model's type; nothing of them stays in memory."""
    base, adapters = opened(adapter, inputs, plan.dtype, force, log=log)
    adapters.train(ADAPTER_NAME, False)
    found = measure(base, inputs.sequences, ADAPTER_NAME)
    distance = compare(found.logits, measure(base, inputs.sequences, None).logits).mean_kl
    del base, adapters
    gc.collect()
    return Before(found, distance, _beside(adapter, plan, inputs, force) if plan.changes_base else None)


def _beside(adapter: Given, plan: MergePlan, inputs: Inputs, force: bool) -> Measurement:
    """The adapter on the base from before it was quantized, which nobody trained: what the merge should give."""
    base, adapters = opened(adapter, inputs, plan.dtype, force, quantized=False)
    adapters.train(ADAPTER_NAME, False)
    found = measure(base, inputs.sequences, ADAPTER_NAME)
    del base, adapters
    gc.collect()
    return found


def after_merge(folder: Path, adapter: Given, plan: MergePlan, before: Before, inputs: Inputs) -> Verification:
    """The merged folder where it stands, against what was measured before."""
    config = ModelConfig.model_validate({
        "model_name_or_path": str(folder), "dtype": str(plan.dtype).removeprefix("torch."),
        "device": adapter.model.device, "trust_remote_code": adapter.model.trust_remote_code,
    })  # fmt: skip
    base = load_base(config, lambda _: None, None, inputs.tokenizer)
    found = measure(base, inputs.sequences, None)
    del base
    gc.collect()
    return verify(before.measured, found, before.adapter_kl, before.beside)
