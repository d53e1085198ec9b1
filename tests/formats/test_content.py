"""What the model reads of a request: texts are returned, images and audio are priced, and nothing is overlooked.

Threats T25 (URLs are never fetched), T34 (20,000 of everything), T66 (base64).
"""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.body import RequestBody
from proxy.formats.content import Prompt, read_prompt, with_files, with_images, with_previous
from proxy.formats.strict_json import dump
from tests.formats.test_images import EMPTY_CHAT, data_url, jpeg, of_part, png, read, webp_lossy

# -------------------------------------------------------------------------------------------------------------- texts


def test_a_chat_is_read_message_by_message():
    """Contents, roles and names are texts. Each message, each name and the reply priming add tokens."""
    prompt = read(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Hi"}, "there"]},
            {"role": "assistant", "content": None, "refusal": "No."},
        ]
    )
    assert prompt.texts == ("system", "Be brief.", "user", "ann", "Hi", "there", "assistant", "No.")
    assert (prompt.overhead, prompt.opaque_bytes, prompt.media_tokens, prompt.has_hidden_input) == (
        3 * 3 + 1 + 3,
        0,
        0,
        False,
    )


def test_tool_calls_are_read_with_their_ids_and_arguments():
    """Arguments are a string of JSON. If a client sends an object, it is read as the JSON that templates print."""
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
    assert not prompt.has_hidden_input


def test_items_of_responses_are_read_like_messages():
    """The output of a tool is read, as text or as parts; an item's own id, type and status are not."""
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
    assert prompt.overhead == 4 * 3 + 1 + 3 + 3  # four items, a name, the instructions, the reply priming
    assert not prompt.has_hidden_input


def test_encrypted_reasoning_is_estimated_and_not_read_as_text():
    """Counted as text it would have more than twice the tokens of the reasoning in it, whose number is unknown."""
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
def test_inputs_of_completions_and_embeddings_are_only_text(document: dict, texts: tuple[str, ...]):
    """They are not messages, so no tokens are added."""
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
    """Each integer in a list is one token; true, null and fractions are none."""
    assert read(is_chat=False, **document) == Prompt(overhead=tokens)


def test_a_single_text_counts_as_a_message():
    """/responses accepts a text without a role as its input."""
    assert read(input="Hi") == Prompt(texts=("Hi",), overhead=EMPTY_CHAT)


def test_2048_texts_and_20_000_messages_are_read():
    """2,048 texts are the most that OpenAI embeds in one call; 20,000 messages are more than any chat has (T34)."""
    assert len(read(input=["x"] * 2048, is_chat=False).texts) == 2048
    prompt = read(messages=[{"role": "user", "content": "x"}] * 20_000)
    assert (len(prompt.texts), prompt.overhead) == (40_000, 60_003)


