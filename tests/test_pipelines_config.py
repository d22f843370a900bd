"""The configuration: read as YAML 1.2, validated whole, all mistakes at once, each by its path."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipelines import schemas
from pipelines.cli import VERBS, parse, shipped
from pipelines.config import (
    Config,
    ConfigError,
    build,
    commented_default,
    override,
    parse_value,
    read_yaml,
    to_yaml,
)
from pipelines.schemas import demo

SHIPPED = sorted(shipped("demo").parent.glob("*.yaml"))
PRETRAIN: dict[str, Any] = {"data": "shards", "out": "run"}


def read(text: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-2.5e+4", -25000.0),
        (".5", 0.5),
        (".5e3", 500.0),
        ("1.", 1.0),
        ("0.1", 0.1),
        (".inf", float("inf")),
        ("3", 3),
        ("-7", -7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("[1e-3, a]", [0.001, "a"]),
        ("{a: 1e2}", {"a": 100.0}),
    ],
)
def test_values_are_read_as_yaml_1_2(text, value, tmp_path):
    assert read(f"key: {text}\n", tmp_path) == {"key": value}
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False) | st.integers(-(10**12), 10**12))
def test_numbers_survive_python_notation(number):
    found = parse_value(repr(number).replace("inf", ".inf"))
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1,\n", "line 2"),
        ("a: b: c\n", "line 1"),
        ("- 1\n- 2\n", "must hold keys and values, found list"),
        ("", "must hold keys and values, found NoneType"),
        ("just words\n", "must hold keys and values, found str"),
        ("a: \x00\n", "config.yaml"),
        ("a: !!python/object:os.system {}\n", "line 1"),
    ],
)
def test_what_is_no_mapping_is_one_line_with_file_and_place(text, says, tmp_path):
    with pytest.raises(ConfigError, match=r".") as caught:
        read(text, tmp_path)
    message = str(caught.value)
    assert says in message
    assert str(tmp_path / "config.yaml") in message
    assert "\n" not in message


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\xff\n")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("latin.yaml", "folder.yaml"):
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read") as caught:
            read_yaml(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_all_mistakes_come_at_once_each_with_path_and_advice():
    values = {
        "data": "shards",
        "batch_sise": 3,
        "samples": "many",
        "precision": "fp8",
        "model": {"dim": -1, "imaje_size": 32, "image": {"name": "timm", "opsions": {}}},
        "optimizer": {"learning_rate": 0, "warmup": 1.0},
    }
    with pytest.raises(ConfigError, match=r".") as caught:
        build(schemas.PretrainConfig, values, origin="my.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "10 errors in my.yaml"
    starts = {line.split(":")[0].strip() for line in lines[1:]}
    assert starts == {
        *("out", "batch_sise", "samples", "precision", "model.dim", "model.imaje_size"),
        *("model.image.name", "model.image.opsions"),
        *("optimizer.learning_rate", "optimizer.warmup"),
    }
    text = "\n".join(lines)
    for advice in ("batch_size", "image_size", "options", "learning_rate"):
        assert advice in text
    for line in lines[1:]:
        if "unknown key" in line:
            assert "did you mean" in line
            assert "known: " in line


def test_one_mistake_is_one_error():
    with pytest.raises(ConfigError, match=r"^1 error in my.yaml\n  out: required"):
        build(schemas.PretrainConfig, {"data": "x"}, origin="my.yaml")


def every_path(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The mappings of a schema, however deep."""
    found = [prefix]
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += every_path(inner, (*prefix, name))
    return found


@pytest.mark.parametrize(
    ("verb", "path"),
    [(verb, path) for verb in VERBS for path in every_path(VERBS[verb].schema)],
    ids=lambda one: ".".join(one) if isinstance(one, tuple) else one,
)
def test_an_unknown_key_is_an_error_at_every_depth(verb, path):
    values = read_yaml(shipped("demo")) if verb == "demo" else {}
    override(values, ".".join([*path, "no_such_key"]), 1)
    with pytest.raises(ConfigError, match=r".") as caught:
        build(VERBS[verb].schema, values, origin="x")
    assert f"{'.'.join([*path, 'no_such_key'])}: unknown key" in str(caught.value)


