"""One training step after another, each when it is asked for: a line comes in, the step is taken, its seconds go out.

    python -m peers.stepwise JOB.json topwork|trl_tuned|peft_loop [auto|THREADS]      (in benchmarks/)

Every step has the same rows. `topwork` looks at its threads before each step, as its loop does; a number holds them.
The peers are those of compare.py.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import Job, peak_mib, read_chats
from topwork.common.threads import let_waiting_threads_sleep

Steps = Iterator[dict[str, Any]]


def topwork_steps(job: Job, asked: str) -> Steps:
    """What each step says beside its seconds, once it is done; begun as the next is asked for."""
    let_waiting_threads_sleep()  # before torch comes, as the command line does
    from peers.topwork_step import open_adapted, read_examples

    from topwork.ops.threads import computing_threads

    trained = open_adapted(job.model_name, job.r, job.lora_alpha)
    examples = read_examples(trained.base, job.ordered, job.max_length)[: job.batch]
    passes = trained.passes(examples, sum(len(example.tokens) for example in examples))
    learners = [trained.learner(name) for name in trained.adapters.configs]
    with computing_threads("auto" if asked == "auto" else int(asked)) as threads:
        yield {}
        while True:
            told = threads.look()
            [result] = trained.steps(learners, passes)
            yield {"threads": threads.count, "told": told, "loss": result.loss, "tokens": result.tokens}


def peft_steps(job: Job, _: str) -> Steps:
    """The bare loop of peft_loop.py."""
    import torch
    from peers.peft_loop import adapted, collate, encode, padding_of, train_step, trained_parameters
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    rows = [encode(tokenizer, chat, job.max_length) for chat in read_chats(job.ordered)[: job.batch]]
    batch, model = collate(rows, padding_of(tokenizer)), adapted(job).train()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=job.learning_rate, weight_decay=0.0, fused=True)
    yield {}
    while True:
        loss, _norm = train_step(model, optimizer, [batch], job.max_grad_norm)
        tokens = int(batch["attention_mask"].sum())
        yield {"threads": torch.get_num_threads(), "told": None, "loss": loss, "tokens": tokens}


def wait_and_tell(steps: Steps) -> None:
    """A step for each line that comes in, until none does."""
    next(steps)
    say({})
    for _ in sys.stdin:
        start = time.perf_counter()
        done = next(steps)
        say({"seconds": time.perf_counter() - start, **done})


def say(done: dict[str, Any]) -> None:
    print(json.dumps({**done, "peak_mib": peak_mib()}), flush=True)


def trl_tells(job: Job) -> None:
    """SFTTrainer as trl_sft.py has it, whose steps wait in a callback."""
    import tempfile

    import torch
    from datasets import Dataset
    from peers.trl_sft import set_initial, settings
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    class Asked(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                sys.exit()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            say({"seconds": time.perf_counter() - self.start, "threads": torch.get_num_threads(), "told": None})

    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in read_chats(job.ordered)]
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.bfloat16),
            args=settings(job, "tuned", job.batch, out),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_dir),
            callbacks=[Asked()],
            peft_config=LoraConfig(
                r=job.r, lora_alpha=job.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        set_initial(trainer.model, job.initial)
        say({})
        trainer.train()


STEPS: dict[str, Callable[[Job, str], Steps]] = {"topwork": topwork_steps, "peft_loop": peft_steps}


def main(path: str, system: str, threads: str = "auto") -> None:
    job = Job.read(path)
    if system == "trl_tuned":
        trl_tells(job)
    else:
        wait_and_tell(STEPS[system](job, threads))


if __name__ == "__main__":
    main(*sys.argv[1:4])
