"""The two kinds of tokenizers behind one interface: fast ones know the characters of each token, slow ones need a lock.

Thread-safe: the shared tokenizer is never switched to truncation or padding.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cenote.errors import BadRequest, TooLong

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from cenote.conventions import Cuts

ENCODED_AT_ONCE = 256
"""Texts whose encodings are held at once: a token of an encoding takes some hundred bytes."""

MOST_CUTS = 8
"""Cutting a text at a token's end may give other tokens; it is repeated at most this often."""

UNICODE = "text must be valid Unicode, without lone surrogates"

FIRST_LOOK = 8
"""Characters per token that `FastTokenizer.enough` looks at first; most text has 3 to 5."""
MARGIN = 2
"""Words at a cut that do not count: the last one is incomplete, and the one beside it may depend on it."""

Ids = list[int]
End = Literal["left", "right"] | None


class Text(NamedTuple):
    """A tokenised text; `type_ids` is `None` where all are zero."""

    ids: Seq[int]
    type_ids: Seq[int] | None = None

    def part(self, kept: slice) -> Text:
        """Return the tokens at the places `kept`."""
        if self.type_ids is None:
            return Text(self.ids[kept])
        return Text(self.ids[kept], self.type_ids[kept])

    def extended(self, ids: Ids) -> Text:
        """Return the text with further tokens, of type 0."""
        extended = [*self.ids, *ids]
        if self.type_ids is None:
            return Text(extended)
        return Text(extended, [*self.type_ids, *[0] * len(ids)])


class _Side(NamedTuple):
    """A text of pairs: its tokens, as far as a pair may keep them, and the number of all."""

    kept: Encoding
    length: int


