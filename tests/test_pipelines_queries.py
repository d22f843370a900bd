"""Queries into vectors: the formula against a slow transcription, and what is refused."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from pairs_corpus import COLOURS, SHAPES, picture, tiny_model
from PIL import Image

from align.fusion import fusion_head
from align.fusion.head import FusionHead, Modality
from pipelines.config import ConfigError
from pipelines.queries import MOST_WEIGHT, Query, QueryEncoder, Term, picture_and_text, summed

CAT, DOG = picture("red", "cross", side=50), picture("blue", "ring", side=36)


def head_of(name: str, model: Any) -> FusionHead:
    """A head that is no longer the mean of both."""
    torch.manual_seed(3)
    head = fusion_head(name)(
        dim=model.config.dim,
        image_width=model.image.token_width,
        text_width=model.text.token_width,
        **({"width": 16} if name == "intermediate" else {}),
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head.eval()


@pytest.fixture(scope="module")
def encoder() -> QueryEncoder:
    model = tiny_model()
    return QueryEncoder(model, {name: head_of(name, model) for name in ("early", "intermediate")})


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt((row * row).sum())


def plain(encoder: QueryEncoder, value: Any) -> np.ndarray:
    """The embedding of one value, by the model's own interface, in float64."""
    if isinstance(value, np.ndarray):
        return unit(value.astype(np.float64))
    is_text = isinstance(value, str)
    rows = (encoder.model.encode_text if is_text else encoder.model.encode_image)([value])
    return rows[0].numpy().astype(np.float64)


@torch.no_grad()
def fused(encoder: QueryEncoder, head: str, image: Any, text: Any) -> np.ndarray:
    model = encoder.model
    images = model.image_features(model.preprocess([image]))
    tokens = model.tokenize([text])
    texts = model.text_features(tokens.ids, tokens.mask)
    given = encoder.heads[head](
        Modality(model.project_image(images.pooled), images.tokens, images.mask),
        Modality(model.project_text(texts.pooled), texts.tokens, texts.mask),
    )
    return given.embedding[0].numpy().astype(np.float64)


def slowly(encoder: QueryEncoder, query: Query) -> np.ndarray:
    """The formula of `Query`, term by term."""
    total, rest = np.zeros(encoder.model.config.dim), list(query.terms)
    if query.head is not None:
        image = next(t for t in rest if isinstance(t.value, Image.Image) and t.weight >= 0)
        text = next(t for t in rest if isinstance(t.value, str) and t.weight >= 0)
        rest = [t for t in rest if t is not image and t is not text]
        both = image.weight + text.weight
        lean = (text.weight - image.weight) / both
        alone = plain(encoder, text.value if lean > 0 else image.value)
        mixture = (1 - abs(lean)) * fused(encoder, query.head, image.value, text.value)
        total = both * unit(mixture + abs(lean) * alone)
    for term in rest:
        total = total + term.weight * plain(encoder, term.value)
    return unit(total)


VECTOR = np.linspace(-1, 2, 16)
QUERIES: dict[str, Query] = {
    "a text": Query((Term("red cross"),)),
    "a picture": Query((Term(CAT),)),
    "a vector": Query((Term(VECTOR),)),
    "a vector in half precision": Query((Term(VECTOR.astype(np.float16)),)),
    "both": Query((Term(CAT), Term("blue"))),
    "away from a text alone": Query((Term("red cross", -1.0),)),
    "weights": Query((Term("red", 2.0), Term(CAT, 0.5), Term(DOG, -0.25), Term("dot", -1.0))),
    "terms of no weight": Query((Term("red", 1.0), Term(CAT, 0.0))),
    "tiny weights": Query((Term("red", 1e-5), Term(CAT, -2e-5))),
    "large weights": Query((Term("red", MOST_WEIGHT), Term(CAT, -0.9 * MOST_WEIGHT))),
    "a head": Query((Term(CAT), Term("blue")), "early"),
    "a head that reads tokens": Query((Term(DOG), Term("red bar")), "intermediate"),
    "leaning to the picture": Query((Term(CAT, 1.5), Term("blue", 0.5)), "early"),
    "leaning to the text": Query((Term(CAT, 0.2), Term("blue", 1.8)), "intermediate"),
    "a head and light weights": Query((Term(CAT, 0.1), Term("blue", 0.3)), "early"),
    "fused, and more": Query(
        (Term("dot", -0.7), Term(CAT, 0.6), Term(DOG, -0.2), Term("blue", 1.0), Term(VECTOR, 0.3)),
        "intermediate",
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_the_vector_is_that_of_the_formula(name, encoder):
    found = encoder.vectors([QUERIES[name]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], slowly(encoder, QUERIES[name]), atol=2e-5)
    assert np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-6)


def test_a_batch_gives_what_single_queries_give(encoder):
    many = [*QUERIES.values(), *(Query((Term(f"{c} {s}"),)) for c in COLOURS for s in SHAPES)]
    together = encoder.vectors(many)
    single = np.concatenate([encoder.vectors([query]) for query in many])
    np.testing.assert_allclose(together, single, atol=1e-6)
    assert encoder.vectors([]).shape == (0, encoder.model.config.dim)


@pytest.mark.parametrize("head", [None, "early", "intermediate"])
def test_the_balance_ends_at_the_picture_and_at_the_text(head, encoder):
    image, text = (encoder.vectors([Query((Term(value),))]) for value in (CAT, "blue"))
    for weights, expected in {(2.0, 0.0): image, (0.0, 2.0): text}.items():
        terms = (Term(CAT, weights[0]), Term("blue", weights[1]))
        assert (encoder.vectors([Query(terms, head)]) == expected).all()
    near = encoder.vectors([Query((Term(CAT, 1.999), Term("blue", 0.001)), head)])
    np.testing.assert_allclose(near, image, atol=5e-3)


def test_a_head_is_not_the_plain_sum(encoder):
    terms = (Term(CAT), Term("blue"))
    rows = encoder.vectors([Query(terms, head) for head in (None, "early", "intermediate")])
    assert (rows[:, None] @ rows.T)[~np.eye(3, dtype=bool)[:, None]].max() < 0.999


def test_equal_texts_and_the_same_picture_are_embedded_once(encoder, monkeypatch):
    seen: list[int] = []
    model = encoder.model
    for name in ("encode_text", "encode_image", "preprocess"):
        real = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda values, real=real: (seen.append(len(values)), real(values))[1]
        )
    first = encoder.vectors(
        [Query((Term(CAT), Term("red"))), Query((Term(CAT), Term("red", -1.0)))]
    )
    assert seen == [1, 1]
    seen.clear()
    encoder.vectors([Query((Term(CAT), Term("red")), "early"), Query((Term(CAT),))])
    assert seen == [1], "what the head was given serves the other query too"
    assert not np.allclose(first[0], first[1])


