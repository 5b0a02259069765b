"""The page of a run: whole, marked, from any kind of images; and the numbers behind its figures."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from torchem import explore
from torchem.data.eman import write_eman
from torchem.data.images import Images

ROOT = Path(__file__).resolve().parents[2]
N, CLASSES, BOX = 60, 4, 70


@pytest.fixture
def parameters():
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "image": [f"{i + 1:06d}@a.hdf" for i in range(N)],
            "class_id": rng.integers(0, CLASSES - 1, N),  # the last class is empty
            "mirror": rng.integers(0, 2, N),
            "alpha": rng.uniform(0, 360, N),
            "sx": rng.normal(0, 2, N),
            "sy": rng.normal(0, 2, N),
            "peak": rng.normal(0, 1, N),
            "pixel_error": np.nan,
        }
    )


@pytest.fixture
def history():
    rows = [(1, 0, 30, 0), (1, 1, 20, 0), (1, 2, 10, 0), (1, 3, 0, 0)]
    rows += [(2, 0, 40, 12), (2, 1, 15, 0), (2, 2, 5, 0), (2, 3, 0, 0)]
    return pd.DataFrame(rows, columns=["iteration", "class_id", "members", "joined"]).assign(peak=1.0)


@pytest.fixture
def averages():
    return torch.from_numpy(np.random.default_rng(2).standard_normal((CLASSES, BOX, BOX)))


def pictures(page):
    return [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]


def test_a_whole_page(tmp_path, parameters, history, averages):
    pixels = np.random.default_rng(3).standard_normal((N, BOX, BOX)).astype(np.float32)
    pixels[7] = np.nan  # one broken image spoils nothing
    write_eman(tmp_path / "a.hdf", pixels)
    report = explore.write_report(
        tmp_path / "run_report.html", parameters, averages, history, Images.open(tmp_path / "a.hdf"),
        title="apoferritin <MRA> & co", simulated=True, resolution=[9.5, 12, np.inf, np.nan],
    )  # fmt: skip
    page = report.read_text()
    assert "apoferritin &lt;MRA&gt; &amp; co" in page and '<p class="simulated">simulated particles</p>' in page
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Class averages", "Classes", "Iterations", "Shifts and angles", "Embeddings"]
    found = pictures(page)
    assert len(found) == 5 and all(picture[..., :3].std() > 0.01 for picture in found)
    assert "59 of 60 images" in page and "median" in page and "<td>iterations</td><td>2</td>" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf", "run_report.html"]


def test_a_page_without_images_and_history(tmp_path, parameters, averages):
    page = explore.write_report(tmp_path / "a.html", parameters, averages.numpy(), title="RFA").read_text()
    assert len(pictures(page)) == 3 and 'class="simulated"' not in page


@pytest.mark.parametrize(("count", "value"), [(5, 1.0), (60, np.nan)])
def test_images_that_cannot_be_embedded(tmp_path, parameters, averages, count, value):
    class Same:
        def __len__(self):
            return count

        def read(self, indices):
            return np.full((len(indices), BOX, BOX), value, np.float32)

    page = explore.write_report(tmp_path / "a.html", parameters[:count], averages, None, Same(), title="a").read_text()
    assert "too few" in page and len(pictures(page)) == 3


def test_without_scikit_learn_the_page_says_so(tmp_path, parameters, averages, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))

    class Noise:
        def __len__(self):
            return N

        def read(self, indices):
            return np.random.default_rng(0).standard_normal((len(indices), 32, 32)).astype(np.float32)

    page = explore.write_report(tmp_path / "a.html", parameters, averages, None, Noise(), title="a").read_text()
    assert "no t-SNE, since scikit-learn is not installed" in page and len(pictures(page)) == 4


def test_occupancy_and_attraction(history):
    table = explore.occupancy(history).set_index(["iteration", "class_id"])
    np.testing.assert_allclose(table.loc[1, "occupancy"], np.array([30, 20, 10, 0]) / 60)
    assert table.loc[1, "attraction"].isna().all()
    # 12 of the 30 images that were not in class 0 came to it
    np.testing.assert_allclose(table.loc[2, "attraction"], [12 / 30, 0, 0, 0])
    assert explore.occupancy(history.drop(columns="joined"))["attraction"].isna().all()


@pytest.mark.parametrize("iterations", [1, 2])
def test_history_of_one_class_and_of_one_iteration(iterations):
    rows = pd.DataFrame({"iteration": np.arange(iterations) + 1, "class_id": 0, "members": 50, "peak": 0.3})
    (axis,) = explore.class_history(rows).axes
    assert axis.lines[0].get_ydata().tolist() == [0.3] * iterations
    two = pd.concat([rows, rows.assign(class_id=1)])
    shown = explore.class_history(two).axes
    np.testing.assert_array_equal(shown[0].images[0].get_array(), np.full((2, iterations), 0.5))


def test_class_counts(parameters):
    first = parameters.assign(class_id=[0] * 30 + [1] * 30, peak=0.5)
    second = first.assign(class_id=[0] * 20 + [1] * 25 + [0] * 15, peak=np.arange(60.0))
    rows = pd.concat([explore.class_counts(1, first, None, 3), explore.class_counts(2, second, first, 3)])
    assert rows[["iteration", "class_id", "members", "joined"]].to_numpy().tolist() == [
        [1, 0, 30, 0], [1, 1, 30, 0], [1, 2, 0, 0], [2, 0, 35, 15], [2, 1, 25, 10], [2, 2, 0, 0],
    ]  # fmt: skip
    np.testing.assert_allclose(rows["peak"][:2].iloc[0], 0.5)
    np.testing.assert_allclose(rows["peak"].iloc[4], np.arange(20, 45).mean())
    assert np.isnan(rows["peak"].iloc[2])
    table = explore.occupancy(rows).set_index(["iteration", "class_id"])
    np.testing.assert_allclose(table.loc[2, "attraction"], [15 / 30, 10 / 30, 0])
    # an empty class's peak does not spoil the mean over all
    line = explore.class_history(rows).axes[3].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [0.5, 29.5])


def test_names_are_loaded_on_first_use():
    code = "import sys, torchem.explore; print([m for m in ('torch', 'matplotlib', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        explore.nothing  # noqa: B018


def test_gallery_is_sorted_and_bounded():
    averages = np.random.default_rng(1).standard_normal((230, 8, 8)).astype(np.float32)
    (axis,) = explore.gallery(averages, np.arange(230)).axes
    names = [text.get_text() for text in axis.texts]
    assert len(names) == 200 and names[0] == "229: 229" and names[-1] == "30: 30"
    # the second of the second row stands where its name does, in its own greys, y upwards
    text, twelfth = axis.texts[11], averages[218]
    assert text.get_text() == "218: 218"
    x, y = round(text.get_position()[0]) - 4, round(text.get_position()[1] - 1.01 * 8)
    low, high = np.percentile(twelfth, [0.5, 99.8])
    shown = axis.images[0].get_array()[y : y + 8, x : x + 8]
    np.testing.assert_allclose(shown, (twelfth[::-1] - low) / (high - low), atol=1e-5)


def test_gallery_in_the_given_order():
    averages = np.zeros((3, 8, 8))  # all alike: no greys to divide by
    (axis,) = explore.gallery(averages, labels=["a", "b", "c"]).axes
    assert [text.get_text() for text in axis.texts] == ["0\na", "1\nb", "2\nc"]
    assert np.nanmax(axis.images[0].get_array()) == 0


def test_many_classes_and_one_score():
    class_id = np.arange(60) % 30
    figure = explore.embedding_figure({"one": np.arange(60.0)[:, None]}, class_id)
    assert len(figure.axes) == 2  # the plot and its scale


def test_notebooks_show_figures(parameters):
    shown = explore.shift_histogram(parameters)._repr_png_()
    assert matplotlib.image.imread(io.BytesIO(shown), format="png").std() > 0
