"""The command line: `align VERB [CONFIG.yaml] [values in order] [key.path=value ...]`.

This module and all it imports stay free of torch, so that help and mistakes come at once.
Exit codes: 0 done, 1 a fault of ours, 2 a mistake in what was asked, 3 `inspect` or `doctor` found
something wrong, 130 interrupted.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipelines import schemas
from pipelines.config import (
    Config,
    ConfigError,
    RunError,
    build,
    commented_default,
    override,
    read_yaml,
    to_yaml,
    value_for,
)


@dataclass(frozen=True)
class Verb:
    """A command: what it can be told, what runs it, and one line of help."""

    schema: type[Config]
    run: str
    summary: str


VERBS: dict[str, Verb] = {
    "demo": Verb(schemas.DemoConfig, "pipelines.demo:run", "train and show all on built-in data"),
    "pack": Verb(schemas.PackConfig, "pipelines.pack:run", "image-text pairs into shards"),
    "doctor": Verb(
        schemas.DoctorConfig, "pipelines.doctor:run", "would training run, and how fast"
    ),
    "inspect": Verb(
        schemas.InspectConfig, "pipelines.inspect:run", "what shards hold; damage; copies"
    ),
    "pretrain": Verb(schemas.PretrainConfig, "pipelines.pretrain:run", "train a dual encoder"),
    "embed": Verb(schemas.EmbedConfig, "pipelines.embed:run", "shards into an embedding table"),
    "index": Verb(schemas.IndexConfig, "pipelines.index:run", "a table into a FAISS index"),
    "search": Verb(schemas.SearchConfig, "pipelines.search:run", "pictures for words or a picture"),
    "serve": Verb(schemas.ServeConfig, "pipelines.serve:run", "a page and an API over indexes"),
    "evaluate": Verb(
        schemas.EvaluateConfig, "pipelines.evaluate:run", "classification and retrieval"
    ),
    "fuse": Verb(schemas.FuseConfig, "pipelines.fuse:run", "compare fusion heads"),
    "export": Verb(
        schemas.ExportConfig, "pipelines.export:run", "a bundle for OpenCLIP, Hugging Face, ONNX"
    ),
    "import": Verb(
        schemas.ImportConfig, "pipelines.importing:run", "a model of OpenCLIP or Hugging Face"
    ),
}

_USAGE = """usage: align VERB [CONFIG.yaml] [VALUE ...] [key.path=value ...]

{verbs}

  config VERB     print every key of a verb with its default and meaning

options:
  --print         print the resolved configuration and stop
  --traceback     show where an error came from
  --version       print the version
  --help          this, or after a verb, that verb's keys
"""
_OVERRIDE = re.compile(r"^(?:--)?([A-Za-z_][\w.-]*)=(.*)$", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    try:
        sys.exit(_dispatch(given))
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            traceback.print_exc()
        code, message = _verdict(error)
        if not (isinstance(error, ConfigError) and _is_told_by_another()):
            print(f"align {given[0] if given else ''}: {message}", file=sys.stderr)
        sys.exit(code)


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error."""
    match error:
        case KeyboardInterrupt():
            return 130, "interrupted"
        case ValueError() | OSError():
            return 2, _one_line(error)
        case RunError():
            return 1, _one_line(error)
    name, line = type(error).__name__, _one_line(error)
    return 1, f"internal error: {name}: {line} (--traceback shows where)"


def _is_told_by_another() -> bool:
    """Whether a launcher started several processes here, and another one tells mistakes.

    One of each machine does, since a file may be missing on that one alone.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0"


def main_of(verb: str) -> None:
    """Run one verb with the arguments of this process: what `python -m pipelines.VERB` does."""
    main([verb, *sys.argv[1:]])


def _one_line(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in {"--help", "-h", "help"}:
        print(_usage())
        return 0
    if given[0] == "--version":
        print(metadata.version("clip-align"))
        return 0
    name, *rest = given
    if name == "config":
        if len(rest) != 1 or rest[0] not in VERBS:
            raise ConfigError(f"give one verb: {', '.join(VERBS)}")
        print(_default_config(rest[0]), end="")
        return 0
    if name not in VERBS:
        raise ConfigError(f"unknown verb; known: {', '.join([*VERBS, 'config'])}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(_verb_help(name))
        return 0
    config = parse(name, [argument for argument in rest if argument != "--print"])
    if "--print" in rest:
        print(to_yaml(config), end="")
        return 0
    if missing := config.missing_places():
        raise ConfigError("\n".join(missing))
    run: Callable[[Config], int | None] = resolve_name(verb.run)
    return run(config) or 0


def parse(name: str, arguments: Sequence[str]) -> Config:
    """The configuration that a verb's arguments stand for.

    A first argument that ends in .yaml is read; `key=value`, `--key=value` and `--key value` set a
    key; the rest fill the verb's positional keys in order.

    Raises:
        ConfigError: one line for each mistake.
    """
    schema = VERBS[name].schema
    values: dict[str, Any] = read_yaml(shipped("demo")) if name == "demo" else {}
    origin = f"the arguments of align {name}"
    positional = list(schema.positional)
    overrides: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        assigned = _OVERRIDE.match(argument)
        if assigned and (argument.startswith("--") or not _is_words(schema, assigned, positional)):
            key = assigned[1].replace("-", "_")
            overrides.append((key, value_for(schema, key, assigned[2])))
        elif argument.startswith("--"):
            key = argument[2:].replace("-", "_")
            field = schema.model_fields.get(key)
            flag = not rest or (field is not None and field.annotation is bool)
            overrides.append((key, True if flag else value_for(schema, key, rest.pop(0))))
        elif argument.endswith((".yaml", ".yml")):
            origin = argument
            values = read_yaml(Path(argument))
        elif positional:
            overrides.append((positional.pop(0), argument))
        else:
            takes = " ".join(key.upper() for key in schema.positional) or "no values without a key"
            raise ConfigError(f"{argument!r} is one value too many; {name} takes {takes}")
    for path, value in overrides:
        override(values, path, value)
    if overrides and not origin.startswith("the arguments"):
        origin = f"{origin} and the arguments"
    return build(schema, values, origin=origin)


def _is_words(schema: type[Config], assigned: re.Match[str], positional: Sequence[str]) -> bool:
    """Whether what looks like `key=value` is a text to search for, such as "e=mc2"."""
    known = assigned[1].partition(".")[0].replace("-", "_") in schema.model_fields
    return not known and list(positional[:1]) == ["text"]


def shipped(name: str) -> Path:
    """A configuration that comes with the package."""
    return Path(str(resources.files("pipelines") / "configs" / f"{name}.yaml"))


def _default_config(verb: str) -> str:
    if shipped(verb).is_file():
        return shipped(verb).read_text(encoding="utf-8")
    return commented_default(VERBS[verb].schema)


def _usage() -> str:
    lines = [f"  {name:<15} {verb.summary}" for name, verb in VERBS.items()]
    return _USAGE.format(verbs="\n".join(lines))


def _verb_help(name: str) -> str:
    schema = VERBS[name].schema
    positional = " ".join(f"[{key.upper()}]" for key in schema.positional)
    head = f"usage: align {name} [CONFIG.yaml] {positional} [key.path=value ...]".replace("  ", " ")
    return f"{head}\n\n{schema.__doc__}\n\nKeys and defaults:\n\n{_default_config(name)}"


if __name__ == "__main__":
    main()
