"""Simulated data sets: what the images hold, noise, files, interruptions, refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from torchem.data.mrc import read_map, write_map
from torchem.data.particles import Particles
from torchem.data.star import read_star, write_star
from torchem.errors import InputError
from torchem.imaging import simulation
from torchem.imaging.ctf import ctf
from torchem.imaging.density import density, project
from torchem.imaging.fourier import FourierPixels, half_transform
from torchem.imaging.projection import fourier_volume
from torchem.imaging.simulation import NoiseOptions, SimulateOptions, make_dataset, simulate
from torchem.imaging.symmetry import rotation_matrix
from torchem.ops.slices import project as cut_slices

FILES = {"particles.mrcs", "particles.star", "truth.star", "truth_class001.mrc", "reference.mrc"}
BOX, PIXEL = 32, 5.0


@pytest.fixture(scope="module")
def molecule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small PDB file without symmetry, off the origin."""
    rng = np.random.default_rng(5)
    xyz = rng.normal(size=(400, 3)).clip(-2, 2) * [20, 12, 8] + [100, 40, -30]
    xyz[:60] += [10, 20, 0]
    path = tmp_path_factory.mktemp("model") / "small.pdb"
    lines = [
        f"ATOM  {i % 99999 + 1:5d}  CA  ALA A{i % 9999 + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C\n"
        for i, (x, y, z) in enumerate(xyz)
    ]
    path.write_text("".join(lines) + "END\n")
    return path


@pytest.fixture
def options(molecule: Path) -> SimulateOptions:
    return SimulateOptions(
        model=str(molecule), symmetry="C1", n_particles=150, box=BOX, pixel_size=PIXEL, reference_angst=40.0,
        shift_sigma_px=1.5, noise=NoiseOptions(snr=0.2), device="cpu",
    )  # fmt: skip


def images(folder: Path) -> np.ndarray:
    return read_map(folder / "particles.mrcs")[0]


def noiseless(options: SimulateOptions, **changes: Any) -> SimulateOptions:
    return replace(options, noise=NoiseOptions(snr=math.inf), **changes)


def test_images_are_shifted_projections_times_ctf(options: SimulateOptions, tmp_path: Path) -> None:
    """Against NumPy sums over atoms from the numbers in truth.star, the greyscale from the truth map."""
    from torchem.data.atoms import read_atoms

    options = noiseless(options, n_particles=5, phase_shift=30.0)
    simulate(options, tmp_path)
    xyz, weights = read_atoms(options.model)
    xyz -= (weights[:, None] * xyz).sum(0) / weights.sum()
    truth, pixel_size = read_map(tmp_path / "truth_class001.mrc")
    assert pixel_size == PIXEL
    weights *= truth.sum() / weights.sum()
    table = read_star(tmp_path / "truth.star")["particles"]
    assert (table["rlnPhaseShift"] == 30.0).all() and (table["rlnClassNumber"] == 1).all()
    k = np.fft.fftfreq(BOX, 1 / BOX)
    kx, ky = k[None, :], k[:, None]
    volts = 300e3
    wavelength = 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))
    for image, row in zip(images(tmp_path), table.itertuples(), strict=True):
        a, b, c = np.deg2rad([row.rlnAngleRot, row.rlnAngleTilt, row.rlnAnglePsi])
        z_rot = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
        y_tilt = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
        z_psi = np.array([[np.cos(c), np.sin(c), 0], [-np.sin(c), np.cos(c), 0], [0, 0, 1]])
        seen = xyz @ (z_psi @ y_tilt @ z_rot).T
        # the origin centres the particle: it stands at minus the origin
        x, y = (seen[:, 0] - row.rlnOriginXAngst) / PIXEL, (seen[:, 1] - row.rlnOriginYAngst) / PIXEL
        wave_x, wave_y = (np.exp(-2j * np.pi / BOX * at[:, None] * k) for at in (x, y))
        transform = np.einsum("n,ny,nx->yx", weights, wave_y, wave_x)
        s2 = (kx**2 + ky**2) / (BOX * PIXEL) ** 2
        angle = np.arctan2(ky, kx) - np.deg2rad(row.rlnDefocusAngle)
        mean, half = (row.rlnDefocusU + row.rlnDefocusV) / 2, (row.rlnDefocusU - row.rlnDefocusV) / 2
        chi = np.pi * wavelength * s2 * (mean + half * np.cos(2 * angle)) - np.pi / 2 * 2.7e7 * wavelength**3 * s2**2
        transform *= np.sin(chi + np.deg2rad(30.0) + np.arcsin(0.1))
        transform *= np.exp(-math.log(2) * s2 * (2 * PIXEL) ** 2) * (kx**2 + ky**2 < (BOX / 2) ** 2)
        exact = np.fft.fftshift(np.fft.ifft2(transform).real)
        assert np.sqrt(((image - exact) ** 2).mean()) < 0.01 * exact.std()


