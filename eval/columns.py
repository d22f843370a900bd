"""From the samples' own JSON members to columns of a table: their names and their types.

Parts are written one by one, and none knows what is in the others. What a part decides depends on
its own rows alone; the rest is decided when all parts are there, by `agreed` and `in_agreement`.

A name can be taken: by one of the columns that every row has, by another name that differs in case
alone (a database would compare the wrong one), or where `{"a.b": 1, "a": {"b": 2}}` has two members
of one name. Such a member is kept as `json.NAME`. A field that holds text here and numbers there
becomes text.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

OWN: tuple[str, ...] = ("id", "key", "caption", "shard")
"""Columns that every row has."""

_TAKEN = "json."
_MIXED = b"mixed"
_REMEDY = "embed into a new folder with fields=[...], the JSON fields to keep"


@dataclass(frozen=True)
class Agreement:
    """What the columns of all parts are called, and which of them hold text for want of one type.

    Attributes:
        names: The new name of each that has another one.
        mixed: New names of those that are text.
        text: Of these, the ones that some part holds in another type.
    """

    names: dict[str, str] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    text: tuple[str, ...] = ()


def columns_of(
    samples: Sequence[Mapping[str, Any]], own: Mapping[str, Any]
) -> tuple[dict[str, pa.Array], list[str]]:
    """The columns of some samples by name, in the order of their names, and which have mixed types.

    Args:
        samples: The JSON members of each.
        own: The values of the columns that every row has; where a member of such a name holds the
            same, it is not kept again.
    """
    columns: dict[str, list[Any]] = {}
    for row, sample in enumerate(samples):
        for name, value in _members(sample, {key: own[key][row] for key in own}):
            columns.setdefault(name, [None] * len(samples))[row] = value
    arrays, mixed = {}, []
    for name in sorted(columns):
        try:
            arrays[name] = pa.array(columns[name])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            arrays[name] = _texts(columns[name])
            mixed.append(name)
    return arrays, mixed


def mixed_noted(table: pa.Table, mixed: Sequence[str]) -> pa.Table:
    """The table with a note of which of its columns are text for want of one type."""
    return table.replace_schema_metadata({_MIXED: json.dumps(mixed)}) if mixed else table


def agreed(schemas: Sequence[pa.Schema]) -> Agreement:
    """What the columns of all parts are to be; the same however many parts were rewritten so."""
    names = _renamed({name for schema in schemas for name in names_of(schema)})
    types: dict[str, set[pa.DataType]] = {}
    mixed: set[str] = set()
    for schema in schemas:
        noted: list[str] = json.loads((schema.metadata or {}).get(_MIXED, b"[]"))
        mixed |= {names.get(name, name) for name in noted}
        for name, kind in zip(names_of(schema), schema.types, strict=True):
            types.setdefault(names.get(name, name), set()).add(kind)
    mixed |= {name for name, several in types.items() if not _fit(several)}
    differing = {name for name in mixed if types[name] - {pa.string(), pa.null()}}
    return Agreement(names, tuple(sorted(mixed)), tuple(sorted(differing)))


def in_agreement(part: pa.Table, agreement: Agreement) -> pa.Table | None:
    """A part as agreed; None where it is so already.

    Raises:
        ValueError: Two of its columns would have one name.
    """
    found: dict[str, pa.Array | pa.ChunkedArray] = {}
    mixed, changed = [], False
    for name, column in zip(names_of(part.schema), part.columns, strict=True):
        new = agreement.names.get(name, name)
        if new in found:
            raise ValueError(f"two JSON fields would be called {new!r}; {_REMEDY}")
        if new in agreement.text and column.type not in (pa.string(), pa.null()):
            column, changed = _texts(column.to_pylist()), True
        changed |= new != name
        mixed += [new] if new in agreement.mixed else []
        found[new] = column
    if not changed:
        return None
    own = [name for name in found if name in OWN]
    ordered = {name: found[name] for name in [*own, *sorted(set(found) - set(own))]}
    return mixed_noted(pa.table(ordered), sorted(mixed))


def names_of(schema: pa.Schema) -> list[str]:
    """The names of its columns."""
    return [str(name) for name in schema.names]


def notes_on(names: Collection[str], agreement: Agreement) -> list[str]:
    """What a user should know of these columns, a line each."""
    taken = sorted(name for name in names if name.startswith(_TAKEN))
    notes = []
    if taken:
        notes.append(f"JSON fields whose names are taken are kept as {_listed(taken)}")
    if agreement.mixed:
        notes.append(f"JSON fields of several types are kept as text: {_listed(agreement.mixed)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} others" if len(names) > 10 else "")


def _members(sample: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The members of a sample, each under a name of its own."""
    seen: set[str] = set()
    for name, value in _flat(sample):
        if name.lower() in OWN:
            if _same(value, own.get(name)):
                continue
            name = _TAKEN + name
        while name in seen:
            name = _TAKEN + name
        seen.add(name)
        yield name, value


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _same(value: Any, own: Any) -> bool:
    """Whether a member says what the row's own column says; shards of img2dataset repeat both."""
    if isinstance(value, str) and isinstance(own, str):
        return value.strip() == own.strip()
    return value is None


def _texts(values: Sequence[Any]) -> pa.Array:
    """Values as text: strings as they are, others as JSON."""
    texts = [
        one if one is None or isinstance(one, str) else json.dumps(one, default=str)
        for one in values
    ]
    # Half a surrogate pair is allowed in JSON, and nowhere else.
    sound = [one and one.encode("utf-8", "replace").decode() for one in texts]
    return pa.array(sound, pa.string())


def _fit(types: set[pa.DataType]) -> bool:
    try:
        schemas = [pa.schema([("x", one)]) for one in types]
        pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _renamed(names: Collection[str]) -> dict[str, str]:
    """New names for those that differ from others in case alone.

    The last of such names in the order of their letters, the one with most small letters, stays.
    New names depend on the old ones alone, so that parts which have them already stay as they are.
    """
    new = {name: name for name in names}
    while True:
        groups: dict[str, set[str]] = {}
        for name in new.values():
            groups.setdefault(name.lower(), set()).add(name)
        moved = {name for group in groups.values() for name in group - {max(group)}}
        if not moved:
            return {old: name for old, name in new.items() if old != name}
        new = {old: _TAKEN + name if name in moved else name for old, name in new.items()}
