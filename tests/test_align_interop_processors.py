"""Texts before the tower: what a tokenizer file of Hugging Face's says of how ours cleans them."""

import sys
import unicodedata

import pytest
from test_align_interop_huggingface import cased_tokenizer

from align.interop.processors import _stand_ins, _with_cleaning
from align.tokenizer import Tokenizer, _cleaner

CLEANED = ["whitespace", "lower", "canonicalize"]
TEXTS = {
    "composed of two characters": unicodedata.normalize("NFD", "a café, Ångström, naïve"),
    "hangul in parts": unicodedata.normalize("NFD", "한국어"),
    "curly quotes": "\u201cthe dog\u2019s\u201d bowl, \u2018it\u2019",
    "low quotes": "\u201ewide\u201f \u201ahigh\u201b",
    "ligatures": "\ufb01ne \ufb02oor, a\ufb03x o\ufb00 be\ufb06, \u0149 \u01c4",
    "full width": "\uff21 \uff52ed\u3000dog\uff01 \uff08\uff10\uff09",
    "half width": "\uff76\uff9e \uffe6",
    "colours of a terminal": "a \x1b[31;1mred\x1b[0m dog",
    "control characters": "a\x00b\x7f c\ufeff d\x0b e\ufffc",
    "lines": "one\r\ntwo\u2028three\rfour",
    "spaces": "  a\u00a0\u2003b\t c ",
    "a dotted capital": "İstanbul",
}


def written(clean: str) -> Tokenizer:
    """Byte pairs to which every character matters, cleaned in a way."""
    tokenizer = cased_tokenizer()
    return Tokenizer(tokenizer.backend, context_length=200, clean=clean)


@pytest.mark.parametrize("clean", CLEANED)
@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_odd_characters_have_our_ids_there(kind, clean):
    ours = written(clean)
    batch = ours([TEXTS[kind]])
    assert _with_cleaning(ours).encode(TEXTS[kind]).ids == batch.ids[0].tolist()


def test_every_character_that_ftfy_replaces_is_replaced_alike():
    from ftfy.chardata import CONTROL_CHARS, DOUBLE_QUOTE_RE, LIGATURES, SINGLE_QUOTE_RE, WIDTH_MAP

    assert {ord(one): other for one, other in _stand_ins().items()} == {**LIGATURES, **WIDTH_MAP}
    normaliser, clean = _with_cleaning(written("whitespace")).normalizer, _cleaner("whitespace")
    for code in range(sys.maxunicode // 16):
        one = chr(code)
        if SINGLE_QUOTE_RE.match(one) or DOUBLE_QUOTE_RE.match(one) or code in CONTROL_CHARS:
            assert normaliser.normalize_str(f"x{one}y") == clean(f"x{one}y"), hex(code)
