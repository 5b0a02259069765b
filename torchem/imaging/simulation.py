"""Particles with a known answer: molecules, poses, CTF, noise, and the files of a data set.

Image geometry: a point at x (Å) is seen at (A x)_{x,y} + shift, A of the Euler angles as in
:func:`torchem.imaging.symmetry.rotation_matrix`; the origin is pixel L//2. rlnOriginXAngst/YAngst, which centre the
particle, are minus the shift.
"""

import fcntl
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from torchem.data.atoms import read_atoms
from torchem.data.mrc import read_map, write_map
from torchem.data.star import read_star, write_star
from torchem.errors import InputError, Problems
from torchem.imaging.ctf import Optics, ctf
from torchem.imaging.density import density, project, spread_density
from torchem.imaging.phantom import phantom
from torchem.imaging.resolution import raised_cosine_lowpass
from torchem.imaging.symmetry import canonical, operators, rotation_matrix

__all__ = ["NoiseOptions", "SimulateOptions", "density", "make_dataset", "phantom", "project", "simulate"]

Progress = Callable[[int, int], None]

COMMENT = "simulated by torchem"  # first line of the STAR files and label of the MRC files
MICROGRAPH = 100  # particles a micrograph
HEADER_BYTES = 1024  # of an MRC file without extended header
BATCH = 64  # images made together; a constant, since the noise is drawn batch by batch
ATOMIC_MODELS = (".pdb", ".ent", ".cif", ".mmcif")
MAPS = (".mrc", ".map", ".ccp4")


@dataclass
class NoiseOptions:
    """Noise, of unit variance."""

    snr: float = 0.1  # variance of the CTF-modulated signal over that of the noise, whole boxes; inf: no noise
    spectrum: str = "white"  # or a file: RELION model.star, or two columns, frequency (1/Å) and power


