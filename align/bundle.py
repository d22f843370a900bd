"""A trained dual encoder as a folder that anybody can load: weights, tokenizer, how to rebuild.

bundle/
  config.json         towers, width, picture size, pixel statistics; where it came from
  model.safetensors   the weights
  tokenizer/          Hugging Face's format
  README.md           the model card
  results.json        what was measured, where something was
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align import hub, interop
from align.card import Result, merged, model_card, with_results
from align.draws import NoDraws
from align.folders import damage, identity, json_object, whole_folder
from align.model import DualEncoder, DualEncoderConfig
from align.quick import collector_rests
from align.tokenizer import Tokenizer
from align.trust import data_alone, refuse_calls, refuse_intruders

FORMAT = 2
"""Written; 1, which had neither a temperature nor texts cleaned, is read too."""
_IDENTIFYING = ("model.safetensors", "tokenizer/tokenizer.json", "config.json")
_NEEDED = (*_IDENTIFYING, "tokenizer/tokenizer_config.json")
_RESULTS = 1


def save(
    model: DualEncoder,
    folder: Path | str,
    *,
    card: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle, whole or not at all.

    Args:
        model: what to save.
        folder: replaced if it is a bundle, or empty.
        card: text of the model card (Markdown); if it is empty it is made from the rest, or stays
            together with the results where the bundle that is replaced is the same.
        provenance: JSON values that say where the weights came from; the card tells of `data` (a
            fingerprint), `sources`, `samples`, `steps` and `config`.

    Raises:
        ValueError: the folder holds something else, a weight is no number, or `load` would refuse
            what was written.
    """
    folder = Path(folder)
    refuse_place(folder)
    config, weights = self_contained(model), _weights(model)
    with whole_folder(folder) as beside:
        save_file(weights, beside / "model.safetensors")
        model.tokenizer.save(beside / "tokenizer")
        description = {
            "format": FORMAT,
            "model": config.to_dict(),
            "tokenizer": {"clean": model.tokenizer.clean},
            "provenance": dict(provenance or {}),
        }
        (beside / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        refuse_intruders(beside, folder)
        refuse_calls(beside, folder)
        text = card or model_card(model, provenance or {})
        (beside / "README.md").write_text(text, encoding="utf-8")
        # safetensors lets nobody else read what it writes
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
        if not card and is_bundle(folder) and _same(beside, folder):
            for name in ("README.md", "results.json"):
                if (folder / name).is_file():
                    shutil.copy(folder / name, beside / name)


def refuse_place(folder: Path) -> None:
    """See whether a bundle may go there: a folder that `save` would replace is lost.

    Raises:
        ValueError: something is there that is no bundle.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_bundle(folder)):
        raise ValueError(f"{folder} is there and is no bundle: choose another place for one")


def refuse_unwritable(folder: Path) -> None:
    """See by trying whether a bundle can be written there; nothing of the trial stays.

    Raises:
        ValueError: the nearest folder above it that is there cannot be written to, or is a file.
    """
    above = next(one for one in folder.absolute().parents if os.path.lexists(one))
    try:
        tempfile.TemporaryDirectory(prefix=".writing-", dir=above).cleanup()
    except OSError as error:
        raise ValueError(
            f"{folder}: no bundle can be written there: {above}: {error.strerror}; choose another "
            "place for it"
        ) from error


def load(path: Path | str) -> DualEncoder:
    """Load a bundle from a folder, or from the Hugging Face hub by its id, ready to encode.

    Models of OpenCLIP and Hugging Face are read too (`align.interop.read_foreign`).

    A bundle is data: where there is code, a pickle or a link that leads elsewhere in the folder,
    or the configuration asks for any of them, nothing of it is read (`align.trust`). One that is
    replaced while it is read is read once more, from the start: never a mixture of two.

    Args:
        path: a folder that `save` wrote, or a hub id such as `someone/some-model` (which
            `hub:someone/some-model` is, whatever folders there are here); or
            `open_clip:NAME@TAG`, `hf:OWNER/NAME`, a folder in OpenCLIP's or Hugging Face's format.

    Raises:
        ValueError: there is no bundle, it is refused, it is damaged, or it was replaced twice while
            it was read.
    """
    if interop.is_foreign(path):
        return interop.read_foreign(path)
    folder = hub.find(path)
    for _ in range(2):
        before, model, refused = identity(folder, _NEEDED), None, None
        try:
            model = _load(folder, path)
        except ValueError as error:
            refused = error
        if identity(folder, _NEEDED) == before:
            if model is None:
                raise refused or ValueError(path)
            return model
    raise ValueError(f"{path} was replaced while it was read, twice: load it when that is over")


def _load(folder: Path, path: Path | str) -> DualEncoder:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is no bundle: it has no config.json")
    refuse_intruders(folder)
    try:
        json_object(folder, "config.json")  # whose nesting `refuse_calls` follows
    except ValueError as error:
        raise ValueError(f"{path} is a damaged bundle: {error}") from error
    refuse_calls(folder)
    try:
        with collector_rests():
            return _read(folder)
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is a damaged bundle: {damage(error)}") from error
    except Exception as error:  # each architecture has checks of its own, and some have none
        what = f"{type(error).__name__}: {damage(error)}"
        raise ValueError(f"{path} is a damaged bundle: {what}") from error


def _read(folder: Path) -> DualEncoder:
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise ValueError(f"it has no {missing[0]}")
    description = json_object(folder, "config.json")
    if lacking := [key for key in ("format", "model") if key not in description]:
        raise ValueError(f"its config.json lacks {lacking[0]!r}")
    version = description["format"]
    if type(version) is not int or version not in (1, FORMAT):
        raise ValueError(f"format {version}; this version reads 1 and {FORMAT}")
    try:
        config = DualEncoderConfig.from_dict(description["model"])
    except ValueError as error:
        raise ValueError(f"its config.json: {error}") from error
    clean = "none" if version == 1 else _cleaning(description.get("tokenizer"))
    tokenizer = Tokenizer(_backend(folder), context_length=config.context_length, clean=clean)
    with NoDraws():
        model = DualEncoder(config, tokenizer)
    weights = load_file(folder / "model.safetensors")
    if version == 1:
        weights |= {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
    model.load_state_dict(weights)
    _refuse_no_numbers(weights, of=model)
    return model.eval()


def _cleaning(values: Any) -> str:
    if not isinstance(values, dict) or [*values] != ["clean"] or type(values["clean"]) is not str:
        raise ValueError("its config.json says no `clean`, and nothing else, of the tokenizer")
    return values["clean"]


def _backend(folder: Path) -> PreTrainedTokenizerFast:
    """Not by `AutoTokenizer`, which would look for a class of its own where all is in one file."""
    json_object(folder, "tokenizer/tokenizer_config.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))
    except Exception as error:  # of many kinds
        json_object(folder, "tokenizer/tokenizer.json")
        what = f"{type(error).__name__}: {damage(error)}"
        raise ValueError(f"its tokenizer/tokenizer.json is no tokenizer ({what})") from error


def _weights(model: DualEncoder) -> dict[str, Tensor]:
    """What is saved; weights with two names are written twice, as the format wants it."""
    weights, seen = {}, set()
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().contiguous()
        place = (plain.device, plain.untyped_storage().data_ptr())
        weights[name] = plain.clone() if place in seen else plain
        seen.add(place)
    _refuse_no_numbers(weights, of=model)
    return weights


def _refuse_no_numbers(weights: Mapping[str, Tensor], *, of: DualEncoder) -> None:
    """Weights must be of the kind that the model computes with, and finite.

    A buffer may be infinite, as masks of attention are; statistics and temperature may not.
    """
    buffers = {
        name
        for name, _ in of.named_buffers()
        if not name.rpartition(".")[2].startswith(("running_", "logit_"))
    }
    expected = of.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            kind = str(expected[name].dtype).removeprefix("torch.")
            raise ValueError(f"the weight {name} is of {tensor.dtype}, where {kind} belongs")
        # A sum tells in one pass over memory; it may overflow, and only then is looked at closely.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        if tensor.isnan().any():
            raise ValueError(f"the weight {name} holds values that are no numbers (NaN)")
        if name not in buffers and tensor.isinf().any():
            raise ValueError(f"the weight {name} holds infinite values")


def self_contained(model: DualEncoder) -> DualEncoderConfig:
    """A model's configuration, with all in it that otherwise a hub or a library would supply."""
    towers = {
        side: replace(recipe, name=tower.name, options=data_alone(tower.recipe()))
        for side, recipe, tower in (
            ("image", model.config.image, model.image),
            ("text", model.config.text, model.text),
        )
    }
    return replace(model.config, **towers)


def is_bundle(folder: Path | str) -> bool:
    """Whether a folder is one that `save` wrote, by its `config.json`, damaged or not."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "format" in values and "model" in values


def fingerprint(path: Path | str) -> str:
    """What names a bundle's weights, vocabulary and configuration: a SHA-256 over all three.

    Raises:
        ValueError: there is no bundle.
    """
    if interop.is_foreign(path):
        raise ValueError(f"{path} is no bundle; `align import {path} FOLDER` makes one of it")
    folder = hub.find(path)
    digest = hashlib.sha256()
    for name in _IDENTIFYING:
        if not (folder / name).is_file():
            raise ValueError(f"{path} is no bundle: it has no {name}")
        with (folder / name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _same(one: Path, other: Path) -> bool:
    try:
        return fingerprint(one) == fingerprint(other)
    except ValueError:  # a file of it is missing
        return False


def record_results(folder: Path | str, results: Iterable[Result]) -> None:
    """Keep measured numbers with a bundle: in `results.json`, and in the table of its card.

    A figure that was measured before by the same protocol is replaced; those of other weights are
    forgotten. Of the card nothing but the table changes. The fingerprint stays what it was.

    Args:
        folder: a bundle on this machine.
        results: what was measured.

    Raises:
        ValueError: it is no bundle, or its `results.json` cannot be read.
        OSError: it cannot be written to.
    """
    folder = Path(folder)
    if not is_bundle(folder):
        raise ValueError(f"{folder} is no bundle: no results can be kept with it")
    of, path, card = fingerprint(folder), folder / "results.json", folder / "README.md"
    with _alone(folder):
        old: list[Any] = []
        try:
            if path.exists():
                kept = json.loads(path.read_text(encoding="utf-8"))
                old, weights = kept["results"], kept["bundle"]
                old = old if weights == of else []
            rows = merged(old, [result.to_json() for result in results])
            text = with_results(card.read_bytes() if card.exists() else b"", rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: move it away and measure again") from error
        content = {"format": _RESULTS, "bundle": of, "results": rows}
        _replace(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        _replace(card, text)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder until the block ends: results of two runs at once are all kept."""
    import fcntl  # systems without it can still load

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with beside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def push_to_hub(
    bundle: DualEncoder | Path | str,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a bundle of Align",
) -> str:
    """Put a bundle on the Hugging Face hub; `align.load(repo_id)` gets it back.

    It is loaded first, as those who fetch it will: what is damaged or refused stays here. Files
    that are no part of a bundle are not uploaded.

    Args:
        bundle: a folder, or a model, which is saved first.
        repo_id: `OWNER/NAME`; the repository is made if it is not there.
        private: whether a new repository can be seen by its owner alone.
        token: with the right to write; None = that of `hf auth login` or `HF_TOKEN`.
        revision: the branch, made if it is not there; None = `main`.
        message: what the commit says.

    Returns:
        The address of the repository.

    Raises:
        ValueError: no such bundle, a damaged or refused one, no token, no network, or no right.
    """
    if isinstance(bundle, DualEncoder):
        with tempfile.TemporaryDirectory() as place:
            save(bundle, Path(place) / "bundle")
            return push_to_hub(
                Path(place) / "bundle",
                repo_id,
                private=private,
                token=token,
                revision=revision,
                message=message,
            )
    if not Path(bundle).is_dir():
        raise ValueError(f"there is no folder {bundle} to push")
    load(Path(bundle))
    return hub.upload(
        Path(bundle), repo_id, private=private, token=token, revision=revision, why=message
    )
