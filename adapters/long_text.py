"""The first or the last tokens of a long text, without tokenising all of it.

A model reads a few hundred tokens, and a request may carry megabytes. So a long text is tokenised
in windows, and only until there are enough tokens. The result is exactly that of the whole text,
because a window is divided only where the tokenizer could not tell:

- A *cut* is the place between a visible character and a space. No word of a supported tokenizer
  spans it, and what is on one side changes nothing on the other: both sides are encoded apart.
- All words of a window but the last one are *settled*: text that follows can only change the last.
- Within a last word without end (a megabyte of dots, a page of Chinese) the tokens are settled on
  which all its prefixes agree at which the model could end a token (`WordModel.agreed`).
- A run of spaces that the tokenizer collapses or drops is shortened first, and so is a word that
  WordPiece answers with the unknown token because of its length.

`Pipeline.of` looks up in a tokenizer's own description whether all this holds for it. If it does
not, and where a text has no place to divide it for `LONGEST_STRETCH` characters, that much is
encoded at once, and more is refused: a wrong token would be worse, and so would a gigabyte.
"""

import itertools
import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from adapters.errors import UncuttableText

Pairs: TypeAlias = set[tuple[str, str]]
# Where each token begins and ends in its text, in code points: int32 [tokens, 2].
Spans: TypeAlias = npt.NDArray[np.int32]
# Where each character of a window is in the text, and its end: int32 [characters + 1].
Places: TypeAlias = npt.NDArray[np.int32]
# A part of a tokenizer's description.
Part: TypeAlias = Mapping[str, Any] | None

# Characters that are encoded in one step; a step takes a few milliseconds.
SLICE = 2**14
# Characters without a place to divide them. Encoding them takes a tenth of a second and 60 MB.
LONGEST_STRETCH = 2**17
_FIRST_WINDOW = 1024
_CHARACTERS_A_TOKEN = 6

# Letters and digits that stay one or more letters or digits in every normal form, and do not
# combine with a neighbour of this class. Characters of rare scripts are left out: a window that
# ends with one is only made longer.
_LETTERS = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03a9\u03ac-\u03ce"
    "\u0400-\u0481\u048a-\u052f\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0904-\u0939"
    "\u0e01-\u0e2e\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3"
)
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff"
_EMOJI = "\U0001f300-\U0001f3fa\U0001f400-\U0001f64f\U0001f680-\U0001f6d2"
_VISIBLE = (
    _LETTERS + _IDEOGRAPHS + "!-/:-@\\[-`{-~\u2013\u2014\u2018-\u201d\u2026\u3001\u3002"
    "\u3008-\u3011\uff01\uff0c\uff1a\uff1b\uff1f" + _EMOJI
)
_QUIET = re.compile(f"[{_VISIBLE} \t\n](?=[{_VISIBLE} \t\n])")
_CUT = f"(?<=[{_VISIBLE}])"
_NOT_SPACE = re.compile(r"\S")
_BLANK = " \t\n"
_DROP_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
# The 256 characters that stand for bytes.
_BYTES = frozenset(ByteLevel.alphabet())


