"""Bundles on the hub: against a local server that plays the hub's API, and a cache laid by hand.

The hub's own client runs in all of them; only its address, cache and token are others.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, TOKEN, Hub, serving_hub
from huggingface_hub import constants
from pairs_corpus import picture, tiny_model

import align
from align import hub as hub_module
from align.bundle import fingerprint, load, push_to_hub, record_results, save
from align.card import Result

ID = f"{OWNER}/tiny"
TEXTS = ["red circle", "blue bar"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A folder to work in, an empty cache, no token, and a hub that does not answer."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    at(monkeypatch, "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def hub(nowhere, monkeypatch):
    with serving_hub() as served:
        at(monkeypatch, served.url)
        yield served


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def on_the_hub(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.files[ID, branch]
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    return message


# --- pushed, and fetched again ---


def test_what_is_pushed_is_the_bundle_and_loads_by_its_id(hub, model, saved):
    assert push_to_hub(saved, ID, token=TOKEN, message="First") == f"{hub.url}/{ID}"
    assert on_the_hub(hub) == contents(saved)
    assert hub.private[ID], "unless asked for, nobody else sees it"
    assert hub.messages == ["First"]
    for name in (ID, f"hub:{ID}"):
        other = align.load(name)
        assert torch.equal(other.encode_text(TEXTS), model.encode_text(TEXTS))
        pictures = [picture("red", "dot")]
        assert torch.equal(other.encode_image(pictures), model.encode_image(pictures))
    assert fingerprint(ID) == fingerprint(saved)


def test_a_model_is_saved_first_and_a_repository_can_be_public(hub, model):
    push_to_hub(model, ID, token=TOKEN, private=False)
    assert not hub.private[ID]
    assert {"config.json", "model.safetensors", "README.md"} <= set(on_the_hub(hub))
    assert torch.equal(load(ID).encode_text(TEXTS), model.encode_text(TEXTS))


def test_a_branch_of_its_own_leaves_main_alone(hub, saved):
    url = push_to_hub(saved, ID, token=TOKEN, revision="small")
    assert url == f"{hub.url}/{ID}/tree/small"
    assert on_the_hub(hub, "small") == contents(saved)
    assert on_the_hub(hub) == {}


def test_pushing_again_takes_away_what_the_bundle_no_longer_has(hub, saved, tmp_path):
    record_results(saved, [Result("names", "top1", 0.5)])
    push_to_hub(saved, ID, token=TOKEN)
    assert "results.json" in on_the_hub(hub)
    hub.files[ID, "main"]["LICENSE"] = b"mine"
    save(tiny_model(seed=1), tmp_path / "next")
    push_to_hub(tmp_path / "next", ID, token=TOKEN)
    assert on_the_hub(hub) == {**contents(tmp_path / "next"), "LICENSE": b"mine"}


def test_only_what_a_bundle_has_is_pushed(hub, saved):
    (saved / "notes.txt").write_text("mine alone")
    (saved / ".env").write_text("PASSWORD=x")
    push_to_hub(saved, ID, token=TOKEN)
    assert {"notes.txt", ".env"} & set(on_the_hub(hub)) == set()


def test_the_token_of_the_environment_is_taken(hub, saved, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(saved, ID)
    assert on_the_hub(hub) == contents(saved)


# --- what is refused before anything leaves or comes ---


def test_nothing_is_pushed_that_would_not_load(hub, saved):
    (saved / "extra.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"extra\.pkl"):
        push_to_hub(saved, ID, token=TOKEN)
    (saved / "extra.pkl").unlink()
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        push_to_hub(saved, ID, token=TOKEN)
    with pytest.raises(ValueError, match="there is no folder"):
        push_to_hub(saved / "no", ID, token=TOKEN)
    assert not hub.log


@pytest.mark.parametrize("name", ["pytorch_model.bin", "code/modeling.py", "a/b.pkl", "x.TAR.gz"])
def test_a_repository_with_code_or_a_pickle_is_refused_and_nothing_fetched(hub, saved, name):
    push_to_hub(saved, ID, token=TOKEN)
    hub.files[ID, "main"][name] = b"x"
    with pytest.raises(ValueError, match="refused") as caught:
        load(ID)
    assert name in one_line(caught)
    assert ID in one_line(caught)
    assert hub.fetched() == set()


def test_what_is_no_part_of_a_bundle_is_not_fetched(hub, saved):
    push_to_hub(saved, ID, token=TOKEN)
    hub.files[ID, "main"] |= {"video.mp4": b"x" * 100, "other.safetensors": b"x"}
    load(ID)
    assert hub.fetched() == set(contents(saved))


def test_what_a_file_holds_is_looked_at_once_it_is_here(hub, saved):
    push_to_hub(saved, ID, token=TOKEN)
    config = json.loads(hub.files[ID, "main"]["config.json"])
    config["model"]["text"]["options"]["config"]["auto_map"] = {"AutoModel": "x.y"}
    hub.files[ID, "main"]["config.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match="auto_map"):
        load(ID)


# --- one clear line for what goes wrong ---


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        (ID, None, "token"),
        (ID, "hf_wrong", "does not know the token"),
        ("nobody/tiny", TOKEN, "no right"),
        ("tiny", TOKEN, "OWNER/NAME"),
        ("a/b/c", TOKEN, "OWNER/NAME"),
        ("some one/tiny", TOKEN, "OWNER/NAME"),
        (f"{OWNER}/tiny.git", TOKEN, "OWNER/NAME"),
    ],
)
def test_a_push_that_cannot_be_says_why(hub, saved, repo, token, said):
    with pytest.raises(ValueError, match=r".") as caught:
        push_to_hub(saved, repo, token=token)
    assert said in one_line(caught)
    assert repo in one_line(caught)
    assert not hub.files


def test_a_card_that_the_hub_does_not_take_is_named(hub, saved):
    (saved / "README.md").write_text("---\nlibrary_name: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md"):
        push_to_hub(saved, ID, token=TOKEN)


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(nowhere, saved):
    for action in (lambda: push_to_hub(saved, ID, token=TOKEN), lambda: load(ID)):
        with pytest.raises(ValueError, match="onnect") as caught:
            action()
        assert ID in one_line(caught)


@pytest.mark.parametrize("fault", [401, 404, 503])
def test_a_model_the_hub_does_not_give_is_one_line(hub, fault):
    hub.fault = fault
    with pytest.raises(ValueError, match=r".") as caught:
        load("someone/nothing")
    assert "someone/nothing" in one_line(caught)


def test_without_a_config_it_is_no_bundle(hub, saved):
    push_to_hub(saved, ID, token=TOKEN)
    del hub.files[ID, "main"]["config.json"]
    with pytest.raises(ValueError, match=f"{ID} is no bundle"):
        load(ID)


# --- the cache, where the hub cannot be asked ---


def cached(saved: Path, cache: Path) -> Path:
    """A bundle as the hub's client keeps it: links into a folder of blobs, and a reference."""
    home = cache / "models--someone--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for number, (name, data) in enumerate(contents(saved).items()):
        (home / "blobs" / str(number)).write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (2 + name.count("/")) + f"blobs/{number}")
    return snapshot