def test_unknown_keys_inside_lists_and_named_entries_list_the_right_known_keys():
    with pytest.raises(ConfigError, match=r"tasks\.mine\.lable: unknown key; .*'label'"):
        build(
            schemas.EvaluateConfig,
            {"model": "m", "tasks": {"mine": {"task": "retrieval", "data": "d", "lable": "x"}}},
            origin="x",
        )
    with pytest.raises(ConfigError, match=r"stages\.0\.image_sise: unknown key; .*'image_size'"):
        build(
            schemas.PretrainConfig,
            {**PRETRAIN, "stages": [{"until": 0.5, "image_size": 8, "image_sise": 8}]},
            origin="x",
        )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.dim", "wide"),
        ("model.dim", 2.5),
        ("model.dim", None),
        ("model", 3),
        ("model.image", []),
        ("captions", "{caption}"),
        ("captions", []),
        ("resume", "maybe"),
        ("optimizer.learning_rate", "fast"),
        ("optimizer.options", [1]),
        ("loss.temperature", 0.0),
        ("samples", 0),
        ("seed", "x"),
        ("workers", -1),
        ("data", 3.5),
    ],
)
def test_a_wrong_type_is_named_with_what_was_given(path, value):
    values = dict(PRETRAIN)
    override(values, path, value)
    with pytest.raises(ConfigError, match=r".") as caught:
        build(schemas.PretrainConfig, values, origin="x")
    first, line = str(caught.value).splitlines()
    assert first == "1 error in x"
    assert line.strip().startswith(f"{path}: ")
    assert repr(value) in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 100}, "batch_size: 100 must be a multiple of lanes (64)"),
        ({"samples": 100}, "samples: 100 is less than one batch (256)"),
        ({"model": {"image": {"name": "resnet18"}}}, "unknown tower 'resnet18'; known: timm:NAME"),
        ({"model": {"text": {"name": "timm:bert"}}}, "unknown tower 'timm:bert'; known: hf:NAME"),
    ],
)
def test_values_that_do_not_fit_each_other_say_so(changes, says):
    with pytest.raises(ConfigError, match=r".") as caught:
        build(schemas.PretrainConfig, {**PRETRAIN, **changes}, origin="x")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


# --- overrides ---


def test_overrides_reach_into_nested_mappings_and_make_what_is_missing():
    values: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    override(values, "a.b", 9)
    override(values, "d.e.f", 8)
    override(values, "new", 7)
    assert values == {"a": {"b": 9, "c": 2}, "d": {"e": {"f": 8}}, "new": 7}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4), st.integers())
def test_an_override_sets_what_it_names_and_nothing_else(path, value):
    values = {"kept": {"inner": 1}}
    override(values, ".".join(path), value)
    inner: Any = values
    for key in path:
        inner = inner[key]
    assert inner == value
    assert values["kept"] == {"inner": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards", "run", "optimizer.learning_rate=1e-3", "model.image_size=32"],
        ["--data=shards", "--out=run", "--optimizer.learning-rate=1e-3", "model.image-size=32"],
        ["--data", "shards", "--out", "run", "--optimizer.learning_rate", "1e-3",
         "--model.image_size", "32"],
    ],
)  # fmt: skip
def test_arguments_may_be_written_in_several_ways(arguments):
    config = parse("pretrain", arguments)
    assert isinstance(config, schemas.PretrainConfig)
    assert (config.data, config.out) == ("shards", Path("run"))
    assert config.optimizer.learning_rate == 1e-3
    assert config.model.image_size == 32


def test_later_arguments_win_over_earlier_ones_and_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: a\nout: b\nseed: 1\nbatch_size: 64\n")
    config = parse("pretrain", [str(path), "seed=2", "seed=3", "--resume", "elsewhere"])
    assert isinstance(config, schemas.PretrainConfig)
    assert (config.seed, config.batch_size, config.resume) == (3, 64, True)
    assert config.data == "elsewhere"


def test_a_flag_takes_no_value_away_from_what_follows():
    config = parse("pretrain", ["--resume", "shards", "run"])
    assert isinstance(config, schemas.PretrainConfig)
    assert (config.resume, config.data, config.out) == (True, "shards", Path("run"))


def test_text_that_looks_like_a_number_stays_text_where_text_is_wanted():
    config = parse("search", ["42"])
    assert isinstance(config, schemas.SearchConfig)
    assert config.text == "42"


# --- printing ---


@pytest.mark.parametrize("verb", VERBS)
def test_the_commented_default_is_yaml_with_every_key_and_its_meaning(verb):
    schema = VERBS[verb].schema
    text = commented_default(schema)
    values = yaml.safe_load(text)
    assert list(values) == list(schema.model_fields)
    lines = text.splitlines()
    for name, field in schema.model_fields.items():
        assert any(line.startswith(f"{name}:") for line in lines)
        if field.description:
            assert f"# {field.description.splitlines()[0]}" in lines
        if not field.is_required() and not issubclass(type(field.default), BaseModel):
            given = {name: read_in(text)[name]}
            default = schema.model_construct(**{name: field.get_default(call_default_factory=True)})
            assert default.model_dump(mode="json", include={name}) == given


def read_in(text: str) -> dict[str, Any]:
    values = parse_value(text)
    assert isinstance(values, dict)
    return values