def test_schemas_and_unknown_fields_are_read_as_json():
    """Tools, functions, the response format, and fields that the proxy does not know."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"name": "s", "schema": {"type": "object"}}
    prompt = read(
        tools=[tool],
        functions=[{"name": "g"}],
        response_format=schema,
        preface="Be brief",
        Suffix="end",
        tool_prompt=None,
    )
    assert prompt.texts == tuple(
        json.dumps(value, separators=(",", ":")) for value in ([tool], [{"name": "g"}], schema, "Be brief", "end")
    )
    assert read(text={"format": {"a": "é"}}).texts == ('{"format":{"a":"é"}}',)
    assert read(tools=[]) == Prompt(overhead=3)


def test_long_keys_are_texts():
    """A prompt can be written into the keys of an object as well as into its values."""
    long = "one two three four five six seven eight nine ten"
    assert read(**{long: 1}).texts == (json.dumps({long: 1}, separators=(",", ":")),)
    assert read(messages=[{"role": "user", "content": [{long: "yes", "short": "no"}]}]).texts == (
        "user",
        long,
        "yes",
        "no",
    )


def test_fields_that_the_model_does_not_read_are_not_counted():
    """Parameters of the generation, and metadata of the call."""
    document = {
        "model": "m",
        "stop": ["a"],
        "user": "u",
        "metadata": {"k": "v"},
        "logit_bias": {"5": 1},
        "max_tokens": 5,
    }
    assert read_prompt(RequestBody(document), is_chat=False) == Prompt()


# ---------------------------------------------------------------------------------------------------- audio and files


def test_audio_costs_one_token_for_a_hundred_bytes():
    """A token is 100 ms, and the leanest MP3 has 1,000 bytes per second; other files have more bytes per token."""
    data = base64.b64encode(bytes(30_000)).decode()
    prompt = of_part({"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}})
    assert prompt == Prompt(("user",), EMPTY_CHAT + 300, opaque_bytes=40_000, media_tokens=300)


def test_a_file_is_estimated_as_prose_and_open_unless_it_is_plain_text():
    """A plain text is bounded by its bytes. Of other files the model also sees the pages as images."""
    plain = {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64," + "A" * 377}
    assert of_part(plain) == Prompt(("user", "a.txt"), EMPTY_CHAT + 100)
    inside = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "A" * 372}}
    assert of_part(inside) == Prompt(("user", "a.pdf"), EMPTY_CHAT + 100, has_hidden_input=True)


# ------------------------------------------------------------------------------------------------------- hidden input


@pytest.mark.parametrize(
    "document",
    [
        {"conversation": {"id": "conv_1"}},
        {"prompt": {"id": "pmpt_1", "variables": {"city": "Rome"}}},
        {"web_search_options": {}},
        {"chat_template": "{% for i in range(1000000) %}x{% endfor %}"},
        {"tools": [{"type": "function", "name": "f"}, {"type": "web_search"}]},
        {"tools": ["web_search"]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"id": "msg_1"}]},
        {"tools": [{"type": "namespace", "tools": [{"type": "function"}, {"type": "mcp"}]}]},
        {"tools": [{"type": "namespace"}]},
        {"input": [{"type": "additional_tools", "tools": [{"type": "web_search"}]}]},
        {"tools": [{"type": "tool_search"}]},
        {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
        {"mm_processor_kwargs": {"max_pixels": 10**9}},
        {"media_io_kwargs": {"video": {"num_frames": 10**6}}},
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
def test_hidden_input_is_detected(document: dict):
    """Stored items, tools that run at the upstream, linked files, videos: nothing in the body bounds them."""
    assert read(**document).has_hidden_input


def test_the_previous_response_is_part_of_the_input():
    """It counts with its known total. If the total is unknown, nothing bounds the call."""
    prompt = read(previous_response_id="resp_1", input="Hi")
    longer = with_previous(prompt, 500)
    assert (longer.overhead, longer.bound(100), longer.has_hidden_input) == (
        prompt.overhead + 500,
        prompt.bound(100) + 500,
        False,
    )
    assert with_previous(prompt, None) == replace(prompt, has_hidden_input=True)


LINK = {"type": "video_url", "video_url": {"url": "https://a.example/v.mp4"}}


@pytest.mark.parametrize(
    "turns",
    [
        {"role": "user", "content": [LINK]},
        [[{"role": "user", "content": [LINK]}]],
        [{"role": "user", "content": LINK}],
        [{"role": "user", "content": [[LINK]]}],
        [{"role": "user", "Content": [LINK]}],
        [{"role": "user", "content": [{"Type": "video_url", "Video_URL": LINK["video_url"]}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "Video_Url": LINK["video_url"]}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": [{"url": "https://a.example"}] * 9}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": [{"data": "x"}]}]}],
        [{"role": "user", "content": [{"type": "document", "source": [{"type": "url", "url": "x"}]}]}],
        [{"role": "user", "content": [{"type": "document", "Source": {"type": "url", "url": "x"}}]}],
    ],
)
@pytest.mark.parametrize("field", ["messages", "input"])
def test_no_shape_and_no_spelling_hides_input(field: str, turns: object):
    """A link whose tokens nothing bounds is one in every shape that some server reads."""
    assert read(**{field: turns}).has_hidden_input


@pytest.mark.parametrize(
    "document",
    [
        {"previous_response_id": None, "conversation": None, "web_search_options": False, "prompt": None},
        {"tools": [{"type": "function"}, {"type": "custom"}, {"function": {"name": "f"}}]},
        {"tools": [{"type": "namespace", "tools": [{"type": "function"}]}, {"type": "namespace", "tools": []}]},
        {"tools": [{"type": "tool_search", "execution": "client"}]},
        {
            "input": [
                {"type": "additional_tools", "tools": [{"type": "function"}]},
                {"type": "mcp_list_tools", "tools": [{}]},
            ]
        },
        {"tools": {"type": "function"}},
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
def test_a_prompt_without_hidden_input(document: dict):
    """A linked image is not hidden input either: it has the highest price."""
    assert not read(**document).has_hidden_input


# --------------------------------------------------------------------------------------------------------- invariants


def test_no_depth_overflows_the_stack():
    """The caller need not have limited the depth."""
    value: object = "deep"
    for _ in range(5000):
        value = [{"type": "x", "content": value}]
    assert "deep" in read(messages=value).texts


names = st.sampled_from(
    "messages input prompt suffix instructions tools functions documents response_format json_schema text format "
    "schema role name content output type id audio image_url url detail input_audio data file file_data file_id "
    "file_url tool_calls function arguments encrypted_content previous_response_id chat_template "
    "system source input_schema thinking signature title".split()
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=9)
    | st.sampled_from(
        "image_url input_image input_audio file input_file video_url function item_reference low "
        "image document tool_result tool_use thinking redacted_thinking search_result base64 content".split()
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
def test_any_request_is_read_and_its_byte_bound_is_never_below_its_tokens(document: dict, model: str, is_chat: bool):
    """A token is at least one byte, so the bytes of the texts and the overhead never exceed the bound."""
    prompt = with_images(read_prompt(RequestBody(document), is_chat=is_chat), model=model)
    most = sum(len(text.encode("utf-8", "surrogatepass")) for text in prompt.texts) + prompt.overhead
    body_bytes = len(dump({"model": model, **document}))
    assert most <= prompt.bound(body_bytes)
    assert 0 <= prompt.media_tokens <= prompt.overhead
    assert prompt.opaque_bytes <= body_bytes


def test_an_image_may_be_an_item_of_its_own_and_lack_a_type():
    """Its base64 is excluded from the bound only if the part states its type; the price is the same."""
    url = data_url(png(512, 512))
    item = read(input=[{"type": "input_image", "image_url": url}])
    assert (item.texts, item.opaque_bytes) == ((), len(url))
    bare = of_part({"image_url": {"url": url}})
    assert (bare.opaque_bytes, bare.media_tokens) == (0, item.media_tokens)


def test_audio_without_data_is_read_as_text():
    """A part of an unexpected shape is counted, not ignored."""
    assert of_part({"type": "input_audio", "input_audio": {"url": "elsewhere"}}).texts[-1] == "elsewhere"


def test_uploaded_files_are_priced_as_audio_or_as_images() -> None:
    """Audio by its size, up to the model's context; images at the highest fidelity."""
    prompt = Prompt(texts=("hello",), overhead=3)
    audio = with_files(prompt, [1000, 1_000_001], are_audio=True, context=None)
    assert (audio.overhead, audio.media_tokens, audio.opaque_bytes) == (3 + 10_011, 10_011, 1_001_001)
    assert audio.bound(1_001_101) == 100 + 10_011
    assert with_files(prompt, [25_000_000], are_audio=True, context=None).media_tokens == 16_000
    assert with_files(prompt, [25_000_000], are_audio=True, context=32_000).media_tokens == 32_000
    assert with_files(prompt, [5, 50_000_000], are_audio=False, context=None).media_tokens == 2 * 8192


