"""Write docs/decisions/README.md and benchmarks/results/README.md: one line for each decision and each record.

    python tools/index_pages.py

A decision's line is its heading and the quoted lines below it; a record's the first sentence of the script that made
it, and the date, commit and threads that the record names. tests/docs/test_index_pages.py holds the pages to the files.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
RECORDS = ROOT / "benchmarks" / "results"
INDEX = "README.md"

COMMANDS = {
    "against_f60e869": "against.py f60e869 --pairs 14 --kinds lora,nf4,dora",
    "against_ff1d0f1": "against.py ff1d0f1 --pairs 16 --kinds dora,nf4 --processes 3",
    "against_ff1d0f1_first": "against.py ff1d0f1 --pairs 14 --kinds lora,dora --processes 1",
    "against_247651f": "against.py 247651f --pairs 8 --kinds lora --processes 1",
    "against_d8d824c": "against.py d8d824c --kinds lora,nf4 --pairs 12 --processes 1",
    "against_e8061a0": "against.py e8061a0 --kinds lora,nf4 --pairs 16 --processes 1",
    "against_e8061a0_banking77": "against.py e8061a0 --kinds lora,nf4 --pairs 40 --processes 1 "
    "(512 tokens of banking77)",
    "against_e8061a0_new_lengths": "against.py e8061a0 --new-lengths --kinds lora,nf4 --pairs 20 --processes 1",
    "against_4baac91": "against.py 4baac91 --kinds lora,nf4 --pairs 14 --processes 1",
    "against_4baac91_banking77": "against.py 4baac91 --kinds lora,nf4 --pairs 30 --processes 1 "
    "(512 tokens of banking77)",
    "against_4baac91_new_lengths": "against.py 4baac91 --new-lengths --kinds lora,nf4 --pairs 14 --processes 1",
    "against_429015c": "against.py 429015c --kinds lora,nf4 --pairs 16",
    "against_429015c_banking77": "against.py 429015c --kinds lora,nf4 --pairs 16 --processes 1 "
    "(512 tokens of banking77)",
    "against_429015c_new_lengths": "against.py 429015c --new-lengths --kinds lora,nf4 --pairs 12 --processes 1",
    "attention": "attention.py",
    "banking77": "banking77.py score",
    "banking77_batch16": "topwork train benchmarks/banking77.yaml --set training.batch_size=16",
    "banking77_lora": "compare.py --data banking77 --steps 7 --batch 16 --peers trl_tuned,peft_loop",
    "beside_lora": "beside_lora.py",
    "beside_lora_amx": "beside_lora.py --out benchmarks/results/beside_lora_amx",
    "checkpointing": "checkpointing.py",
    "combine_error": "combine_error.py",
    "expert_lora": "expert_lora.py",
    "combine_tasks": "combine_tasks.py",
    "combine_tasks_unmixed": "combine_tasks.py --so-far (as of 4d5468f: no general rows among the tasks')",
    "container_memory": "container_memory.py --limits 1350,1200,1000,900 --addresses 2200 --data 900 --steps 1 "
    "--before SRC (BEFORE: 6cefe2f)",
    "elementwise": "elementwise.py",
    "feedforward": "feedforward.py --rounds 7 --layers 12",
    "gguf_export": "gguf_export.py",
    "imported_examples": "imported_examples.py FOLDER",
    "gradients": "gradients.py",
    "gradients_amx": "gradients.py --out benchmarks/results/gradients_amx",
    "generation_products": "generation_products.py",
    "grouped": "grouped.py",
    "gsm8k_lora": "compare.py --data gsm8k --steps 5 --peers trl_tuned,peft_loop",
    "gsm8k_lora_amx": "compare.py --data gsm8k --steps 5 --peers trl_tuned,peft_loop",
    "gsm8k_lora_trl": "compare.py --data gsm8k --steps 6 --rounds 2 --peers trl_default,trl_packed",
    "gsm8k_qlora": "compare.py --data gsm8k --steps 5 --rounds 4 --peers topwork_qlora,trl_qlora",
    "llama_1b": "compare.py --model llama1b --steps 3 --batch 10 --tokens-per-pass 2048 "
    "--peers topwork_qlora,peft_loop,peft_loop_qlora",
    "loading": "loading.py",
    "loss": "loss.py",
    "loss_curves": "loss_curves.py --side-by-side",
    "loss_curves_amx": "loss_curves.py --seeds 1 --side-by-side",
    "loss_curves_fp32": "loss_curves.py --batch 1 --peers peft_loop_fp32",
    "many_adapters": "many_adapters.py --rounds 6",
    "many_adapters_banking77": "many_adapters.py --rows banking77 --rounds 8",
    "many_adapters_banking77_batch1": "many_adapters.py --rows banking77 --batch 1 --rounds 12",
    "many_adapters_banking77_batch1_nf4": "many_adapters.py --rows banking77 --batch 1 --quantized --rounds 12",
    "many_adapters_batch1": "many_adapters.py --batch 1 --rounds 12",
    "many_adapters_batch1_nf4": "many_adapters.py --batch 1 --quantized --rounds 12",
    "merge_memory": "merge_memory.py",
    "merge_rounding": "merge_rounding.py",
    "neighbour": "neighbour.py --rounds 3",
    "pairs_on_one_folder": "pairs_on_one_folder.py --pairs 200",
    "planned": "planned.py",
    "products": "products.py",
    "kills": "kills.py --a-run 10",
    "lint_speed": "lint_speed.py",
    "long_conversations": "long_conversations.py BEFORE --out long_conversations",
    "profile_step": "profile_step.py",
    "profile_step_six_adapters": "profile_step.py --ranks 2,4,8,16,32,64 --steps 3",
    "qlora_merge": "qlora_merge.py",
    "qlora_quality_banking77": "qlora_quality.py --data banking77",
    "qlora_quality_gsm8k": "qlora_quality.py --data gsm8k",
    "qlora_step": "qlora_step.py",
    "quantization_error": "quantization_error.py --text valid.txt --windows 64",
    "quantized_head": "quantized_head.py --text valid.txt",
    "serving": "serving_speed.py --rounds 3 --threads 2 "
    "--systems bandwidth,topwork,topwork_nf4,transformers,peft,llama_bf16,llama_q4_0",
    "serving_alone": "serving_speed.py --rounds 5 --threads 2 --systems bandwidth,topwork,topwork_nf4",
    "small_terms": "small_terms.py",
    "small_terms_nf4": "small_terms.py --quantized",
    "soak": "soak.py",
    "streaming_memory": "streaming_memory.py",
    "streaming_memory_auto": "streaming_memory.py --tokenizer auto",
    "sweep_banking77_rank": "sweeps.py --data banking77 --preset rank --rows 800 --test-rows 160",
    **{
        f"sweep_banking77_{preset}": f"sweeps.py --data banking77 --preset {preset} --rows 480 --test-rows 120"
        for preset in ("learning-rate", "methods", "scaling", "targets")
    },
    **{
        f"sweep_gsm8k_{preset}": f"sweeps.py --data gsm8k --preset {preset}"
        for preset in ("methods", "rank", "scaling", "targets")
    },
    "sweep_gsm8k_learning-rate": "sweeps.py --data gsm8k --preset learning-rate --seeds 2",
    "sweep_e2e_nlg_learning-rate": "sweeps.py --data e2e_nlg --preset learning-rate --seeds 2",
}
"""What made a record, without folders, as far as the record (or docs/log.md) tells."""


def decisions() -> str:
    """docs/decisions/README.md."""
    lines = [
        "# Decisions\n",
        "Choices that somebody will question, and why they were made. Written by `python tools/index_pages.py` "
        "(`make docs`)\nfrom the files.\n",
        "| | title | still true? what it decided |",
        "| ---: | --- | --- |",
        *(_decision(file) for file in sorted(DECISIONS.glob("[0-9]*.md"))),
    ]
    return "\n".join(lines) + "\n"


def records() -> str:
    """benchmarks/results/README.md."""
    stems = sorted({file.stem for file in RECORDS.iterdir() if file.suffix == ".json"})
    lines = [
        "# Records\n",
        "What the benchmarks printed, the losing figures too. Written by `python tools/index_pages.py` (`make docs`)\n"
        "from the files. The commands (`python benchmarks/…`) leave out folders; its script tells the rest.\n",
        "| record | question | made by | when, commit, threads |",
        "| --- | --- | --- | --- |",
        *(_record(stem, stems) for stem in stems),
    ]
    return "\n".join(lines) + "\n"


def _decision(file: Path) -> str:
    text = file.read_text("utf-8")
    number, title = re.match(r"# (\d+)\. (.*)", text).groups()  # type: ignore[union-attr]
    quoted = [line[2:] for line in text.split("\n\n")[1].split("\n") if line.startswith("> ")]
    if not quoted:
        raise SystemExit(
            f"{file} has no quoted lines below its heading; say there whether it holds, and what it decided"
        )
    return f"| {number} | [{title}]({file.name}) | {' '.join(quoted)} |"


def _record(stem: str, stems: list[str]) -> str:
    if stem not in COMMANDS:
        raise SystemExit(f"{RECORDS / stem}.json: nobody knows what made it; add its command to COMMANDS in {__file__}")
    command = COMMANDS[stem]
    record = json.loads((RECORDS / f"{stem}.json").read_text("utf-8"))
    files = [file for file in sorted(RECORDS.iterdir()) if _stem(file, stems) == stem and file.suffix != ".md"]
    beside = ", ".join(f"[{file.stem.removeprefix(stem).strip('_') or file.suffix[1:]}]({file.name})" for file in files)
    page = f"[{stem}]({stem}.md)" if (RECORDS / f"{stem}.md").exists() else stem
    question = record.get("what") or _question(command.split()[0])
    return f"| {page} ({beside}) | {question} | `{command}` | {_when(record)} |"


def _stem(file: Path, stems: list[str]) -> str:
    """The record that a file belongs to: the longest whose name it begins with."""
    return max((stem for stem in stems if file.stem == stem or file.name.startswith(stem + "_")), key=len, default="")


def _question(script: str) -> str:
    """The first sentence of a benchmark's docstring."""
    told = ast.get_docstring(ast.parse((ROOT / "benchmarks" / script).read_text("utf-8")))
    assert told is not None
    return " ".join(told.split("\n\n")[0].split())


def _when(record: dict[str, Any]) -> str:
    around = record.get("surroundings")
    if around is None:
        return "not told"
    return f"{around['date']}, {around['commit']}, {around['hardware']['threads']}"


if __name__ == "__main__":
    (DECISIONS / INDEX).write_text(decisions(), encoding="utf-8")
    (RECORDS / INDEX).write_text(records(), encoding="utf-8")
