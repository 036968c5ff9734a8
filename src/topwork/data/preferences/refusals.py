"""What objective sft says of rows that compare answers, judge them or have none, and how one of them is learned."""

from collections.abc import Mapping, Sequence

from topwork.common.errors import DataError
from topwork.common.yaml_text import in_yaml
from topwork.data.config import DataConfig
from topwork.data.meaning.fields import first_called
from topwork.data.preferences.shapes import ANSWERS, KINDS, Fields, Kind, Shape, shape_of
from topwork.data.preferences.talks import SPEAKS, is_talk, respelled, role_of


def refuse_preferences(config: DataConfig, rows: Sequence[Fields], found: Sequence[str]) -> None:
    """Raises DataError where objective sft is given what compares or judges answers, and the recipe does not say which
    of them is to be learned."""
    named = {"chosen": "preference", "rejected": "preference", "label": "kto"}
    asked = next((named[name] for name in config.columns if name in named), config.format)
    if asked not in KINDS and (config.format != "auto" or config.columns):
        return
    rows = [respelled(fields, config) for fields in rows]
    kinds: Sequence[Kind] = [kind for kind in KINDS if asked == kind] or ["preference", "kto"]
    for kind in kinds:
        shape = shape_of(kind, rows, found, config.columns)
        if shape is not None:
            raise DataError(_refusal(shape, rows))
    if asked in KINDS:
        raise DataError(
            f"data.format {asked} is for {_OBJECTIVES[kinds[0]]}, while training.objective is sft, which learns "
            f"answers as they stand; leave it out, and say in data.columns which of {', '.join(found)} holds them"
        )


_OBJECTIVES: dict[Kind, str] = {
    "preference": "a preference objective (DPO, ORPO)", "kto": "a preference objective (KTO)",
    "prompts": "an objective that writes the answers itself (GRPO)",
}  # fmt: skip


def _refusal(shape: Shape, rows: Sequence[Fields]) -> str:
    what = {
        "preference": "preference data ({}): they compare answers and need",
        "kto": "preference data ({}): they judge answers and need",
        "prompts": "prompts without answers ({}): they need",
    }[shape.kind].format(shape.told)
    one = {"preference": "the chosen answer", "kto": "every answer, whatever its label,", "prompts": "answers"}
    last = ", and data.train_on: last_answer for the last of its turns alone" if _answers_before(shape, rows) else ""
    return (
        f"these rows are {what} {_OBJECTIVES[shape.kind]}, while training.objective is sft. "
        f"To learn {one[shape.kind]} as {'they stand' if shape.kind == 'prompts' else 'it stands'}, set "
        f"{shape.alone}{last}"
    )


def _answers_before(shape: Shape, rows: Sequence[Fields]) -> bool:
    """Whether the talk of a row has answers before the last one."""
    column, own = next(iter(shape.answers[0].values())), shape.format in ("messages", "sharegpt")
    values = (fields.get(column) for fields in rows)
    talks = (value.get("messages") if isinstance(value, Mapping) else value for value in values)
    return any(is_talk(talk) and sum(role_of(turn) in SPEAKS for turn in talk) > own for talk in talks)


def no_answers(found: Sequence[str]) -> str | None:
    """What to say of rows that objective sft cannot read because they are prompts alone; None where they are not."""
    prompt = first_called(("prompt",), found)
    if prompt is None or first_called(ANSWERS, found):
        return None
    rest = [name for name in found if name != prompt]
    way = in_yaml({"prompt": prompt, "completion": rest[0] if len(rest) == 1 else "COLUMN"})
    where = f"If {'one of ' if len(rest) > 1 else ''}{', '.join(rest)} holds them" if rest else "Give each row one, and"
    return (
        f"no answers: these rows are prompts (column {prompt}) beside which no column is known to hold any, while "
        f"training.objective is sft, which learns answers. {where}{',' if rest else ''} set data.columns: {way}"
    )