@dataclass(frozen=True, slots=True, eq=False)
class Pipeline:
    """What is known of a tokenizer.

    encode: a text as the tokenizer's own encoding, without special tokens.
    shorten: rewrites a window so that the tokens of the text stay the same.
    cut: finds the places where both sides can be encoded apart; None: nothing is known, and a text
    is only ever encoded whole.
    any_start: all words but the first are settled too, so a window may begin anywhere.
    joined: neighbours that a window must not end between, because an added token has them.
    added: the ids of tokens that are found before there are words.
    absorbing: the first letters of added tokens that take in the spaces before them.
    spaces: the length of the longest added token of spaces; a window may end in the middle of one.
    words: None if no prefix of a word tells how the word is encoded.
    """

    encode: Callable[[str], Any]
    shorten: "Shortening | None" = None
    cut: re.Pattern[str] | None = None
    any_start: bool = False
    joined: frozenset[tuple[str, str]] = frozenset()
    added: frozenset[int] = frozenset()
    absorbing: frozenset[str] = frozenset()
    spaces: int = 0
    words: "WordModel | None" = None

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Pipeline":
        """The pipeline of a tokenizer that neither truncates nor pads."""

        def encode(text: str) -> Any:
            return tokenizer.encode(text, add_special_tokens=False)

        description = json.loads(tokenizer.to_str())
        added, model = description["added_tokens"], description["model"]
        normalizer = _Normalizer.of(description["normalizer"])
        splits = _splits(description["pre_tokenizer"])
        if normalizer is None or not _is_known(normalizer, splits, added, tokenizer):
            return Pipeline(encode)
        match model["type"]:
            case "WordPiece" if splits[0] in _DROP_SPACES:
                words = None
            case "BPE" if splits == ["ByteLevel"] and _is_plain_bpe(model):
                words = WordModel(tokenizer)
            case "Unigram" if splits[-1].startswith("Metaspace") and not model.get("byte_fallback"):
                words = WordModel(tokenizer)
            case _:
                return Pipeline(encode)

        # A token that takes in the space after it: no cut between the two.
        ends = {token["content"][-1] for token in added if token["rstrip"]}
        excluded = "".join(re.escape(end.lower() + end.upper()) for end in sorted(ends))
        joined: Pairs = set(normalizer.joined)
        # What is stripped there must be spaces alone, which collapse everywhere else.
        after = f"(?= +[{_VISIBLE}])" if normalizer.strips_left else "(?= )"
        blank = [token["content"] for token in added if token["content"].isspace()]
        for token in added:
            if token["content"] not in blank:
                joined.update(itertools.pairwise(token["content"]))
        return Pipeline(
            encode,
            _shortening(description, normalizer, splits, tokenizer),
            re.compile(_CUT + (f"(?<![{excluded}])" if excluded else "") + after),
            any_start=splits == ["BertPreTokenizer"],
            joined=frozenset((_plain(left), _plain(right)) for left, right in joined),
            added=frozenset(token["id"] for token in added),
            absorbing=frozenset(_plain(token["content"]) for token in added if token["lstrip"]),
            spaces=max(map(len, blank), default=0),
            words=words,
        )

    def quiet(self, text: str, start: int) -> int:
        """The next place from `start` where neither side changes how the other is normalised.

        No added token spans it either. The end of the text if there is none.
        """
        start = max(start, 1) - 1
        # A longer window would be refused.
        for match in _QUIET.finditer(text, start, start + LONGEST_STRETCH + 2 * SLICE):
            end = match.end()
            # `'s` and `'ll` are words of a byte-level tokenizer.
            if "'" in text[max(0, end - 2) : end]:
                continue
            if (_plain(text[end - 1]), _plain(text[end])) not in self.joined:
                return end
        return len(text)


@dataclass(frozen=True, slots=True, eq=False)
class Shortening:
    """Runs of spaces, and words that are too long for WordPiece, without what changes nothing.

    few: what a run of spaces becomes. words: its group is what a long word becomes.
    """

    spaces: re.Pattern[str]
    few: str
    words: re.Pattern[str] | None = None

    def __call__(self, text: str) -> str:
        text = self.spaces.sub(self.few, text)
        return text if self.words is None else self.words.sub(r"\1", text)

    def located(self, text: str, origins: Places) -> tuple[str, Places]:
        """The same, and what is left of the characters' places."""
        text, origins = _replaced(self.spaces, lambda _: self.few, text, origins)
        if self.words is not None:
            text, origins = _replaced(self.words, lambda match: match[1], text, origins)
        return text, origins


def _replaced(
    pattern: re.Pattern[str],
    replacement: Callable[[re.Match[str]], str],
    text: str,
    origins: Places,
) -> tuple[str, Places]:
    """A replacement has the places of the first characters of what it replaces."""
    texts: list[str] = []
    places: list[Places] = []
    start = 0
    for match in pattern.finditer(text):
        kept = replacement(match)
        texts += (text[start : match.start()], kept)
        places.append(origins[start : match.start() + len(kept)])
        start = match.end()
    if not texts:
        return text, origins
    return "".join([*texts, text[start:]]), np.concatenate([*places, origins[start:]])


