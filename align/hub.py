"""Bundles on the Hugging Face hub: fetched without what is no part of one, and pushed whole."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whatever client the hub uses
    OfflineModeIsEnabled,
    XetDownloadError,
)

from align.folders import damage
from align.trust import refuse_names

PARTS = ("config.json", "model.safetensors", "README.md", "results.json", "tokenizer/*")
"""What is fetched of a bundle, and pushed; nothing else is."""
PREFIX = "hub:"
"""Before an id it says that the hub is meant, whatever lies here."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_PATIENCE = 10.0
"""Seconds that the hub has to say what it has."""
_FAILURES = (HTTPError, OfflineModeIsEnabled, XetDownloadError, OSError)


def find(path: Path | str) -> Path:
    """The folder of a bundle: one that is here, or what the hub has under an id.

    The hub is asked for `hub:OWNER/NAME`, and for `OWNER/NAME` where neither a folder of that name
    nor one of the owner's is here: that is a path with a mistake in it. What the hub's client has
    in its cache is used where the hub cannot be reached.

    Raises:
        ValueError: it is nowhere, or what the hub has is refused (`align.trust`).
    """
    name = str(path)
    if name.startswith(PREFIX):
        return _fetch(_checked(name.removeprefix(PREFIX)))
    if Path(path).exists():
        return Path(path)
    if isinstance(path, Path) or not _ID.fullmatch(name):
        raise ValueError(f"there is no bundle {name}: no such folder, and no hub id (OWNER/NAME)")
    owner = name.partition("/")[0]
    if Path(owner).exists():
        raise ValueError(
            f"there is no bundle {name}: {owner} is here, and nothing of that name is in it; "
            f"{PREFIX}{name} asks the hub"
        )
    return _fetch(_checked(name))


def upload(
    folder: Path, repo_id: str, *, private: bool, token: str | None, revision: str | None, why: str
) -> str:
    """Make a repository on the hub what a folder is; returns its address.

    Args:
        folder: a bundle; `PARTS` of it are uploaded, and those the folder lacks removed there.
        repo_id: `OWNER/NAME`; made if it is not there.
        private: whether a new repository can be seen by its owner alone.
        token: with the right to write; None = that of `hf auth login` or `HF_TOKEN`.
        revision: the branch, made if it is not there; None = `main`.
        why: what the commit says.

    Raises:
        ValueError: no token, no network, no right to write there.
    """
    _checked(repo_id)
    if not (token := token or get_token()):
        raise ValueError(
            f"{repo_id} cannot be pushed without a token: log in with `hf auth login`, or set "
            "HF_TOKEN to one that may write"
        )
    api = HfApi(token=token, library_name="clip-align")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=why,
            allow_patterns=list(PARTS),
            delete_patterns=list(PARTS),
        )
    except (*_FAILURES, ValueError) as error:  # the last where the card's header is wrong
        raise ValueError(f"{repo_id} could not be pushed: {_told(error)}") from error
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _checked(repo_id: str) -> str:
    wrong = not _ID.fullmatch(repo_id) or len(repo_id) > 96 or ".." in repo_id or "--" in repo_id
    if wrong or repo_id.endswith((".git", "-", ".")):
        raise ValueError(
            f"{repo_id!r} is no hub id: it takes OWNER/NAME, of letters, digits, - _ ."
        )
    return repo_id


def _fetch(repo_id: str) -> Path:
    """A snapshot of a repository in the hub's own cache, without what is no part of a bundle."""
    try:
        # The one request that is not tried again and again where there is no network.
        found = HfApi(library_name="clip-align").model_info(repo_id, timeout=_PATIENCE)
        refuse_names([file.rfilename for file in found.siblings or []], repo_id)
        return Path(snapshot_download(repo_id, allow_patterns=list(PARTS)))
    except _FAILURES as error:
        try:
            kept = snapshot_download(repo_id, allow_patterns=list(PARTS), local_files_only=True)
        except _FAILURES:
            raise ValueError(
                f"there is no folder {repo_id}, and none could be had from the hub: {_told(error)}"
            ) from error
        return Path(kept)


def _told(error: Exception) -> str:
    """What a failure of the hub means, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    match status:
        case 401:
            return (
                "the hub does not know the token, or nothing of that name can be seen without one"
            )
        case 403:
            return "the token has no right to do that there"
        case 404:
            return "nobody and nothing of that name is there"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask, and it is not in the hub's cache"
    if type(error) is ValueError:
        return " ".join(str(error).split())
    return f"{damage(error)} ({type(error).__name__})"
