"""Images of every kind of file, opened by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from torchem.data.eman import write_eman
from torchem.data.images import Images
from torchem.data.mrc import write_map, write_stack
from torchem.errors import InputError

HERE = Path(__file__).parent


@pytest.fixture
def pixels():
    return np.random.default_rng(1).standard_normal((5, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".mrcs", ".mrc", ".hdf", ".H5"])
def test_stacks(tmp_path, pixels, suffix):
    path = tmp_path / f"a@b{suffix}"  # what comes before @ is no number here
    (write_stack if "mrc" in suffix else write_eman)(path, pixels, pixel_size=1.5)
    images = Images.open(path)
    images.check()
    assert (len(images), images.box, images.pixel_size, images.particles) == (5, 8, 1.5, None)
    assert images.names[4] == f"000005@{path}"
    np.testing.assert_array_equal(images.read([4, 1]), pixels[[4, 1]])
    assert Images.open(path, pixel_size=2.0).pixel_size == 2.0


def test_tables(small_set, tmp_path):
    path = small_set()
    images = Images.open(path)
    images.check()
    assert (len(images), images.box, images.pixel_size) == (12, 16, 4.0)
    assert images.names[2] == "000003@particles.mrcs" and images.particles.source == path
    assert images.read([0, 11]).shape == (2, 16, 16)


def test_of_different_sizes(small_set):
    def change(optics, particles, images):
        optics.loc[1] = optics.loc[0]
        optics.loc[1, ["rlnOpticsGroup", "rlnImagePixelSize"]] = 2, 3.0
        particles.loc[5:, "rlnOpticsGroup"] = 2

    with pytest.raises(InputError, match=r"different sizes \(16 px of 3 Å, 16 px of 4 Å\)"):
        Images.open(small_set(change))


def test_bdb():
    pytest.importorskip("dissect.database", reason='the extra "bdb" is not installed')
    with pytest.raises(InputError, match="images of 5 x 4 px are not square"):
        Images.open(f"bdb:{HERE / 'eman2'}#particles")


def test_what_cannot_be_aligned(tmp_path, pixels):
    with pytest.raises(InputError, match=r"a\.tif is no file of images by its name"):
        Images.open(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.mrcs not found"):
        Images.open(tmp_path / "a.mrcs")
    write_eman(tmp_path / "a.hdf", pixels[None])
    with pytest.raises(InputError, match="volumes of 8 x 8 x 5"):
        Images.open(tmp_path / "a.hdf")
    write_map(tmp_path / "a.mrc", pixels[:, :7], 1.0)
    with pytest.raises(InputError, match="not square"):
        Images.open(tmp_path / "a.mrc")


def test_batches_are_shared_not_copied(tmp_path, pixels):
    """What is read is NumPy's, PyTorch's and by DLPack anyone's, at one address."""
    write_eman(tmp_path / "a.hdf", pixels)
    batch = Images.open(tmp_path / "a.hdf").read([0, 1])
    tensor = torch.from_numpy(batch)
    assert tensor.data_ptr() == torch.from_dlpack(batch).data_ptr() == np.from_dlpack(tensor).ctypes.data
    batch[0, 0, 0] = 7
    assert tensor[0, 0, 0] == 7 == np.asarray(tensor)[0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too(pixels):
    tensor = torch.from_numpy(pixels).cuda()
    assert tensor.__cuda_array_interface__["data"][0] == tensor.data_ptr()
    cupy = pytest.importorskip("cupy")
    for shared in (cupy.asarray(tensor), cupy.from_dlpack(tensor)):
        assert shared.data.ptr == tensor.data_ptr()
        assert torch.as_tensor(shared).data_ptr() == tensor.data_ptr()
