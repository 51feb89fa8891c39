"""What is said of an image that cannot be used, and the limit on its size."""

from pathlib import Path

from mige.utils.errors import UserError

MAX_PIXELS = 178_956_970  # 512 MiB as RGB, where Pillow's own limit refuses; a 108-megapixel photograph still passes


class BadImageError(UserError, ValueError):
    """An image that cannot be used: which one, what is wrong and what to do."""

    def __init__(self, image: Path | str, message: str, hint: str):
        super().__init__(image, message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)


def check_size(image: Path | str, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadImageError for an image (`size`: width, height) without pixels or with more than `max_pixels`."""
    if min(size) < 1:
        raise BadImageError(image, f"{size[0]} x {size[1]} pixels, expected at least 1 x 1", "give an image")
    if size[0] * size[1] > max_pixels:
        message = f"{size[0] * size[1]:,} pixels, expected at most {max_pixels:,}"
        raise BadImageError(image, message, "make it smaller or crop it")
