"""The hub is asked only where it answers: its client would go on trying for half a minute."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whatever client the hub uses
)

PATIENCE_SECONDS = 5.0
"""How long the hub is waited for before its cache alone is used."""


@contextmanager
def hub_if_it_answers(name: str) -> Iterator[str]:
    """Let libraries ask the hub inside a `with` block, or only its cache where it is silent.

    A folder needs no hub, and then none is asked. While the block lasts, a hub that did not answer
    counts as `HF_HUB_OFFLINE`, which all of Hugging Face's libraries obey.

    Args:
        name: what is looked for: a folder, or a hub id.

    Yields:
        What a message about a failure adds: empty where the hub was reached or not needed.
    """
    if Path(name).is_dir():
        yield ""
        return
    before = constants.HF_HUB_OFFLINE
    why = "; HF_HUB_OFFLINE forbids to ask the hub" if before else ""
    if not before and not _answers():
        why = (
            f"; {constants.ENDPOINT} does not answer, and its cache here lacks it: "
            "check the network, or name a local folder"
        )
        constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_SECONDS)
    except (HTTPError, OSError):
        return False
    return True
