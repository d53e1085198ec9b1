"""What of a request the model reads: texts are handed on, pictures and sounds have their price, nothing is missed.

Threats T25 (addresses are never fetched), T34 (20,000 of everything), T66 (base64).
"""

import base64
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.prompt import Prompt, parts_of, read_prompt
from proxy.strict_json import dump


def read(*, model: str = "gpt-4o", is_chat: bool = True, **document: object) -> Prompt:
    return read_prompt(document, model=model, is_chat=is_chat)


def of_part(part: object, model: str = "gpt-4o") -> Prompt:
    """What one part of a message adds to its role."""
    return read(messages=[{"role": "user", "content": [part]}], model=model)


MESSAGE = 3
EMPTY_CHAT = 6  # of a chat with one message


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_chat_is_read_message_by_message():
    """Contents, roles and names are texts; each message, each name and the answer's beginning have their tokens."""
    prompt = read(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Hi"}, "there"]},
            {"role": "assistant", "content": None, "refusal": "No."},
        ]
    )
    assert prompt.texts == ("system", "Be brief.", "user", "ann", "Hi", "there", "assistant", "No.")
    assert (prompt.overhead, prompt.opaque_bytes, prompt.media_tokens, prompt.is_open) == (3 * 3 + 1 + 3, 0, 0, False)


def test_calls_of_tools_are_read_with_their_ids_and_arguments():
    """Arguments are JSON in a string; where a client sends them as an object the template writes JSON."""
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": {"a": [1, 2]}}},
    ]
    prompt = read(
        messages=[
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        ]
    )
    expected = ("assistant", "call_1", "f", '{"a":1}', "call_2", "g", '{"a":[1,2]}', "tool", "call_1", "done")
    assert prompt.texts == expected
    assert not prompt.is_open


def test_items_of_a_response_are_read_like_messages():
    """Their own ids, kinds and states are not; what a tool gave back is, as text or as parts."""
    prompt = read(
        instructions="Be brief.",
        input=[
            {"type": "message", "id": "msg_1", "status": "completed", "role": "user", "content": "Hi"},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": {}},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "one"}]},
            {"type": "function_call_output", "call_id": "c", "output": "two"},
        ],
    )
    assert sorted(prompt.texts) == sorted(["Hi", "user", "c", "f", "{}", "c", "one", "c", "two", "Be brief."])
    assert prompt.overhead == 4 * 3 + 1 + 3 + 3  # four items, a name, the instructions, the answer's beginning
    assert not prompt.is_open