# ------------------------------------------------------------------------------------------------- Anthropic's blocks


def block(kind: str, **more: object) -> Prompt:
    """The prompt of one message with a role and a block of this type."""
    return of_part({"type": kind, **more})


def source(kind: str, data: object, **more: object) -> dict:
    """The `source` of an image or a document."""
    return {"source": {"type": kind, "data": data, **more}}


def test_the_system_prompt_is_text_before_all_messages():
    """As one text or as blocks."""
    assert read(system="Be brief.", messages=[]).texts == ("Be brief.",)
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert read(system=blocks, messages=[]).texts == ("Be brief.",)


def test_an_image_block_is_priced_by_its_area():
    """Its base64 is not text. An unknown size has the highest price and does not make the prompt open."""
    data = base64.b64encode(png(1092, 1092)).decode()
    prompt = block("image", **source("base64", data, media_type="image/png"))
    assert prompt.texts == ("user",)
    assert (prompt.media_tokens, prompt.opaque_bytes, prompt.has_hidden_input) == (1590, len(data), False)
    for unknown in ({"source": {"type": "url", "url": "https://x.example/a.png"}}, source("base64", "??"), {}):
        assert (block("image", **unknown).media_tokens, block("image", **unknown).has_hidden_input) == (4784, False)
    assert block("image", source={"type": "file", "file_id": "file_1"}).has_hidden_input


