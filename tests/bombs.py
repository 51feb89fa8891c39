"""Image files of few bytes and pixels that take their decoder long, a little over what is let through."""

import io
import struct

from PIL import Image

from mige.utils.decode_effort import MAX_COMMENTS, MAX_SCANS, MAX_STRIPS


def _saved(kind: str, **params) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(file, kind, **params)
    return file.getvalue()


def directory(tags: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """A TIFF of one directory, or EXIF data: (tag, type, count, value) each; the value None is where `data` begins."""
    start = 14 + 12 * len(tags)
    entries = b"".join(struct.pack("<HHII", *tag[:3], start if tag[3] is None else tag[3]) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def tags(num_tags: int = 40, size: int = 50_000) -> bytes:
    """EXIF data whose tags all have the same bytes."""
    return directory([(40_000 + n, 1, size, None) for n in range(num_tags)], bytes(size))


def tiff(num_strips: int = 1) -> bytes:
    """Of a byte in every row, which all are the same one."""
    where = 122 if num_strips > 1 else 130
    shape = [(256, 4, 1, 1), (257, 4, 1, num_strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    offsets = None if num_strips > 1 else where
    strips = [(273, 4, num_strips, offsets), (277, 3, 1, 1), (278, 4, 1, 1), (279, 3, 1, 1)]
    return directory(shape + strips, struct.pack("<I", where) * num_strips + bytes(16))


def many_tags_tiff() -> bytes:
    shape = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    more = [(278, 4, 1, 8), (279, 4, 1, 64), *((40_000 + n, 1, 50_000, None) for n in range(40))]
    return directory(shape + more, bytes(50_000))


def progressive(num_scans: int = MAX_SCANS + 1) -> bytes:
    """A grey JPEG of 16 x 16 pixels whose scans each say that nothing changes."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def scan(first: int, last: int, data: bytes) -> bytes:
        return segment(0xDA, bytes([1, 1, 0, first, last, 0])) + data

    def huffman(kind: int, symbol: int) -> bytes:
        return segment(0xC4, bytes([kind, 1, *[0] * 15, symbol]))

    head = segment(0xDB, bytes([0]) + bytes([1] * 64))
    head += segment(0xC2, struct.pack(">BHHB", 8, 16, 16, 1) + bytes([1, 0x11, 0])) + huffman(0, 0) + huffman(0x10, 0)
    return b"\xff\xd8" + head + scan(0, 0, b"\x0f") + scan(1, 63, b"\x0f") * (num_scans - 1) + b"\xff\xd9"


def commented_gif(num_blocks: int = MAX_COMMENTS + 1) -> bytes:
    plain = _saved("GIF")
    palette_ends = 13 + (3 * 2 << (plain[10] & 7) if plain[10] & 0x80 else 0)
    return plain[:palette_ends] + b"!\xfe" + b"\x01a" * num_blocks + b"\0" + plain[palette_ends:]


def commented_ppm(num_comments: int = MAX_COMMENTS + 1) -> bytes:
    return b"P3\n1 1\n255\n" + b"#\n" * num_comments + b"9 9 9\n"


_INLINE = tags().replace(struct.pack("<HI", 1, 50_000), struct.pack("<HI", 1, 1))  # of the same length: Pillow reads it
OF_TAGS = "its tags claim more bytes than it has"
BOMBS = {
    "progressive JPEG": (progressive, f"more than {MAX_SCANS} scans"),
    "scans behind a large comment": (
        lambda: progressive()[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 5 + progressive()[2:],
        f"more than {MAX_SCANS} scans",
    ),
    "GIF comments": (commented_gif, f"more than {MAX_COMMENTS:,} blocks of comments"),
    "PPM comments": (commented_ppm, f"more than {MAX_COMMENTS:,} comments"),
    "TIFF tags": (many_tags_tiff, OF_TAGS),
    "TIFF strips": (lambda: tiff(2 * MAX_STRIPS + 1), f"more than {MAX_STRIPS:,} strips or tiles"),
    "EXIF in PNG": (lambda: _saved("PNG", exif=tags()), OF_TAGS),
    "EXIF in JPEG": (lambda: _saved("JPEG", exif=b"Exif\0\0" + tags()), OF_TAGS),
    "EXIF in WebP": (lambda: _saved("WEBP", exif=tags()), OF_TAGS),
    "EXIF in AVIF": (lambda: _saved("AVIF", exif=_INLINE).replace(_INLINE, tags()), OF_TAGS),
}
"""Its content, and words of its refusal."""

HARMLESS = {
    "progressive JPEG": lambda: progressive(MAX_SCANS),
    "GIF comments": lambda: commented_gif(MAX_COMMENTS),
    "PPM comments": lambda: commented_ppm(MAX_COMMENTS),
    "TIFF strips": lambda: tiff(500),
    "EXIF in PNG": lambda: _saved("PNG", exif=tags(2)),
    "EXIF in JPEG": lambda: _saved("JPEG", exif=b"Exif\0\0" + tags(1)),
}