class WordModel:
    """A BPE or Unigram model, asked about words of which only the beginning is known.

    The encoding of a word's prefix is that of a shorter prefix and one more token. For BPE, because
    merges on both sides of a place that no merge crosses do not see each other; for Unigram,
    because there is one best path to every place. So, of any longer word, the encoding begins with
    the encoding of one of the prefixes at which a token may begin that is longer than the rest of
    what is known. What the encodings of all these prefixes begin with is settled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._whole = tokenizer

    def agreed(self, word: str) -> Generator[None, None, list[int]]:
        """The ids with which the encoding of every word begins that begins with this one."""
        bare, longest = self._bare, self._longest
        # Of the last places, the one with the fewest tokens that may cross it.
        lowest = max(0, len(word) - longest)
        places: list[int] = []
        for end in range(len(word), lowest, -1):
            starts = self._starts(word, end)
            if not places or len(starts) < len(places):
                places = starts
            if len(places) == 1:
                break
        common: list[int] | None = None
        group = max(1, SLICE // max(places, default=1))
        for index in range(0, len(places), group):
            yield
            prefixes = [word[:place] for place in places[index : index + group]]
            for encoding in bare.encode_batch_fast(prefixes, add_special_tokens=False):
                common = encoding.ids if common is None else _common(common, encoding.ids)
        return common or []

    # Few services ever see such a word, and a vocabulary is large.
    @cached_property
    def _bare(self) -> Tokenizer:
        """The model without normalizer, words and added tokens."""
        # The same model and not a copy through JSON, where a score may lose its last bit.
        return Tokenizer(self._whole.model)

    @cached_property
    def _pieces(self) -> list[str]:
        return sorted(self._bare.get_vocab())

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces), default=1)

    def _starts(self, word: str, end: int) -> list[int]:
        """Where a token may begin that ends after `end`, and `end` itself."""
        starts = range(max(0, end - self._longest + 1), end)
        return [*(start for start in starts if self._is_begun(word[start:end])), end]

    def _is_begun(self, text: str) -> bool:
        """Whether a piece is longer than this text and begins with it."""
        index = bisect_left(self._pieces, text)
        if index < len(self._pieces) and self._pieces[index] == text:
            index += 1
        return index < len(self._pieces) and self._pieces[index].startswith(text)


class Reader:
    """The tokens at one end of a long text, more of them with every step.

    Args:
        locates: remember where in the text they are.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        text: str,
        end: Literal["first", "last"],
        *,
        locates: bool = False,
    ) -> None:
        self.complete = False
        self._pipeline = pipeline
        self._text = text
        self._is_first = end == "first"
        # The text on this side of the position has been looked at; the window is what has no tokens
        # in `_ids` yet, and `_more` are those of its tokens that are settled nevertheless.
        self._position = 0 if self._is_first else len(text)
        self._is_quiet = True
        self._window = ""
        self._ids: list[int] = []
        self._more: list[int] = []
        # Only if it locates: the places of the window, and of the tokens.
        self._origins: Places | None = None
        if locates:
            self._origins = np.array([self._position], dtype=np.int32)
        self._spans: list[Spans] = []
        self._more_spans = np.empty((0, 2), dtype=np.int32)

    def __len__(self) -> int:
        """How many tokens are known; of the whole text, if `complete`."""
        return len(self._ids) + len(self._more)

    def ids(self, count: int) -> list[int]:
        """At most this many tokens at this end of the text."""
        if self._is_first:
            return (self._ids + self._more)[:count]
        ids = self._more + self._ids
        return ids[max(0, len(ids) - count) :]

    def spans(self, count: int) -> Spans:
        """Where these tokens are: int32 [tokens, 2]. Only of a reader that locates.

        If the text is not complete, the outermost token that is known may be longer.
        """
        assert self._origins is not None
        if self._is_first:
            return np.concatenate([*self._spans, self._more_spans])[:count]
        spans = np.concatenate([self._more_spans, *self._spans])
        return spans[max(0, len(spans) - count) :]

    def read(self, count: int) -> Generator[None, None, None]:
        """Continue until this many tokens are known, or all; yields before each piece of work.

        Raises:
            UncuttableText: too much of it cannot be divided.
        """
        size = min(SLICE, max(_FIRST_WINDOW, _CHARACTERS_A_TOKEN * (count - len(self))))
        while not self.complete and len(self) < count:
            yield
            self._extend(size)
            self._more, self._more_spans = [], self._more_spans[:0]
            cut = self._find_cut()
            length = len(self._window)
            if length > LONGEST_STRETCH and (cut is None or length > LONGEST_STRETCH + 2 * SLICE):
                raise UncuttableText(LONGEST_STRETCH)
            if cut is not None:
                self._take(cut)
            else:
                self._more = yield from self._settled(count - len(self))
            # A window without a cut doubles, so that all its encodings cost twice the last one.
            room = max(SLICE, LONGEST_STRETCH - len(self._window))
            size = max(min(2 * size, SLICE), min(len(self._window), room))

    def _extend(self, size: int) -> None:
        """Add the next part of the text to the window."""
        pipeline, text, position = self._pipeline, self._text, self._position
        if pipeline.cut is None:
            size = len(text)
        origins = self._origins
        if self._is_first:
            self._position = pipeline.quiet(text, position + size)
            window = self._window + text[position : self._position]
            self.complete = self._position == len(text)
            if origins is not None:
                more = np.arange(position, self._position + 1, dtype=np.int32)
                origins = np.concatenate([origins[:-1], more])
        else:
            start = max(0, position - size)
            if start:
                quiet = pipeline.quiet(text, start)
                # Wherever a window begins, what follows its first cut is encoded alike.
                self._is_quiet = quiet < position
                self._position = quiet if self._is_quiet else start
            else:
                self._position = 0
            window = text[self._position : position] + self._window
            self.complete = self._position == 0
            if origins is not None:
                more = np.arange(self._position, position, dtype=np.int32)
                origins = np.concatenate([more, origins])
        shorten = pipeline.shorten
        if shorten is not None and origins is not None:
            window, origins = shorten.located(window, origins)
        elif shorten is not None:
            window = shorten(window)
        self._window, self._origins = window, origins

    def _find_cut(self) -> int | None:
        """The cut that leaves the least in the window."""
        if self.complete:
            return len(self._window) if self._is_first else 0
        assert self._pipeline.cut is not None
        if not self._is_first:
            found = self._pipeline.cut.search(self._window, 1)
            return found.start() if found else None
        # Backwards: most windows have a cut near their end.
        end = len(self._window)
        while (end := self._window.rfind(" ", 1, end)) > 0:
            if self._pipeline.cut.match(self._window, end):
                return end
        return None

    def _take(self, cut: int) -> None:
        origins = self._origins
        if self._is_first:
            encoding = self._pipeline.encode(self._window[:cut])
            self._ids += encoding.ids
            self._window = self._window[cut:]
            if origins is not None:
                self._spans.append(_spans(encoding, origins))
                self._origins = origins[cut:]
        else:
            encoding = self._pipeline.encode(self._window[cut:])
            self._ids = encoding.ids + self._ids
            self._window = self._window[:cut]
            if origins is not None:
                self._spans.insert(0, _spans(encoding, origins[cut:]))
                self._origins = origins[: cut + 1]

    def _settled(self, missing: int) -> Generator[None, None, list[int]]:
        """Tokens of a window without a cut that stay as they are whatever is beside it."""
        if not self._is_first and not (self._pipeline.any_start and self._is_quiet):
            return []
        encoding = self._pipeline.encode(self._window)
        ids = yield from self._settled_of(encoding, missing)
        if self._origins is not None:
            # The first tokens of the window or the last ones.
            spans = _spans(encoding, self._origins)
            self._more_spans = (
                spans[: len(ids)] if self._is_first else spans[len(spans) - len(ids) :]
            )
        return ids

    def _settled_of(self, encoding: Any, missing: int) -> Generator[None, None, list[int]]:
        pipeline = self._pipeline
        ids: list[int] = encoding.ids
        words: list[int | None] = encoding.word_ids
        if not ids:
            return []
        if not self._is_first:
            return ids[len(words) - words[::-1].index(words[0]) :]
        if self._window[-1].isspace():
            limit = len(self._window)
            if self._may_be_absorbed():
                limit = len(self._window.rstrip()) - 1
            elif pipeline.spaces:
                # Greedy from the left: more spaces can change only the last tokens of a run.
                limit -= 2 * pipeline.spaces
            if limit < len(self._window):
                return ids[: sum(stop <= limit for _, stop in encoding.offsets)]
        start = words.index(words[-1])
        # Looking closer at the last word is of use only if it may have all that is missing.
        is_added = start + 1 == len(ids) and ids[start] in pipeline.added
        if pipeline.words is None or is_added or not start < missing <= len(ids):
            return ids[:start]
        agreed = yield from pipeline.words.agreed("".join(encoding.tokens[start:]))
        return ids[:start] + agreed

    def _may_be_absorbed(self) -> bool:
        """Whether an added token may take in the spaces at the end of the window."""
        if not self._pipeline.absorbing:
            return False
        following = _NOT_SPACE.search(self._text, self._position)
        return following is not None and _plain(following[0]) in self._pipeline.absorbing


