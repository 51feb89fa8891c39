"""What a file is that cannot be opened as an image, told from its first bytes, and what to do about it."""

from pathlib import Path

from PIL import TiffImagePlugin

from mige.utils.bad_image import BadImageError

# Only what Pillow decodes itself: EPS, for one, would start Ghostscript on a stranger's file. MPO comes as JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
USE_ONE_OF = f"use one of {', '.join(FORMATS)} (TIFF: integers of 1, 2, 4, 8, 12 or 16 bits), or HEIC with mige[heif]"
_CONVERT = "convert it to PNG or JPEG"

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SIGNATURES = (  # offset, bytes, what it is, what to do
    (
        0,
        b"version https://git-lfs",
        "a pointer of git-lfs in place of the file",
        "run `git lfs pull` in its repository",
    ),
    (0, b"\xff\x0a", "a JPEG XL image, which Pillow cannot read", _CONVERT),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image, which Pillow cannot read", _CONVERT),
    (0, b"%PDF-", "a PDF document", "save the page as PNG or JPEG"),
    (0, b"%!PS", "a PostScript drawing", "render it to PNG"),
    (0, b"8BPS", "a Photoshop document", "export it as PNG or JPEG"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image of float pixels, which have no fixed range", _CONVERT),
    (0, b"#?RADIANCE", "a Radiance HDR image of float pixels, which have no fixed range", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"\0\0\1\0", "an icon (ICO)", _CONVERT),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file", "develop it to PNG or JPEG"),
    (8, b"CR\2\0", "a camera's raw file (CR2)", "develop it to PNG or JPEG"),
    (4, b"ftypcrx ", "a camera's raw file (CR3)", "develop it to PNG or JPEG"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)", "save one of its frames as PNG"),
    (8, b"AVI ", "a video (AVI)", "save one of its frames as PNG"),
    (0, b"\0\0\1\xba", "a video (MPEG)", "save one of its frames as PNG"),
    (0, b"\0\0\1\xb3", "a video (MPEG)", "save one of its frames as PNG"),
    (0, b"FLV\1", "a video (FLV)", "save one of its frames as PNG"),
    (4, b"moov", "a video (QuickTime)", "save one of its frames as PNG"),
    (4, b"mdat", "a video (QuickTime)", "save one of its frames as PNG"),
    (8, b"WAVE", "a sound (WAV)", "give an image"),
    (0, b"PK\3\4", "a ZIP archive", "unpack it and give the image inside"),
    (0, b"PK\5\6", "an empty ZIP archive", "give an image"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it and give the image inside"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the image inside"),
    (0, b"Rar!", "a RAR archive", "unpack it and give the image inside"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it and give the image inside"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it and give the image inside"),
    (0, b"\x93NUMPY", "a NumPy array", "save it as PNG"),
)


def is_heif(path: Path) -> bool:
    """Whether the file says that it is HEIC or HEIF, by its brand."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def unknown_file(path: Path) -> BadImageError:
    """The error for a readable file that Pillow does not know as one of FORMATS: it says what the file is."""
    with path.open("rb") as file:
        head = file.read(1024)
    kind, hint = _kind(path, head)
    return BadImageError(path, f"{kind}not an image of a known format", hint)


def _kind(path: Path, head: bytes) -> tuple[str, str]:
    for offset, signature, kind, hint in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return f"{kind}, ", hint
    if head[4:8] == b"ftyp":
        if head[8:12] in HEIF_BRANDS:
            return "a HEIC image, ", 'install pillow-heif (pip install "mige[heif]"), or convert it to JPEG'
        return "a video (MP4 or QuickTime), ", "save one of its frames as PNG"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_kind(path)
    if not head.strip(b"\0"):
        return "a file of zero bytes only, ", "the download or copy was cut: fetch the image again"
    return _text_kind(head)


def _tiff_kind(path: Path) -> tuple[str, str]:
    """Names what is unusual about a TIFF; Pillow says no more than that it does not know it."""
    hint = "save it as PNG, or as TIFF with 8 or 16 bits a channel"
    try:
        with path.open("rb") as file:
            header = file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(header + file.read(8) if header[2] == 43 else header)
            file.seek(tags.next)
            tags.load(file)
            bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
            sample = {1: "unsigned", 2: "signed", 3: "float"}.get(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0], "")
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError, RuntimeError):
        return "a damaged TIFF, ", "replace it"
    return f"a TIFF of {' + '.join(map(str, bits))} {sample} bits a pixel, which Pillow cannot read, ", hint


def _text_kind(head: bytes) -> tuple[str, str]:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start and start.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return "an SVG drawing, ", "render it to PNG"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<meta")) or b"<html" in start:
        return "a web page (HTML), ", "the download got a page in place of the image: fetch it again"
    if start.startswith((b"<?xml", b"<error")):
        return "an XML text, ", "the download got a message in place of the image: fetch it again"
    if start.startswith((b"{", b"[")):
        return "a JSON text, ", "the download got a message in place of the image: fetch it again"
    if start and _is_text(head):
        return "a text, ", f"{USE_ONE_OF}; if it was downloaded, its text says why it is no image"
    return "", USE_ONE_OF


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # otherwise only the last character was cut
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
