"""The command line: light to import, one line for each mistake, stated exit codes."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from pipelines import cli
from pipelines.cli import VERBS, main, parse
from pipelines.config import Config, ConfigError
from pipelines.schemas import SearchConfig

HEAVY = ("torch", "transformers", "timm", "accelerate", "faiss", "sklearn", "matplotlib", "pyarrow")
_LIGHT = """
import sys
sys.argv = ["align", *{arguments!r}]
from pipelines.cli import main
try:
    main()
except SystemExit as left:
    code = left.code
loaded = sorted(name for name in {heavy!r} if name in sys.modules)
print("loaded:", loaded, "code:", code, file=sys.stderr)
"""


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out, captured.err


def fresh(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=environment, **options
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 0),
        (["pretrain", "--help"], 0),
        (["config", "fuse"], 0),
        (["pretrain", "a", "b", "--print"], 0),
        (["pretrain", "batch_sise=3"], 2),
        (["no-such-verb"], 2),
        (["demo", "pretrain.model.image.name=resnet"], 2),
        (["fuse", "heads.a.name=erly"], 2),
        (["evaluate", "nowhere.yaml"], 2),
        (["search"], 2),
    ],
    ids=lambda one: " ".join(one) or "nothing" if isinstance(one, list) else str(one),
)
def test_help_and_mistakes_load_nothing_heavy(arguments, code):
    """Not timed: what makes them slow is what they import."""
    done = fresh([sys.executable, "-c", _LIGHT.format(arguments=arguments, heavy=HEAVY)])
    assert done.stderr.splitlines()[-1] == f"loaded: [] code: {code}"


def test_the_package_align_is_light_until_it_is_used():
    script = "import sys, align, align.fusion; assert not {'torch', 'timm'} & {*sys.modules}"
    assert fresh([sys.executable, "-c", script]).returncode == 0


# --- exit codes and messages ---


def running(monkeypatch, verb: str, run) -> None:
    monkeypatch.setattr(cli, "resolve_name", lambda _: run)
    monkeypatch.setattr(Config, "missing_places", lambda _: [])
    assert verb in VERBS


def failing(error: BaseException):
    def run(_config):
        raise error

    return run


@pytest.mark.parametrize("code", [0, 130])
def test_the_code_of_a_verb_is_passed_on(code, capsys, monkeypatch):
    running(monkeypatch, "index", lambda _: code)
    assert call(capsys, "index", "table", "out")[0] == code


def test_a_verb_that_says_nothing_is_done(capsys, monkeypatch):
    running(monkeypatch, "index", lambda _: None)
    assert call(capsys, "index", "table", "out")[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("the table is bad"), 2, "align index: the table is bad"),
        (ValueError("first\nsecond\nthird"), 2, "align index: first"),
        (FileNotFoundError("no data in x; pack first"), 2, "align index: no data in x; pack first"),
        (
            FileNotFoundError(2, "No such file or directory", "x/y"),
            2,
            "align index: x/y: No such file or directory",
        ),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (PermissionError(13, "Permission denied", "x"), 2, "align index: x: Permission denied"),
        (
            RuntimeError("shape\nmismatch"),
            1,
            "align index: internal error: RuntimeError: shape (--traceback shows where)",
        ),
        (AssertionError(), 1, "internal error: AssertionError"),
        (KeyError("a"), 1, "internal error: KeyError: 'a'"),
        (MemoryError(), 1, "internal error: MemoryError"),
        (KeyboardInterrupt(), 130, "align index: interrupted"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else "",
)
def test_every_error_is_one_line_and_its_code(error, code, line, capsys, monkeypatch):
    running(monkeypatch, "index", failing(error))
    found, out, err = call(capsys, "index", "table", "out")
    assert found == code
    assert out == ""
    assert len(err.splitlines()) == 1
    assert line in err


def test_traceback_shows_where(capsys, monkeypatch):
    running(monkeypatch, "index", failing(RuntimeError("deep inside")))
    _, _, plain = call(capsys, "index", "table", "out")
    code, _, err = call(capsys, "index", "--traceback", "table", "out")
    assert code == 1
    assert "Traceback" not in plain
    assert err.startswith("Traceback")
    assert "in run\n    raise error\nRuntimeError: deep inside" in err
    assert err.endswith(plain)


def test_an_unknown_verb_lists_the_verbs(capsys):
    code, _, err = call(capsys, "pretain")
    assert code == 2
    assert len(err.splitlines()) == 1
    for verb in [*VERBS, "config"]:
        assert verb in err


@pytest.mark.parametrize("arguments", [["config"], ["config", "nothing"], ["config", "a", "b"]])
def test_config_wants_one_verb(arguments, capsys):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "give one verb: demo, pack" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["index", "a", "b", "c"], "'c' is one value too many; index takes TABLE OUT"),
        (["fuse", "a"], "'a' is one value too many; fuse takes no values without a key"),
        (["index", "--tabel", "x", "y"], "tabel: unknown key; did you mean 'table'?"),
        (["pretrain", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["search"], 'give a text to look for, as in: align search "red heart"'),
    ],
)
def test_mistaken_arguments_say_what_is_taken(arguments, says, capsys):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err


# --- help ---


def test_help_names_every_verb_in_a_line(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        code, out, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        for name, verb in VERBS.items():
            assert f"  {name:<15} {verb.summary}\n" in out


def test_the_version_is_that_of_the_package(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.strip()[0].isdigit()


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_is_its_keys(verb, capsys):
    code, out, err = call(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert f"usage: align {verb}" in out
    assert str(VERBS[verb].schema.__doc__) in out
    for name in VERBS[verb].schema.model_fields:
        assert f"\n{name}:" in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_printed_configuration_of_a_verb_is_valid_input(verb, capsys, tmp_path):
    code, out, _ = call(capsys, "config", verb)
    assert code == 0
    values = yaml.safe_load(out)
    required = {
        **{"source": "x", "bundle": "x", "to": "onnx"},
        "data": "x",
        "out": "x.png",
        "model": "m",
        "table": "t",
        "text": "red heart",
        **dict.fromkeys(["pairs", "test_data", "index", "test_pairs"], "x"),
        "tasks": {"one": {"task": "retrieval", "data": "d"}},
    }
    missing = {
        key: required[key] for key, value in values.items() if value is None and key in required
    }
    path = tmp_path / "mine.yaml"
    path.write_text(out, encoding="utf-8")
    rest = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for key, value in missing.items()
    ]
    parse(verb, [str(path), *rest])


def test_print_resolves_and_runs_nothing(capsys, monkeypatch, tmp_path):
    running(monkeypatch, "pretrain", failing(AssertionError("must not run")))
    out_folder = tmp_path / "run"
    code, out, err = call(capsys, "pretrain", "shards", str(out_folder), "model.dim=7", "--print")
    assert (code, err) == (0, "")
    assert not out_folder.exists()
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    assert parse("pretrain", [str(path)]) == parse(
        "pretrain", ["shards", str(out_folder), "model.dim=7"]
    )


# --- verbs ---


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_run_and_a_module_of_its_own_name(verb):
    run = resolve_name(VERBS[verb].run)
    name = {"import": "importing"}.get(verb, verb)  # a keyword cannot name a module
    assert VERBS[verb].run == f"pipelines.{name}:run"
    (config,) = signature(run).parameters.values()
    assert config.annotation is VERBS[verb].schema
    file = Path(str(import_module(f"pipelines.{name}").__file__))
    started = file.with_name("__main__.py") if file.name == "__init__.py" else file
    assert f'main_of("{verb}")' in started.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pack", "index"])
def test_a_verb_is_a_module_too(verb):
    done = fresh([sys.executable, "-m", f"pipelines.{verb}", "no_such_key=1"])
    assert done.returncode == 2
    assert f"errors in the arguments of align {verb}" in done.stderr
    assert "no_such_key: unknown key" in done.stderr


def test_a_mistake_leaves_nothing_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["pretrain", "data", "run", "model.dimm=3"],
        ["demo", "out=run", "queries=[]"],
        ["pack", "nowhere", "run"],
    ):
        assert call(capsys, *arguments)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == []


def test_every_line_of_a_configuration_error_is_shown(capsys):
    code, _, err = call(capsys, "pretrain", "a", "b", "model.dimm=3", "seed=x")
    assert code == 2
    assert len(err.splitlines()) == 3
    with pytest.raises(ConfigError):
        parse("pretrain", ["a", "b", "model.dimm=3", "seed=x"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["woman: dark skin tone"], "woman: dark skin tone"),
        (["--text", "woman: dark skin tone"], "woman: dark skin tone"),
        (["text=1984"], "1984"),
        (["--text=#1"], "#1"),
        (["e=mc2"], "e=mc2"),
    ],
)
def test_a_text_is_taken_literally(arguments, text):
    found = parse("search", arguments)
    assert isinstance(found, SearchConfig)
    assert found.text == text


def test_a_path_of_digits_is_a_path():
    assert parse("index", ["table", "out=2024"]).model_dump(mode="json")["out"] == "2024"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("seed=-1", "seed"),
        ("seed=10000000000", "seed"),
        ("stages=[{until: 0.6, image_size: 8}, {until: 0.3, image_size: 16}]", "stages"),
    ],
)
def test_what_could_only_fail_later_fails_at_the_door(argument, says):
    with pytest.raises(ConfigError, match=says):
        parse("pretrain", ["data", "out", argument])


FUSE_READS = ("data", "pairs", "test_data", "index", "test_pairs")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["pretrain", "nowhere", "out"], ["data: there is no file or folder nowhere"]),
        (
            ["fuse", "model=m", "out=o", *(f"{key}=x" for key in FUSE_READS)],
            [f"{key}: there is no" for key in FUSE_READS],
        ),
        (
            ["search", "x", "index=ix", "image=cat.png"],
            ["index: there is no", "image: there is no"],
        ),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_at_once_and_without_torch(arguments, lines, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines.cli", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(said) == len(lines)
    assert all(line in one for line, one in zip(lines, said, strict=True))
    assert " torch" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_had_enough_is_no_mistake():
    script = "import sys; from pipelines.cli import main; main(['config', 'pretrain'])"
    command = f'{sys.executable} -c "{script}" | head -c 1'
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("out", ["hits", "hits.txt", "."])
def test_hits_are_drawn_to_a_picture_file(out):
    with pytest.raises(ConfigError, match=r"no picture file; name one, such as hits\.png"):
        parse("search", ["red", f"out={out}"])


def test_an_interrupt_while_the_command_is_being_imported_is_told_in_a_line(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "pipelines.cli":
                raise KeyboardInterrupt

    scripts = tomllib.loads((Path(cli.__file__).parent.parent / "pyproject.toml").read_text())
    run = resolve_name(scripts["project"]["scripts"]["align"])
    monkeypatch.delitem(sys.modules, "pipelines.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["align", "pretrain", "c.yaml"])
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 130
    assert capsys.readouterr().err == "align pretrain: interrupted\n"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1"}, False),
    ],
    ids=str,
)
def test_of_several_processes_one_of_each_machine_tells_a_mistake(
    environment, told, monkeypatch, capsys
):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "nowhere", "out"])
    assert left.value.code == 2
    assert ("there is no file or folder nowhere" in capsys.readouterr().err) is told