def _spans(encoding: Any, origins: Places) -> Spans:
    """Where an encoding's tokens are in the text."""
    return origins[np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)]


@dataclass(frozen=True, slots=True)
class _Normalizer:
    """joined: neighbours that are replaced together. collapses: runs of spaces become one."""

    joined: frozenset[tuple[str, str]] = frozenset()
    collapses: bool = False
    strips_left: bool = False
    strips_right: bool = False

    @staticmethod
    def of(part: Part) -> "_Normalizer | None":
        """None: it may look further than at one character and its marks."""
        if part is None:
            return _Normalizer()
        match part["type"]:
            case "Sequence":
                parts = [_Normalizer.of(item) for item in part["normalizers"]]
                known = [item for item in parts if item is not None]
                if len(known) < len(parts):
                    return None
                return _Normalizer(
                    frozenset().union(*(item.joined for item in known)),
                    any(item.collapses for item in known),
                    any(item.strips_left for item in known),
                    any(item.strips_right for item in known),
                )
            case "Strip":
                return _Normalizer(strips_left=part["strip_left"], strips_right=part["strip_right"])
            case "Replace":
                replaced, content = part["pattern"], part["content"]
                if replaced == {"Regex": " {2,}"} and content in (" ", "\u2581"):
                    return _Normalizer(collapses=True)
                text = replaced.get("String", " ")
                if any(character.isspace() for character in text + content):
                    return None
                return _Normalizer(frozenset(itertools.pairwise(text)))
            case (
                "BertNormalizer"
                | "NFC"
                | "NFD"
                | "NFKC"
                | "NFKD"
                | "Lowercase"
                | "StripAccents"
                | "Nmt"
                | "Precompiled"
            ):
                return _Normalizer()
        return None


