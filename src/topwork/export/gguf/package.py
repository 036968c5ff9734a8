"""The `gguf` package, which is an extra."""

from types import ModuleType

from topwork.common.errors import RequestError


def gguf_package() -> ModuleType:
    """The package. Raises RequestError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise RequestError(
            "writing GGUF needs the package gguf, which is not installed; get it with: pip install topwork[gguf]"
        ) from error
    return gguf
