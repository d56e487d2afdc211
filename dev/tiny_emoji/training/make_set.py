"""Choose the icons to learn and caption them by their names.

    python make_set.py icons --out data

writes data/images.npy (n, 64, 64, 3) uint8 on white, and data/rows.json: for each picture its name, its
words, its style (which package it is from) and its category.
"""
import argparse
import json
from pathlib import Path

import numpy as np

STYLES = {"noto": "noto", "fluent-emoji": "fluent", "fluent-emoji-flat": "flat", "noto-v1": "blob"}
CATEGORIES_OF = "noto"  # the package whose categories count for the icons of all
SILENT = {"with", "of", "large", "ear"}  # parts of names that are not captions

CONCEPTS = """
red-heart orange-heart yellow-heart green-heart blue-heart purple-heart brown-heart black-heart white-heart
broken-heart sparkling-heart red-circle orange-circle yellow-circle green-circle blue-circle purple-circle
brown-circle black-circle white-circle red-square orange-square yellow-square green-square blue-square
purple-square brown-square black-large-square white-large-square

grinning-face smiling-face-with-heart-eyes smiling-face-with-sunglasses crying-face loudly-crying-face
enraged-face angry-face sleeping-face face-with-open-mouth winking-face thinking-face neutral-face
face-with-tears-of-joy alien ghost skull robot jack-o-lantern clown-face pile-of-poo

cat-face dog-face fox panda frog pig-face tiger-face lion mouse-face rabbit-face bear koala monkey-face
cow-face penguin hatching-chick baby-chick owl fish tropical-fish blowfish octopus whale turtle snail
lady-beetle honeybee butterfly crab

red-apple green-apple banana orange tangerine lemon watermelon grapes strawberry cherries peach pineapple
tomato avocado carrot corn-ear ear-of-corn pizza hamburger doughnut cookie birthday-cake shortcake ice-cream
soft-ice-cream lollipop cheese-wedge bread egg cooking fried-egg

sun sun-with-face full-moon crescent-moon star glowing-star cloud rainbow fire droplet snowflake snowman
evergreen-tree deciduous-tree palm-tree cactus sunflower tulip rose cherry-blossom blossom mushroom
four-leaf-clover maple-leaf

soccer-ball basketball baseball tennis volleyball pool-8-ball gem-stone crown gift balloon rocket automobile
bus airplane sailboat house light-bulb key locked bell alarm-clock hourglass-done wrapped-gift umbrella
magnet bomb
""".split()


def on_white(rgba: np.ndarray) -> np.ndarray:
    colour = rgba.astype(np.float32)
    opacity = colour[..., 3:] / 255
    return (colour[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path, help="the folder that render.py wrote")
    parser.add_argument("--out", type=Path, default=Path("data"))
    arguments = parser.parse_args()

    packages = {package: np.load(arguments.icons / f"{package}.npz") for package in STYLES}
    category = dict(
        zip(packages[CATEGORIES_OF]["names"].tolist(), packages[CATEGORIES_OF]["categories"].tolist()))
    images, rows = [], []
    for package, style in STYLES.items():
        rgba = packages[package]["rgba"]
        own_category = packages[package]["categories"].tolist()
        index = {name: i for i, name in enumerate(packages[package]["names"].tolist())}
        for name in CONCEPTS:
            if name in index:
                i = index[name]
                images.append(on_white(rgba[i]))
                rows.append({"name": name, "style": style, "category": category.get(name, own_category[i]),
                             "words": [word for word in name.split("-") if word not in SILENT]})

    arguments.out.mkdir(parents=True, exist_ok=True)
    np.save(arguments.out / "images.npy", np.stack(images))
    (arguments.out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{len(images)} pictures of {len({row['name'] for row in rows})} things")


if __name__ == "__main__":
    main()
