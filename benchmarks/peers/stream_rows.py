"""A file streamed as training streams it, but for the model. Prints one JSON line.

python -m peers.stream_rows FILE STEPS BATCH_SIZE TOKENIZER      (in benchmarks/)
"""

import json
import resource
import sys
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from topwork.data.config import DataConfig
from topwork.data.examples import load_data
from topwork.data.source import StreamedRows
from topwork.data.streaming.examples import StreamedExamples
from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.models.tokenizer import open_tokenizer

MODEL = "smollm2-135m"


def main(file: str, steps: int, batch_size: int, kind: str) -> dict[str, object]:
    """Index the file, ask for the first steps, and for the later half of them again of a source that begins there."""
    config, length = ModelConfig(model_name_or_path=MODEL), 2048
    if kind == "auto":  # as `topwork train` opens it; AutoConfig imports what a model needs, torch's compiler too
        tokenizer, _ = open_tokenizer(config)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(find_source(config, lambda _: None).folder)
    tokenizer(["a"])
    before, start = peak_bytes(), time.perf_counter()
    data = load_data(DataConfig(train=file, streaming=True), tokenizer, length, 0, lambda _: None)
    assert isinstance(data.train, StreamedExamples)
    index_seconds, index = time.perf_counter() - start, peak_bytes()
    source = StreamedRows(data.train, batch_size, 0)
    source.examples(0)  # draws the order of the epoch
    start = time.perf_counter()
    seen = [content(source, step) for step in range(1, steps)]
    seconds = time.perf_counter() - start
    later = StreamedRows(data.train, batch_size, 0)
    again = [content(later, step) for step in range(steps // 2, steps)]
    return {
        "file_bytes": Path(file).stat().st_size,
        "model": MODEL,
        "tokenizer": kind,
        "rows": len(data.train),
        "batch_size": batch_size,
        "steps": steps,
        "before_bytes": before,
        "index_bytes": index,
        "peak_bytes": peak_bytes(),
        "index_seconds": index_seconds,
        "rows_per_second": batch_size * (steps - 1) / seconds,
        "step_milliseconds": 1000 * seconds / (steps - 1),
        "resumed_alike": again == seen[steps // 2 - 1 :],
    }


def content(source: StreamedRows, step: int) -> list[tuple[str, bytes, bytes]]:
    return [(row.source, row.tokens.tobytes(), row.weights.tobytes()) for row in source.examples(step)]


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
