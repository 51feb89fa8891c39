"""The shapes of training's images: heights and widths, px, of which a micro-batch has one."""

from mige.config import DataConfig


def image_sizes(data: DataConfig, step: int) -> tuple[tuple[int, int], ...]:
    """Height and width of every shape that a training shows, px; of a square alone where the config names none.

    step: px of a patch along one side (16).
    """
    return tuple((rows * step, columns * step) for rows, columns in data.shapes) or ((data.size, data.size),)
