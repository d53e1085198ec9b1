"""An image is priced by its size in pixels, anywhere in a request, and never by its base64."""

import base64
import struct

import pytest

from proxy.formats.body import RequestBody
from proxy.formats.content import Prompt, read_prompt, with_images
from proxy.formats.images import price_by_area


def read(*, model: str = "gpt-4o", is_chat: bool = True, **document: object) -> Prompt:
    return with_images(read_prompt(RequestBody(document), is_chat=is_chat), model=model)


def of_part(part: object, model: str = "gpt-4o") -> Prompt:
    """The prompt of one message with a role and this part."""
    return read(messages=[{"role": "user", "content": [part]}], model=model)


EMPTY_CHAT = 6  # of a chat with one message


def png(width: int, height: int, first: bytes = b"IHDR") -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, first, width, height) + b"\x08\x02\x00\x00\x00 and so on"


def jpeg(width: int, height: int, before: bytes = b"", sof: int = 0xC0) -> bytes:
    head = b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + b"JFIF" + bytes(10)
    return head + before + bytes((0xFF, sof)) + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(20)


def segment(marker: int, count: int) -> bytes:
    """A segment of a JPEG with `count` bytes of data, which look like the frame header of a small image."""
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


def image(url: object, **more: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def price(data: bytes, model: str = "gpt-4o", **more: object) -> int:
    return of_part(image(data_url(data), **more), model).media_tokens


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
        ((0, 100), HIGHEST),  # not a size
    ],
)
def test_an_image_is_priced_by_its_tiles(size: tuple[int, int], tokens: int):
    """The first two sizes are the examples in OpenAI's documents. Width and height may be exchanged."""
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
def test_each_model_has_its_own_prices(model: str, small: int, highest: int):
    """By tiles or by patches. An image of unknown size has the highest price of its model."""
    assert price(png(256, 256), model) == small
    assert of_part(image("https://a.example/x.png"), model).media_tokens == highest
    assert max(price(png(side, 2 * side), model) for side in (32, 700, 800, 5000)) <= highest


def test_an_image_has_at_most_1536_patches():
    """A larger one is scaled down."""
    assert price(png(1024, 1536), "o4-mini") == price(png(9000, 9000), "o4-mini") == 2642


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((1092, 1092), 1590), ((200, 200), 54), ((1, 1), 1), ((2576, 1392), 4782), ((8000, 8000), 4784), (None, 4784)],
)
def test_an_image_on_messages_is_priced_by_its_area(size: tuple[int, int] | None, tokens: int):
    """One token for 750 pixels, at most 4784, which is also the price of an unknown size."""
    assert price_by_area(size) == tokens


def test_low_detail_costs_the_base_price_if_the_model_supports_it():
    """An unknown model may ignore `detail` and read the whole image."""
    for part in (
        image(data_url(png(4000, 4000)), detail="low"),
        image("https://a.example/x.png", detail="low"),
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
        jpeg(2048, 4096, segment(0xE1, 65_000)),  # with a preview inside
        jpeg(2048, 4096, segment(0xE2, 65_000) + segment(0xDB, 500)),
        jpeg(2048, 4096, b"\xff" * 30),
        webp_extended(2048, 4096),
        webp_lossless(2048, 4096),
        webp_lossy(2048, 4096),
    ],
)
def test_the_size_is_read_from_the_first_bytes(data: bytes):
    """Of PNG, JPEG and WebP, whatever media type the data URL states."""
    assert price(data) == 85 + 6 * 170


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        png(16, 16, b"tEXt"),  # some decoders go on to an IHDR behind it
        b"GIF89a" + struct.pack("<HH", 16, 16) + bytes(30),  # its frames may be larger than its screen
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
def test_an_image_of_unknown_size_has_the_highest_price(data: bytes):
    """The price is never less than what the upstream may find in the file."""
    assert price(data) == HIGHEST


def test_only_32_images_of_a_request_are_searched_beyond_their_first_bytes():
    """Decoding blocks the event loop. After the first 32 images a JPEG's size is read only from its first 4 KiB."""
    far, near = (image(data_url(jpeg(16, 16, segment(0xE1, count)))) for count in (5000, 3000))
    assert of_part(far).media_tokens == 765
    assert read(messages=[{"content": [far] * 33}]).media_tokens == 32 * 765 + HIGHEST
    assert read(messages=[{"content": [near] * 33}]).media_tokens == 33 * 765


@pytest.mark.parametrize("blank", ["\n", " ", "!", "é", "="])
def test_the_size_is_not_read_from_base64_that_is_not_strict(blank: str):
    """A decoder that skips invalid characters sees other bytes, and so perhaps another size."""
    url = data_url(png(16, 16))
    assert of_part(image(url[:30] + blank + url[30:])).media_tokens == HIGHEST
    assert of_part(image(url)).media_tokens == 765


def test_the_base64_and_the_url_of_an_image_are_not_counted_as_text():
    """A megabyte of base64 would count as 680,000 tokens (T66). A remote URL is not fetched (T25)."""
    url = data_url(png(1024, 1024) + bytes(10**6))
    for part in (image(url), {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url}):
        assert of_part(part) == Prompt(("user",), EMPTY_CHAT + 765, opaque_bytes=len(url), media_tokens=765)
    for address in ("https://a.example/x.png", "file:///etc/passwd", "", "data:image/svg+xml,<svg/>"):
        assert of_part(image(address)) == Prompt(("user",), EMPTY_CHAT + HIGHEST, media_tokens=HIGHEST)


def test_an_image_is_priced_anywhere_in_a_request():
    """In messages, in items, in the output of a tool, or as an item of its own."""
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
def test_data_that_may_be_read_as_text_stays_in_the_bound(part: dict):
    """It also has the price of an image if other servers may read it as one."""
    prompt = of_part(part)
    assert prompt.opaque_bytes == 0
    assert prompt.bound(5000) == 5000 + prompt.media_tokens
    if "image_url" in part and part.get("type") != "text":
        assert prompt.media_tokens == HIGHEST
