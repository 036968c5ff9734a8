"""The adapter methods, each its record's one line."""

from typing import Any

from topwork.adapters.method import Method
from topwork.adapters.methods.bitfit import BITFIT
from topwork.adapters.methods.full import FULL
from topwork.adapters.methods.ia3 import IA3
from topwork.adapters.methods.loha import LOHA
from topwork.adapters.methods.lokr import LOKR
from topwork.adapters.methods.lora.method import LORA
from topwork.adapters.methods.oft import OFT
from topwork.adapters.methods.readonly.method import READONLY
from topwork.adapters.methods.vera import VERA
from topwork.adapters.methods.virtual import PREFIX, PROMPT

METHODS: dict[str, Method[Any]] = {
    method.name: method for method in (LORA, IA3, VERA, LOHA, LOKR, OFT, PREFIX, PROMPT, BITFIT, FULL, READONLY)
}
"""Name -> record."""
