"""What each data type does to SmolLM2's weights and to its perplexity: `topwork quantize --analyze`, kept as a record.

    python benchmarks/quantization_error.py --text WIKITEXT --windows 64

WIKITEXT is a plain text file: wikitext-2's valid.txt in the record. Writes quantization_error.json, .md and .png.
"""

import argparse
from math import exp
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record

BLOCK = 64
FOUR_BIT = ("nf4", "nf4 + DQ", "fp4", "int4")


def main() -> None:
    given = arguments()
    from topwork.reporting.curves import png_bytes
    from topwork.reporting.quantization import quantization_chart
    from topwork.run.analyze import analyze

    analysis = analyze(given.model, given.text, given.windows)
    record = {**analysis.as_json(), "surroundings": surroundings()}
    assert analysis.scores is not None
    record["perplexity"]["text"] = given.text.name
    record["perplexity"]["above_base"] = {name: analysis.scores.more(name) for name in analysis.scores.losses}
    record["perplexity"]["e2m1_above_int4"] = analysis.scores.more("e2m1", "int4")
    write_record(given.out, record, as_markdown(record, given))
    chart = quantization_chart(analysis.formats, record["perplexity"]["perplexities"], analysis.model)
    given.out.with_name(given.out.name + ".png").write_bytes(png_bytes(chart))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "quantization_error")
    return parser.parse_args()


def as_markdown(record: dict[str, Any], given: argparse.Namespace) -> str:
    scores = record["perplexity"]
    parts = [
        f"# Errors of data types: {record['model']}",
        f"`python benchmarks/quantization_error.py --text {given.text.name} --windows {given.windows}` with "
        f"OMP_NUM_THREADS=1 · {record['layers']} linear layers, {record['parameters']:,} parameters, against their "
        f"{record['dtype']} values · every figure, by layer kind too, is in the JSON beside this file.",
        _in_words(record),
        f"## Blocks of {BLOCK}",
        f"Perplexity: {scores['windows']} windows of {scores['window_tokens']} tokens of {scores['text']}, each for "
        "itself. SNR is 10 log10(Σ w² / Σ e²).",
        table(HEAD, [_row(row, scores) for row in _at(record, BLOCK)]),
        f"The base itself: perplexity {scores['perplexities']['base']:.2f}, {scores['losses']['base']:.4f} nats. ± is "
        "one standard error of the difference, window by window.",
        "## SNR in dB by block size",
        "In brackets: the same format on normally distributed weights.",
        _by_block(record),
        "![chart](quantization_error.png)",
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


HEAD = (
    "type", "bits/param", "MSE", "max error", "correlation", "SNR, dB", "normal weights' SNR, dB", "perplexity",
    "nats more than the base",
)  # fmt: skip


REMARKS = """Theory expects nf4 < fp4 < int4, with the textbook's 4-bit float: e2m1 here. bitsandbytes' fp4, which we
hold bit for bit, is another: its smallest value is 1/192 of the constant and not 1/12, so that with ±0 four of sixteen
codes lie around zero and hardly any weight needs three of them; it loses to uniform int4 at every block size here, less
so the longer the block. NF4 is the default, and fp4 is there to read what others wrote.

A remark on smollm2-135m: its weights come from a GGUF file in Q4_1 and so have at most sixteen values in each block of
32, at even distances from that block's smallest. A uniform int4 whose constant is the largest magnitude has another
grid and gains nothing from that, as the ratios beside those of normal weights show. The base's perplexity is that of
the Q4_1 file."""


def _in_words(record: dict[str, Any]) -> str:
    """What the figures say, computed from them; a sentence that they did not bear out would be wrong here."""
    rows = [row for row in _at(record, BLOCK) if row["name"] in ("nf4", "fp4", "e2m1", "int4")]

    def order(key: str, falling: bool) -> str:
        return " < ".join(row["name"] for row in sorted(rows, key=lambda row: -row[key] if falling else row[key]))

    losses = record["perplexity"]["losses"]
    by_loss = " < ".join(sorted((row["name"] for row in rows), key=losses.__getitem__))
    above, error = record["perplexity"]["e2m1_above_int4"]
    return (
        f"Error, least first: on normal weights {order('normal_snr_db', True)}, on the model's {order('mse', False)}; "
        f"perplexity {by_loss} (e2m1 above int4: {above:+.4f} ± {error:.4f} nats). {REMARKS}"
    )


def _at(record: dict[str, Any], block_size: int) -> list[dict[str, Any]]:
    wise = [row for row in record["formats"] if row["block_size"] == block_size]
    return [*wise, *(row for row in record["formats"] if row["block_size"] is None)]


def _row(row: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    loss, scored = scores["losses"].get(row["name"]), ["–", "–"]
    if loss is not None:
        above, error = scores["above_base"][row["name"]]
        scored = [f"{exp(loss):.2f}", f"{above:+.4f} ± {error:.4f}"]
    return [
        row["name"], f"{row['bits_per_parameter']:.3f}", f"{row['mse']:.3e}", f"{row['max_error']:.3f}",
        f"{row['correlation']:.6f}", f"{row['snr_db']:.2f}", f"{row['normal_snr_db']:.2f}", *scored,
    ]  # fmt: skip


def _by_block(record: dict[str, Any]) -> str:
    names = [*FOUR_BIT, "int8"]
    rows = {(row["name"], row["block_size"]): row for row in record["formats"]}
    sizes = sorted({size for name, size in rows if name == "nf4"})
    return table(
        ["block", *names],
        [
            [
                str(size),
                *(f"{rows[name, size]['snr_db']:.2f} ({rows[name, size]['normal_snr_db']:.2f})" for name in names),
            ]
            for size in sizes
        ],
    )


if __name__ == "__main__":
    main()
