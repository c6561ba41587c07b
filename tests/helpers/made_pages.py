"""What the report's page shows besides runs: films, heat maps, a map, answers to targets."""

import io

import numpy as np
import pandas as pd
from PIL import Image

from medembed.report.gallery import Thumbnail
from medembed.results.embedding_map import EmbeddingMap, MapInfo, write_map
from medembed.results.predictions import image_code


def thumbnails(wanted):
    """Grey ramps in place of radiographs; every seventh image is not at hand."""
    found = {}
    for k, sha256 in enumerate(wanted):
        if k % 7 != 6:
            ramp = np.tile(np.linspace(0, 255, 160, dtype=np.uint8), (200, 1))
            output = io.BytesIO()
            Image.fromarray(ramp).save(output, "JPEG")
            found[sha256] = Thumbnail(output.getvalue(), 160, 200)
    return found


def make_heat(directory, sha256):
    """Numbers of a heat map as `predict --explain` writes them: one hot cell, none in padding."""
    lines = ["row,column,left,top,right,bottom,logit"]
    for row, column in np.ndindex(4, 4):
        edges = (column * 40, row * 50, column * 40 + 40, row * 50 + 50)
        lines.append(f"{row},{column},{','.join(map(str, edges))},{int(row == column == 1)}")
    directory.mkdir(exist_ok=True)
    (directory / f"{image_code(sha256)}.csv").write_text("\n".join(lines))


def give_map(run, images):
    """Keep a map in a run: abnormal images lie on the right."""
    rows = images.assign(pooling="mean", x=images["label"] * 4.0, y=np.linspace(0, 3, len(images)))
    rows = rows.astype({"label": "Int8"})
    info = MapInfo(method="pca", seed=0, manifest="0", explained={"mean": [0.5, 0.2]}, versions={})
    write_map(run, EmbeddingMap(rows, info))


def make_answers(images):
    """Answers to two further targets: one by patient, one known of few."""
    answers = {"metal": images["patient"] % 3 == 1, "cast": images["label"] == 1}
    found = {
        name: pd.Series(own.to_numpy(), images["sha256"], "Int8") for name, own in answers.items()
    }
    found["cast"] = found["cast"].mask((images["patient"] % 5 != 0).to_numpy())
    return found