def test_encrypted_reasoning_is_estimated_and_not_read_as_text():
    """Read as text it would have more than twice the tokens of the thoughts in it; nobody can say their number."""
    prompt = read(input=[{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA" * 1000}])
    assert (prompt.texts, prompt.overhead) == ((), EMPTY_CHAT + 1000)
    assert read(input=[{"type": "reasoning", "encrypted_content": None}]).overhead == EMPTY_CHAT


@pytest.mark.parametrize(
    ("document", "texts"),
    [
        ({"prompt": "Once upon", "suffix": "the end."}, ("Once upon", "the end.")),
        ({"prompt": ["one", "two", ""]}, ("one", "two")),
        ({"input": "embed me"}, ("embed me",)),
        ({"input": ["one", "two"]}, ("one", "two")),
    ],
)
def test_prompts_and_what_is_embedded_are_nothing_but_text(document: dict, texts: tuple[str, ...]):
    """No messages, so nothing is added to them."""
    assert read(is_chat=False, **document) == Prompt(texts=texts)


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": [[1, 2], [3], []]}, 3),
        ({"input": [5, 6]}, 2),
        ({"input": [[5, 6], [7]]}, 3),
        ({"input": [True, None, 1.5]}, 0),
    ],
)
def test_tokens_that_come_as_numbers_are_counted(document: dict, tokens: int):
    """One each; what is no whole number is no token."""
    assert read(is_chat=False, **document) == Prompt(overhead=tokens)


def test_a_single_text_is_a_message_too():
    """/responses takes one without a role."""
    assert read(input="Hi") == Prompt(texts=("Hi",), overhead=EMPTY_CHAT)


def test_2048_texts_and_20_000_messages_are_read():
    """The most that OpenAI embeds at once, and more turns than anybody has (T34)."""
    assert len(read(input=["x"] * 2048, is_chat=False).texts) == 2048
    prompt = read(messages=[{"role": "user", "content": "x"}] * 20_000)
    assert (len(prompt.texts), prompt.overhead) == (40_000, 60_003)


def test_schemas_are_read_as_json():
    """Tools, functions and the form that an answer must have; a form without a schema is nothing to read."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"name": "s", "schema": {"type": "object"}}
    prompt = read(
        tools=[tool], functions=[{"name": "g"}], response_format={"type": "json_schema", "json_schema": schema}
    )
    assert prompt.texts == tuple(
        json.dumps(value, separators=(",", ":")) for value in ([tool], [{"name": "g"}], schema)
    )
    assert read(text={"format": {"type": "json_schema", "name": "s", "schema": {"a": "é"}}}).texts == ('{"a":"é"}',)
    for form in ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "text"}}}, {"tools": []}):
        assert read(**form) == Prompt(overhead=3)


def test_what_only_steers_the_answer_is_not_read():
    """Nor is what is said about the call."""
    document = {
        "model": "m",
        "stop": ["a"],
        "user": "u",
        "metadata": {"k": "v"},
        "logit_bias": {"5": 1},
        "max_tokens": 5,
    }
    assert read_prompt(document, model="m", is_chat=False) == Prompt()


# ----------------------------------------------------------------------------------------------------------- pictures


def png(width: int, height: int, first: bytes = b"IHDR") -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, first, width, height) + b"\x08\x02\x00\x00\x00 and so on"


def jpeg(width: int, height: int, before: bytes = b"", sof: int = 0xC0) -> bytes:
    head = b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + b"JFIF" + bytes(10)
    return head + before + bytes((0xFF, sof)) + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(20)


def segment(marker: int, count: int) -> bytes:
    """A segment of a JPEG with `count` bytes in it, which look like the size of a small picture."""
    return (
        bytes((0xFF, marker))
        + struct.pack(">H", count + 2)
        + (b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01" * 7282)[:count]
    )


def webp(kind: bytes, payload: bytes) -> bytes:
    return b"RIFF\x00\x00\x00\x00WEBP" + kind + struct.pack("<I", len(payload)) + payload + bytes(9)


def webp_extended(width: int, height: int) -> bytes:
    return webp(b"VP8X", bytes(4) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3])


def webp_lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14))


def webp_lossy(width: int, height: int) -> bytes:
    return webp(b"VP8 ", b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height))


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def picture(url: object, **more: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def price(data: bytes, model: str = "gpt-4o", **more: object) -> int:
    return of_part(picture(data_url(data), **more), model).media_tokens


HIGHEST = 85 + 8 * 170


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((1024, 1024), 85 + 4 * 170),  # 768 × 768
        ((2048, 4096), 85 + 6 * 170),  # fits as 1024 × 2048, then 768 × 1536
        ((512, 512), 85 + 4 * 170),  # made 768 × 768
        ((1, 1), 85 + 4 * 170),
        ((1920, 1080), 85 + 6 * 170),  # 1366 × 768
        ((3000, 1000), 85 + 8 * 170),  # 2048 × 683
        ((100_000, 10), 85 + 4 * 170),  # 2048 × 1
        ((2**32 - 1, 2**32 - 1), 85 + 4 * 170),
        ((0, 100), HIGHEST),  # no size at all
    ],
)
def test_a_picture_costs_its_tiles(size: tuple[int, int], tokens: int):
    """The first two are the examples in OpenAI's documents; width and height may change places."""
    width, height = size
    assert price(png(width, height)) == price(png(height, width)) == tokens


@pytest.mark.parametrize(
    ("model", "small", "highest"),
    [
        ("gpt-4o-mini-2024-07-18", 2833 + 4 * 5667, 2833 + 8 * 5667),
        ("gpt-4.1-mini", 104, 2489),  # 64 patches × 1.62, at most 1536
        ("openai/gpt-5-mini", 104, 2489),
        ("gpt-5.4-mini", 104, 2489),
        ("gpt-4.1-nano", 158, 3779),
        ("gpt-5-nano", 158, 3779),
        ("o4-mini", 111, 2642),
        ("gpt-4.1", 765, HIGHEST),
        ("gpt-5", 765, HIGHEST),
        ("my-own-model", 765, HIGHEST),
    ],
)
def test_models_have_their_own_prices(model: str, small: int, highest: int):
    """By tiles or by patches; a picture whose size nobody knows has the highest price of its model."""
    assert price(png(256, 256), model) == small
    assert of_part(picture("https://a.example/x.png"), model).media_tokens == highest
    assert max(price(png(side, 2 * side), model) for side in (32, 700, 800, 5000)) <= highest


def test_a_picture_of_too_many_patches_is_made_to_fit():
    """1536 patches are the most."""
    assert price(png(1024, 1536), "o4-mini") == price(png(9000, 9000), "o4-mini") == 2642


def test_low_detail_costs_the_base_alone_where_the_model_knows_of_it():
    """A model that we don't know may read the whole picture whatever is asked."""
    for part in (
        picture(data_url(png(4000, 4000)), detail="low"),
        picture("https://a.example/x.png", detail="low"),
        {"type": "input_image", "image_url": "https://a.example/x.png", "detail": "low"},
    ):
        assert of_part(part).media_tokens == 85
        assert of_part(part, "gpt-4o-mini").media_tokens == 2833
        assert of_part(part, "my-own-model").media_tokens >= 765
        assert of_part(part, "o4-mini").media_tokens == 2642
    assert price(png(1024, 1024), detail="high") == price(png(1024, 1024), detail=["low"]) == 765


@pytest.mark.parametrize(
    "data",
    [
        png(2048, 4096),
        jpeg(2048, 4096),
        jpeg(2048, 4096, sof=0xC2),
        jpeg(2048, 4096, segment(0xE1, 65_000)),  # a preview inside
        jpeg(2048, 4096, segment(0xE2, 65_000) + segment(0xDB, 500)),
        jpeg(2048, 4096, b"\xff" * 30),
        webp_extended(2048, 4096),
        webp_lossless(2048, 4096),
        webp_lossy(2048, 4096),
    ],
)
def test_the_size_stands_in_the_first_bytes(data: bytes):
    """Of PNG, JPEG and WebP, whatever the address says of the kind."""
    assert price(data) == 85 + 6 * 170


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        png(16, 16, b"tEXt"),  # some readers go on to the header behind it
        b"GIF89a" + struct.pack("<HH", 16, 16) + bytes(30),  # its pictures may be larger than its screen
        b"\xff\xd8",
        jpeg(16, 16)[:24],
        jpeg(16, 16, b"\x00"),
        jpeg(16, 16, b"\xff\x01"),
        jpeg(16, 16, b"\xff\xd0"),
        jpeg(16, 16, b"\xff\xda\x00\x02"),
        jpeg(16, 16, b"\xff" * 200),
        jpeg(16, 16, segment(0xE2, 65_000) * 3),
        webp(b"ANIM", bytes(20)),
        b"RIFF\x00\x00\x00\x00WAVEfmt " + bytes(30),
        b"<svg/>" * 20,
    ],
)
def test_what_does_not_say_its_size_costs_the_most(data: bytes):
    """Never less than the upstream may find in it."""
    assert price(data) == HIGHEST


