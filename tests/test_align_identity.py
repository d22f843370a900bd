"""What names a model that no files of ours name."""

import copy

import pytest
import torch
from pairs_corpus import tiny_model

from align.identity import weights_fingerprint
from align.model import DualEncoder


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_model()


def test_it_is_a_function_of_the_model_alone(model):
    before = weights_fingerprint(model)
    assert len(before) == 64
    assert weights_fingerprint(tiny_model()) == before, "built again"
    model.encode_text(["red dot", "a much longer text than any before it was"])
    model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert weights_fingerprint(model) == before, "after use"


@pytest.mark.parametrize("what", ["weight", "running statistic", "temperature"])
def test_every_number_counts(model, what):
    other = copy.deepcopy(model)
    state = other.state_dict()
    name = {
        "weight": "text_projection.weight",
        "running statistic": next(key for key in state if key.endswith("running_mean")),
        "temperature": "logit_scale",
    }[what]
    with torch.no_grad():
        state[name].reshape(-1)[-1] += 1e-3
    assert weights_fingerprint(other) != weights_fingerprint(model)


def test_the_tokenizer_and_the_sizes_count(model):
    said = {weights_fingerprint(model), weights_fingerprint(tiny_model(context_length=12))}
    other = tiny_model()
    other.tokenizer.clean = "lower"
    said.add(weights_fingerprint(other))
    other = tiny_model()
    other.tokenizer.backend.add_tokens(["zebra"])
    said.add(weights_fingerprint(other))
    assert len(said) == 4