NAN, INFINITY = float("nan"), float("inf")
REFUSED: dict[str, tuple[Query, str]] = {
    "nothing": (Query(()), "needs a text or a picture"),
    "no weight": (Query((Term("red", 0.0), Term(CAT, 0.0))), "with a weight other than 0"),
    "no number": (Query((Term("red", NAN),)), "weight: nan is no number"),
    "infinity": (Query((Term("red", -INFINITY),)), "weight: -inf is no number"),
    "too large": (Query((Term("red", 1e30),)), "weight: 1e[+]30 is no number"),
    "no words": (Query((Term(" \n "),)), "a text to look for is empty"),
    "a short vector": (Query((Term(np.ones(3)),)), r"must hold 16 finite numbers.*\[3\]"),
    "no numbers": (Query((Term(np.full(16, NAN)),)), "must hold 16 finite numbers"),
    "no direction": (Query((Term(np.zeros(16)),)), "has no direction"),
    "an unknown head": (
        Query((Term(CAT), Term("red")), "erly"),
        "unknown fusion head 'erly'; known: early, intermediate",
    ),
    "a head for words": (Query((Term("a"), Term("b")), "early"), "one picture and one text"),
    "a head for two": (Query((Term(CAT), Term(DOG), Term("b")), "early"), "exactly one picture"),
    "a head for less": (Query((Term(CAT, -1.0), Term("b")), "early"), "exactly one picture"),
    "a head for nothing": (
        Query((Term(CAT, 0.0), Term("b", 0.0), Term(VECTOR)), "early"),
        "exactly one picture",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looked_for_is_one_line(name, encoder):
    query, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says) as caught:
        encoder.vectors([Query((Term("fine"),)), query])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=says):
        encoder.check(query)


@pytest.mark.parametrize(
    "terms",
    [
        (Term("red"), Term("red", -1.0)),
        (Term(CAT, 0.3), Term("a"), Term(CAT, -0.3), Term("a", -1.0)),
        (Term(VECTOR, 1e-6), Term(2 * VECTOR, -1e-6)),
    ],
    ids=["texts", "pictures", "vectors"],
)
def test_terms_that_cancel_each_other_out_are_told(terms, encoder):
    encoder.check(Query(terms))
    with pytest.raises(ConfigError, match="cancel each other out"):
        encoder.vectors([Query(terms)])


def test_the_sum_of_rows_is_refused_where_rounding_alone_is_left():
    row = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    almost = torch.nn.functional.normalize(row + 3e-7, dim=0)
    with pytest.raises(ConfigError, match="cancel"):
        summed([5.0, -5.0], [row, almost])
    torch.testing.assert_close(summed([3.0, -1.0], [row, row]), row)


def test_what_a_head_would_fuse():
    image, text = Term(CAT), Term("red")
    assert picture_and_text((text, image, Term("dot", -1.0), Term(VECTOR))) == (image, text)
    assert picture_and_text((text, image, Term("dot", 0.0))) is None
    assert picture_and_text((text,)) is None


def test_many_threads_get_what_one_gets(encoder):
    chosen = [QUERIES[name] for name in ("weights", "leaning to the text", "a text")]
    expected = encoder.vectors(chosen)
    wrong: list[float] = []

    def ask() -> None:
        wrong.extend(float(np.abs(encoder.vectors(chosen) - expected).max()) for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 20
    assert max(wrong) < 1e-6