def test_not_every_jpeg_of_a_request_is_searched_for_its_size():
    """That takes time in which nobody else is served: after the first 32 only where it stands at the beginning."""
    far, near = (picture(data_url(jpeg(16, 16, segment(0xE1, count)))) for count in (5000, 3000))
    assert of_part(far).media_tokens == 765
    assert read(messages=[{"content": [far] * 33}]).media_tokens == 32 * 765 + HIGHEST
    assert read(messages=[{"content": [near] * 33}]).media_tokens == 33 * 765


@pytest.mark.parametrize("blank", ["\n", " ", "!", "é", "="])
def test_base64_that_a_reader_would_have_to_forgive_does_not_say_its_size(blank: str):
    """Who skips what is no base64 sees other bytes than we do, and so perhaps another size."""
    url = data_url(png(16, 16))
    assert of_part(picture(url[:30] + blank + url[30:])).media_tokens == HIGHEST
    assert of_part(picture(url)).media_tokens == 765


def test_the_base64_of_a_picture_is_no_text():
    """A megabyte of it would count as 680,000 tokens (T66). A far address is none either, nor fetched (T25)."""
    url = data_url(png(1024, 1024) + bytes(10**6))
    for part in (picture(url), {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url}):
        assert of_part(part) == Prompt(("user",), EMPTY_CHAT + 765, opaque_bytes=len(url), media_tokens=765)
    for address in ("https://a.example/x.png", "file:///etc/passwd", "", "data:image/svg+xml,<svg/>"):
        assert of_part(picture(address)) == Prompt(("user",), EMPTY_CHAT + HIGHEST, media_tokens=HIGHEST)