@dataclass
class SimulateOptions:
    """What is simulated."""

    model: Any = "phantom"  # phantom, FILE.pdb, FILE.cif, FILE.mrc, or a list of them: a mixture in equal parts
    symmetry: str = "D2"  # of the model, in RELION's axes
    n_particles: int = 1000
    box: int = 64  # px
    pixel_size: float = 3.54  # Å
    low_pass_angst: float | None = None  # Å; if none, twice the pixel size for atoms and nothing more for maps
    reference_angst: float = 60.0  # Å, resolution of reference.mrc
    orientations: str = "uniform"  # or a STAR file: the angles of its first n_particles rows
    shift_sigma_px: float = 3.0  # standard deviation of the shifts in x and in y
    defocus_min_angst: float = 8000.0
    defocus_max_angst: float = 30000.0
    astigmatism_angst: float = 500.0  # most that defocus V is below U
    voltage: float = 300.0  # kV
    cs: float = 2.7  # mm
    amplitude_contrast: float = 0.1
    phase_shift: float = 0.0  # degrees
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    seed: int = 1  # of poses, defoci and noise; the phantom is always the same molecule
    device: str = "auto"  # auto, cpu, cuda

    @property
    def models(self) -> list[str]:
        """The models, one a class."""
        return [str(m) for m in self.model] if isinstance(self.model, (list, tuple)) else [str(self.model)]

    def check(self) -> None:
        """Refuse what cannot be simulated.

        Raises
        ------
        InputError
            One line a problem: option, value, remedy.
        """
        problems = Problems()
        if not self.models:
            problems.add("model=[]: give phantom, an atomic model or a map, or a list of them")
        for model in self.models:
            kind = Path(model).suffix.lower()
            if model == "phantom":
                continue
            if kind not in ATOMIC_MODELS + MAPS:
                problems.add(f"model={model}: must be phantom, or a file that ends in .pdb, .cif or .mrc")
            else:
                problems.require(Path(model).is_file(), "model", model, "no such file; check the path")
        try:
            canonical(self.symmetry)
        except InputError as error:
            problems.add(f"symmetry={self.symmetry}: {error}")
        problems.require(self.n_particles >= 1, "n_particles", self.n_particles, "must be at least 1")
        problems.require(
            self.box >= 16 and self.box % 2 == 0, "box", self.box, "must be an even number of pixels, at least 16"
        )
        problems.positive("pixel_size", self.pixel_size)
        problems.positive("low_pass_angst", self.low_pass_angst)
        problems.require(
            self.reference_angst > 2 * self.pixel_size, "reference_angst", self.reference_angst,
            f"must be above {2 * self.pixel_size:g} Å, the finest that these pixels hold",
        )  # fmt: skip
        problems.require(
            self.orientations == "uniform" or Path(self.orientations).is_file(), "orientations", self.orientations,
            "must be uniform or an existing STAR file",
        )  # fmt: skip
        problems.require(
            0 <= self.shift_sigma_px <= self.box / 8, "shift_sigma_px", self.shift_sigma_px,
            f"must be between 0 and {self.box / 8:g}, an eighth of the box",
        )  # fmt: skip
        problems.require(
            0 <= self.astigmatism_angst < math.inf, "astigmatism_angst", self.astigmatism_angst, "must be 0 or more"
        )
        problems.require(
            -math.inf < self.defocus_min_angst <= self.defocus_max_angst < math.inf,
            "defocus_min_angst", self.defocus_min_angst,
            f"must not be above defocus_max_angst={self.defocus_max_angst:g}",
        )  # fmt: skip
        problems.positive("voltage", self.voltage)
        problems.require(0 <= self.cs < math.inf, "cs", self.cs, "must be 0 mm or more")
        problems.require(
            0 <= self.amplitude_contrast < 1, "amplitude_contrast", self.amplitude_contrast,
            "must be at least 0 and below 1",
        )  # fmt: skip
        problems.require(
            math.isfinite(self.phase_shift), "phase_shift", self.phase_shift, "must be a number of degrees"
        )
        problems.require(self.noise.snr > 0, "noise.snr", self.noise.snr, "must be positive; inf is without noise")
        problems.require(
            self.noise.spectrum == "white" or Path(self.noise.spectrum).is_file(),
            "noise.spectrum", self.noise.spectrum, "must be white or an existing file",
        )  # fmt: skip
        problems.require(0 <= self.seed < 2**62, "seed", self.seed, "must be 0 or a positive integer")
        problems.one_of("device", self.device, "auto", "cpu", "cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.add("device=cuda: this PyTorch sees no CUDA device; give device=cpu")
        problems.tell()


def make_dataset(
    folder: str | Path, *, snr: float = 0.1, progress: Progress | None = None, **options: Any
) -> None:
    """Simulate particles of the built-in phantom into a folder, as stand-in or demonstration.

    Parameters
    ----------
    snr, options
        ``noise.snr``, and any other fields of :class:`SimulateOptions`.
    progress
        is called with (particles done, of all).
    """
    simulate(SimulateOptions(noise=NoiseOptions(snr=snr), **options), folder, progress)


def simulate(options: SimulateOptions, folder: str | Path, progress: Progress | None = None) -> None:
    """Write a simulated data set: particles.mrcs, particles.star, truth.star, truth_class001.mrc …, reference.mrc.

    Projections of the truth maps, summed along z, are the signal in the images, so that their greyscale is
    absolute. ``truth.star`` has the table of ``particles.star`` with the angles, origins and classes that a
    refinement should find. Files appear under their names when all of them are whole, ``particles.star`` last.
    On a CPU the same options give the same bytes; on a GPU all that is drawn is the same and sums differ by
    rounding.

    Raises
    ------
    InputError
        options or files that cannot be used; another process is making a data set in this folder.
    """
    options.check()
    folder = Path(folder)
    box, pixel_size = options.box, options.pixel_size
    with _one_thread() as threads, _parts(folder) as part:
        truth = _draw(options, torch.Generator().manual_seed(options.seed))
        noise_filter = _noise_filter(options.noise.spectrum, box, pixel_size)
        molecules = [_molecule(options, number) for number in range(len(options.models))]
        stack = part("particles.mrcs")
        scale = _write_images(stack, molecules, truth, noise_filter, options, threads, progress)
        reference = torch.zeros(box, box, box)
        for number, (model, molecule) in enumerate(zip(options.models, molecules, strict=True), 1):
            volume = scale * molecule.map.cpu()
            label = f"{COMMENT}: {Path(model).name}, the truth"
            write_map(part(f"truth_class{number:03d}.mrc"), volume.numpy(), pixel_size, label)
            reference += volume / len(molecules)
        low_pass = raised_cosine_lowpass(box, pixel_size, options.reference_angst)
        reference = torch.fft.irfftn(torch.fft.rfftn(reference) * low_pass, s=reference.shape)
        label = f"{COMMENT}: the truth at {options.reference_angst:g} A"
        write_map(part("reference.mrc"), reference.numpy(), pixel_size, label)
        optics, particles, poses = _tables(options, truth)
        comment = f"{COMMENT}\n{_summary(options)}"
        write_star(part("truth.star"), {"optics": optics, "particles": particles.join(poses)}, comment)
        write_star(part("particles.star"), {"optics": optics, "particles": particles}, comment)


@contextmanager
def _one_thread() -> Iterator[int]:
    """Keep torch to one thread and give the number it had.

    Whole batches are shared among threads instead: the steps are so small that meeting after each costs more than
    they do, above all on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


# -- what is simulated ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Molecule:
    """One class: its map, and the points that are projected."""

    map: Tensor  # (L, L, L), unit standard deviation
    points: Tensor  # (n, 3) Å
    weights: Tensor  # (n,)
    resolution: float  # Å, that of the map for atoms, 0 for the map's own voxels


@dataclass(frozen=True)
class _Truth:
    """What is drawn for every particle, on the CPU whatever the device."""

    angles: Tensor  # (n, 3) rot, tilt, psi in degrees
    shifts: Tensor  # (n, 2) px, of the particle in its image
    ctf: Tensor  # (n, 6) as torchem.imaging.ctf.ctf takes them
    classes: Tensor  # (n,) from 0


def _molecule(options: SimulateOptions, number: int) -> _Molecule:
    """Read or make the model of class ``number``, centred and checked."""
    model, box, pixel_size = options.models[number], options.box, options.pixel_size
    resolution, finest = options.low_pass_angst or 0.0, 0.0
    if Path(model).suffix.lower() in MAPS:
        xyz, weights, finest = _voxels_of_file(model, box * pixel_size / 2)
    else:
        # a mixture of phantoms is one of different molecules
        xyz, weights = phantom(options.symmetry, number) if model == "phantom" else read_atoms(model)
        xyz = xyz - (weights[:, None] * xyz).sum(0) / weights.sum()
        resolution = resolution or 2 * pixel_size
        reach, half = float(np.linalg.norm(xyz, axis=1).max()), (box // 2 - 1) * pixel_size
        if reach > half:
            raise InputError(
                f"model={model}: reaches {reach:.0f} Å from its centre, and the box of {box} px x {pixel_size:g} Å "
                f"ends at {half:.0f} Å; give a larger box or pixel_size"
            )
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    points = torch.from_numpy(np.ascontiguousarray(xyz, np.float32)).to(device)
    point_weights = torch.from_numpy(np.asarray(weights, np.float32)).to(device)
    if model != "phantom":
        _check_symmetry(model, points, point_weights, options.symmetry)
    volume = spread_density(points, point_weights, box, pixel_size, resolution, finest)
    deviation = float(volume.std())
    if not deviation > 0:
        raise InputError(f"model={model}: nothing of it is in the box; give a model centred on the origin")
    volume /= deviation
    # the voxels within the sphere that stays in the image, where there are fewer of them than atoms (and for maps)
    axis = torch.arange(box, device=device) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = (x**2 + y**2 + z**2 < (box // 2) ** 2) & (volume.abs() > 1e-6 * volume.abs().max())
    if finest or int(inside.sum()) < len(points):
        voxels = torch.stack([x[inside], y[inside], z[inside]], dim=1) * pixel_size
        return _Molecule(volume, voxels, volume[inside], 0.0)
    return _Molecule(volume, points, point_weights / deviation, resolution)


def _voxels_of_file(path: str, half: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Voxels of a map within a half-width (Å) as points, weights above the mean of its faces, and twice its pixel."""
    volume, pixel_size = read_map(path)
    if pixel_size is None:
        raise InputError(f"model={path}: its header has no pixel size; set the cell dimensions in the header")
    if len(set(volume.shape)) != 1 or volume.shape[0] < 2:
        shape = " x ".join(str(n) for n in volume.shape[::-1])
        raise InputError(f"model={path}: {shape} voxels; give a cubic map, centred in its box")
    background = np.mean([volume.take(side, axis).mean() for axis in range(3) for side in (0, -1)])
    axis = (np.arange(len(volume)) - len(volume) // 2) * pixel_size
    kept = np.flatnonzero((axis >= -half) & (axis < half))
    z, y, x = np.meshgrid(axis[kept], axis[kept], axis[kept], indexing="ij")
    weights = volume[np.ix_(kept, kept, kept)] - background
    return np.stack([x, y, z], axis=-1).reshape(-1, 3), weights.reshape(-1), 2 * pixel_size


def _check_symmetry(model: str, points: Tensor, weights: Tensor, symmetry: str) -> None:
    """Refuse a model that does not look the same (coarsely) after every operation of its point group."""
    box = 32
    pixel_size = 2.2 * float(points.norm(dim=1).max()) / box
    before = spread_density(points, weights, box, pixel_size, 3 * pixel_size).flatten()
    for operator in torch.from_numpy(operators(symmetry)[1:]).to(points):
        after = spread_density(points @ operator.T, weights, box, pixel_size, 3 * pixel_size).flatten()
        alike = float(torch.corrcoef(torch.stack([before, after]))[0, 1])
        if alike < 0.9:
            raise InputError(
                f"model={model}: it does not have symmetry {canonical(symmetry)} about its centre in RELION's axes "
                f"(correlation {alike:.2f} after one of its rotations); turn the model, or give symmetry=C1"
            )


def _draw(options: SimulateOptions, generator: torch.Generator) -> _Truth:
    n = options.n_particles

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    tilt = torch.rad2deg(torch.acos(uniform(-1, 1)))
    angles = torch.stack([uniform(-180, 180), tilt, uniform(-180, 180)], dim=1)
    shifts = options.shift_sigma_px * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    defocus_u = uniform(options.defocus_min_angst, options.defocus_max_angst)
    defocus_v = defocus_u - uniform(0, options.astigmatism_angst)
    one = torch.ones(n, dtype=torch.float64)
    parameters = [defocus_u, defocus_v, uniform(0, 180), options.phase_shift * one, 0 * one, one]
    # equal parts, in random order
    classes = torch.randperm(n, generator=generator) % len(options.models)
    if options.orientations != "uniform":
        angles = _angles_of_file(options.orientations, n)
    return _Truth(angles, shifts, torch.stack(parameters, dim=1), classes)


def _angles_of_file(path: str, n: int) -> Tensor:
    """`(n, 3)` angles of a STAR file's first rows."""
    labels = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    tables = [block for block in read_star(path).values() if isinstance(block, pd.DataFrame)]
    table = next((table for table in tables if set(labels) <= set(table.columns)), None)
    if table is None:
        raise InputError(f"orientations={path}: has no table with {', '.join(labels)}; give particles with angles")
    if len(table) < n:
        raise InputError(f"orientations={path}: has {len(table)} rows; give n_particles={len(table)} or fewer")
    angles = table[labels].to_numpy()[:n]
    if angles.dtype.kind not in "if" or not np.isfinite(angles.astype(np.float64)).all():
        raise InputError(f"orientations={path}: its angles are not all numbers; correct the file")
    return torch.from_numpy(angles.astype(np.float64))


# -- images --------------------------------------------------------------------------------------------------------


def _optics(options: SimulateOptions) -> Optics:
    return Optics(
        "opticsGroup1", options.voltage, options.cs, options.amplitude_contrast, options.pixel_size, options.box
    )


def _write_images(
    path: Path,
    molecules: list[_Molecule],
    truth: _Truth,
    noise_filter: Tensor | None,
    options: SimulateOptions,
    threads: int,
    progress: Progress | None,
) -> float:
    """Write the stack; returns what the molecules' maps are to be multiplied by for their signal's greyscale.

    The signal is written first, since its scale against the noise is known only at the end.
    """
    n, box, snr = options.n_particles, options.box, options.noise.snr
    with mrcfile.new_mmap(path, shape=(n, box, box), mrc_mode=2, overwrite=True) as stack:
        stack.set_image_stack()
        stack.voxel_size = options.pixel_size
        header = stack.header
        # MRC2014's way to say that no statistics are given
        header.dmin, header.dmax, header.dmean, header.rms = 0, -1, -2, -1
        header.label = b""  # mrcfile's own has the time in it
        header.label[0] = COMMENT.encode()
        header.nlabl = 1
    # not through the memory map: on a full disk that would end the process
    noise_generator = torch.Generator().manual_seed(options.seed + 2**62)
    batches = [slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
    total = squares = 0.0
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES)
        for rows, signal in _signals(molecules, truth, batches, options, threads):
            total += float(signal.sum(dtype=torch.float64))
            squares += float(signal.double().square().sum())
            file.write(signal.numpy().tobytes())
            if progress is not None:
                progress(rows.stop, n)
        deviation = math.sqrt(squares / (n * box**2) - (total / (n * box**2)) ** 2)
        scale = (1.0 if math.isinf(snr) else math.sqrt(snr)) / deviation
        for rows in batches:
            count, place = rows.stop - rows.start, HEADER_BYTES + 4 * rows.start * box**2
            file.seek(place)
            image = torch.frombuffer(bytearray(file.read(4 * count * box**2)), dtype=torch.float32) * scale
            if not math.isinf(snr):
                noise = torch.randn(count, box, box, generator=noise_generator)
                if noise_filter is not None:
                    noise = torch.fft.irfft2(torch.fft.rfft2(noise) * noise_filter, s=(box, box))
                image += noise.flatten()
            file.seek(place)
            file.write(image.numpy().tobytes())
    return scale


def _signals(
    molecules: list[_Molecule], truth: _Truth, batches: list[slice], options: SimulateOptions, threads: int
) -> Iterator[tuple[slice, Tensor]]:
    """The batches in turn with their images on the CPU; one a thread where that is the device."""
    if molecules[0].map.is_cuda:
        for rows in batches:
            yield rows, _signal(molecules, truth, rows, options).cpu()
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(batches), threads):
            some = batches[start : start + threads]
            signals = pool.map(lambda rows: _signal(molecules, truth, rows, options), some)
            yield from zip(some, signals, strict=True)


def _signal(molecules: list[_Molecule], truth: _Truth, rows: slice, options: SimulateOptions) -> Tensor:
    """`(b, L, L)`: projections, shifted, times the CTF."""
    box, device = options.box, molecules[0].map.device
    rotations = rotation_matrix(*truth.angles[rows].unbind(1))
    images = torch.empty(len(rotations), box, box, device=device)
    for number, molecule in enumerate(molecules):
        of_class = truth.classes[rows] == number
        images[of_class.to(device)] = project(
            molecule.points, molecule.weights, rotations[of_class], box, options.pixel_size, molecule.resolution
        )
    ky = torch.fft.fftfreq(box, 1 / box, device=device, dtype=torch.float64)[:, None].expand(-1, box // 2 + 1)
    kx = torch.fft.rfftfreq(box, 1 / box, device=device, dtype=torch.float64).expand(box, -1)
    shift = truth.shifts[rows].to(device)[:, :, None, None]
    angle = (-2 * math.pi / box) * (kx * shift[:, 0] + ky * shift[:, 1])
    transfer = ctf(_optics(options), truth.ctf[rows].to(device), kx.flatten(), ky.flatten()).reshape(angle.shape)
    spectrum = torch.fft.rfft2(images) * torch.polar(transfer, angle).to(torch.complex64)
    return torch.fft.irfft2(spectrum, s=(box, box))


def _noise_filter(spectrum: str, box: int, pixel_size: float) -> Tensor | None:
    """`(L, L//2 + 1)` that turns white noise into noise of this spectrum and unit variance; None for white."""
    if spectrum == "white":
        return None
    frequency, power = _spectrum_of_file(spectrum)
    full = torch.fft.fftfreq(box, pixel_size, dtype=torch.float64)
    half = torch.fft.rfftfreq(box, pixel_size, dtype=torch.float64)
    radius = torch.hypot(full[:, None], half)
    values = torch.from_numpy(np.interp(radius.numpy(), frequency, power))
    # columns between the first and the last stand for two of the whole transform
    twice = torch.ones(box // 2 + 1, dtype=torch.float64)
    twice[1:-1] = 2
    return (values / ((values * twice).sum() / box**2)).sqrt().float()


def _spectrum_of_file(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (1/Å, ascending) and power, in any unit, of a RELION model file or of two columns of numbers."""
    remedy = "give a RELION model.star, or two columns: frequency in 1/Å and power"
    labels = ["rlnResolution", "rlnSigma2Noise"]
    if Path(path).suffix.lower() == ".star":
        tables = [block for block in read_star(path).values() if isinstance(block, pd.DataFrame)]
        table = next((table for table in tables if set(labels) <= set(table.columns)), None)
        if table is None:
            raise InputError(f"noise.spectrum={path}: has no table with {' and '.join(labels)}; {remedy}")
        columns = table[labels].to_numpy()
    else:
        try:
            columns = np.loadtxt(path, ndmin=2)
        except (ValueError, UnicodeDecodeError) as error:
            raise InputError(f"noise.spectrum={path}: not numbers ({error}); {remedy}") from None
    if columns.ndim != 2 or columns.shape[1] != 2 or len(columns) < 2 or columns.dtype.kind not in "if":
        raise InputError(f"noise.spectrum={path}: {columns.shape} values; {remedy}")
    frequency, power = columns.astype(np.float64).T
    if not (np.isfinite(columns).all() and (np.diff(frequency) > 0).all() and power.min() >= 0 and power[1:].max() > 0):
        raise InputError(
            f"noise.spectrum={path}: frequencies must ascend, and powers be 0 or more and not all 0; {remedy}"
        )
    return frequency, power


# -- files ---------------------------------------------------------------------------------------------------------


def _tables(options: SimulateOptions, truth: _Truth) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """RELION 5's optics and particles tables, and the columns that a refinement should find."""
    optics = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnMicrographOriginalPixelSize": [float(options.pixel_size)],
        "rlnVoltage": [float(options.voltage)],
        "rlnSphericalAberration": [float(options.cs)],
        "rlnAmplitudeContrast": [float(options.amplitude_contrast)],
        "rlnImagePixelSize": [float(options.pixel_size)],
        "rlnImageSize": [options.box],
        "rlnImageDimensionality": [2],
        "rlnCtfDataAreCtfPremultiplied": [0],
    }
    n = options.n_particles
    particles = {
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
        "rlnMicrographName": [f"mic{i // MICROGRAPH + 1:04d}.mrc" for i in range(n)],
        "rlnOpticsGroup": np.ones(n, np.int64),
        "rlnDefocusU": truth.ctf[:, 0].numpy(),
        "rlnDefocusV": truth.ctf[:, 1].numpy(),
        "rlnDefocusAngle": truth.ctf[:, 2].numpy(),
    }
    if options.phase_shift:
        particles["rlnPhaseShift"] = truth.ctf[:, 3].numpy()
    origins = -options.pixel_size * truth.shifts
    poses = {
        "rlnAngleRot": truth.angles[:, 0].numpy(),
        "rlnAngleTilt": truth.angles[:, 1].numpy(),
        "rlnAnglePsi": truth.angles[:, 2].numpy(),
        "rlnOriginXAngst": origins[:, 0].numpy(),
        "rlnOriginYAngst": origins[:, 1].numpy(),
        "rlnClassNumber": truth.classes.numpy() + 1,
    }
    return pd.DataFrame(optics), pd.DataFrame(particles), pd.DataFrame(poses)


def _summary(options: SimulateOptions) -> str:
    """The options in one line, but for the device."""
    settings = asdict(options)
    noise = settings.pop("noise")
    del settings["device"]
    settings |= {f"noise.{key}": value for key, value in noise.items()}
    return " ".join(f"{key}={value}" for key, value in settings.items() if value is not None)


def _is_ours(path: Path) -> bool:
    """Whether a file is absent or of a simulated data set: its first comment or MRC label says so."""
    if not path.exists():
        return True
    with open(path, "rb") as file:
        return COMMENT.encode() in file.read(HEADER_BYTES)


@contextmanager
def _parts(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Give temporary paths for the files of a data set; at the end they take their names, in order of asking.

    One process at a time: the lock goes with the process, and what a killed one left is written over.
    """
    temporary = folder / ".making"
    names: list[str] = []

    def part(name: str) -> Path:
        names.append(name)
        return temporary / name

    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with open(temporary / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{folder}: another process is making a data set there; wait for it, or choose another folder"
                ) from None
            try:
                yield part
                for name in names:
                    if not _is_ours(folder / name):
                        raise InputError(
                            f"{folder / name} is there and was not simulated by torchem; choose another folder"
                        )
                # an older set is not whole from here until the last file of the new one has come
                (folder / names[-1]).unlink(missing_ok=True)
                for name in names:
                    os.replace(temporary / name, folder / name)
            finally:
                for path in temporary.iterdir():
                    path.unlink()
                temporary.rmdir()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror or error}); free space or rights, or choose another folder"
        ) from error
