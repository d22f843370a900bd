"""From a YAML file and overrides to one validated configuration, or to all errors at once.

Nothing here imports torch: a mistake in a configuration is found in well under a second.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined, to_jsonable_python


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values do not change.

    Class attributes:
        positional: keys that may be given on the command line without their name, in order.
        must_exist: keys of files and folders that are read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    positional: ClassVar[tuple[str, ...]] = ()
    must_exist: ClassVar[tuple[str, ...]] = ()

    def missing_places(self) -> list[str]:
        """A line for each file or folder that has to be there and is not; costs no import."""
        return [
            f"{key}: there is no file or folder {place}"
            + ("; name the folder, or a pattern such as a/{0..7}.tar" if "*" in str(place) else "")
            for key in self.must_exist
            for place in _places(getattr(self, key))
            if not place.exists()
        ]


def _places(given: Any) -> Iterator[Path]:
    """The local files and folders in a value: URLs and patterns are looked at when opened."""
    if isinstance(given, list):
        for one in given:
            yield from _places(one)
    elif isinstance(given, Config):
        yield from (place for key in given.must_exist for place in _places(getattr(given, key)))
    elif isinstance(given, str) and "://" not in given and "{" not in given:
        yield Path(given)
    elif isinstance(given, Path):
        yield given


Model = TypeVar("Model", bound=Config)


KIND = "~"
"""Begins the tag of each kind of value that a key may have; messages leave it out."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message has one line for each mistake."""


class RunError(RuntimeError):
    """What ended a run from outside, such as the death of another process; one line says it."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text, `no` as False, `010` as 8, `12:30` as 750; YAML 1.2 does not.

    Dates stay text too.
    """


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that either version of YAML would read as something else."""


_SCALARS = {
    "bool": ("tTfF", r"^(true|True|TRUE|false|False|FALSE)$"),
    "int": ("-+0123456789", r"^[-+]?\d+$"),
    "float": (
        "-+0123456789.",
        r"^([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_first, _pattern) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first)
        )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quotes around Unicode's own line breaks, which are lost in plain text."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{path}:{line} {problem}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, found {type(values).__name__}")
    return values


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML: `3`, `1e-3`, `true`, `[a, b]`, anything else text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def value_for(schema: type[BaseModel], path: str, text: str) -> Any:
    """The value of an override for its key: text and paths as they are, the rest as YAML."""
    annotation: Any = schema
    for part in path.split("."):
        inner = _inner_schema(annotation)
        field = inner.model_fields.get(part) if inner is not None else None
        if field is None:
            return parse_value(text)
        annotation = field.annotation
    of_several = get_origin(annotation) in (Union, UnionType)
    kinds = set(get_args(annotation) if of_several else [annotation]) - {type(None)}
    return text if kinds <= {str, Path} and text != "null" else parse_value(text)


def override(values: dict[str, Any], path: str, value: Any) -> None:
    """Set `key.path` in nested mappings, making them where they are missing."""
    *parents, last = path.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def build(schema: type[Model], values: Mapping[str, Any], *, origin: str) -> Model:
    """Validate values against a schema.

    Args:
        schema: what is allowed.
        values: what was given.
        origin: where it came from, for the message.

    Raises:
        ConfigError: one line for each mistake, with its path and a suggestion.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(schema, detail) for detail in error.errors()]
    plural = "error" if len(lines) == 1 else "errors"
    raise ConfigError("\n".join([f"{len(lines)} {plural} in {origin}", *(f"  {x}" for x in lines)]))


def _explain(schema: type[Config], detail: ErrorDetails) -> str:
    given = [part for part in detail["loc"] if not str(part).startswith(KIND)]
    path = ".".join(str(part) for part in given)
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(schema, given[:-1])
            near = difflib.get_close_matches(str(given[-1]), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"{path}: unknown key; {hint}known: {', '.join(known)}"
        case "missing":
            return f"{path}: required, and not given"
        case "value_error":
            said = str(detail.get("ctx", {}).get("error", detail["msg"]))
            return f"{path}: {said}" if path else said
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{path}: {message}, got {detail['input']!r}"


def _known_keys(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for part in path:
        if isinstance(part, str) and part in schema.model_fields:
            inner = _inner_schema(schema.model_fields[part].annotation)
            if inner is not None:
                schema = inner
    return list(schema.model_fields)


def _inner_schema(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_schema(argument) for argument in get_args(annotation))
    return next((schema for schema in found if schema is not None), None)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that is valid input again."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def commented_default(schema: type[Config]) -> str:
    """Every key of a schema with its default and what it means, as YAML."""
    return "\n".join(_lines(schema, indent="")) + "\n"


def _lines(schema: type[BaseModel], *, indent: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield from (f"{indent}# {line}" for line in (field.description or "").splitlines())
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(inner, indent=indent + "  ")
        else:
            yield f"{indent}{name}: {_default(field)}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  # required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "  # required"
    dumped = yaml.dump(
        to_jsonable_python(value),
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=10_000,
    )
    return dumped.removesuffix("\n").removesuffix("\n...")
