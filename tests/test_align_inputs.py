"""What is given to a model to encode: wrong values are one line that says which and why."""

import jaxtyping
import numpy as np
import pytest
import torch
from pairs_corpus import encoded, picture, tiny_model
from PIL import Image

from align.tokenizer import CLEANING


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def unchecked():
    """Without the types that are checked in tests alone: users do not have them checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refusal(function, *given) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        function(*given)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.bool])
def test_numbers_that_are_no_pixels_are_refused_by_their_type(model, unchecked, dtype):
    message = refusal(model.encode_image, torch.ones(2, 3, 32, 32, dtype=dtype))
    assert str(dtype) in message
    assert "uint8" in message


def test_pixels_of_another_size_are_refused_by_their_shape(model, unchecked):
    message = refusal(model.encode_image, torch.ones(2, 3, 32, 31, dtype=torch.uint8))
    assert "[rows, 3, 32, 32]" in message
    assert "[2, 3, 32, 31]" in message


NO_TEXTS = {
    "nothing": (["a", None], "text 1 is a NoneType"),
    "a number": ([3], "text 0 is a int"),
    "bytes": (["a", "b", b"abc"], "text 2 is a bytes"),
    "a list": ([["a"]], "text 0 is a list"),
    "half a pair": (["a", "b\ud83d"], "text 1 is no text: its character 1 .*U[+]D83D"),
    "a generator": ((text for text in "ab"), "list of strings, not a generator"),
    "a set": ({"a"}, "list of strings, not a set"),
    "bytes alone": (b"abc", "list of strings, not a bytes"),
    "none at all": (None, "list of strings, not a NoneType"),
    "one string": ("abc", "list of strings, not one string"),
}


@pytest.mark.parametrize("clean", CLEANING)
@pytest.mark.parametrize("kind", NO_TEXTS)
def test_what_is_no_text_is_named_however_texts_are_cleaned(model, unchecked, kind, clean):
    texts, expected = NO_TEXTS[kind]
    model.tokenizer.clean = clean
    try:
        for function in (model.encode_text, model.tokenize, model.tokenizer.ids):
            with pytest.raises(ValueError, match=expected):
                function(texts)
    finally:
        model.tokenizer.clean = "none"


def test_a_text_is_named_by_its_place_among_all(model, unchecked):
    with pytest.raises(ValueError, match="text 5 is a float"):
        model.encode_text([*"abcde", 0.5], batch_size=2)


def test_columns_and_tuples_of_texts_are_lists(model, unchecked):
    expected = model.encode_text(["red", "dot"])
    assert torch.equal(model.encode_text(("red", "dot")), expected)
    assert torch.equal(model.encode_text(np.array(["red", "dot"])), expected)
    assert model.encode_text(()).shape == (0, 16)


NO_PICTURES = {
    "nothing": (None, "picture 1 is a NoneType"),
    "an array": (np.zeros((8, 8, 3), np.uint8), "picture 1 is a ndarray"),
    "a tensor": (torch.zeros(3, 32, 32, dtype=torch.uint8), "picture 1 is a Tensor"),
    "bytes": (b"PNG", "picture 1 is a bytes"),
    "no height": (Image.new("RGB", (5, 0)), "picture 1 has no pixels: it is 5 x 0"),
    "no width": (Image.new("RGB", (0, 5)), "picture 1 has no pixels: it is 0 x 5"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_no_picture_is_named_by_its_place_and_type(model, unchecked, kind):
    wrong, expected = NO_PICTURES[kind]
    good = picture("red", "dot")
    for function in (model.encode_image, model.preprocess):
        assert expected in refusal(function, [good, wrong])


def test_what_is_no_list_of_pictures_is_refused(model, unchecked):
    one = picture("red", "dot")
    assert "not a generator" in refusal(model.encode_image, (image for image in [one]))
    assert "not one picture" in refusal(model.encode_image, one)
    assert "not a dict" in refusal(model.preprocess, {"a": one})


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_is_cut_off_is_named(model, tmp_path, form):
    whole = encoded(picture("red", "ring", side=90), form)
    path = tmp_path / f"cut.{form.lower()}"
    for keep in (0.3, 0.7):
        path.write_bytes(whole[: int(len(whole) * keep)])
        assert f"{path} cannot be read as a picture" in refusal(model.encode_image, [path])


def test_a_picture_whose_file_is_cut_off_is_named_by_its_place_among_all(model, tmp_path):
    whole = encoded(picture("red", "ring", side=90), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    good = picture("red", "dot")
    with Image.open(tmp_path / "cut.jpg") as opened, pytest.raises(ValueError, match="picture 3 "):
        model.encode_image([good, good, good, opened], batch_size=2)


def test_no_pictures_are_an_empty_batch(model):
    assert model.preprocess([]).shape == (0, 3, 32, 32)


def test_pictures_of_another_size_are_taken_where_it_is_asked_for():
    model = tiny_model()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    found = model.encode_image(pixels, image_size=64)
    assert torch.equal(found, model.eval().project_image(model.image(pixels).pooled))
    with pytest.raises(ValueError, match=r"\[rows, 3, 48, 48\], not \[3, 3, 64, 64\]"):
        model.encode_image(pixels, image_size=48)
