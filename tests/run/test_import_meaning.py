"""What other tools' keys mean, said in ours. The configs are of our own making, with their keys and shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from topwork.recipe.recipe import load_recipe
from topwork.run.import_ import Imported, import_recipe, write_recipe

AXOLOTL = """
base_model: owner/base
load_in_4bit: true
adapter: qlora
datasets:
  - path: owner/rows
    type: alpaca
sequence_len: 512
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
learning_rate: 1e-4
optimizer: adamw_bnb_8bit
lora_r: 8
lora_alpha: 16
val_set_size: 0.1
"""
LLAMAFACTORY = """
model_name_or_path: owner/base
stage: sft
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: tickets
cutoff_len: 256
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 2.0e-4
"""
TRL = """
model_name_or_path: owner/base
dataset_name: owner/rows
use_peft: true
lora_r: 4
max_steps: 30
"""
TORCHTUNE = """
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: True
  lora_rank: 64
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/
  output_dir: ${output_dir}
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 256
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
batch_size: 4
gradient_accumulation_steps: 8
epochs: 1
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
"""
MLX = """
model: Qwen/Qwen3-0.6B
fine_tune_type: lora
num_layers: 4
iters: 100
batch_size: 2
grad_accumulation_steps: 5
data: owner/rows
lora_parameters: {rank: 8, scale: 2.5, dropout: 0.1, keys: [self_attn.q_proj]}
"""
UNSLOTH = """
from unsloth import FastLanguageModel
max_seq_length = 512
four = True
model, tokenizer = FastLanguageModel.from_pretrained("owner/base", max_seq_length = max_seq_length, load_in_4bit = four)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 8, random_state = 7)
dataset = load_dataset("owner/rows", split = "train[:100]")
trainer = SFTTrainer(model = model, train_dataset = dataset, args = SFTConfig(
    per_device_train_batch_size = 2, gradient_accumulation_steps = 4, learning_rate = 2e-4, max_steps = 60))
if False:
    FastLanguageModel.from_pretrained("owner/other")
"""


def imported(folder: Path, text: str, name: str = "config.yaml", **asked: Any) -> Imported:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return import_recipe(file, **asked)


def value(found: Imported, key: str) -> Any:
    at: Any = found.values
    for part in key.split("."):
        at = at[part]
    return at


def fate(found: Imported, key: str) -> tuple[str, int | None, str]:
    return next((told.fate, told.given.line, told.note) for told in found.told if told.given.key == key)


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """A folder with LLaMA-Factory's list of data sets."""
    (tmp_path / "data").mkdir()
    info = {
        "tickets": {"file_name": "tickets.json", "columns": {"prompt": "question", "response": "answer"}},
        "talks": {
            "hf_hub_url": "owner/talks",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "customer", "assistant_tag": "agent"},
        },
        "pairs": {"file_name": "pairs.json", "ranking": True},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


