"""Draw the icons of Iconify packages.

    npm install @iconify-json/{noto,noto-v1,fluent-emoji,fluent-emoji-flat}
    pip install resvg-py
    python render.py node_modules/@iconify-json/* --out icons

For each package a file icons/NAME.npz: `names` and `categories` (n strings), `rgba` (n, 64, 64, 4) uint8.
"""
import argparse
import io
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIZE = 64


def documents(icons: dict) -> dict[str, str]:
    """The SVG document of every icon, by name. `icons` is an Iconify icons.json."""
    width = icons.get("width", 16)
    height = icons.get("height", width)
    return {name: svg(icon["body"], icon.get("left", 0), icon.get("top", 0),
                      icon.get("width", width), icon.get("height", height))
            for name, icon in icons["icons"].items() if not icon.get("hidden")}


def svg(body: str, left: float, top: float, width: float, height: float) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>')


def picture(document: str) -> np.ndarray:
    """The document drawn SIZE pixels wide or high, in the middle of a transparent square."""
    png = resvg_py.svg_to_bytes(svg_string=document, width=SIZE, height=SIZE, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawn.thumbnail((SIZE, SIZE))
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    return np.asarray(square)


def render(package: Path, out: Path) -> None:
    icons = documents(json.loads((package / "icons.json").read_text(encoding="utf-8")))
    categories = json.loads((package / "metadata.json").read_text(encoding="utf-8")).get("categories", {})
    category = {name: group for group, names in categories.items() for name in names}
    with ProcessPoolExecutor(2) as pool:
        rgba = np.stack(list(pool.map(picture, icons.values(), chunksize=50)))
    np.savez_compressed(out / f"{package.name}.npz", rgba=rgba, names=list(icons),
                        categories=[category.get(name, "") for name in icons])
    print(f"{package.name}: {len(icons)} icons")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("icons"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for package in arguments.packages:
        render(package, arguments.out)


if __name__ == "__main__":
    main()
