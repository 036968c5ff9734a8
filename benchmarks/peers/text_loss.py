"""The loss of an NF4 base on plain text. Prints one JSON line.

python -m peers.text_loss MODEL TEXT WINDOWS QUANTIZATION_JSON      (in benchmarks/)
"""

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean

from topwork.evaluation.perplexity import read_windows, window_losses
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes


def main(model: str, text: str, windows: str, options: str) -> None:
    wanted = QuantizationConfig.model_validate({"load_in_4bit": True, **json.loads(options)})
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu"), lambda _: None, wanted)
    parts = read_windows(base, Path(text), int(windows))
    start = time.perf_counter()
    nats = mean(window_losses(base, parts))
    found = {
        "windows": len(parts), "window_tokens": len(parts[0]), "nats": nats, "perplexity": math.exp(nats),
        "weights_bytes": weight_bytes(base.module), "seconds": time.perf_counter() - start,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:5])
