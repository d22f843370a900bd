"""What goes wrong around exports and imports: a network that is away, a disk that is full."""

import errno
import time
from pathlib import Path

import pytest
from pairs_corpus import tiny_model

from align.folders import whole_folder
from align.interop import onnx, read_foreign


@pytest.mark.parametrize("source", ["hf:someone/some-model", "open_clip:hf-hub:someone/some-model"])
@pytest.mark.parametrize("offline", [True, False], ids=["offline", "silent"])
def test_a_hub_that_is_not_there_is_one_line_within_seconds(source, offline, monkeypatch):
    """The address of a port where nothing listens stands for a network that is away."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(ValueError, match="someone/some-model") as caught:
        read_foreign(source)
    assert time.monotonic() - begun < 20, "the hub's client alone goes on for half a minute"
    said = str(caught.value)
    assert ("HF_HUB_OFFLINE" if offline else "http://127.0.0.1:9 does not answer") in said
    assert len(said.splitlines()) == 1


def test_a_model_of_a_wrong_kind_is_no_fault_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a model of the type 'bert'") as caught:
        read_foreign(f"hf:{tmp_path}")
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_a_disk_that_is_full_is_told_with_the_folder(monkeypatch, tmp_path):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "_write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        onnx.write_onnx(tiny_model(), tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_names_a_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "out"):
        Path(tmp_path / "absent").read_bytes()
    assert caught.value.filename == str(tmp_path / "absent")
