"""References of any box and pixel size."""

from pathlib import Path

import numpy as np
import pytest

from torchem.data.mrc import write_map
from torchem.em.reference import read_mask, read_reference, rescale
from torchem.errors import InputError


def gaussian(box: int, pixel_size: float) -> np.ndarray:
    """A smooth lopsided map, the same object at every box and pixel size (Å)."""
    axis = (np.arange(box) - box // 2) * pixel_size
    z, y, x = axis[:, None, None], axis[:, None], axis
    large = np.exp(-((x - 6) ** 2 + (y + 4) ** 2 + z**2 / 1.5) / 200)
    return large + 0.5 * np.exp(-((x + 9) ** 2 + y**2 + (z - 8) ** 2) / 150)


@pytest.mark.parametrize(
    ("new_box", "new_pixel_size"),
    [(32, 4.0), (64, 2.0), (24, 4.0), (48, 4.0), (31, 4.13), (54, 2.57), (33, 3.9)],
)
def test_rescaled_map_is_the_same_object(new_box: int, new_pixel_size: float) -> None:
    rescaled = rescale(gaussian(32, 4.0), 4.0, new_box, new_pixel_size)
    expected = gaussian(new_box, new_pixel_size) * new_pixel_size / 4.0
    inside = np.abs((np.arange(new_box) - new_box // 2) * new_pixel_size) < 55
    region = np.ix_(inside, inside, inside)
    assert rescaled.dtype == np.float32
    np.testing.assert_allclose(rescaled[region], expected[region], atol=2e-3)


def test_what_lies_beyond_nyquist_is_cut() -> None:
    wave = np.cos(np.pi * 0.9 * (np.arange(40) - 20))  # almost Nyquist
    volume = np.broadcast_to(wave, (40, 40, 40)).copy()
    middle = rescale(volume, 2.0, 20, 4.0)[5:15, 5:15, 5:15]
    assert np.abs(middle).max() < 0.02


def test_background_fills_what_the_map_does_not_reach() -> None:
    rescaled = rescale(gaussian(32, 4.0) + 7, 4.0, 64, 4.0)
    np.testing.assert_allclose(rescaled[:8], 7, atol=0.01)


def test_read_map(tmp_path: Path) -> None:
    write_map(tmp_path / "map.mrc", gaussian(32, 4.0), 4.0)
    same = read_reference(tmp_path / "map.mrc", 32, 4.0)
    np.testing.assert_array_equal(same, gaussian(32, 4.0).astype(np.float32))
    assert read_reference(tmp_path / "map.mrc", 40, 3.3).shape == (40, 40, 40)


def test_a_map_much_narrower_than_the_images_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_map(tmp_path / "map.mrc", gaussian(32, 4.0), 1.0)
    read_reference(tmp_path / "map.mrc", 16, 4.0)
    assert not caplog.records
    read_reference(tmp_path / "map.mrc", 32, 4.0)
    assert "is 32 Å wide, the images 128 Å: is 1 Å, the pixel size in its header, right?" in caplog.text


def test_read_mask(tmp_path: Path) -> None:
    axis = np.arange(32) - 16
    mask = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 100).astype(np.float32)
    write_map(tmp_path / "mask.mrc", mask, 4.0)
    rescaled = read_mask(tmp_path / "mask.mrc", 64, 2.0)
    assert rescaled.min() >= 0 and rescaled.max() <= 1
    assert rescaled[32, 32, 32] > 0.95
    assert rescaled.mean() == pytest.approx(mask.mean(), rel=0.04)


@pytest.mark.parametrize(
    ("volume", "pixel_size", "message"),
    [
        (np.ones((4, 4, 6)), 1.0, "give a cubic map"),
        (np.ones((4, 4, 4)), 1.0, "every voxel is 1"),
        (np.arange(64.0).reshape(4, 4, 4), 0.0, "no pixel size"),
    ],
)
def test_maps_that_cannot_be_matched(tmp_path: Path, volume: np.ndarray, pixel_size: float, message: str) -> None:
    write_map(tmp_path / "map.mrc", volume, pixel_size)
    with pytest.raises(InputError, match=message) as error:
        read_reference(tmp_path / "map.mrc", 4, 1.0)
    assert "map.mrc" in str(error.value)


def test_mask_beyond_bounds(tmp_path: Path) -> None:
    write_map(tmp_path / "mask.mrc", np.arange(64.0).reshape(4, 4, 4), 1.0)
    with pytest.raises(InputError, match="between 0 and 1"):
        read_mask(tmp_path / "mask.mrc", 4, 1.0)


def test_atomic_model(tmp_path: Path) -> None:
    atoms = [(5.0, 0, 0), (-5.0, 0, 0), (0, 9.0, 0), (0, -9.0, 0)]
    lines = [
        f"ATOM  {i + 1:5d}  CA  ALA A{i + 1:4d}    {x + 50:8.3f}{y + 50:8.3f}{z + 50:8.3f}  1.00  0.00           C"
        for i, (x, y, z) in enumerate(atoms)
    ]
    (tmp_path / "model.pdb").write_text("\n".join(lines) + "\nEND\n")
    volume = read_reference(tmp_path / "model.pdb", 24, 2.0)
    assert volume.shape == (24, 24, 24) and volume.dtype == np.float32
    # without the planes at -12, which have no counterpart
    volume = volume[1:, 1:, 1:]
    z, y, x = np.meshgrid(*[np.arange(-11, 12)] * 3, indexing="ij")
    centre = [(volume * axis).sum() / volume.sum() for axis in (x, y, z)]
    np.testing.assert_allclose(centre, 0, atol=0.05)
    assert (volume * y**2).sum() > (volume * x**2).sum() > (volume * z**2).sum()
    with pytest.raises(InputError, match="larger box"):
        read_reference(tmp_path / "model.pdb", 8, 2.0)