@pytest.mark.parametrize("offline", [True, False])
def test_the_cache_serves_where_the_hub_does_not(nowhere, model, saved, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    snapshot = cached(saved, nowhere / "cache")
    shutil.rmtree(saved)
    assert torch.equal(load(ID).encode_text(TEXTS), model.encode_text(TEXTS))
    assert torch.equal(load(snapshot).encode_text(TEXTS), model.encode_text(TEXTS))


def test_what_was_fetched_before_serves_while_the_hub_is_down(hub, model, saved):
    push_to_hub(saved, ID, token=TOKEN)
    load(ID)
    hub.fault = 503
    assert torch.equal(load(ID).encode_text(TEXTS), model.encode_text(TEXTS))


def test_the_cache_is_no_way_around_the_refusal(nowhere, saved):
    snapshot = cached(saved, nowhere / "cache")
    (snapshot / "train.py").write_text("import os")
    with pytest.raises(ValueError, match=r"train\.py"):
        load(ID)
    (snapshot / "train.py").unlink()
    (snapshot / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load(ID)


def test_offline_and_not_in_the_cache_says_so(nowhere, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE") as caught:
        load(ID)
    assert ID in one_line(caught)


# --- a path or an id ---


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Which ids the hub would have been asked for."""
    names: list[str] = []

    def fetch(name: str) -> Path:
        names.append(name)
        raise ValueError("asked")

    monkeypatch.setattr(hub_module, "_fetch", fetch)
    return names


@pytest.mark.parametrize(
    "name",
    [
        "bundle",
        "a/b/c",
        "./a/b",
        "../a",
        "/a/b",
        "~/a",
        "a/",
        "/a",
        "a b/c",
        "a/b c",
        "",
        ".",
        "-a/b",
    ],
)
def test_what_has_not_the_form_of_an_id_never_asks_the_hub(nowhere, asked, name):
    with pytest.raises(ValueError, match="no bundle") as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert asked == []


def test_a_path_object_never_asks_the_hub(nowhere, asked):
    with pytest.raises(ValueError, match="no such folder"):
        load(Path("someone/tiny"))
    assert asked == []


def test_a_mistyped_path_is_told_from_an_id(nowhere, asked):
    Path("runs/demo").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs is here") as caught:
        load("runs/dmo")
    assert "hub:runs/dmo" in one_line(caught)
    assert asked == []
    for name in ("hub:runs/dmo", "someone/dmo"):
        with pytest.raises(ValueError, match="asked"):
            load(name)
    assert asked == ["runs/dmo", "someone/dmo"]


def test_a_folder_that_is_here_is_taken_before_the_hub(nowhere, asked, model):
    save(model, Path("someone/tiny"))
    load("someone/tiny")
    assert asked == []
    with pytest.raises(ValueError, match="asked"):
        load("hub:someone/tiny")


@pytest.mark.parametrize("name", ["hub:", "hub:tiny", "hub:a/b/c", "hub:../x", "hub:a/b@main"])
def test_after_the_prefix_an_id_is_wanted(nowhere, asked, name):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        load(name)
    assert asked == []