def test_pictures_have_their_price_wherever_they_stand():
    """In messages, in items, in what a tool gave back, or as an item by itself."""
    part = {"type": "input_image", "image_url": "https://a.example/x.png"}
    for turn in (
        {"role": "user", "content": [part] * 3},
        {"role": "user", "content": part},
        {"type": "function_call_output", "output": [part]},
        part,
    ):
        count = 3 if turn.get("content") == [part] * 3 else 1
        assert read(messages=[turn]).media_tokens == read(input=[turn]).media_tokens == count * HIGHEST


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "image_url": {"url": data_url(bytes(1000))}},
        {"type": "image_url", "image_url": {"url": [data_url(bytes(1000))]}},
        {"type": "image_url", "image_url": [data_url(bytes(1000))]},
        {"type": "image_url", "image_url": {"url": "data:text/plain;base64," + "A" * 1000}},
        {"type": "thinking", "data": "A" * 1000},
        {"type": "input_audio", "input_audio": ["A" * 1000]},
        {"image_url": {"url": data_url(bytes(1000))}},
        {"type": None, "image_url": {"url": data_url(bytes(1000))}},
        {"input_audio": {"data": "A" * 1000}},
    ],
)
def test_nothing_is_left_out_because_it_looks_like_a_picture(part: dict):
    """What some server could take for text stays in the bound, with the price of a picture if others see one."""
    prompt = of_part(part)
    assert prompt.opaque_bytes == 0
    assert prompt.bound(5000) == 5000 + prompt.media_tokens
    if "image_url" in part and part.get("type") != "text":
        assert prompt.media_tokens == HIGHEST


# --------------------------------------------------------------------------------------------------- sounds and files


