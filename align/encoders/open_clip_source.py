"""Where OpenCLIP's models come from: a built-in name with a tag, a folder, the hub; no pickles."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whatever client the hub uses
)
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import parse_model_name
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError

from align.encoders.reach import hub_if_it_answers
from align.encoders.tower import near
from align.folders import damage

PICKLES = (".bin", ".pt", ".pth")
_FIRST = (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors")
_SECTIONS = ("embed_dim", "vision_cfg", "text_cfg")


@dataclass(frozen=True)
class Source:
    """An OpenCLIP model before it is built.

    Attributes:
        name: as OpenCLIP takes it.
        config: what it is built from: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`, ...
        preprocess: the fields of `open_clip.transform.PreprocessCfg`, complete.
        weights: a file in safetensors; None = fresh ones.
        folder: the local folder that it lies in, if it does.
    """

    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path | None = None
    folder: Path | None = None

    @property
    def title(self) -> str:
        """What its towers are called: the name, or `custom` where a folder is all that it has."""
        return self.name if self.folder is None else "custom"


def find_source(name: str, weights: str | bool = False) -> Source:
    """Find a model of OpenCLIP's, and its weights where they are wanted.

    Args:
        name: one of `open_clip.list_models()`, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or a folder
            that holds `open_clip_config.json`.
        weights: True = those of the folder or hub id, False = none; or a tag of
            `open_clip.list_pretrained()`, or a file in safetensors.

    Raises:
        ValueError: there is no such model, no such weights, or none but pickles.
    """
    kind, place = None, name
    if (Path(name) / HF_CONFIG_NAME).is_file():
        kind = "local-dir"
    else:
        with one_line(f"open_clip:{name}"):
            kind, place = parse_model_name(name)
    if kind == "local-dir":
        return _from_folder(Path(place), weights)
    if kind == "hf-hub":
        return _from_hub(place, weights)
    return _built_in(name.replace("/", "-"), weights)


def build_model(source: Source) -> Any:
    """OpenCLIP's own module, with its weights or with fresh ones, in fp32 and evaluation mode.

    Raises:
        ValueError: its configuration or weights do not fit.
    """
    config = deepcopy(source.config)
    hugging_face = bool(config["text_cfg"].get("hf_model_name"))
    custom = config.pop("custom_text", False) or hugging_face
    if hugging_face:
        config["text_cfg"]["hf_model_pretrained"] = False
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    for section in ("vision_cfg", "text_cfg"):
        config[section].pop("output_tokens", None)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    hub = str(config["text_cfg"]["hf_model_name"]) if hugging_face else "."
    with (
        hub_if_it_answers(hub) as silence,
        one_line(f"open_clip:{source.name} could not be made from its configuration{silence}"),
    ):
        model: Any = (kind if custom else open_clip.CLIP)(**config)
    if source.weights is not None:
        with one_line(f"{source.weights} does not fit open_clip:{source.name}"):
            open_clip.load_checkpoint(model, str(source.weights), strict=True)
    return model.eval()


def _from_folder(folder: Path, weights: str | bool) -> Source:
    path = folder / HF_CONFIG_NAME
    if not folder.is_dir():
        raise ValueError(f"local-dir:{folder}: there is no such folder")
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of OpenCLIP's: it has no {HF_CONFIG_NAME}")
    found = weights if isinstance(weights, bool) else _file(weights)
    if found is True:
        found = _weights_in(folder)
    config, preprocess = _read_config(path)
    _find_architectures(config, folder)
    return Source(f"local-dir:{folder}", config, preprocess, found or None, folder)


def _find_architectures(config: dict[str, Any], folder: Path) -> None:
    """Architectures that were written beside a folder's weights are found where it is now."""
    for section, key, prefix in (
        ("text_cfg", "hf_model_name", ""),
        ("vision_cfg", "timm_model_name", "local-dir:"),
    ):
        told = str(config[section].get(key) or "")
        here = folder / Path(told.removeprefix(prefix)).name
        if told.startswith(prefix or "/") and (here / "config.json").is_file():
            config[section][key] = f"{prefix}{here}"


def _from_hub(name: str, weights: str | bool) -> Source:
    config, preprocess = _read_config(_download(name, HF_CONFIG_NAME))
    found = None if weights is False else weights
    if found is True:
        found = _download(name, HF_SAFE_WEIGHTS_NAME)
    return Source(
        f"hf-hub:{name}", config, preprocess, _file(found) if isinstance(found, str) else found
    )


def _built_in(name: str, weights: str | bool) -> Source:
    config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        raise ValueError(
            f"OpenCLIP has no model {name!r}{near(name, known)}; `open_clip.list_models()` lists "
            "them all, and a folder needs an open_clip_config.json"
        )
    preprocess = asdict(PreprocessCfg())
    if weights is False:
        return Source(name, config, preprocess)
    quick = bool(config.get("quick_gelu", False))
    other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
    tags = {
        tag: bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)) == quick
        # Where a model has no such sibling, it is right as it is.
        or other == name
        or other not in open_clip.list_models()
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    fitting = [tag for tag, fits in tags.items() if fits]
    known = {} if weights is True else open_clip.get_pretrained_cfg(name, weights)
    if known and not tags.get(str(weights).lower().replace("-", "_"), True):
        raise ValueError(
            f"the weights {weights} were trained with{'out' if quick else ''} QuickGELU, "
            f"open_clip:{name} computes otherwise: take {other}@{weights}"
        )
    if not known:
        if isinstance(weights, str) and Path(weights).suffix:
            return Source(name, config, preprocess, _file(weights))
        what = "is an architecture; say which weights" if weights is True else f"has no {weights!r}"
        raise ValueError(
            f"open_clip:{name} {what}{near(str(weights), fitting)}, as in {name}@TAG "
            f"(tags: {', '.join(fitting) or 'none'})"
        )
    preprocess = merge_preprocess_dict(preprocess, known)
    owner, _, filename = str(known.get("hf_hub", "")).rpartition("/")
    stem = Path(filename or HF_WEIGHTS_NAME)
    safe = HF_SAFE_WEIGHTS_NAME if stem.name == HF_WEIGHTS_NAME else f"{stem.stem}.safetensors"
    if not owner:
        raise ValueError(f"the weights {weights} of open_clip:{name} are published as a pickle")
    return Source(name, config, preprocess, _download(owner, safe))


def _download(name: str, filename: str) -> Path:
    with hub_if_it_answers(name) as silence:
        try:
            return Path(huggingface_hub.hf_hub_download(name, filename))
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"hf-hub:{name}: {filename} could not be fetched ({damage(error)}{silence})"
            ) from error


def _file(weights: str) -> Path:
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise ValueError(f"{weights} is no file in safetensors; {_CONVERT}")
    if not path.is_file():
        raise ValueError(f"{weights}: there is no such file")
    return path


def _weights_in(folder: Path) -> Path:
    """The file that OpenCLIP would take, among those in safetensors."""
    known = [folder / name for name in _FIRST if (folder / name).is_file()]
    if found := [*known, *sorted(folder.glob("*.safetensors"))]:
        return found[0]
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(f"{folder} has no weights but {pickles[0]}, a pickle; {_CONVERT}")
    raise ValueError(f"{folder} has no weights: {HF_SAFE_WEIGHTS_NAME} is missing")


_CONVERT = (
    "pickles are never loaded: where you trust it, write `safetensors.torch.save_file(torch.load("
    f"FILE, weights_only=True), '{HF_SAFE_WEIGHTS_NAME}')` once"
)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and the complete `preprocess_cfg` of a file."""
    with one_line(f"{path} cannot be read"):
        whole = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or not isinstance(whole.get("model_cfg"), dict):
        raise ValueError(f"{path} lacks 'model_cfg'")
    config = whole["model_cfg"]
    if missing := [key for key in _SECTIONS if key not in config]:
        raise ValueError(f"{path} lacks {missing[0]!r} in 'model_cfg'")
    return config, merge_preprocess_dict(asdict(PreprocessCfg()), whole.get("preprocess_cfg") or {})


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors that OpenCLIP and the libraries under it meet, as one clear line.

    Raises:
        ValueError: instead of them.
    """
    try:
        yield
    except _ERRORS as error:
        raise ValueError(f"{what}: {damage(error)}") from error


_ERRORS = (
    *(HTTPError, OSError, LookupError, SafetensorError),
    *(AssertionError, AttributeError, RuntimeError, TypeError, ValueError),
)