def test_agrees_with_the_projector_of_refinement(options: SimulateOptions, tmp_path: Path) -> None:
    """Slices of the truth map's transform times the CTF are the images put back by their origins."""
    simulate(noiseless(options, n_particles=8, low_pass_angst=14.0), tmp_path)
    particles = Particles.read(tmp_path / "truth.star")
    truth = torch.tensor(read_map(tmp_path / "truth_class001.mrc")[0]).double()
    pixels, r_max = FourierPixels.of(BOX), BOX // 2 - 1
    size = 2 * (r_max - 2)  # not where the slice ends amid a shell
    kx, ky = pixels.kx[: pixels.count(size)], pixels.ky[: pixels.count(size)]
    rotations = rotation_matrix(*torch.tensor(particles.euler).unbind(1))
    slices = cut_slices(fourier_volume(truth, r_max, 4), rotations, kx, ky, 4, r_max)
    slices *= ctf(particles.optics[0], torch.tensor(particles.ctf_parameters), kx, ky)
    seen = pixels.gather(half_transform(torch.tensor(particles.images(range(8))).double()))[:, : len(kx)]
    seen = seen * pixels.phases(torch.tensor(particles.origin_angst) / PIXEL, size)
    agreement = (seen * slices.conj()).real.sum(1) / (seen.abs().square().sum(1) * slices.abs().square().sum(1)).sqrt()
    assert float(agreement.min()) > 0.999
    greyscale = (seen * slices.conj()).real.sum() / slices.abs().square().sum()
    assert float(greyscale) == pytest.approx(1, abs=0.01)


def test_signal_to_noise(options: SimulateOptions, tmp_path: Path) -> None:
    simulate(options, tmp_path / "noisy")
    simulate(noiseless(options), tmp_path / "clean")
    signal = images(tmp_path / "clean")
    assert signal.var() == pytest.approx(1, rel=1e-4)
    noise = images(tmp_path / "noisy") - math.sqrt(0.2) * signal
    n = noise.size
    assert noise.var() == pytest.approx(1, abs=5 * math.sqrt(2 / n)) and abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs((noise[:, :, 1:] * noise[:, :, :-1]).mean()) < 5 / math.sqrt(n)
    truths = [read_map(tmp_path / name / "truth_class001.mrc")[0] for name in ("noisy", "clean")]
    np.testing.assert_allclose(truths[0], math.sqrt(0.2) * truths[1], rtol=1e-4, atol=1e-6)


