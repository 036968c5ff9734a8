"""Topwork: one frozen base, many adapters, one pass.

    import topwork

    run = topwork.train("recipe.yaml")
    scores = topwork.evaluate(run.folder)
    print(topwork.answer(run.folder, "Where is my order 4711?"))

Names are imported when they are first used, so that `import topwork` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "train": "topwork.run.train",
    "train_together": "topwork.run.train",
    "open_session": "topwork.run.session",
    "sweep": "topwork.run.sweep.run",
    "RunInterrupted": "topwork.run.interrupted",
    "init": "topwork.run.init",
    "plan_run": "topwork.run.plan",
    "evaluate": "topwork.run.evaluate",
    "answer": "topwork.run.chat",
    "merge": "topwork.run.merge",
    "combine": "topwork.run.combine",
    "compare_adapters": "topwork.run.likeness",
    "convert": "topwork.run.convert",
    "import_recipe": "topwork.run.import_",
    "push": "topwork.run.push",
    "quantize": "topwork.run.quantize",
    "report": "topwork.run.report",
    "advise": "topwork.run.advise",
    "serve": "topwork.serving.extra",
    "Engine": "topwork.generation.engine",
    "Recipe": "topwork.recipe.recipe",
    "load_recipe": "topwork.recipe.recipe",
    "load_base": "topwork.models.load",
    "Adapters": "topwork.adapters.graft",
    "AdapterConfig": "topwork.adapters.config",
    "ModelConfig": "topwork.models.config",
    "QuantizationConfig": "topwork.quantization.config",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'topwork' has no attribute {name!r}; it has {', '.join(sorted(_WHERE))}")


def __dir__() -> list[str]:
    return list(__all__)
