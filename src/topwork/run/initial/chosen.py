"""The lines of a new recipe: what the base, the rows, advice and memory ask for, each with its reason."""

from pathlib import Path

from topwork.data.config import called
from topwork.plan.advice.advise import Advice
from topwork.recipe.places import PATHS
from topwork.run.initial.known import Known
from topwork.run.initial.lines import Line
from topwork.run.initial.room import Fitted
from topwork.run.initial.sources import written

ANSWER_STEP, LONGEST_ANSWER = 16, 1024
"""`max_new_tokens` is a multiple of the one, and the other at most."""
GIVEN = "As asked for with --set."
_FOLDER = {f"{section}.{name}" for section, names in PATHS.items() for name in names}


def lines_of(known: Known, advice: Advice) -> list[Line]:
    """All but what memory asks for."""
    lines = [*_of_base(known), *_of_advice(known, advice), *_of_data(known), *_of_evaluation(known, advice)]
    lines.append(Line("output_dir", _run_folder(known.sources.name), "The run's folder, from the current folder on."))
    folder = known.out.parent
    given = [
        Line(key, written(value, folder) if key in _FOLDER and isinstance(value, str) else value, GIVEN)
        for key, value in known.given.items()
    ]
    return [*lines, *given]


def lines_of_memory(known: Known, fit: Fitted) -> list[Line]:
    """What is changed so that it fits, and the pass that was planned."""
    lines = []
    for change in fit.changes:
        why = f"Without it there is too little memory. {change.says[:1].upper()}{change.says[1:]}."
        if change.key == "data.max_length":
            why = f"{why} {known.lengths(int(change.value))}."
        lines.append(Line(change.key, change.value, why))
    if "training.tokens_per_pass" not in known.given:
        why = (
            "Left out, it is chosen from free memory when training begins; it decides memory and never the result. "
            f"Planned: {fit.sentence}."
        )
        lines.append(Line("training.tokens_per_pass", fit.fit.tokens_per_pass, why, off=True))
    return lines


def _of_base(known: Known) -> list[Line]:
    model = known.base.named
    named = written(model, known.out.parent) if Path(model).exists() else model
    return [
        Line("model.model_name_or_path", named, known.base.why),
        Line("model.dtype", "bfloat16", "What the frozen base is held and multiplied in."),
    ]


def _of_advice(known: Known, advice: Advice) -> list[Line]:
    lines = []
    for choice in advice.choices:
        why, off = choice.reason, choice.key == "quantization.load_in_4bit" and not choice.value
        if choice.key == "data.max_length":
            why = f"{why} {known.lengths(int(choice.value))}."
        if choice.key == "adapter.target_modules" and choice.value == "all-linear":
            why = f"Every linear layer but the output head. {why}"
        lines.append(Line(choice.key, True if off else choice.value, why, off))
    return lines


def _of_data(known: Known) -> list[Line]:
    folder, sources = known.out.parent, known.sources
    train = [written(path, folder) for path in sources.train]
    how = "; ".join(known.rows.told).removeprefix(f"{called(sources.train[0])}: ") if len(train) == 1 else ""
    how = how or "; ".join(known.rows.told)
    lines = [Line("data.train", train[0] if len(train) == 1 else train, f"{how[:1].upper()}{how[1:]}.")]
    if sources.eval:
        held = [written(path, folder) for path in sources.eval]
        why = "Named after validation: held out, to tell what was learned from what was learned by heart."
        lines.append(Line("data.eval", held[0] if len(held) == 1 else held, why))
    lines += [Line(f"data.{key}", getattr(known.rows.config, key), why) for key, why in known.rows.set.items()]
    if known.taken is not None:
        lines += [Line(f"data.{key}", value, known.taken.reasons[key]) for key, value in known.taken.options.items()]
    elif known.looked.kind != "text":
        lines.append(Line("data.chat_template", "chatml", _NO_TOKENIZER, off=True))
    if known.bad:
        lines.append(Line("data.on_bad_row", "drop", f"{known.unusable()}; they are left out, counted and named."))
    return lines


_NO_TOKENIZER = (
    "The base's tokenizer is not on this machine, so whether it has a chat template was not seen. Where it has none, "
    "training says so before anything is learned, and this line gives it one."
)


def _of_evaluation(known: Known, advice: Advice) -> list[Line]:
    lines = []
    if known.sources.test:
        why = "Rows that training never sees: `topwork eval` answers and scores these."
        lines.append(Line("evaluation.data", written(known.sources.test[0], known.out.parent), why))
    if known.taken is not None and known.looked.kind != "text":
        answer = known.taken.lengths.answer
        room = min(LONGEST_ANSWER, -(-(answer + 1) // ANSWER_STEP) * ANSWER_STEP)
        advised = [one.value for one in advice.choices if one.key == "evaluation.max_new_tokens"]
        room = max(room, *(value for value in advised if isinstance(value, int)), 0)
        why = f"The longest answer that was looked at has {answer:,} tokens, the end of its turn among them."
        lines.append(Line("evaluation.max_new_tokens", room, why))
    return lines


def _run_folder(name: str) -> str:
    """One that is not there yet, so that training begins in it."""
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    return next(folder for number in numbers if not Path(folder := f"runs/{name}{number}").exists())
