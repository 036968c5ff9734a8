"""Where the rules' reasons are from. `how` says how well each is known: a record of this repository, a page that was
read, one of which excerpts were read, or a paper from memory, not read again."""

from dataclasses import dataclass
from typing import Literal

How = Literal["measured here", "read", "excerpts read", "from memory", "arithmetic"]


@dataclass(frozen=True)
class Source:
    """A record or a publication. `date` is the record's, or the day of the last look."""

    text: str
    how: How
    date: str

    def __str__(self) -> str:
        return f"{self.text} ({self.how}, {self.date})"


def _record(file: str, date: str, part: str = "") -> Source:
    return Source(f"benchmarks/results/{file}.md{part}", "measured here", date)


BANKING_RATES = _record("sweep_banking77_learning-rate", "2026-11-22")
BANKING_RANKS = _record("sweep_banking77_rank", "2026-11-22")
BANKING_TARGETS = _record("sweep_banking77_targets", "2026-11-22")
BANKING_SCALES = _record("sweep_banking77_scaling", "2026-11-22")
BANKING_METHODS = _record("sweep_banking77_methods", "2026-11-22")
BANKING = _record("banking77", "2026-11-22")
BANKING_BATCH = Source("docs/log.md, banking77, one epoch, beside TRL + PEFT", "measured here", "2026-11-22")
GSM8K_RATES = _record("sweep_gsm8k_learning-rate", "2026-11-29")
E2E_RATES = _record("sweep_e2e_nlg_learning-rate", "2026-11-29")
GSM8K_SCALES = _record("sweep_gsm8k_scaling", "2026-11-22")
GSM8K_TARGETS = _record("sweep_gsm8k_targets", "2026-11-22")
GSM8K_METHODS = _record("sweep_gsm8k_methods", "2026-11-22")
QLORA_BANKING = _record("qlora_quality_banking77", "2026-11-22")
QLORA_GSM8K = _record("qlora_quality_gsm8k", "2026-11-22")
QLORA_STEP = Source("docs/qlora.md, a step over NF4 and its memory", "measured here", "2026-11-22")
INTENTS = Source(
    "benchmarks/sweeps/banking77.yaml: the longest of 77 intents has fewer than 24 tokens",
    "measured here",
    "2026-11-22",
)
SUPPORT = Source("README.md, the quickstart's table (examples/support)", "measured here", "2026-11-22")
DROPOUT = _record("beside_lora", "2026-11-22")
DROPOUT_AMX = _record("beside_lora_amx", "2026-12-01")
OPTIMIZERS = Source("docs/qlora.md, adamw_8bit", "measured here", "2026-11-22")
KEPT_BEST = Source("docs/options.md, training.load_best_model_at_end", "read", "2026-11-29")
FITTING = Source("docs/data.md, Lengths: what `too_long` does", "read", "2026-11-29")
TEMPLATES = Source("docs/data.md, Templates", "read", "2026-11-29")
ARITHMETIC = Source("the binomial's standard error, √(p (1 − p) / n)", "arithmetic", "2026-11-29")

WITHOUT_REGRET = Source(
    'Schulman et al., "LoRA Without Regret", Thinking Machines, 2025, by TRL\'s page lora_without_regret',
    "excerpts read", "2026-11-29",
)  # fmt: skip
TINKER_RATE = Source(
    "tinker-cookbook, hyperparam_utils.py and docs/supervised-learning/sl-hyperparams: LR = 5e-5 · 10 · (2000 / "
    "width)^p, p = 0.781 for llamas, 0.0775 for Qwen", "excerpts read", "2026-11-29",
)  # fmt: skip
TINKER_RANK = Source("Tinker's documentation, LoRA Primer, the choice of a rank", "excerpts read", "2026-11-29")
PEFT_ANSWERS = Source("peft, method_comparison/MetaMathQA, max_new_tokens 300", "read", "2026-08-21")
RATE_MATTERS = Source('"Learning Rate Matters", arXiv:2602.04998v2', "excerpts read", "2026-11-29")
OPENAI_AMOUNT = Source(
    "OpenAI's guide to supervised fine-tuning, \"Right number of examples\"", "read", "2026-11-29"
)  # fmt: skip
MICROSOFT_CHOICE = Source(
    'Microsoft Learn, "Compare and combine optimization strategies"', "excerpts read", "2026-11-29"
)  # fmt: skip
CHANGING_FACTS = Source(
    '"Building Reliable AI Systems" (Manning), section 5.1.1, prompt, retrieval or fine-tuning', "excerpts read",
    "2026-11-29",
)  # fmt: skip
PROVENANCE = Source(
    'Lewis et al., "Retrieval-Augmented Generation", arXiv:2005.11401, on provenance', "from memory", "2026-11-29"
)  # fmt: skip
NEW_FACTS = Source(
    'Gekhman et al., "Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?", arXiv:2405.05904',
    "from memory", "2026-11-29",
)  # fmt: skip
RETRIEVAL = Source(
    'Ovadia et al., "Fine-Tuning or Retrieval?", arXiv:2312.05934', "from memory", "2026-11-29"
)  # fmt: skip
LEARNS_LESS = Source(
    'Biderman et al., "LoRA Learns Less and Forgets Less", arXiv:2405.09673, abstract', "read", "2026-11-29"
)
CAPACITY = Source("Allen-Zhu and Li, arXiv:2404.05405: a parameter holds about two bits", "from memory", "2026-11-29")
QLORA = Source("Dettmers et al., QLoRA, arXiv:2305.14314, its hyperparameters", "from memory", "2026-11-29")
REPEATS = Source(
    'Muennighoff et al., "Scaling Data-Constrained Language Models", arXiv:2305.16264', "from memory", "2026-11-29"
)  # fmt: skip
STOPPING = Source('Prechelt, "Early Stopping — But When?", 1998', "from memory", "2026-11-29")
