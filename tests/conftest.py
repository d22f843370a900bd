"""What several test modules begin with.

Nothing of the project is imported up here: this file is read before shapes begin to be checked.
"""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny data set of coloured shapes, packed; a module may have another of its own."""
    from pairs_corpus import write_pairs

    folder = tmp_path_factory.mktemp("pairs") / "data"
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Sums over threads differ in their last bit, and so would runs that are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