class FastTokenizer:
    """A tokenizer of the tokenizers library.

    Args:
        tokenizer: Transformers' wrapper of it.
        lowercase: lower-case text before tokenising, as Sentence-Transformers' `do_lower_case`.
        cuts: text of a pair that is cut.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, lowercase: bool = False, cuts: Cuts = "longest_first"
    ) -> None:
        self._tokenizer = tokenizer
        self._cuts = cuts
        self._backend = tokenizer.backend_tokenizer
        self._wants_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._backend.no_truncation()
        self._backend.no_padding()
        if lowercase:
            self._lowercase()

    def tokenize(self, texts: list[str], *, special: bool) -> list[Text]:
        """Tokenise `texts`, with the special tokens if `special`."""
        tokenised: list[Text] = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            part = texts[start : start + ENCODED_AT_ONCE]
            encodings = self.encodings(part, special=special, offsets=False)
            tokenised += map(self.text_of, encodings)
        return tokenised

    def encodings(self, texts: list[str], *, special: bool, offsets: bool = True) -> list[Encoding]:
        """Encode `texts`.

        Args:
            texts: any number.
            special: add the special tokens.
            offsets: keep the range of characters of each token.

        Raises:
            BadRequest: a text is not valid Unicode.
        """
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        try:
            encodings: list[Encoding] = encode(texts, add_special_tokens=special)
        except TypeError:  # of tokenizers, for a str that has no UTF-8
            raise BadRequest(UNICODE, param="input") from None
        return encodings

    def enough(self, text: str, count: int, *, from_end: bool) -> str:
        """Return a part of `text` whose first `count` tokens, special tokens aside, are those of the whole text.

        Words are tokenised one by one, so that the tokens before the last words of a beginning are those of the text.
        That is compared on beginnings of several lengths, as a tokenizer may look farther (digits grouped from the
        end). Where a text has no such words, it is returned whole.

        Args:
            text: of any length.
            count: at least 1.
            from_end: return an end of the text, and compare the last tokens.

        Raises:
            BadRequest: the text is not valid Unicode, be it where nothing is tokenised.
        """
        length = FIRST_LOOK * count
        while 4 * length < len(text):
            part = text[kept_places(length, from_end)]
            (encoding,) = self.encodings([part], special=False)
            if _is_settled(encoding, count, from_end):
                longer = [text[kept_places(size, from_end)] for size in (length + 1, length + length // 2)]
                others = self.encodings(longer, special=False, offsets=False)
                if {_ids(other, count, from_end) for other in others} == {_ids(encoding, count, from_end)}:
                    _check_unicode(text)
                    return part
            length *= 4
        return text

    def text_of(self, encoding: Encoding) -> Text:
        """Return the ids of `encoding`, and its type ids where the model takes any."""
        ids = encoding.ids
        if not self._wants_type_ids:
            return Text(ids)
        type_ids = encoding.type_ids
        return Text(ids, type_ids if any(type_ids) else None)

    def cut(self, text: str, limit: int, *, special: bool, side: End = None) -> Text:
        """Tokenise `text` as Hugging Face does with truncation: content is cut, special tokens stay.

        Args:
            text: of any length.
            limit: maximum tokens.
            special: add the special tokens.
            side: end that is cut; `None` = the tokenizer's.
        """
        return self.text_of(self.cut_encoding(text, limit, special=special, side=side))

    def cut_encoding(self, text: str, limit: int, *, special: bool, side: End = None) -> Encoding:
        """Return the encoding of `text` that `cut` makes its tokens of."""
        (encoding,) = self.encodings([text], special=False)
        room = limit - self._added(special, pair=False)
        encoding.truncate(max(0, room), direction=side or self._tokenizer.truncation_side)
        if special:
            encoding = self._backend.post_process(encoding, None, True)
            encoding.truncate(limit)  # where not even the special tokens fit
        return encoding

    def beginning(self, text: str, limit: int) -> str:
        """Return the beginning of `text` that has at most `limit` tokens."""
        for _ in range(MOST_CUTS):
            (encoding,) = self.encodings([text], special=False)
            if len(encoding.ids) <= limit:
                break
            offsets = encoding.offsets
            text = text[: min(offsets[limit - 1][1], offsets[limit][0])]  # a character may be of several tokens
        return text

    def join(self, pairs: list[tuple[str, str]], limit: int, *, special: bool) -> list[Text]:
        """Join each pair to one text of at most `limit` tokens; a text is tokenised once.

        Raises:
            TooLong: the only text that may be cut has too few tokens.
        """
        texts = list(dict.fromkeys(chain.from_iterable(pairs)))
        encodings = self.encodings(texts, special=False)
        room = max(0, limit - self._added(special, pair=True))
        sides = [_Side(self._shortened(encoding, room), len(encoding)) for encoding in encodings]
        side_of = dict(zip(texts, sides, strict=True))
        return [self._join(side_of[query], side_of[document], limit, special) for query, document in pairs]

    def _join(self, query: _Side, document: _Side, limit: int, special: bool) -> Text:
        room = max(0, limit - self._added(special, pair=True))
        for_query, for_document = SHARES[self._cuts](query.length, document.length, room)
        shortened = self._shortened(query.kept, for_query), self._shortened(document.kept, for_document)
        joined = self._backend.post_process(*shortened, special)
        joined.truncate(limit)  # where not even the special tokens fit
        return self.text_of(joined)

    def _shortened(self, encoding: Encoding, length: int) -> Encoding:
        """Return `encoding`, or a copy that is cut to `length` tokens, on the tokenizer's side.

        An encoding keeps its cut parts, in pieces of the length of the rest, and joining two makes a pair of every
        piece of one and every piece of the other. So the kept part of a long one is taken as such a piece.
        """
        from tokenizers import Encoding

        if len(encoding) <= length:
            return encoding
        side = self._tokenizer.truncation_side
        copy = Encoding.merge([encoding])
        if 0 < 2 * length <= len(encoding):
            copy.truncate(len(encoding) - length, direction="right" if side == "left" else "left")
            (piece,) = copy.overflowing
            return piece
        copy.truncate(length, direction=side)
        return copy

    def _added(self, special: bool, *, pair: bool) -> int:
        """Return the number of special tokens that are added to a text or a pair."""
        return int(self._backend.num_special_tokens_to_add(pair)) if special else 0

    def _lowercase(self) -> None:
        from tokenizers.normalizers import Lowercase
        from tokenizers.normalizers import Sequence as Normalizers

        existing = [self._backend.normalizer] if self._backend.normalizer else []
        self._backend.normalizer = Normalizers([Lowercase(), *existing])


class SlowTokenizer:
    """A tokenizer in Python, which one thread uses at a time.

    Args:
        tokenizer: of Transformers.
        lowercase: as `FastTokenizer`.
        cuts: likewise.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, lowercase: bool = False, cuts: Cuts = "longest_first"
    ) -> None:
        self._tokenizer = tokenizer
        self._cuts = cuts
        self._lock = threading.Lock()
        self._cased = str.lower if lowercase else str

    def tokenize(self, texts: list[str], *, special: bool) -> list[Text]:
        """See `FastTokenizer.tokenize`."""
        if not texts:
            return []
        outputs = self._call([*map(self._checked, texts)], add_special_tokens=special)
        return [Text(ids) for ids in outputs["input_ids"]]

    def enough(self, text: str, count: int, *, from_end: bool) -> str:
        """See `FastTokenizer.enough`: nothing is known of words here, so the text is returned whole."""
        return text

    def cut(self, text: str, limit: int, *, special: bool, side: End = None) -> Text:
        """See `FastTokenizer.cut`.

        Raises:
            BadRequest: the tokenizer cuts at the other end alone.
        """
        if side not in (None, self._tokenizer.truncation_side):
            raise BadRequest(
                f"a text of this model cannot be cut at its {side} end: its tokenizer cuts at the other; "
                "leave the side out, or send a shorter text",
                param="truncation_direction",
            )
        outputs = self._call(self._checked(text), truncation=True, max_length=limit, add_special_tokens=special)
        return Text(outputs["input_ids"][:limit])

    def beginning(self, text: str, limit: int) -> str:
        """See `FastTokenizer.beginning`."""
        (tokens,) = self.tokenize([text], special=False)
        return text if len(tokens.ids) <= limit else str(self._tokenizer.decode(list(tokens.ids[:limit])))

    def join(self, pairs: list[tuple[str, str]], limit: int, *, special: bool) -> list[Text]:
        """See `FastTokenizer.join`."""
        queries = [self._checked(query) for query, _ in pairs]
        documents = [self._checked(document) for _, document in pairs]
        outputs = self._call(queries, documents, add_special_tokens=special, truncation=self._cuts, max_length=limit)
        ids: list[Ids] = outputs["input_ids"]
        types = outputs.get("token_type_ids", [None] * len(ids))
        kept = slice(limit)  # also where not even the special tokens fit
        return [Text(*row).part(kept) for row in zip(ids, types, strict=True)]

    def _call(self, *texts: Any, **options: Any) -> Any:
        with self._lock:
            return self._tokenizer(*texts, **options)

    def _checked(self, text: str) -> str:
        """Return a text as the tokenizer takes it.

        Raises:
            BadRequest: it is not valid Unicode, which some tokenizers in Python take for unknown words.
        """
        _check_unicode(text)
        return self._cased(text)