def test_files(options: SimulateOptions, tmp_path: Path) -> None:
    simulate(options, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert b"simulated" in (tmp_path / name).read_bytes()[:1024]
    blocks = read_star(tmp_path / "particles.star")
    table, truth = blocks["particles"], read_star(tmp_path / "truth.star")["particles"]
    assert list(table["rlnImageName"][:2]) == ["000001@particles.mrcs", "000002@particles.mrcs"]
    assert list(table.groupby("rlnMicrographName").size()) == [100, 50]
    assert not {"rlnAngleRot", "rlnOriginXAngst", "rlnClassNumber"} & set(table.columns)
    pd.testing.assert_frame_equal(truth[table.columns], table)
    origins = truth[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    assert origins.std() == pytest.approx(1.5 * PIXEL, rel=0.15)
    assert truth["rlnDefocusU"].between(8000, 30000).all()
    assert (truth["rlnDefocusU"] - truth["rlnDefocusV"]).between(0, 500).all()
    # uniform over the sphere: cosines of the tilt have mean 0 and variance 1/3
    cosines = np.cos(np.deg2rad(truth["rlnAngleTilt"].to_numpy()))
    assert abs(cosines.mean()) < 0.2 and cosines.var() == pytest.approx(1 / 3, abs=0.1)
    particles = Particles.read(tmp_path / "particles.star")
    particles.check(particle_diameter=120.0)
    assert len(particles) == 150 and particles.optics[0].pixel_size == PIXEL


def test_reference_is_the_truth_low_passed(options: SimulateOptions, tmp_path: Path) -> None:
    simulate(replace(options, n_particles=2), tmp_path)
    truth, reference = (np.fft.rfftn(read_map(tmp_path / f)[0]) for f in ("truth_class001.mrc", "reference.mrc"))
    k = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.fft.rfftfreq(BOX, 1 / BOX) ** 2)
    inner, outer = radius <= BOX * PIXEL / 40 - 1, radius >= BOX * PIXEL / 40 + 1
    np.testing.assert_allclose(reference[inner], truth[inner], rtol=1e-4)
    assert np.abs(reference[outer]).max() < 1e-4 * np.abs(truth).max()


def test_same_seed_same_bytes(options: SimulateOptions, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    simulate(options, tmp_path / "a")
    torch.set_num_threads(3)
    try:
        simulate(options, tmp_path / "b")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    simulate(replace(options, seed=2), tmp_path / "c")
    assert not np.allclose(images(tmp_path / "a"), images(tmp_path / "c"))


def star_spectrum(path: Path, frequency: np.ndarray, power: np.ndarray) -> Path:
    table = pd.DataFrame({"rlnSpectralIndex": range(len(power)), "rlnResolution": frequency, "rlnSigma2Noise": power})
    write_star(path.with_suffix(".star"), {"model_general": {"rlnNrClasses": 1}, "model_optics_group_1": table})
    return path.with_suffix(".star")


def text_spectrum(path: Path, frequency: np.ndarray, power: np.ndarray) -> Path:
    np.savetxt(path, np.stack([frequency, power], axis=1), header="frequency power")
    return path


@pytest.mark.parametrize("write", [star_spectrum, text_spectrum])
def test_coloured_noise(options: SimulateOptions, tmp_path: Path, write: Callable) -> None:
    frequency = np.linspace(0, 0.5 / PIXEL, 17)
    path = write(tmp_path / "spectrum.txt", frequency, 7 * (1 + 20 * np.exp(-((frequency * 40) ** 2))))
    coloured = replace(options, n_particles=400, noise=NoiseOptions(snr=1e-6, spectrum=str(path)))
    simulate(coloured, tmp_path / "set")
    noise = images(tmp_path / "set")
    assert noise.var() == pytest.approx(1, rel=0.03)
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(0)
    k = np.fft.fftfreq(BOX, PIXEL)
    expected = 1 + 20 * np.exp(-((np.hypot(k[:, None], k).clip(max=0.5 / PIXEL) * 40) ** 2))
    ratio = power / expected
    assert ratio.std() / ratio.mean() < 0.07  # 400 images: 5 %


def test_mixture(options: SimulateOptions, tmp_path: Path) -> None:
    volume = density(np.array([[30.0, 0, 0], [-30, 0, 0]]), np.ones(2), 48, 3.0, 15.0).numpy()
    write_map(tmp_path / "two.mrc", volume, 3.0)
    # a microscope of which the CTF is 1 throughout, but for the amplitude contrast
    plain = dict.fromkeys(("defocus_min_angst", "defocus_max_angst", "astigmatism_angst", "cs"), 0.0)
    mixed = noiseless(options, model=[options.model, str(tmp_path / "two.mrc")], n_particles=21, shift_sigma_px=0.0)
    simulate(replace(mixed, phase_shift=90.0, **plain), tmp_path / "set")
    table = read_star(tmp_path / "set" / "truth.star")["particles"]
    assert sorted(table["rlnClassNumber"].value_counts()) == [10, 11]
    maps = [read_map(tmp_path / "set" / f"truth_class00{c}.mrc")[0] for c in (1, 2)]
    assert maps[0].std() == pytest.approx(maps[1].std(), rel=1e-4)
    reference = read_map(tmp_path / "set" / "reference.mrc")[0]
    assert reference.sum() == pytest.approx((maps[0].sum() + maps[1].sum()) / 2, rel=1e-3)
    axis = (torch.arange(BOX) - BOX // 2) * PIXEL
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    voxels = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
    angles = torch.from_numpy(table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(copy=True))
    for number, volume in enumerate(maps, 1):
        of_class = (table["rlnClassNumber"] == number).to_numpy(copy=True)
        rotations = rotation_matrix(*angles[torch.from_numpy(of_class)].unbind(1))
        expected = math.sqrt(0.99) * project(voxels, torch.tensor(volume).flatten(), rotations, BOX, PIXEL).numpy()
        assert np.abs(images(tmp_path / "set")[of_class] - expected).std() < 0.02


def test_map_of_other_box_and_pixel_size(options: SimulateOptions, tmp_path: Path) -> None:
    """A map is resampled to what the atoms it was made of give directly, as far as both hold them."""
    from torchem.data.atoms import read_atoms

    write_map(tmp_path / "fine.mrc", density(*read_atoms(options.model), 80, 3.0, 15.0).numpy() + 0.3, 3.0)
    simulate(replace(options, n_particles=4, low_pass_angst=15.0), tmp_path / "atoms")
    simulate(replace(options, n_particles=4, model=str(tmp_path / "fine.mrc")), tmp_path / "map")
    a, b = (read_map(tmp_path / kind / "truth_class001.mrc")[0] for kind in ("atoms", "map"))
    np.testing.assert_allclose(a / a.std(), b / b.std(), atol=0.02 * (a / a.std()).max())
    a, b = images(tmp_path / "atoms"), images(tmp_path / "map")
    assert np.abs(a - b).std() < 0.01


def test_orientations_of_a_star_file(options: SimulateOptions, tmp_path: Path) -> None:
    simulate(replace(options, n_particles=6), tmp_path / "a")
    angles = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    table = read_star(tmp_path / "a" / "truth.star")["particles"]
    table["rlnAngleTilt"] = 90.0
    write_star(tmp_path / "side.star", {"particles": table})
    given = replace(options, n_particles=5, orientations=str(tmp_path / "side.star"))
    simulate(given, tmp_path / "b")
    same = read_star(tmp_path / "b" / "truth.star")["particles"]
    np.testing.assert_array_equal(same[angles], table[angles][:5])
    with pytest.raises(InputError, match="has 6 rows"):
        simulate(replace(given, n_particles=7), tmp_path / "c")
    write_star(tmp_path / "none.star", {"particles": table.drop(columns="rlnAnglePsi")})
    with pytest.raises(InputError, match="no table with rlnAngleRot"):
        simulate(replace(given, orientations=str(tmp_path / "none.star")), tmp_path / "c")


def test_phantom_data_set(tmp_path: Path) -> None:
    """What the refine command calls; also that voxels take the place of atoms where they are fewer."""
    told: list[tuple[int, int]] = []
    make_dataset(
        tmp_path, n_particles=70, box=24, pixel_size=9.5, snr=0.5, voltage=300.0, cs=2.0, amplitude_contrast=0.1,
        seed=1, symmetry="D2", progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(64, 70), (70, 70)]
    assert {path.name for path in tmp_path.iterdir()} == FILES
    Particles.read(tmp_path / "particles.star").check(particle_diameter=200.0)
    truth = read_map(tmp_path / "truth_class001.mrc")[0]
    # D2: the map is its own half turn about every axis
    inner = truth[1:, 1:, 1:]
    for axes in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_allclose(np.flip(inner, axes), inner, atol=1e-4 * truth.max())


class Stopped(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise Stopped


def test_interrupted(options: SimulateOptions, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        simulate(options, tmp_path / "new", stop)
    assert not list((tmp_path / "new").iterdir())
    # what was there before stays as it was
    simulate(options, tmp_path / "old")
    before = {name: (tmp_path / "old" / name).read_bytes() for name in FILES}
    with pytest.raises(Stopped):
        simulate(replace(options, seed=2), tmp_path / "old", stop)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    # and a killed process's leavings are in nobody's way
    (tmp_path / "old" / ".making").mkdir()
    (tmp_path / "old" / ".making" / "particles.mrcs").write_bytes(b"half")
    simulate(options, tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_one_at_a_time(options: SimulateOptions, tmp_path: Path) -> None:
    def begin_another(done: int, total: int) -> None:
        with pytest.raises(InputError, match="another process is making a data set there"):
            simulate(options, tmp_path)

    simulate(options, tmp_path, begin_another)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_real_particles_are_not_written_over(options: SimulateOptions, tmp_path: Path) -> None:
    (tmp_path / "particles.star").write_text("data_particles\n")
    with pytest.raises(InputError, match=r"particles\.star is there and was not simulated"):
        simulate(options, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["particles.star"]


def test_model_without_the_symmetry(options: SimulateOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not have symmetry C2 .* symmetry=C1"):
        simulate(replace(options, symmetry="C2"), tmp_path)


def test_model_larger_than_the_box(options: SimulateOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger box or pixel_size"):
        simulate(replace(options, pixel_size=2.0), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere.pdb"}, "model=nowhere.pdb: no such file"),
        ({"model": "model.txt"}, "must be phantom, or a file that ends in"),
        ({"model": []}, r"model=\[\]"),
        ({"symmetry": "C2V"}, "symmetry=C2V"),
        ({"n_particles": 0}, "n_particles=0"),
        ({"box": 33}, "box=33: must be an even number"),
        ({"pixel_size": 0.0}, "pixel_size=0"),
        ({"low_pass_angst": -1.0}, "low_pass_angst=-1"),
        ({"reference_angst": 8.0}, "reference_angst=8"),
        ({"orientations": "nowhere.star"}, "orientations=nowhere.star"),
        ({"shift_sigma_px": 5.0}, "shift_sigma_px=5"),
        ({"defocus_min_angst": 40000.0}, "defocus_min_angst=40000"),
        ({"astigmatism_angst": -5.0}, "astigmatism_angst=-5"),
        ({"voltage": 0.0}, "voltage=0"),
        ({"cs": -1.0}, "cs=-1"),
        ({"amplitude_contrast": 1.0}, "amplitude_contrast=1"),
        ({"noise": NoiseOptions(snr=0.0)}, "noise.snr=0"),
        ({"noise": NoiseOptions(spectrum="nowhere.txt")}, "noise.spectrum=nowhere.txt"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_refused(options: SimulateOptions, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(replace(options, **change), tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "0 1\n0.1 x\n", "not numbers"),
        ("a.txt", "0 1 2\n0.1 1 2\n", "two columns"),
        ("a.txt", "0.1 1\n0.0 1\n", "must ascend"),
        ("a.txt", "0 1\n0.1 -1\n", "0 or more"),
        ("a.star", "data_x\n\nloop_\n_rlnResolution #1\n0.1\n0.2\n", "no table with"),
    ],
)
def test_spectrum_refused(
    options: SimulateOptions, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    noise = NoiseOptions(spectrum=str(tmp_path / name))
    with pytest.raises(InputError, match=message):
        simulate(replace(options, noise=noise), tmp_path / "set")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_makes_the_same_set(options: SimulateOptions, tmp_path: Path) -> None:
    simulate(options, tmp_path / "cpu")
    simulate(replace(options, device="cuda"), tmp_path / "cuda")
    np.testing.assert_allclose(images(tmp_path / "cpu"), images(tmp_path / "cuda"), atol=1e-4)
    assert (tmp_path / "cpu" / "truth.star").read_bytes() == (tmp_path / "cuda" / "truth.star").read_bytes()


def test_batches_are_those_of_the_noise() -> None:
    """The noise is drawn a batch at a time, and torch draws otherwise from a block that is no multiple of 16."""
    assert simulation.BATCH % 16 == 0