def test_a_sound_costs_a_token_for_a_hundred_bytes():
    """A token is 100 ms, and the leanest MP3 has 1000 bytes a second: a longer sound has more bytes."""
    data = base64.b64encode(bytes(30_000)).decode()
    prompt = of_part({"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}})
    assert prompt == Prompt(("user",), EMPTY_CHAT + 300, opaque_bytes=40_000, media_tokens=300)


def test_a_file_is_bounded_by_its_bytes_and_estimated_as_prose():
    """Only of plain text: of all others the model gets pictures of their pages too, so they are open."""
    plain = {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64," + "A" * 377}
    assert of_part(plain) == Prompt(("user", "a.txt"), EMPTY_CHAT + 100)
    inside = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "A" * 372}}
    assert of_part(inside) == Prompt(("user", "a.pdf"), EMPTY_CHAT + 100, is_open=True)


# --------------------------------------------------------------------------------------------------------------- open


@pytest.mark.parametrize(
    "document",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": {"id": "conv_1"}},
        {"prompt": {"id": "pmpt_1", "variables": {"city": "Rome"}}},
        {"web_search_options": {}},
        {"chat_template": "{% for i in range(1000000) %}x{% endfor %}"},
        {"tools": [{"type": "function", "name": "f"}, {"type": "web_search"}]},
        {"tools": ["web_search"]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"id": "msg_1"}]},
        {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
        {"messages": [{"role": "assistant", "content": None, "audio": {"id": "audio_1"}}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://a.example/a.pdf"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file_1"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://a.example"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"audio_url": {"url": "https://a.example"}}]}]},
    ],
)
def test_what_stands_for_tokens_that_the_request_does_not_show_is_open(document: dict):
    """Stored things, hosted tools, far files, films: nothing in the body bounds them."""
    assert read(**document).is_open


@pytest.mark.parametrize(
    "document",
    [
        {"previous_response_id": None, "conversation": None, "web_search_options": False, "prompt": None},
        {"tools": [{"type": "function"}, {"type": "custom"}, {"function": {"name": "f"}}]},
        {"tools": "web_search"},
        {"input": [{"content": "Hi"}, {"type": "reasoning", "summary": []}]},
        {"messages": [{"role": "assistant", "tool_calls": []}, {"role": "assistant", "refusal": "No."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": "Hi", "audio": "audio_1"}]},
    ],
)
def test_what_the_request_shows_is_not_open(document: dict):
    """Pictures far away are not either: they have the highest price."""
    assert not read(**document).is_open


# ----------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("field", ["messages", "input"])
def test_the_parts_of_a_request_are_those_of_its_turns(field: str):
    """Of their contents and of what tools gave back; what is no list of parts has none."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"content": parts[:1]}, {"output": [*parts[1:], "c"]}, {"content": "d"}, "e", {"content": {"type": "f"}}]
    assert parts_of({field: turns}) == parts
    assert parts_of({field: "x"}) == []


def test_no_depth_overflows_the_stack():
    """Whoever calls need not have bounded it."""
    value: object = "deep"
    for _ in range(5000):
        value = [{"type": "x", "content": value}]
    assert "deep" in read(messages=value).texts


names = st.sampled_from(
    "messages input prompt suffix instructions tools functions documents response_format json_schema text format "
    "schema role name content output type id audio image_url url detail input_audio data file file_data file_id "
    "file_url tool_calls function arguments encrypted_content previous_response_id chat_template".split()
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=9)
    | st.sampled_from(
        "image_url input_image input_audio file input_file video_url function item_reference low".split()
    )
    | st.sampled_from(
        [data_url(data) for data in (b"", png(9, 9), jpeg(9, 9), webp_lossy(9, 9), b"\xff\xd8\xff\xff")]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(names | st.text(max_size=3), inner, max_size=5)
        | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": inner}), max_size=3)
    ),
    max_leaves=25,
)


@given(
    document=st.dictionaries(names | st.text(max_size=3), values, max_size=6),
    model=st.sampled_from(["gpt-4o", "gpt-4o-mini", "o4-mini", "x"]),
    is_chat=st.booleans(),
)
def test_no_request_breaks_the_reading_and_its_bound_is_never_below_its_count(
    document: dict, model: str, is_chat: bool
):
    """Whatever stands where: a token is at least one byte, so the count of what was found stays within the bound."""
    prompt = read_prompt(document, model=model, is_chat=is_chat)
    most = sum(len(text.encode("utf-8", "surrogatepass")) for text in prompt.texts) + prompt.overhead
    body_bytes = len(dump({"model": model, **document}))
    assert most <= prompt.bound(body_bytes)
    assert 0 <= prompt.media_tokens <= prompt.overhead
    assert prompt.opaque_bytes <= body_bytes