def _check_unicode(text: str) -> None:
    """Raise `BadRequest` for a text with a lone surrogate, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(UNICODE, param="input") from None


def kept_places(count: int, from_end: bool) -> slice:
    """Return the places of the first or the last `count`."""
    return slice(-count, None) if from_end else slice(count)


def _ids(encoding: Encoding, count: int, from_end: bool) -> tuple[int, ...]:
    """Return the first or the last `count` ids."""
    return tuple(encoding.ids[kept_places(count, from_end)])


def _is_settled(encoding: Encoding, count: int, from_end: bool) -> bool:
    """Return whether the first or the last `count` tokens are more than `MARGIN` words away from the cut."""
    words = [word for word in encoding.word_ids if word is not None]
    if from_end:
        words.reverse()
    return len(words) > count and abs(words[count - 1] - words[-1]) >= MARGIN


def fast_or_slow(
    tokenizer: PreTrainedTokenizerBase, *, lowercase: bool, cuts: Cuts = "longest_first"
) -> FastTokenizer | SlowTokenizer:
    """Return `tokenizer` behind the interface of its kind."""
    is_fast = tokenizer.is_fast and getattr(tokenizer, "backend_tokenizer", None) is not None
    kind = FastTokenizer if is_fast else SlowTokenizer
    return kind(tokenizer, lowercase=lowercase, cuts=cuts)


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the tokens that two texts keep when cut to `room` together, "longest first" as the tokenizers library."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)


def _first_cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the tokens that two texts keep when the first is cut.

    Raises:
        TooLong: none of its tokens would be left.
    """
    kept = min(first, room - second)
    if kept < 1 and first + second > room:
        raise TooLong(
            f"a pair of {first} and {second} tokens is to be cut to {room}, and the checkpoint asks to cut one "
            "of its texts alone, of which nothing would be left; shorten the other one",
            param="truncate_prompt_tokens",
        )
    return kept, second


def _second_cut(first: int, second: int, room: int) -> tuple[int, int]:
    return _first_cut(second, first, room)[::-1]


SHARES: Mapping[Cuts, Callable[[int, int, int], tuple[int, int]]] = {
    "longest_first": shares,
    "only_first": _first_cut,
    "only_second": _second_cut,
}
"""The tokens that two texts keep, by the text that is cut."""
