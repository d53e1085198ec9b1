"""What a picture in a request costs in tokens: by its size, which stands in its first bytes, never by its base64.

The prices are those of OpenAI's and Anthropic's documents on vision of 2025. Where a size can't be read it is the
most that the rule gives. Pure.
"""

import binascii
from dataclasses import dataclass

# The size of a JPEG stands behind previews and colour profiles. It is looked for behind so many bytes.
_JPEG_BYTES_MAX = 131_072
_JPEG_HEAD_BYTES = 4096
_JPEG_MARKERS_MAX = 100
_HEAD_BYTES = 30
_DATA_URL_HEAD_MAX = 200

_AREA_TOKENS_MAX = 4784

_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tiles:
    """So much for a picture, and so much for each of its tiles of 512 pixels, once it is made to fit."""

    base: int
    each: int
    knows_detail: bool = True

    def price(self, size: _Size | None, *, is_low: bool) -> int:
        """Fit within 2048 × 2048, the short side made 768: at most 2 × 4 tiles.

        1024 × 1024 becomes 768 × 768, which is 4 tiles: 85 + 4 × 170 = 765. Small pictures are made larger, as the
        documents say; others saw that they are not, which costs less.
        """
        if is_low and self.knows_detail:
            return self.base
        if size is None:
            return self.base + 8 * self.each
        short, long = sorted(size)
        wide, divisor = (768, short) if 768 * long <= 2048 * short else (2048, long)
        tiles = -(-short * wide // (divisor * 512)) * -(-long * wide // (divisor * 512))
        return self.base + tiles * self.each


@dataclass(frozen=True, slots=True)
class Patches:
    """A price for each patch of 32 pixels, in hundredths of a token."""

    hundredths: int

    def price(self, size: _Size | None, *, is_low: bool) -> int:
        """At most 1536 patches: a larger picture is made to fit. 1024 × 1024 has 1024: × 1.62 is 1659."""
        width, height = size or (1536 * 32, 32)
        return -(-min(1536, -(-width // 32) * -(-height // 32)) * self.hundredths // 100)


# By all that the upstream's name of a model contains, the first that fits. The constants are those of OpenAI's
# documents of 2025; models since then change them again.
_PRICES: tuple[tuple[tuple[str, ...], Tiles | Patches], ...] = (
    (("gpt-4o-mini",), Tiles(2833, 5667)),
    (("gpt-4.1", "mini"), Patches(162)),
    (("gpt-5", "mini"), Patches(162)),
    (("gpt-4.1", "nano"), Patches(246)),
    (("gpt-5", "nano"), Patches(246)),
    (("o4-mini",), Patches(172)),
    (("gpt-4",), Tiles(85, 170)),
    (("gpt-5",), Tiles(85, 170)),
)
# Of a model that we don't know: as most are priced, but whether it knows of `detail` nobody says.
_UNKNOWN = Tiles(85, 170, knows_detail=False)


def image_price(model: str) -> Tiles | Patches:
    fitting = (price for marks, price in _PRICES if all(mark in model for mark in marks))
    return next(fitting, _UNKNOWN)


def price_by_area(size: _Size | None) -> int:
    """What Anthropic's models take for a picture: a token for each 750 pixels, once it is made to fit.

    1092 × 1092 is 1590. Which size it is made to fit differs by model; the largest gives 4784.
    """
    width, height = size or (_AREA_TOKENS_MAX, 750)
    return min(_AREA_TOKENS_MAX, -(-width * height // 750))


def base64_start(url: str) -> int:
    """Where the base64 of a picture's data URL begins; 0 where it is no such URL."""
    if not url.startswith("data:image/"):
        return 0
    found = url.find(";base64,", 0, _DATA_URL_HEAD_MAX)
    return found + len(";base64,") if found > 0 else 0


def image_size(url: str, start: int, *, is_searched: bool) -> _Size | None:
    """Width and height of the picture whose base64 begins at `start`; None where its first bytes don't say.

    Not of a GIF, whose pictures may be larger than the screen that its head states.
    """
    head = _decoded(url, start, _HEAD_BYTES)
    size = None
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        size = (int.from_bytes(head[16:20]), int.from_bytes(head[20:24]))
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        size = _webp_size(head)
    elif head.startswith(b"\xff\xd8"):
        size = _jpeg_size(_decoded(url, start, _JPEG_HEAD_BYTES))
        if size is None and is_searched:
            size = _jpeg_size(_decoded(url, start, _JPEG_BYTES_MAX))
    return size if size and all(size) else None


def _decoded(url: str, start: int, count: int) -> bytes:
    """The first bytes, at least so many if there are; none where these are not strictly base64.

    A reader that forgives what is none would see other bytes than we do.
    """
    quads = min(-(-count // 3), (len(url) - start) // 4)
    try:
        return binascii.a2b_base64(url[start : start + quads * 4], strict_mode=True)
    except ValueError:
        return b""


def _webp_size(head: bytes) -> _Size | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return (int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        return (int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF)
    return None


def _jpeg_size(data: bytes) -> _Size | None:
    """The size in the first frame header (SOF), which stands behind any number of other segments."""
    at = 2
    for _ in range(_JPEG_MARKERS_MAX):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7]))
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # has no length, or ends the head
            return None
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])  # 0xFF only fills up
    return None
