"""What an image in a request costs in tokens: computed from its width and height, never from its base64.

The size in pixels is in the first bytes of the file. The prices are those that OpenAI and Anthropic published in
their vision guides in 2025. If the size can't be read, the image costs the most that the rule gives. Pure.
"""

import binascii
from dataclasses import dataclass
from functools import lru_cache

# PNG and WebP state their size within the first 30 bytes. The size of a JPEG comes after its previews and colour
# profiles. It is searched in the first 4 KiB, then in 128 KiB, and behind at most 100 segments.
_HEADER_BYTES = 30
_JPEG_HEADER_BYTES = 4096
_JPEG_HEADER_BYTES_MAX = 131_072
_JPEG_SEGMENTS_MAX = 100
# `;base64,` is searched in this many characters of a data URL, which may be megabytes long.
_DATA_URL_PREFIX_MAX = 200

# Anthropic: the price of the largest size to which a model scales an image down.
_AREA_TOKENS_MAX = 4784

_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A base price for an image, and a price for each tile of 512 × 512 pixels after scaling.

    `supports_detail`: whether `detail: low` reduces the price to the base.
    """

    base: int
    per_tile: int
    supports_detail: bool = True

    def price(self, size: _Size | None, *, is_low: bool) -> int:
        """Scale to fit 2048 × 2048, then scale the short side to 768, and count the tiles.

        1024 × 1024 becomes 768 × 768, which is 2 × 2 tiles: 85 + 4 × 170 = 765. 3000 × 1000 becomes 2048 × 683, which
        is 4 × 2 tiles. No image has more than 4 × 2, so an unknown size costs 8 tiles. Small images are enlarged, as
        the documents say. Users have observed that they are not; such an image costs less than this.
        """
        if is_low and self.supports_detail:
            return self.base
        if size is None:
            return self.base + 8 * self.per_tile
        short, long = sorted(size)
        # The scale is the smaller of 768 / short and 2048 / long. It is kept as a fraction of integers: a float that
        # is a little too large could add a tile.
        numerator, denominator = (768, short) if 768 * long <= 2048 * short else (2048, long)
        tiles = -(-short * numerator // (denominator * 512)) * -(-long * numerator // (denominator * 512))
        return self.base + tiles * self.per_tile


@dataclass(frozen=True, slots=True)
class Patches:
    """A price for each patch of 32 × 32 pixels, in hundredths of a token."""

    hundredths_per_patch: int

    def price(self, size: _Size | None, *, is_low: bool) -> int:
        """Count the patches: at most 1536, because a larger image is scaled down. `detail` makes no difference.

        1024 × 1024 is 32 × 32 = 1024 patches. At 1.62 tokens each that is 1659.
        """
        width, height = size or (1536 * 32, 32)  # an unknown size: 1536 patches in one row
        patches = min(1536, -(-width // 32) * -(-height // 32))
        return -(-patches * self.hundredths_per_patch // 100)


# A row applies if the upstream's name of the model contains all its texts; the first such row counts. `gpt-4.1-mini`
# contains the texts of ("gpt-4.1", "mini") and of ("gpt-4",): the former comes first, so it is priced by patches. The
# constants are those of OpenAI's documents of 2025; newer models change them again.
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
# An unknown model is priced like most models. It may ignore `detail: low` and read the whole image.
_UNKNOWN = Tiles(85, 170, supports_detail=False)


@lru_cache(maxsize=1024)  # with an open list of models there is no end of names
def image_price(model: str) -> Tiles | Patches:
    """The rule by which this model prices images; `model` is the upstream's name of it."""
    matching = (price for texts, price in _PRICES if all(text in model for text in texts))
    return next(matching, _UNKNOWN)


def price_by_area(size: _Size | None) -> int:
    """Anthropic's price of an image: one token for 750 pixels, after scaling down.

    1092 × 1092 costs 1590. The largest size differs by model; the largest of all costs 4784, which is also the price
    of an unknown size.
    """
    width, height = size or (_AREA_TOKENS_MAX, 750)
    return min(_AREA_TOKENS_MAX, -(-width * height // 750))


def base64_start(url: str) -> int:
    """The index at which the base64 of an image's data URL begins; 0 if this is no such URL."""
    if not url.startswith("data:image/"):
        return 0
    found = url.find(";base64,", 0, _DATA_URL_PREFIX_MAX)
    return found + len(";base64,") if found > 0 else 0


def image_size(url: str, start: int, *, is_searched: bool) -> _Size | None:
    """Width and height of the image whose base64 begins at `start`; None if its first bytes don't state them.

    `is_searched`: whether to decode up to 128 KiB of a JPEG for them. The size of a GIF is never read, because its
    frames may be larger than the screen that its header states.
    """
    header = _decode_start(url, start, _HEADER_BYTES)
    size = None
    if header.startswith(b"\x89PNG\r\n\x1a\n") and header[12:16] == b"IHDR":
        size = (int.from_bytes(header[16:20]), int.from_bytes(header[20:24]))
    elif header.startswith(b"RIFF") and header[8:12] == b"WEBP":
        size = _webp_size(header)
    elif header.startswith(b"\xff\xd8"):
        size = _jpeg_size(_decode_start(url, start, _JPEG_HEADER_BYTES))
        if size is None and is_searched:
            size = _jpeg_size(_decode_start(url, start, _JPEG_HEADER_BYTES_MAX))
    return size if size and all(size) else None  # a side of 0 pixels is no size


def _decode_start(url: str, start: int, count: int) -> bytes:
    """Decode the first `count` bytes, or a few more; fewer if there are no more; none if they are not strict base64.

    A lenient decoder skips characters that are not base64. It would see other bytes than a strict one, and so perhaps
    another size.
    """
    # Four characters of base64 are three bytes. An incomplete group at the end is left out.
    quads = min(-(-count // 3), (len(url) - start) // 4)
    try:
        return binascii.a2b_base64(url[start : start + quads * 4], strict_mode=True)
    except ValueError:
        return b""


def _webp_size(header: bytes) -> _Size | None:
    # RFC 9649: VP8X and VP8L store each side minus one. RFC 6386 §9.1: VP8 stores 14 bits, below 2 bits of scaling.
    kind = header[12:16]
    if kind == b"VP8X":
        return (int.from_bytes(header[24:27], "little") + 1, int.from_bytes(header[27:30], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(header[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        return (int.from_bytes(header[26:28], "little") & 0x3FFF, int.from_bytes(header[28:30], "little") & 0x3FFF)
    return None


def _jpeg_size(data: bytes) -> _Size | None:
    """The size in the first frame header (SOF), which comes after any number of other segments.

    A segment is 0xFF, its marker, two bytes of length, and its data. In an SOF the data are one byte of precision,
    two of height and two of width.
    """
    at = 2  # behind the start of the image (SOI), FF D8
    for _ in range(_JPEG_SEGMENTS_MAX):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # all SOF but DHT, JPG and DAC
            return (int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7]))
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # a marker without a length, or the end of the header
            return None
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])  # 0xFF is a fill byte
    return None