def test_a_document_block_is_text_or_open():
    """Of a PDF the model also sees the pages as images, so nothing bounds it."""
    assert block("document", title="T", **source("text", "words")).texts == ("user", "T", "words")
    parts = [{"type": "text", "text": "a"}, {"type": "image", **source("base64", "??")}]
    inner = block("document", source={"type": "content", "content": parts})
    assert (inner.texts, inner.media_tokens, inner.has_hidden_input) == (("user", "a"), 4784, False)
    assert block("document", source={"type": "content", "content": "a"}).texts == ("user", "a")
    pdf = block("document", **source("base64", "JVBE" * 100))
    assert (pdf.texts, pdf.overhead, pdf.opaque_bytes, pdf.has_hidden_input) == (("user",), EMPTY_CHAT + 100, 0, True)
    assert block("document", source={"type": "url", "url": "https://x.example/a.pdf"}).has_hidden_input


def test_tool_result_blocks_are_read():
    """Their texts and images; a block inside them that has parts itself is read as text."""
    content = [
        {"type": "text", "text": "done"},
        {"type": "image", **source("base64", "??")},
        {"type": "search_result", "title": "T", "content": [{"type": "text", "text": "found"}]},
    ]
    prompt = block("tool_result", tool_use_id="toolu_1", is_error=False, content=content)
    assert prompt.texts == ("user", "toolu_1", "done", "T", "found")
    assert (prompt.media_tokens, prompt.has_hidden_input) == (4784, False)
    assert block("tool_result", tool_use_id="toolu_1", content="done").texts == ("user", "toolu_1", "done")


def test_the_input_of_a_tool_use_block_is_read_as_json():
    """Including its keys, which the model reads too."""
    assert block("tool_use", id="toolu_1", name="f", input={"a": [1]}).texts == ("user", "toolu_1", "f", '{"a":[1]}')


def test_thinking_blocks_are_read_and_their_signatures_estimated():
    """A signature is not text; it contains reasoning in encrypted form."""
    prompt = block("thinking", thinking="hm", signature="s" * 400)
    assert (prompt.texts, prompt.overhead) == (("user", "hm"), EMPTY_CHAT + 100)
    assert block("redacted_thinking", data="s" * 400).overhead == EMPTY_CHAT + 100


def test_tools_of_anthropic_add_a_system_prompt():
    """At most 804 tokens beside the descriptions of the tools, without any bytes in the request."""
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    assert read(tools=tools).media_tokens == 804
    assert read(tools=tools).bound(100) == 904
    assert read(tools=[{"type": "function", "function": {}}, "x"]).media_tokens == 0


plain = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": st.text(max_size=4)})


@given(turns=st.lists(plain | st.text(max_size=3) | values, max_size=6), field=st.sampled_from(["messages", "input"]))
def test_a_plain_turn_is_read_like_any_other(turns: list, field: str):
    """Turns of a role and a text are read without a closer look. With a `status`, which is not read, they get one."""

    def unusual(turn: object) -> object:
        texts = turn.values() if isinstance(turn, dict) and turn.keys() == {"role", "content"} else [None]
        is_plain = all(isinstance(text, str) for text in texts)
        return {"role": turn["role"], "content": turn["content"], "status": "done"} if is_plain else turn

    given_turns, closer = RequestBody({field: turns}), RequestBody({field: [unusual(turn) for turn in turns]})
    assert closer.turns[field].plain == 0
    expected = read_prompt(closer, is_chat=True)
    assert read_prompt(given_turns, is_chat=True) == expected
