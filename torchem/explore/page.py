"""One page that shows what an alignment found, with its figures within: it can be sent and opened anywhere."""

import base64
import html
import importlib.util
import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchem.data.files import replacing
from torchem.explore import figures
from torchem.explore.embedding import tsne, two_stage_reduction
from torchem.imaging.masks import apply_circular_mask
from torchem.imaging.planar import transformed

log = logging.getLogger(__name__)

_EMBEDDED_BOX = 64  # px; an overview needs no finer images
_BATCH = 512
_DPI = 110
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: right }
th:first-child, td:first-child { text-align: left } .note { color: #666 }
.simulated { color: #b22222; font-weight: bold; border: 2px solid #b22222; padding: .3rem .8rem; display: inline-block }
"""


class ImageReader(Protocol):
    """Images on disk, as `torchem.data.images.Images`."""

    def __len__(self) -> int: ...

    @property
    def read(self) -> Callable[[np.ndarray], np.ndarray]:
        """`(n, L, L)` float32 images at any indices from 0."""


def write_report(
    path: str | Path,
    parameters: pd.DataFrame,
    averages: Tensor | np.ndarray,
    history: pd.DataFrame | None = None,
    images: ImageReader | None = None,
    *,
    title: str,
    simulated: bool = False,
    resolution: Sequence[float] | None = None,
    radius: float | None = None,
    n_embedded: int = 1000,
    seed: int = 0,
) -> Path:
    """Write the page under a temporary name until whole.

    Parameters
    ----------
    parameters
        one row an image, as `torchem.data.alignment.COLUMNS`.
    averages
        `(k, L, L)`, of any device.
    history
        `torchem.explore.class_counts` of every iteration, one after the other.
    images
        the images in the order of ``parameters``, of which ``n_embedded``, spread over the set, are embedded before
        and after alignment; without it there is no embedding.
    title
        first line of the page.
    simulated
        mark the page as one of simulated particles.
    resolution
        `(k,)` of each average, in Å or whatever ``averages`` were measured in; not finite where there is none.
    radius
        pixels from the centre that the embedding looks at; half the box less 2 without it.

    Returns
    -------
    ``path``.
    """
    averages = torch.as_tensor(averages).detach()
    members = np.bincount(parameters["class_id"].to_numpy(np.int64), minlength=len(averages))
    labels = None
    if resolution is not None:
        labels = [f"{value:.1f} Å" if np.isfinite(value) else "–" for value in resolution]
    parts = [_summary(parameters, members, history)]
    parts.append(_section("Class averages", figures.gallery(averages, members, labels), "class: images"))
    parts.append(_section("Classes", figures.class_histogram(parameters, len(averages))))
    if history is not None and len(history):
        parts.append(_section("Iterations", figures.class_history(history)))
    parts.append(_section("Shifts and angles", figures.shift_histogram(parameters)))
    if images is not None:
        parts.append(_embedding(parameters, images, radius, n_embedded, seed))
    mark = '<p class="simulated">simulated particles</p>' if simulated else ""
    name = html.escape(title)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_CSS}</style></head>\n<body><h1>{name}</h1>{mark}\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _summary(parameters: pd.DataFrame, members: np.ndarray, history: pd.DataFrame | None) -> str:
    shift = np.hypot(parameters["sx"].to_numpy(float), parameters["sy"].to_numpy(float))
    rows = [
        ("images", f"{len(parameters):,}"),
        ("classes", f"{len(members)}, of {members.min():,} to {members.max():,} images"),
        ("mirrored", f"{100 * parameters['mirror'].mean():.1f} %"),
        ("shift", f"median {np.median(shift):.2f} px, largest {shift.max():.2f} px"),
    ]
    if "pixel_error" in parameters and parameters["pixel_error"].notna().any():
        rows.append(("pixel error", f"median {parameters['pixel_error'].median():.3f} px"))
    if history is not None and len(history):
        rows.append(("iterations", f"{history['iteration'].nunique()}"))
    cells = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _embedding(parameters: pd.DataFrame, images: ImageReader, radius: float | None, count: int, seed: int) -> str:
    chosen = np.unique(np.linspace(0, len(parameters) - 1, min(count, len(parameters))).round().astype(np.int64))
    if len(chosen) < 10:
        return _section("Embeddings", None, f"{len(chosen)} images are too few to embed.")
    before, after = _small(images, parameters.iloc[chosen], chosen, radius)
    usable = np.isfinite(before.flatten(1).sum(1).numpy())
    chosen, before, after = chosen[usable], before[usable], after[usable]
    if len(chosen) < 10 or before.std() == 0:
        return _section("Embeddings", None, "Of the images that were looked at, too few are finite to embed.")
    points: dict[str, np.ndarray] = {}
    scores = {when: two_stage_reduction(stack).scores for when, stack in (("before", before), ("after", after))}
    for when, values in scores.items():
        points[f"2SDR, {when} alignment"] = values.numpy()
    note = f"{len(chosen):,} of {len(parameters):,} images, coloured by their class. 2SDR: the first two of "
    note += " and ".join(f"{values.shape[1]} scores {when} alignment" for when, values in scores.items()) + "; "
    if importlib.util.find_spec("sklearn") is None:
        log.info("no t-SNE in the report: scikit-learn is not installed (pip install scikit-learn)")
        note += "no t-SNE, since scikit-learn is not installed (pip install scikit-learn)."
    else:
        note += "t-SNE of all of them."
        with ThreadPoolExecutor(len(scores)) as pool:  # one core each
            places = pool.map(lambda values: tsne(values, seed), scores.values())
            points |= {f"t-SNE, {when} alignment": place for when, place in zip(scores, places, strict=True)}
    class_id = parameters["class_id"].to_numpy(np.int64)[chosen]
    return _section("Embeddings", figures.embedding_figure(points, class_id), note)


def _small(
    images: ImageReader, parameters: pd.DataFrame, chosen: np.ndarray, radius: float | None
) -> tuple[Tensor, Tensor]:
    """Images as they are and aligned, within a circle, in a small box."""
    columns = {
        name: torch.tensor(parameters[name].to_numpy(), dtype=torch.float32) for name in ("alpha", "sx", "sy", "mirror")
    }
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(chosen), _BATCH):
        batch = torch.from_numpy(images.read(chosen[start : start + _BATCH]))
        box = batch.shape[-1]
        aligned = transformed(batch, **{name: values[start : start + _BATCH] for name, values in columns.items()})
        for stack, part in zip((batch, aligned), parts, strict=True):
            masked = apply_circular_mask(stack, (radius or box // 2 - 2) - 2, 4)
            if box > _EMBEDDED_BOX:
                masked = torch.nn.functional.adaptive_avg_pool2d(masked, _EMBEDDED_BOX)
            part.append(masked)
    return torch.cat(parts[0]), torch.cat(parts[1])


def _section(title: str, figure: Figure | None, note: str = "") -> str:
    text = f"<h2>{html.escape(title)}</h2>"
    if note:
        text += f'<p class="note">{html.escape(note)}</p>'
    if figure is not None:
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
            data = base64.b64encode(file.getvalue()).decode()
        text += f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    return text
