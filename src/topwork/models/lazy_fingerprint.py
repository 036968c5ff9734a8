"""A base's fingerprint without the base in memory: the same value as `fingerprint` gives of the loaded one."""

from transformers import PreTrainedModel

from topwork.models.fingerprint import Sampled, digest_of, sample_of
from topwork.models.lazy import LazyModel
from topwork.models.stored_names import stored_names


def lazy_fingerprint(model: LazyModel, bare: PreTrainedModel) -> str | None:
    """Of a model in the type in which it is run, by its skeleton; few pages of the files are read. None where it would
    take reading all of them: files that are packed, or that hold weights in another form than the model."""
    if model.fingerprint is not None:
        return model.fingerprint
    keys = stored_names(bare, model.tensors).keys
    samples: dict[str, Sampled] = {}
    for name, _ in bare.named_parameters(remove_duplicate=True):
        tensor = model.tensors[keys[name]] if name in keys else None
        if tensor is None or tensor.view is None:
            return None
        samples[name] = sample_of(tensor.view(), tensor.dtype)
    return digest_of(sorted(samples.items()))
