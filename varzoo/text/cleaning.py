r"""What prompts go through before they are tokenized, as the captions did in training.

LlamaGen and NAR clean captions with rules that DeepFloyd wrote for web alt texts and PixArt passed on. Their effect is
reproduced rule by rule, in their order, surprises included, since the weights saw captions in just this form:
- formats are removed at the beginning of words too ("epsilon" becomes "ilon");
- words that mix letters and digits ("h2o") and numbers of six or more digits disappear;
- the ends are trimmed before the last spaces are, so a quote behind a space stays until the second pass.
"""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from urllib.parse import unquote_plus

from varzoo.core.errors import unknown
from varzoo.text.extra import require

Rule = tuple[re.Pattern[str], str]

DASHES = "".join(filter(lambda sign: unicodedata.category(sign) == "Pd", map(chr, range(0x10000))))
QUOTES = str.maketrans({**dict.fromkeys("`´«»“”¨", '"'), **dict.fromkeys("‘’", "'")})
ORNAMENTS = re.escape("#®•©™&@·º½¾¿¡§~()[]{}|\\/*")
FORMATS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DOMAINS = "com|co|ru|net|org|edu|gov|it"


def _rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


ADDRESSES = _rules(
    (r"<person>", "person"),  # how some data sets hide names
    (r"\bhttps?:(?:/{1,3}|[a-z0-9%])", ""),
    (rf"\b[a-z0-9.-]+\.(?:{DOMAINS})[\w/-]*\b/?(?!@)", ""),
    (r"\bwww:(?:/{1,3}|[a-z0-9%])", ""),
)
SIGNS = _rules(
    (r"@\w+", ""),  # user names
    (r"[\u31c0-\u9fff]+", ""),  # CJK: strokes, phonetic extensions, enclosed, compatibility, hexagrams, ideographs
    (f"[{re.escape(DASHES)}]+", "-"),
)
NUMBERS_AND_FILES = _rules(
    (r"&quot;?|&amp", ""),  # entities that had been escaped twice
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a line break that was written as two characters
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FORMATS})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{ORNAMENTS}]+", " "),
    (r"\s+\.\s+", " "),
)
CODES_AND_ADVERTS = _rules(
    (r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b", ""),  # article codes
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FORMATS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*(?:[a-zA-Z]+\d+){2}[a-zA-Z\d]*\b", " "),  # longer article codes
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS = _rules(
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """One pass of the official cleaning."""
    caption = _apply(ADDRESSES, unquote_plus(caption).strip().lower())
    caption = _apply(SIGNS, _without_markup(caption)).translate(QUOTES)
    caption = _apply(NUMBERS_AND_FILES, caption)
    if sum(map(caption.count, "-_")) > 3:  # words-joined-by-signs-instead-of-spaces
        caption = caption.replace("-", " ").replace("_", " ")
    caption = html.unescape(html.unescape(require("ftfy").fix_text(caption))).strip()
    return _apply(ENDS, _apply(CODES_AND_ADVERTS, caption)).strip()


def _apply(rules: tuple[Rule, ...], caption: str) -> str:
    for pattern, replacement in rules:
        caption = pattern.sub(replacement, caption)
    return caption


def _without_markup(caption: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes a caption that looks like a file name for a mistake
        return require("bs4").BeautifulSoup(caption, "html.parser").text


CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "captions": lambda prompt: clean_caption(clean_caption(prompt)),  # officially twice
    "lowercase": lambda prompt: prompt.lower().strip(),
    "none": lambda prompt: prompt,
}


def cleaning(name: str) -> Callable[[str], str]:
    """A cleaning by name. Raises ValueError if there is none of that name."""
    if name not in CLEANINGS:
        raise unknown("cleaning", name, CLEANINGS)
    return CLEANINGS[name]
