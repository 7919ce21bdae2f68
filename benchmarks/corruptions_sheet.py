"""Every corruption of one photograph at severities 1, 3 and 5: the picture in docs/corruptions.md.

    python benchmarks/corruptions_sheet.py --out docs/corruptions.jpg

The photograph is of the Grocery Store data set (Klasson et al. 2019, MIT); DMLBENCH_DATA names the folder of grocery-224.zip.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmlbench.corruptions import CORRUPTIONS, corrupted
from dmlbench.datasets.base import need
from dmlbench.datasets.pictures import decoded
from dmlbench.preprocess import Preprocess

PHOTOGRAPH = "dataset/test/Fruit/Red-Grapefruit/Red-Grapefruit_001.jpg"
SHOWN = (1, 3, 5)
COLUMNS = 4
TILE, GAP, LINE = 112, 6, 16


def sheet(picture: np.ndarray) -> Image.Image:
    """The picture (H, W, 3) clean, then under every corruption, three severities side by side."""
    group = len(SHOWN) * TILE + GAP
    rows = -(-(len(CORRUPTIONS) + 1) // COLUMNS)
    out = Image.new("RGB", (COLUMNS * group - GAP, rows * (TILE + LINE + GAP) - GAP), "white")
    draw = ImageDraw.Draw(out)
    font = ImageFont.load_default(size=12)
    for place, name in enumerate(["clean", *CORRUPTIONS]):
        left, top = place % COLUMNS * group, place // COLUMNS * (TILE + LINE + GAP)
        draw.text((left, top), name.replace("_", " "), fill="black", font=font)
        for k, severity in enumerate(SHOWN if name in CORRUPTIONS else (0,)):
            pixels = corrupted(picture, name, severity) if severity else picture
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
            out.paste(tile, (left + k * TILE, top + LINE))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", default=PHOTOGRAPH, help="its path in grocery-224.zip")
    asked = parser.parse_args()
    with zipfile.ZipFile(need("grocery", "grocery-224.zip")) as archive:
        photograph = decoded(archive.read(asked.picture))
    pixels = Preprocess.standard((3, 224, 224))(photograph).transpose(1, 2, 0)
    sheet(pixels).save(asked.out, quality=80, optimize=True)


if __name__ == "__main__":
    main()