EXPECTED = {
    "axolotl": (AXOLOTL, {
        "model.model_name_or_path": "owner/base", "quantization.load_in_4bit": True, "adapter.method": "lora",
        "adapter.r": 8, "adapter.lora_alpha": 16, "data.train": "owner/rows", "data.format": "alpaca",
        "data.max_length": 512, "data.too_long": "drop", "data.eval_fraction": 0.1, "training.batch_size": 8,
        "training.num_train_epochs": 2, "training.learning_rate": 1e-4, "training.optim": "adamw_8bit",
        "training.seed": 42,
    }),
    "trl": (TRL, {
        "adapter.method": "lora", "adapter.r": 4, "adapter.lora_alpha": 32, "adapter.lora_dropout": 0.05,
        "adapter.target_modules": ["q_proj", "v_proj"], "training.learning_rate": 2e-5, "training.batch_size": 8,
        "training.max_steps": 30, "training.lr_scheduler_type": "linear", "training.warmup_steps": 0,
        "data.max_length": 1024, "data.too_long": "truncate", "data.eval_fraction": 0.0,
    }),
    "torchtune": (TORCHTUNE, {
        "model.model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct", "adapter.r": 64, "adapter.lora_alpha": 16,
        "adapter.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data.train": "yahma/alpaca-cleaned", "data.train_on": "all", "training.batch_size": 32,
        "training.lr_scheduler_type": "constant", "training.weight_decay": 0.01, "training.max_grad_norm": 0.0,
    }),
    "mlx-lm": (MLX, {
        "adapter.lora_alpha": 20, "adapter.r": 8, "adapter.lora_dropout": 0.1, "training.max_steps": 20,
        "adapter.layers_to_transform": [24, 25, 26, 27], "training.batch_size": 10, "training.eval_steps": 40,
        "training.max_grad_norm": 0.0, "training.lr_scheduler_type": "constant", "data.train_on": "all",
        "data.eval": {"path": "owner/rows", "split": "valid"}, "training.weight_decay": 0.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("tool", EXPECTED)
def test_keys_keep_their_meaning(tool: str, tmp_path: Path) -> None:
    text, expected = EXPECTED[tool]
    found = imported(tmp_path, text)
    assert found.tool == tool
    assert found.whole, (found.missing, found.refused)
    assert {key: value(found, key) for key in expected} == expected
    assert not found.of("unknown")
    recipe = load_recipe(write_recipe(found, tmp_path / "recipe.yaml"))  # what is written is what was meant
    assert recipe.training.batch_size == value(found, "training.batch_size")


def test_a_llamafactory_data_set_is_what_its_list_says(tickets: Path) -> None:
    found = imported(tickets, LLAMAFACTORY)
    assert found.whole
    assert value(found, "data.train") == f"{tickets}/data/tickets.json"
    assert value(found, "data.columns") == {"instruction": "question", "output": "answer"}
    assert value(found, "adapter.target_modules") == ["q_proj", "v_proj"]
    assert value(found, "adapter.lora_alpha") == 8  # twice the rank, where it is left out
    assert value(found, "training.batch_size") == 6
    more = imported(tickets, LLAMAFACTORY + "add_tokens: <a>,<b>\nresize_vocab: true\n")
    assert value(more, "model.new_tokens") == ["<a>", "<b>"]
    assert more.whole

    talks = imported(tickets, LLAMAFACTORY.replace("dataset: tickets", "dataset: talks"))
    assert value(talks, "data.columns") == {"conversations": "turns"}
    assert value(talks, "data.roles") == {"customer": "user", "agent": "assistant"}
    assert value(talks, "data.message_keys") == {"who": "role", "what": "content"}


def test_a_data_set_that_is_not_in_the_list_is_missing(tickets: Path) -> None:
    found = imported(tickets, LLAMAFACTORY.replace("dataset: tickets", "dataset: ticket"))
    assert not found.whole
    assert "did you mean 'tickets'" in found.missing[0]


def test_preferences_make_no_recipe(tickets: Path) -> None:
    found = imported(tickets, LLAMAFACTORY.replace("dataset: tickets", "dataset: pairs"))
    assert "preferences" in found.refused[0]


def test_devices_multiply_a_batch(tmp_path: Path) -> None:
    assert value(imported(tmp_path, AXOLOTL, devices=4), "training.batch_size") == 32
    assert value(imported(tmp_path, MLX, devices=4), "training.batch_size") == 10  # mlx-lm's is of all devices


def test_packing_is_needless_but_changes_what_a_batch_counts(tmp_path: Path) -> None:
    kind, line, note = fate(imported(tmp_path, AXOLOTL + "sample_packing: true\n"), "sample_packing")
    assert (kind, line) == ("needless", 17)
    assert "raise training.batch_size" in note
    assert "raise" not in fate(imported(tmp_path, AXOLOTL + "sample_packing: false\n"), "sample_packing")[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora_target_linear: true", {"adapter.target_modules": "all-linear"}),
        ("peft_use_dora: true", {"adapter.use_dora": True}),
        ("warmup_steps: 0.2", {"training.warmup_ratio": 0.2}),
        ("warmup_steps: 20", {"training.warmup_steps": 20}),
        ("train_on_inputs: true", {"data.train_on": "all"}),
        ("lora_modules_to_save: [lm_head]", {"adapter.modules_to_save": ["lm_head"]}),
        ("fp16: true\nbf16: false", {"model.dtype": "float16"}),
        ("bf16: false", {"model.dtype": "float32"}),
        ("max_steps: 7", {"training.max_steps": 7}),
        ("tokens: [<a>, <b>, <a>]", {"model.new_tokens": ["<a>", "<b>"]}),
        ("resize_token_embeddings_to_32x: true", {"model.pad_to_multiple_of": 32}),
        ("chat_template: chatml", {"data.chat_template": "chatml"}),
        ("peft: {loftq_config: {loftq_bits: 4}}", {"adapter.init_lora_weights": "loftq"}),
    ],
)
def test_axolotl_one_by_one(line: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = imported(tmp_path, f"{AXOLOTL}{line}\n")
    assert {key: value(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("neftune_noise_alpha: 5", "no noise"),
        ("relora: true", "in turn"),
        ("lr_groups: [{name: a}]", "one learning rate"),
        ("evals_per_epoch: 4", "steps are counted"),
        ("chat_template: llama3", "own chat template"),
        ("special_tokens: {eos_token: x}", "special tokens"),
    ],
)
def test_what_has_no_equal_is_told_with_its_line(line: str, says: str, tmp_path: Path) -> None:
    found = imported(tmp_path, f"{AXOLOTL}{line}\n")
    told = found.of("no equal")
    assert len(told) == 1
    assert told[0].given.line == 17
    assert says in told[0].note
    assert f"line 17: {told[0].given.key}" in found.recipe  # and stands in the recipe's head


def test_an_optimizer_that_is_not_here_is_told(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL.replace("adamw_bnb_8bit", "lion_8bit"))
    assert "adamw is taken" in fate(found, "optimizer")[2]
    assert "optim" not in found.values["training"]


def test_without_an_adapter_all_weights_are_trained(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL.replace("adapter: qlora\n", "").replace("load_in_4bit: true\n", ""))
    assert found.values["adapter"] == {"method": "full"}
    assert fate(found, "lora_r")[0] == "needless"
    assert found.whole


def test_conversations_of_their_own_spelling(tmp_path: Path) -> None:
    rows = """  - path: owner/talks
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
    roles: {user: [human], assistant: [gpt, bot]}
"""
    found = imported(tmp_path, AXOLOTL.replace("  - path: owner/rows\n    type: alpaca\n", rows))
    assert value(found, "data.columns") == {"messages": "turns"}
    assert value(found, "data.message_keys") == {"from": "role", "value": "content"}
    assert value(found, "data.roles") == {"human": "user", "gpt": "assistant", "bot": "assistant"}


def test_a_prompt_of_ones_own_is_its_whole_text(tmp_path: Path) -> None:
    rows = """  - path: rows.jsonl
    type:
      field_instruction: ask
      field_output: reply
      format: "[Q] {instruction} [A]"
"""
    found = imported(tmp_path, AXOLOTL.replace("  - path: owner/rows\n    type: alpaca\n", rows))
    assert value(found, "data.columns") == {"prompt": "[Q] {ask} [A]", "completion": "reply"}
    assert value(found, "data.chat_template") == "raw"


def test_plain_text_is_cut_up_where_they_cut_it_up(tmp_path: Path) -> None:
    rows = "  - path: owner/books\n    type: completion\n    field: body\n"
    found = imported(tmp_path, AXOLOTL.replace("  - path: owner/rows\n    type: alpaca\n", rows))
    assert value(found, "data.format") == "text"
    assert value(found, "data.columns") == {"text": "body"}
    assert value(found, "data.too_long") == "split"


def test_several_data_sets_keep_their_own_formats(tmp_path: Path) -> None:
    more = "  - path: owner/books\n    type: completion\n    split: train[:50]\nsequence_len"
    found = imported(tmp_path, AXOLOTL.replace("sequence_len", more))
    assert value(found, "data.train") == [
        {"path": "owner/rows", "format": "alpaca"},
        {"path": "owner/books", "split": "train", "format": "text", "max_rows": 50},
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (AXOLOTL + "rl: dpo\n", "dpo.yaml"),
        (LLAMAFACTORY.replace("stage: sft", "stage: kto"), "kto.yaml"),
        (TORCHTUNE.replace("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.DPOLoss"), "tune.yaml"),
        ("trl grpo --model_name_or_path owner/base --dataset_name owner/rows\n", "grpo.sh"),
        ("from trl import DPOTrainer\nDPOTrainer(model='owner/base', args=DPOConfig())\nLoraConfig(r=4)\n", "dpo.py"),
    ],
)
def test_other_objectives_make_no_recipe(text: str, name: str, tickets: Path) -> None:
    found = imported(tickets, text, name)
    assert "Topwork has sft alone so far" in found.refused[0]
    assert not found.whole


# Scripts and command lines


def test_an_unsloth_script(tmp_path: Path) -> None:
    found = imported(tmp_path, UNSLOTH, "train.py")
    assert found.tool == "unsloth"
    assert found.whole
    expected = {
        "model.model_name_or_path": "owner/base", "quantization.load_in_4bit": True, "data.max_length": 512,
        "adapter.r": 8, "adapter.lora_alpha": 8, "training.batch_size": 8, "training.max_steps": 60,
        "training.optim": "adamw_8bit", "training.weight_decay": 0.01, "training.seed": 7, "data.train_on": "all",
        "data.train": {"path": "owner/rows", "split": "train", "max_rows": 100},
    }  # fmt: skip
    assert {key: value(found, key) for key in expected} == expected
    assert len(value(found, "adapter.target_modules")) == 7
    answers = imported(tmp_path, UNSLOTH + "trainer = train_on_responses_only(trainer)\n", "train.py")
    assert value(answers, "data.train_on") == "answers"


def test_a_notebook_is_told_by_cell_and_line(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Train"]},
        {"cell_type": "code", "source": ["!pip install unsloth\n", "%matplotlib inline\n"]},
        {"cell_type": "code", "source": "%%bash\necho {"},
        {"cell_type": "code", "source": UNSLOTH.splitlines(keepends=True)},
    ]
    found = imported(tmp_path, json.dumps({"cells": cells}), "train.ipynb")
    assert found.whole
    assert "cell 4, line 6: get_peft_model.r: 8" in found.recipe


def test_what_has_to_be_computed_is_not_read(tmp_path: Path) -> None:
    text = UNSLOTH.replace("r = 8", "r = int(os.environ['R'])").replace("max_steps = 60", "max_steps = steps()")
    found = imported(tmp_path, text + "max_seq_length = 1024\n", "train.py")
    unread = {told.given.key: told.value for told in found.of("not read")}
    assert unread == {
        "get_peft_model.r": "int(os.environ['R'])",
        "max_steps": "steps()",
        "from_pretrained.max_seq_length": "max_seq_length",  # bound to two values
    }
    assert "r" not in found.values["adapter"]


def test_a_script_is_never_run(tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    imported(tmp_path, trap + UNSLOTH, "train.py")
    assert not (tmp_path / "ran").exists()


def test_a_trl_script(tmp_path: Path) -> None:
    text = """
import torch
model = AutoModelForCausalLM.from_pretrained("owner/base", torch_dtype=torch.float16,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True))
args = SFTConfig(output_dir="out", learning_rate=3e-4, dataset_text_field="body")
SFTTrainer(model=model, args=args, train_dataset=load_dataset("json", data_files="rows.jsonl")["train"],
    peft_config=LoraConfig(r=16, lora_alpha=32, use_rslora=True, init_lora_weights="pissa"))
"""
    found = imported(tmp_path, text, "train.py")
    assert found.whole, found.missing
    expected = {
        "model.dtype": "float16", "quantization.bnb_4bit_quant_type": "fp4", "adapter.use_rslora": True,
        "quantization.bnb_4bit_use_double_quant": False, "adapter.init_lora_weights": "pissa", "data.format": "text",
        "data.columns": {"text": "body"}, "data.train": "rows.jsonl", "training.learning_rate": 3e-4,
    }  # fmt: skip
    assert {key: value(found, key) for key in expected} == expected


def test_a_command_line_with_its_launcher(tmp_path: Path) -> None:
    text = """#!/bin/bash
RATE=3e-4
accelerate launch --num_processes 4 trl/scripts/sft.py \\
    --model_name_or_path owner/base --dataset_name owner/rows \\
    --learning_rate $RATE --per_device_train_batch_size 2 \\
    --use_peft --lora_target_modules q_proj k_proj \\
    --output_dir $OUT
"""
    found = imported(tmp_path, text, "train.sh")
    assert value(found, "training.batch_size") == 8  # 2 x 1 x 4 devices
    assert value(found, "training.learning_rate") == 3e-4
    assert value(found, "adapter.target_modules") == ["q_proj", "k_proj"]
    assert fate(found, "learning_rate")[1] == 5
    assert [told.given.key for told in found.of("not read")] == ["output_dir"]


def test_an_mlx_command_and_its_config(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("lora_parameters: {rank: 4, scale: 2}\niters: 50\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "valid.jsonl").write_text("")
    command = "mlx_lm.lora --config lora.yaml --model owner/base --train --data ./rows --iters 20 --mask-prompt\n"
    found = imported(tmp_path, command, "train.sh")
    assert found.tool == "mlx-lm"
    assert value(found, "training.max_steps") == 20  # the command's own go before the file's
    assert value(found, "adapter.lora_alpha") == 8
    assert value(found, "data.train_on") == "last_answer"
    assert value(found, "data.eval") == "./rows/valid.jsonl"


def test_layers_that_cannot_be_counted_are_told(tmp_path: Path) -> None:
    found = imported(tmp_path, MLX.replace("Qwen/Qwen3-0.6B", "./nowhere"))
    assert "layers_to_transform" not in found.values["adapter"]
    assert "the last 4 layers" in fate(found, "num_layers")[2]
    every = imported(tmp_path, MLX.replace("num_layers: 4", "num_layers: -1"))
    assert fate(every, "num_layers")[0] == "needless"


def test_a_fused_attention_takes_one_adapter(tmp_path: Path) -> None:
    found = imported(tmp_path, TORCHTUNE.replace("llama3_2.lora_llama3_2_1b", "phi3.qlora_phi3_mini"))
    assert value(found, "adapter.target_modules") == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert value(found, "quantization.load_in_4bit") is True
