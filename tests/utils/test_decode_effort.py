"""Small files that would take their decoder minutes or gigabytes are refused before it begins; others are not."""

import io

import bombs
import pytest
from PIL import Image

from mige.utils import decode_effort
from mige.utils.images import BadImageError, as_image, image_size, open_image


@pytest.mark.parametrize("kind", bombs.BOMBS)
def test_a_file_of_much_work_is_refused_through_every_door(tmp_path, kind):
    make, words = bombs.BOMBS[kind]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    for door in (open_image, as_image, lambda path: as_image(str(path))):
        with pytest.raises(BadImageError) as refused:
            door(path)
        assert words in refused.value.message and str(path) in str(refused.value)


@pytest.mark.parametrize("kind", bombs.HARMLESS)
def test_a_file_within_the_limits_is_read(tmp_path, kind):
    path = tmp_path / "fine"
    path.write_bytes(bombs.HARMLESS[kind]())
    assert open_image(path).size == image_size(path)


@pytest.mark.parametrize(
    "params", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"comment": b"\xff\xda" * 300}]
)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_are_counted_as_they_are(mode, params):
    file = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert(mode).save(file, "JPEG", **params)
    counted = decode_effort._count_scans(file.getvalue())
    assert counted == 1 if "progressive" not in params else 6 <= counted <= 18
