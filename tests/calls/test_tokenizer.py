"""Tokens are counted as tiktoken counts them, from local tables, without blocking the event loop.

Threats T66 (a megabyte of anything), T67 (special tokens, lone surrogates, a million spaces), T68 (no network).
"""

import asyncio
import gzip
import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from proxy.calls.tokenizer import (
    CHARACTERS_MAX,
    TEXTS_MAX,
    WAITING_CHARACTERS_MAX,
    Tokenizers,
    table_folders,
    tokens_in,
)
from proxy.formats.body import RequestBody
from proxy.formats.content import read_prompt
from proxy.policy.catalog import Model, Upstream

UPSTREAM = Upstream("up", "http://127.0.0.1/v1", None)
# The names of the tables in tiktoken's cache: the SHA-1 of the URL from which it downloads them.
CACHED = {
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
}
FOLDERS = table_folders({})


@pytest.fixture(scope="module")
def tokenizers() -> Iterator[Tokenizers]:
    """Tokenizers with both tables of the wheel."""
    tokens = Tokenizers(FOLDERS)
    tokens.load(["o200k_base", "cl100k_base"])
    yield tokens
    tokens.close()


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiktoken.Encoding]:
    """Tiktoken's own encodings, as tiktoken builds them from its cache."""
    folder = tmp_path_factory.mktemp("cache")
    for name, cached in CACHED.items():
        (folder / cached).write_bytes(table_of(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        return {name: tiktoken.get_encoding(name) for name in CACHED}


def table_of(name: str) -> bytes:
    """A table as OpenAI publishes it."""
    packed = next(path for folder in FOLDERS if (path := folder / f"{name}.tiktoken.gz").exists())
    return gzip.decompress(packed.read_bytes())


# ---------------------------------------------------------------------------------------------- the model's encoding


@pytest.mark.parametrize(
    ("upstream_model", "encoding", "is_guess"),
    [
        ("gpt-4o-mini-2024-07-18", "o200k_base", False),
        ("gpt-5.5", "o200k_base", False),
        ("o3", "o200k_base", False),
        ("ft:gpt-4o:acme::1", "o200k_base", False),
        ("ft:gpt-4:acme::1", "cl100k_base", False),
        ("gpt-4-turbo", "cl100k_base", False),
        ("gpt-35-turbo", "cl100k_base", False),
        ("text-embedding-3-small", "cl100k_base", False),
        ("gpt-oss-120b", "o200k_harmony", False),
        ("openai/gpt-oss-20b", "o200k_harmony", False),
        ("text-davinci-003", "p50k_base", False),
        ("gpt-6-astra", "o200k_base", True),
        ("meta-llama/Llama-3.1-8B-Instruct", "o200k_base", True),
        ("", "o200k_base", True),
    ],
)
def test_the_encoding_is_the_one_that_tiktoken_has_for_the_model(upstream_model: str, encoding: str, is_guess: bool):
    """Looked up by the upstream's name of the model. If tiktoken does not know it, the result is a guess."""
    found = Tokenizers.encoding_of(Model("gpt-4", UPSTREAM, upstream_model))
    assert (found.name, found.is_guess) == (encoding, is_guess)


def test_a_configured_encoding_comes_before_the_name():
    """The operator knows which model a name stands for."""
    found = Tokenizers.encoding_of(Model("m", UPSTREAM, "gpt-4o", encoding="cl100k_base"))
    assert (found.name, found.is_guess) == ("cl100k_base", False)


# ----------------------------------------------------------------------------------------------- counts are correct


def test_the_example_of_openai_s_cookbook_has_129_tokens(tokenizers: Tokenizers):
    """OpenAI's cookbook states this number for these messages on gpt-4-0613."""
    turns = [
        ("", "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."),
        ("example_user", "New synergies will help drive top-line growth."),
        ("example_assistant", "Things working well together will increase revenue."),
        (
            "example_user",
            "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
        ),
        ("example_assistant", "Let's talk later when we're less busy about how to do better."),
    ]
    messages = [{"role": "system", "content": text, **({"name": name} if name else {})} for name, text in turns]
    last = "This late pivot means we don't have time to boil the ocean for the client deliverable."
    messages.append({"role": "user", "content": last})
    prompt = read_prompt(RequestBody({"messages": messages}), is_chat=True)
    assert sum(tokenizers.count(text, "cl100k_base") for text in prompt.texts) + prompt.overhead == 129


@pytest.mark.parametrize(
    ("text", "o200k", "cl100k"),
    [
        ("", 0, 0),
        ("tiktoken is great!", 6, 6),
        ("<|endoftext|>", 7, 7),
        ("お誕生日おめでとう", 8, 9),
        ("\ud800", 1, 1),
        ("a\udfffb", 3, 3),
        (" " * 80, 2, 1),
    ],
)
def test_short_texts_are_counted_on_the_event_loop(tokenizers: Tokenizers, text: str, o200k: int, cl100k: int):
    """Special tokens count as text, and a lone surrogate is one more character (T67)."""
    assert (tokenizers.count(text, "o200k_base"), tokenizers.count(text, "cl100k_base")) == (o200k, cl100k)
    assert tokenizers.count(text, "o200k_harmony") == o200k


@given(text=st.text(st.characters(exclude_categories=()), max_size=200))
def test_no_text_has_more_tokens_than_bytes(tokenizers: Tokenizers, text: str):
    """So the number of bytes bounds every count."""
    for name in CACHED:
        assert bool(text) <= tokenizers.count(text, name) <= len(text.encode("utf-8", "surrogatepass"))


@given(text=st.text(max_size=200))
def test_any_text_is_counted_as_by_tiktoken(
    tokenizers: Tokenizers, encodings: dict[str, tiktoken.Encoding], text: str
):
    """We load the tables differently, but tables and patterns are the same."""
    for name, encoding in encodings.items():
        assert tokenizers.count(text, name) == len(encoding.encode(text, disallowed_special=()))


HOSTILE = {
    "prose": "The ship's cook, who had seen worse, went on peeling potatoes. " * 16_000,
    "spaces": " " * 1_000_000,
    "a": "a" * 1_000_000,
    "endoftext": "<|endoftext|>" * 77_000,
    "surrogates": "\ud800" * 1_000_000,
    "emoji": "👩‍👩‍👧‍👦" * 90_000,
    "U+3000": "\u3000" * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("encoding", ["o200k_base", "cl100k_base"])
async def test_a_megabyte_in_slices_has_almost_the_same_count(
    tokenizers: Tokenizers, encodings: dict[str, tiktoken.Encoding], kind: str, encoding: str
):
    """Also texts that overflow the library's stack. A cut changes the count by at most two tokens (T66, T67)."""
    text = HOSTILE[kind]
    halves = (text[:500_000], text[500_000:])  # the library cannot encode a million spaces at once
    exact = sum(len(encodings[encoding].encode_ordinary(half)) for half in halves)
    counted = await tokenizers.count_all([text], encoding)
    assert counted is not None
    assert abs(counted - exact) <= 2 * (len(text) // 16_384 + 3)


async def test_texts_are_counted_separately(tokenizers: Tokenizers):
    """They are packed into slices, but not joined, and short ones are not cut."""
    texts = ["", "Hello", " world", "x" * 16_384, "a" * 20_000, *["user"] * 1000]
    separately = [await tokenizers.count_all([text], "o200k_base") for text in texts]
    assert await tokenizers.count_all(texts, "o200k_base") == sum(number or 0 for number in separately)
    assert await tokenizers.count_all([], "o200k_base") == await tokenizers.count_all([""] * 9, "o200k_base") == 0


@pytest.mark.parametrize("kind", ["prose", "emoji", "a"])
def test_a_long_text_on_the_event_loop_is_extrapolated(tokenizers: Tokenizers, kind: str):
    """It must not take long, and a text is mostly like its beginning."""
    text = HOSTILE[kind]
    parts = sum(tokenizers.count(text[start : start + 4096], "o200k_base") for start in range(0, len(text), 4096))
    assert tokenizers.count(text, "o200k_base") == pytest.approx(parts, rel=0.02)
    assert tokenizers.count("a" * 4096 + "é" * 4096, "o200k_base") == 2 * tokenizers.count("a" * 4096, "o200k_base")


class Panic(BaseException):
    """A BaseException, as the Rust library raises it."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_if_the_tokenizer_fails_the_bytes_are_counted(error: type[BaseException]):
    """They are never fewer than the tokens, and the call goes on. The log does not contain the text."""

    def fail(text: str) -> list[int]:
        raise error(text)

    with capture_logs() as logs:
        assert tokens_in("é\ud800", fail) == 5
    assert logs == [
        {"event": "a text could not be tokenized", "log_level": "error", "error": error.__name__, "characters": 2}
    ]


def test_the_library_fails_on_a_million_spaces(encodings: dict[str, tiktoken.Encoding]):
    """This is one reason for slices. If this test fails one day, they are needed for the event loop only."""
    with capture_logs():
        assert tokens_in(" " * 1_000_000, encodings["o200k_base"].encode_ordinary) == 1_000_000


def test_a_keyboard_interrupt_is_not_swallowed():
    """It is no failure of the tokenizer."""

    def interrupt(text: str) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens_in("x", interrupt)


# ------------------------------------------------------------------------------------------------------------- bounds


async def test_too_much_text_is_not_counted(tokenizers: Tokenizers):
    """The bytes are used instead. Exactly the allowed amount is still counted."""
    assert await tokenizers.count_all(["a" * (CHARACTERS_MAX // 8)] * 8 + ["a"], "o200k_base") is None
    assert await tokenizers.count_all([""] * (TEXTS_MAX + 1), "o200k_base") is None
    assert await tokenizers.count_all([""] * TEXTS_MAX, "o200k_base") == 0


async def test_a_count_that_takes_too_long_is_given_up(tokenizers: Tokenizers):
    """A call must not wait for ever on a busy machine."""
    assert await tokenizers.count_all([HOSTILE["a"]], "o200k_base", timeout_s=0) is None
    assert await tokenizers.count_all(["Hello"], "o200k_base") == 1


class Gate:
    """An encoder that waits in its thread until the gate is open. Each text is one token."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.counted = 0

    def __call__(self, text: str) -> list[int]:
        self.entered.release()
        assert self.is_open.wait(30)
        self.counted += 1
        return [0]

    async def until_entered(self) -> None:
        """Wait until a thread waits at the gate."""
        await asyncio.to_thread(self.entered.acquire)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.is_open.set()


@pytest.fixture
def gated(gate: Gate) -> Iterator[Tokenizers]:
    """Tokenizers with only one encoding, `gate`."""
    tokens = Tokenizers([])
    tokens._encoders["gate"] = gate
    yield tokens
    gate.is_open.set()
    tokens.close()


async def test_while_too_much_waits_only_short_texts_are_accepted(gated: Tokenizers, gate: Gate):
    """A large text is declined at once, until the others have ended. A small one is always counted."""
    large = ["a" * (CHARACTERS_MAX // 2)]
    queue = [asyncio.create_task(gated.count_all(large, "gate")) for _ in range(4)]
    await gate.until_entered()
    assert await gated.count_all(["a" * (257 << 10)], "gate") is None
    small = asyncio.create_task(gated.count_all(["a"], "gate"))
    gate.is_open.set()
    assert await small == 1
    slices = CHARACTERS_MAX // 2 // 16_384
    assert await asyncio.gather(*queue) == [slices] * 4
    assert sum(len(text) for text in large) * 4 == WAITING_CHARACTERS_MAX
    assert await gated.count_all(large, "gate") == slices


async def test_a_short_prompt_does_not_wait_for_the_end_of_long_ones(gated: Tokenizers, gate: Gate):
    """Each slice queues separately, so the slices of a long prompt are not all counted first."""
    long = asyncio.create_task(gated.count_all(["a" * CHARACTERS_MAX], "gate"))
    await gate.until_entered()
    short = asyncio.create_task(gated.count_all(["a"], "gate"))
    gate.is_open.set()
    assert await short == 1
    assert not long.done()
    assert await long == 512


async def test_a_cancelled_count_leaves_nothing_behind(gated: Tokenizers, gate: Gate):
    """Its current slice ends, the others never begin, and its share of the bound is free again."""
    task = asyncio.create_task(gated.count_all(["a" * CHARACTERS_MAX], "gate"))
    await gate.until_entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.is_open.set()
    assert await gated.count_all(["a" * CHARACTERS_MAX], "gate") == 512
    assert gate.counted == 1 + 512


async def test_closing_ends_a_running_count(gated: Tokenizers, gate: Gate):
    """It gives None, like every later count, and no error in a call that is being settled."""
    task = asyncio.create_task(gated.count_all(["a" * CHARACTERS_MAX], "gate"))
    await gate.until_entered()
    gated.close()
    gate.is_open.set()
    assert await task is None
    assert await gated.count_all(["a"], "gate") is None


# ------------------------------------------------------------------------------------------------------------- tables


def test_tables_are_found_in_the_wheel_and_in_tiktoken_s_cache(tmp_path: Path):
    """Under their names there, and with the hashes of OpenAI's tables."""
    found = {name: hashlib.sha256(table_of(name)).hexdigest() for name in CACHED}
    assert found == {
        "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    }
    for name, cached in CACHED.items():
        (tmp_path / cached).write_bytes(table_of(name))
        tokens = Tokenizers([tmp_path])
        tokens.load([name])
        assert tokens.is_loaded(name)
        assert tokens.count("Hello world", name) == 2
        tokens.close()


def test_only_requested_tables_are_loaded():
    """Each takes about 30 MB. The encoding of gpt-oss shares the table of o200k_base."""
    tokens = Tokenizers(FOLDERS)
    assert not tokens.is_loaded("o200k_base")
    tokens.load(["o200k_harmony"])
    loaded = [name for name in ("o200k_base", "o200k_harmony", "cl100k_base", "gpt2") if tokens.is_loaded(name)]
    assert loaded == ["o200k_base", "o200k_harmony"]
    tokens.close()


async def test_a_table_is_read_once_when_it_is_first_needed(monkeypatch: pytest.MonkeyPatch):
    """In a thread. Calls that come meanwhile wait for it, and one that is cancelled takes it from no other."""
    tokens, reads = Tokenizers(FOLDERS), []
    load = tokens.load
    monkeypatch.setattr(tokens, "load", lambda names: (reads.append((names, threading.get_ident())), load(names)))
    assert await tokens.count_all([], "cl100k_base") == 0
    tokens.begin_to_load("o200k_base")
    calls = [asyncio.ensure_future(tokens.ready(name)) for name in ("o200k_base", "o200k_harmony", "o200k_base")]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert not tokens.is_loaded("o200k_base")
    assert await tokens.count_all(["Hello world"], "o200k_base") == 2
    await asyncio.wait(calls)
    assert [names for names, _ in reads] == [["cl100k_base"], ["o200k_base"]]
    assert threading.get_ident() not in {thread for _, thread in reads}
    assert tokens.begin_to_load("o200k_harmony") is None
    tokens.close()


async def test_no_table_is_read_after_the_end():
    """A stream that is cut off by a stop may still ask for it."""
    tokens = Tokenizers(FOLDERS)
    tokens.close()
    await tokens.ready("o200k_base")
    assert not tokens.is_loaded("o200k_base")


@pytest.mark.parametrize("encoding", ["p50k_base", "r50k_base", "gpt2", "p50k_edit", "nobody_knows_it"])
async def test_without_a_table_four_bytes_count_as_one_token(encoding: str):
    """The proxy starts, logs it once, and long texts are bounded by their bytes (T68)."""
    tokens = Tokenizers(FOLDERS)
    with capture_logs() as logs:
        tokens.load([encoding])
        tokens.load([encoding])
    [line] = logs
    assert (line["log_level"], line["event"]) == (
        "warning",
        "no table for this tokenizer: its tokens are estimated by bytes",
    )
    assert not tokens.is_loaded(encoding)
    assert [tokens.count(text, encoding) for text in ("", "a", "abcde", "éé", "\ud800" * 4, "a" * 10_000)] == [
        0, 1, 2, 1, 3, 2500,
    ]  # fmt: skip
    assert await tokens.count_all(["a"], encoding) is None
    tokens.close()


def damaged(tmp_path: Path, kind: str) -> Path:
    """A folder with a file that has a table's name but not its content."""
    table = table_of("cl100k_base")
    cached, packed = tmp_path / CACHED["cl100k_base"], tmp_path / "cl100k_base.tiktoken.gz"
    if kind == "changed":
        cached.write_bytes(table[:-1] + b"\r")
        packed.write_bytes(gzip.compress(table + b"\n"))
    elif kind == "cut off":
        cached.write_bytes(table[:1000])
        packed.write_bytes(gzip.compress(table)[:-1000])
    elif kind == "no gzip":
        packed.write_bytes(b"no gzip at all")
    elif kind == "damaged gzip":
        packed.write_bytes(gzip.compress(table)[:10] + b"\xff" * 1000)
    elif kind == "a folder":
        cached.mkdir()
        packed.mkdir()
    elif kind == "not readable":
        cached.symlink_to(cached)
    return tmp_path


@pytest.mark.parametrize(
    "kind", ["changed", "cut off", "no gzip", "damaged gzip", "a folder", "not readable", "nothing"]
)
def test_a_damaged_table_is_not_used(tmp_path: Path, kind: str):
    """It would give wrong counts. The next folder is searched, and no file is deleted."""
    folder = damaged(tmp_path, kind)
    before = sorted(path.name for path in folder.iterdir())
    tokens = Tokenizers([folder])
    with capture_logs():
        tokens.load(["cl100k_base"])
    assert not tokens.is_loaded("cl100k_base")
    assert sorted(path.name for path in folder.iterdir()) == before
    tokens.close()
    good = Tokenizers([folder, *FOLDERS])
    good.load(["cl100k_base"])
    assert good.is_loaded("cl100k_base")
    good.close()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({"TIKTOKEN_CACHE_DIR": "/a", "DATA_GYM_CACHE_DIR": "/b"}, Path("/a")),
        ({"DATA_GYM_CACHE_DIR": "/b"}, Path("/b")),
    ],
)
def test_the_cache_folder_is_tiktoken_s(environment: dict[str, str], first: Path):
    """By its own variables, in its order. The wheel comes after it."""
    assert table_folders(environment) == (first, FOLDERS[-1])


def test_an_empty_variable_means_no_cache():
    """As for tiktoken. A missing variable means a folder for temporary files."""
    assert table_folders({"TIKTOKEN_CACHE_DIR": ""}) == FOLDERS[-1:]
    assert [folder.name for folder in table_folders({})] == ["data-gym-cache", "data"]


def test_tiktoken_itself_is_not_changed(tokenizers: Tokenizers):
    """Its constructors run in a copy, so other users of tiktoken in this process keep its loader."""
    from tiktoken_ext import openai_public

    assert openai_public.load_tiktoken_bpe is tiktoken.load.load_tiktoken_bpe
    assert tokenizers.is_loaded("o200k_base")


OFFLINE = """
import asyncio, sys
from pathlib import Path
import proxy.calls.tokenizer
assert not {"tiktoken", "requests", "bpe_openai"} & sys.modules.keys(), "importing the module must not import these"

from proxy.policy.catalog import Model, Upstream
tokens = proxy.calls.tokenizer.Tokenizers([Path(folder) for folder in sys.argv[1:]])
is_watched = False

def refuse(event, arguments):
    is_import = event == "import" and arguments[0] in ("requests", "bpe_openai")
    if is_watched and (is_import or event.startswith("socket.")):
        raise AssertionError(f"{event} {arguments}")

async def main():
    global is_watched
    is_watched = True
    name = tokens.encoding_of(Model("m", Upstream("u", "http://127.0.0.1", None), "gpt-4o")).name
    tokens.load([name, "cl100k_base", "p50k_base", "gpt2"])
    print(tokens.is_loaded(name), tokens.count("Hello world", name), await tokens.count_all(["Hello world"], name))
    is_watched = False
    tokens.close()

sys.addaudithook(refuse)
asyncio.run(main())
"""


@pytest.mark.parametrize(("folders", "output"), [(FOLDERS, "True 2 2"), ([], "False 3 None")])
def test_nothing_is_ever_downloaded(folders: list[Path], output: str):
    """Neither at the start nor by a count, with or without tables, is a socket opened or a name resolved (T68).

    The test runs in a process in which that raises. The wheel's library is not imported either.
    """
    command = [sys.executable, "-c", OFFLINE, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (run.stdout.splitlines()[-1:], run.returncode) == ([output], 0), run.stderr


def test_the_library_takes_linear_time():
    """Before 0.13 its time was quadratic: a megabyte of one letter took minutes."""
    assert tuple(map(int, version("tiktoken").split(".")[:2])) >= (0, 13)