def _splits(part: Part) -> list[str]:
    """The pre-tokenizers that look at a character and its neighbour only; "" is any other."""
    if part is None:
        return [""]
    match part["type"]:
        case "Sequence":
            return [name for item in part["pretokenizers"] for name in _splits(item)] or [""]
        case "ByteLevel" if part["use_regex"]:
            return ["ByteLevel"]
        case "Metaspace" if part["split"] and part["replacement"] == "\u2581":
            return [f"Metaspace {part['prepend_scheme']}"]
        case "Punctuation" if part["behavior"] == "Isolated":
            return ["Punctuation"]
        case "BertPreTokenizer" | "Digits" | "Whitespace" | "WhitespaceSplit" as name:
            return [name]
    return [""]


def _is_known(
    normalizer: _Normalizer, splits: list[str], added: Sequence[Any], tokenizer: Tokenizer
) -> bool:
    """Whether both sides of a cut can be encoded apart."""
    if "" in splits or ("ByteLevel" in splits and len(splits) > 1):
        return False
    if normalizer.strips_left and not (
        normalizer.strips_right
        and normalizer.collapses
        and (splits[0] in _DROP_SPACES or splits == ["Metaspace always"])
    ):
        return False
    for token in added:
        content = token["content"]
        has_space = re.search(r"\s", content) is not None
        if has_space and (splits != ["ByteLevel"] or token["single_word"] or content.strip()):
            return False
    # A table of replacements may do anything with a character.
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    visible = (normalize(chr(code)) for code in range(0x21, 0x7F))
    return all(text and not re.search(r"\s", text) for text in visible)


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    """Whether every byte is a symbol and merges are all there is."""
    options = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    return not any(model.get(name) for name in options) and set(model["vocab"]) >= _BYTES


def _shortening(
    description: Mapping[str, Any], normalizer: _Normalizer, splits: list[str], tokenizer: Any
) -> Shortening:
    contents = [token["content"] for token in description["added_tokens"]]
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    blank = "".join(
        character for character in _BLANK if normalize(f"a{character * 2}b") == normalize("a  b")
    )
    if normalizer.collapses:
        spaces, few = re.compile(f"[{blank}]{{3,}}"), "  "
    elif splits[0] in _DROP_SPACES:
        spaces, few = re.compile(f"[{_BLANK}]{{2,}}"), " "
    else:
        spaces, few = re.compile("(?!)"), ""

    model = description["model"]
    longest = model.get("max_input_chars_per_word", 0) + 1
    letter = re.compile(f"[{_LETTERS}]")
    inside = any(letter.match(text[0]) or letter.match(text[-1]) for text in contents if text)
    if model["type"] != "WordPiece" or splits != ["BertPreTokenizer"] or inside:
        return Shortening(spaces, few)
    # Every letter is at least one character of the word, so it stays longer than the model allows.
    word = re.compile(f"([{_LETTERS}{_EMOJI}]{{{longest}}})[{_LETTERS}{_EMOJI}]+")
    return Shortening(spaces, few, word)


def _plain(character: str) -> str:
    """A letter without case and marks: an added token may be looked up in the normalised text."""
    return unicodedata.normalize("NFKD", character)[:1].lower()


def _common(first: list[int], second: list[int]) -> list[int]:
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return first[:index]
    return first[: len(second)]
