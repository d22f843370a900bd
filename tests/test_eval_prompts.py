import numpy as np
import pytest

from eval.prompts import TEMPLATES, class_prototypes, fill


def encode(texts):
    """A stand-in for a text tower: a vector of each text alone, of arbitrary length."""
    seeds = [sum(ord(letter) * 31**place for place, letter in enumerate(text)) for text in texts]
    rows = [np.random.default_rng(seed).standard_normal(5) for seed in seeds]
    return (np.array(rows) * np.arange(1, len(rows) + 1)[:, None]).astype(np.float32)


def test_both_placeholders_and_braces_in_names():
    assert fill("a photo of a {}.", "red heart") == "a photo of a red heart."
    assert fill("{c}, the {}", "cat") == "cat, the cat"
    assert fill("a {} key", "{c}") == "a {c} key"
    assert fill("a {c} key", "{}") == "a {} key"
    assert fill("{x} of {}", "a{0}") == "{x} of a{0}"
    with pytest.raises(ValueError, match=r"template 'a photo' has no place for the name"):
        fill("a photo", "cat")


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_prototypes_are_the_normalised_mean_of_normalised_rows(batch_size):
    names, templates = ["cat", "dog", "eel"], ["{}", "a {c}.", "two {}s"]
    found = class_prototypes(encode, names, templates, batch_size=batch_size)
    for row, name in zip(found, names, strict=True):
        single = [encode([template.replace("{c}", "{}").format(name)])[0] for template in templates]
        mean = np.mean([vector / np.linalg.norm(vector) for vector in single], axis=0)
        assert row == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_named_template_sets_have_a_place_for_the_name():
    for templates in TEMPLATES.values():
        filled = [fill(template, "zebra") for template in templates]
        assert all(text.count("zebra") == 1 for text in filled)
        assert len(set(filled)) == len(templates)


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="names and templates: 0 and 1"):
        class_prototypes(encode, [], ["{}"])
    with pytest.raises(ValueError, match="names and templates: 1 and 0"):
        class_prototypes(encode, ["cat"], [])
    with pytest.raises(ValueError, match="batch_size"):
        class_prototypes(encode, ["cat"], ["{}"], batch_size=0)
    with pytest.raises(ValueError, match=r"prompt \(from 2\) embeddings: 1 of 1 rows hold NaN"):
        class_prototypes(
            lambda texts: encode(texts) * (np.nan if "eel" in texts else 1),
            ["cat", "dog", "eel"],
            ["{}"],
            batch_size=2,
        )
    with pytest.raises(ValueError, match="class prototype embeddings: 1 of 1 rows are all zero"):
        class_prototypes(
            lambda _texts: np.array([[1.0, 0.0], [-1.0, 0.0]]), ["cat"], ["a {}", "no {}"]
        )