def test_the_commented_default_of_pretrain_is_the_default():
    values = read_in(commented_default(schemas.PretrainConfig))
    values |= PRETRAIN
    assert build(schemas.PretrainConfig, values, origin="x") == build(
        schemas.PretrainConfig, PRETRAIN, origin="x"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_valid_and_survives_printing(path, tmp_path):
    verb = path.stem.split("-")[0].split("_")[0]
    verb = verb if verb in VERBS else "pretrain"
    config = parse(verb, [str(path)])
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert build(VERBS[verb].schema, read_yaml(tmp_path / "again.yaml"), origin="x") == config


def test_there_is_something_shipped():
    assert "demo.yaml" in {path.name for path in SHIPPED}


TRICKY = st.sampled_from(
    [
        "1e-3",
        "1e3",
        "010",
        "no",
        "true",
        "null",
        "12:30",
        "2024-01-01",
        ".5e3",
        "#x",
        "a: b",
        " ",
        "",
    ]
)


@settings(max_examples=100, deadline=None)
@given(
    where=st.dictionaries(st.text(max_size=5), TRICKY | st.text(max_size=8), max_size=3),
    rate=st.floats(1e-12, 1e6),
    caption=TRICKY | st.text(max_size=10),
)
def test_any_value_survives_printing(where, rate, caption):
    values = {
        **PRETRAIN,
        "validation": {"where": where},
        "optimizer": {"learning_rate": rate},
        "captions": [caption],
    }
    config = build(schemas.PretrainConfig, values, origin="x")
    assert build(schemas.PretrainConfig, read_in(to_yaml(config)), origin="x") == config


def test_a_configuration_does_not_change():
    config = build(schemas.PretrainConfig, PRETRAIN, origin="x")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def every_schema(schema: type[Config]) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = {schema}
    for field in schema.model_fields.values():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            found |= every_schema(inner)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_positional_keys_exist_and_every_schema_says_what_it_is(verb):
    for schema in every_schema(VERBS[verb].schema):
        assert schema.__doc__
        assert schema.model_config.get("extra") == "forbid"
    assert set(VERBS[verb].schema.positional) <= set(VERBS[verb].schema.model_fields)


def test_the_demo_fills_in_paths_and_splits():
    config = parse("demo", ["out=elsewhere"])
    assert isinstance(config, schemas.DemoConfig)
    out = Path("elsewhere")
    assert config.pretrain.data == str(out / "shards" / "train")
    assert config.pretrain.bundle == out / "bundle"
    assert config.fuse.index == config.index.out == out / "index"
    assert {task.data for task in config.evaluate.tasks.values()} <= {
        str(out / "shards" / name) for name in demo.BUILT_IN_SPLITS
    }


def test_the_projections_and_fits_that_are_checked_early_are_those_that_exist():
    from align.model import PROJECTIONS
    from align.preprocess import FITS
    from pipelines.schemas.training import ImageTowerConfig, ModelConfig, TextTowerConfig

    for schema in (ImageTowerConfig, TextTowerConfig):
        assert set(get_args(schema.model_fields["projection"].annotation)) == set(PROJECTIONS)
    assert set(get_args(ModelConfig.model_fields["fit"].annotation)) == set(FITS)


def test_the_splits_that_are_checked_early_are_those_that_exist():
    from shards.demo import SPLITS

    assert set(demo.BUILT_IN_SPLITS) == set(SPLITS)


def test_a_list_can_be_given_as_an_argument():
    config = parse("pretrain", ["data", "out", "caption_fields=[txt.lines, json.alt]"])
    assert isinstance(config, schemas.PretrainConfig)
    assert config.caption_fields == ["txt.lines", "json.alt"]


@pytest.mark.parametrize(
    "name", ["txt", "txt.lines", "json.a.b", "json.", "json..a", "foo", "txt."]
)
def test_caption_fields_are_checked_early_as_they_are_later(name):
    from shards.captions import CaptionRule

    def refuses(check):
        try:
            check()
        except ValueError as error:
            return f"unknown place of captions {name!r}" in str(error)
        return False

    early = refuses(lambda: parse("pretrain", ["data", "out", f"caption_fields=['{name}']"]))
    assert early == refuses(lambda: CaptionRule((name,)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss.min_temperature=0.5", "loss.min_temperature: 0.5 is above temperature (0.07)"),
        ("loss.temperature=0.001", "loss.min_temperature: 0.01 is above temperature (0.001)"),
        ("loss.options={temperature: 1}", "loss.options: temperature does not belong here; set"),
    ],
)
def test_temperatures_are_checked_with_the_other_mistakes(given, message):
    with pytest.raises(ConfigError) as caught:
        parse("pretrain", ["data", "out", given, "batch_size=none"])
    assert message in str(caught.value)
    assert "batch_size: " in str(caught.value)
