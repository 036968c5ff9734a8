"""Rows of parquet and arrow files and of `datasets`: what their columns hold as what it was when it was written."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from topwork.common.errors import DataError
from topwork.common.memory import out_of_memory
from topwork.common.os_errors import why
from topwork.data.files.decoding import DataFile

Found = Iterator[tuple[dict[str, Any], str]]
_BATCH_ROWS = 1000
_EMPTY_OBJECTS = ("arguments", "parameters", "properties")
"""Keys whose empty object says something: a call without arguments, a tool without parameters."""
_MEDIA = {"Image": "images", "Audio": "audio", "Video": "videos", "Pdf": "PDFs"}
_Reader = Callable[[Any], Any]


def parquet_rows(file: DataFile) -> Found:
    """Rows of a parquet file, batch by batch. Raises DataError for what is no parquet, or no text."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            yield from _batches_rows(file, table.iter_batches(_BATCH_ROWS), table.schema_arrow)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{file.path} cannot be read as parquet ({_first_line(error)}); fetch it again") from error


def arrow_rows(file: DataFile) -> Found:
    """Rows of an arrow file: a stream, as `datasets` writes it, or a file, as feather is."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file.path)) as source:
            if source.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                source.seek(0)
                table = pyarrow.ipc.open_stream(source)
                batches = iter(table)
            yield from _batches_rows(file, batches, table.schema)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{file.path} cannot be read as arrow ({_first_line(error)}); fetch it again") from error


def dataset_rows(file: DataFile, table: Any) -> Found:
    """Rows of a `datasets.Dataset`, in the order in which it shows them."""
    features = table.features.to_dict()
    batches = table.with_format("arrow").iter(_BATCH_ROWS)
    yield from _rows(file, batches, _readers(file, table.features.arrow_schema, features))


def _first_line(error: Exception) -> str:
    return (why(error).strip() or type(error).__name__).splitlines()[0]


def _batches_rows(file: DataFile, batches: Iterator[Any], schema: Any) -> Found:
    metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(metadata).get("info", {}).get("features") or {}
    except (ValueError, AttributeError):
        features = {}
    yield from _rows(file, batches, _readers(file, schema, features))


def _rows(file: DataFile, batches: Iterator[Any], readers: dict[str, _Reader | None]) -> Found:
    index = 0
    for batch in batches:
        wide = batch.select([name for name in batch.schema.names if name in readers])
        wide.validate(full=True)  # what a damaged file says of itself may lie outside of it
        for row in wide.to_pylist():
            fields = {}
            for name, value in row.items():
                reader = readers[name]
                try:
                    fields[name] = value if reader is None or value is None else reader(value)
                except UnicodeDecodeError as error:
                    raise DataError(_no_text(file, name, f"bytes that are no text (row {index})")) from error
            yield fields, f"[{index}]"
            index += 1


def _no_text(file: DataFile, column: str, what: str) -> str:
    return (
        f"{file.path}: the column {column} holds {what}, and only text is learned here. Take the column out, or name "
        "those to learn: data.columns: {prompt: COLUMN, completion: COLUMN}"
    )


def _readers(file: DataFile, schema: Any, features: Mapping[str, Any]) -> dict[str, _Reader | None]:
    """What turns a column's values into those of rows, None where nothing has to. Where the recipe says which columns
    it reads, those of pictures and sound are left out. Raises DataError for them where it does not."""
    found: dict[str, _Reader | None] = {}
    for column in schema:
        media = _media(column.type, features.get(column.name))
        if media and not file.chosen:
            raise DataError(_no_text(file, column.name, media))
        if media:
            file.note(f"its column {column.name}, which holds {media}, is not read")
        else:
            found[column.name] = _reader(column.type, features.get(column.name))
    return found


def _media(kind: Any, feature: Any) -> str:
    """What a column holds that is no text, wherever in its values; or nothing."""
    if isinstance(feature, Mapping) and feature.get("_type") in _MEDIA:
        return _MEDIA[feature["_type"]]
    import pyarrow.types as types

    if types.is_struct(kind):
        names = {field.name for field in kind}
        if names == {"bytes", "path"} and _is_binary(kind.field("bytes").type):
            return "images or audio"
        inner = [(field.type, _inner(feature, field.name)) for field in kind]
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = [(kind.value_type, _inner(feature, None))]
    else:
        return ""
    return next((what for each in inner if (what := _media(*each))), "")


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _inner(feature: Any, name: str | None) -> Any:
    """The feature of a list's items (name None) or of an object's key."""
    if isinstance(feature, list):
        return feature[0] if name is None and feature else None
    if not isinstance(feature, Mapping):
        return None
    if name is None:
        return feature.get("feature")
    inner = feature.get("feature")  # an older Sequence of an object is an object of lists
    if isinstance(inner, Mapping) and name in inner:
        return {"feature": inner[name], "_type": "Sequence"}
    return feature.get(name)


def _reader(kind: Any, feature: Any) -> _Reader | None:
    import pyarrow.types as types

    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names"):
        return _label(feature["names"])
    if types.is_dictionary(kind):
        return _reader(kind.value_type, feature)
    if types.is_struct(kind):
        return _object({field.name: _reader(field.type, _inner(feature, field.name)) for field in kind})
    if types.is_map(kind):
        return _map(_reader(kind.item_type, None))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _reader(kind.value_type, _inner(feature, None))
        return None if item is None else _list(item)
    return _scalar(kind)


def _scalar(kind: Any) -> _Reader | None:
    import pyarrow.types as types

    if types.is_float16(kind) or types.is_float32(kind):
        return _short_number(np.float16 if types.is_float16(kind) else np.float32)
    if types.is_floating(kind):
        return lambda value: value if math.isfinite(value) else None
    if types.is_decimal(kind):
        return lambda value: int(value) if kind.scale <= 0 else format(value, "f")
    if _is_binary(kind):
        return lambda value: value.decode("utf-8")
    if types.is_temporal(kind):
        return lambda value: value.isoformat() if hasattr(value, "isoformat") else str(value)
    return None


def _short_number(kind: type[np.floating[Any]]) -> _Reader:
    """The number of the fewest digits that is this one in the file's precision: 0.1, which as a double has 17."""
    return lambda value: float(str(kind(value))) if math.isfinite(value) else None


def _label(names: list[str]) -> _Reader:
    """A class by its name; none where a row has no class, which is -1."""
    return lambda value: names[value] if 0 <= value < len(names) else None


def _list(item: _Reader) -> _Reader:
    return lambda values: [None if value is None else item(value) for value in values]


def _map(item: _Reader | None) -> _Reader:
    return lambda pairs: {key: value if item is None or value is None else item(value) for key, value in pairs}


def _object(keys: dict[str, _Reader | None]) -> _Reader:
    """An object without the keys that only other rows' objects have: Arrow writes those as null."""

    def read(value: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, item in value.items():
            reader = keys[key]
            item = item if reader is None or item is None else reader(item)
            hollow = item == {} and isinstance(item, dict) and key not in _EMPTY_OBJECTS
            if item is not None and not (hollow and value[key]):
                found[key] = item
        return found

    return read
