"""Particles: RELION's tables of any version, or cryoSPARC's, as RELION 5's, with their images."""

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from torchem.data.cryosparc import read_cs
from torchem.data.files import find
from torchem.data.mrc import ImageStacks
from torchem.data.star import read_star, write_star
from torchem.errors import InputError
from torchem.imaging.ctf import Optics

log = logging.getLogger(__name__)

# of each particle before RELION 3.1, of the optics group since
_GROUP_LABELS = [
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnImagePixelSize",
    "rlnImageSize",
    "rlnImageDimensionality",
    "rlnMicrographOriginalPixelSize",
    "rlnMtfFileName",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnBeamTiltClass",
    "rlnCtfDataAreCtfPremultiplied",
    "rlnCtfDataArePhaseFlipped",
]
# in pixels before RELION 3.1, in Å since
_PIXEL_LABELS = {f"rlnOrigin{axis}{prior}": f"rlnOrigin{axis}{prior}Angst" for axis in "XYZ" for prior in ("", "Prior")}
_CTF_LABELS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_CTF_GROUP_LABELS = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
# not RELION's: -1 where cryoSPARC says that an image's contrast is inverted on reading
SIGN_LABEL = "torchemImageSign"
_NORM_CHECKED = 100
_JOB_PREFIX = re.compile(r"^[^/]+/job\d+/")


@dataclass
class Particles:
    """A particle set: one row a particle, one row an optics group, and where the images are.

    Attributes
    ----------
    table
        RELION 5's labels without underscore; columns that nothing here knows are kept.
    optics_table
        RELION 5's data_optics.
    source
        the file that was read.
    root
        folder that relative image names start from, if the user gave one.
    """

    table: pd.DataFrame
    optics_table: pd.DataFrame
    source: Path
    root: Path | None = None

    @classmethod
    def read(cls, path: str | Path, root: str | Path | None = None, pixel_size: float | None = None) -> "Particles":
        """Particles of a RELION STAR file (2.x to 5) or a cryoSPARC .cs file.

        Parameters
        ----------
        root
            folder that relative image names start from; without it the current folder, then the folder of ``path``
            and its parents upwards.
        pixel_size
            Å, in place of what the file says.

        Raises
        ------
        InputError
            for a file that is missing, garbled or no particle file.
        """
        path = Path(path)
        root = None if root is None else Path(root)
        if root is not None and not root.is_dir():
            raise InputError(f"dataset.root={root} is no folder; correct it or leave it out")
        if pixel_size is not None and not pixel_size > 0:
            raise InputError(f"dataset.pixel_size={pixel_size} is not positive; give Å per pixel")
        if path.suffix == ".cs":
            table, optics = _regroup(path, read_cs(path))
        else:
            table, optics = _tables(path)
        if len(table) == 0:
            raise InputError(f"{path} has no particles; give a particle file with rows")
        _set_pixel_size(path, optics, pixel_size)
        _origins_to_angstrom(path, table, optics)
        particles = cls(table, optics, path, root)
        particles._add_image_sizes()
        return particles

    def __len__(self) -> int:
        return len(self.table)

    def select(self, indices: np.ndarray | list[int]) -> "Particles":
        """The particles of these rows (indices or a mask), in this order."""
        indices = np.asarray(indices)
        rows = np.flatnonzero(indices) if indices.dtype == bool else indices
        table = self.table.iloc[rows].reset_index(drop=True)
        return Particles(table, _in_use(table, self.optics_table), self.source, self.root)

    @cached_property
    def optics(self) -> list[Optics]:
        """One `Optics` a row of ``optics_table``."""
        return [self._optics(row) for row in range(len(self.optics_table))]

    @cached_property
    def optics_group(self) -> np.ndarray:
        """`(n,)` int64, the row of ``optics_table`` that each particle belongs to, from 0."""
        return _group_rows(self.source, self.table, self.optics_table)

    @cached_property
    def ctf_parameters(self) -> np.ndarray:
        """`(n, 6)` float64: defocus U and V (Å), angle (degrees), phase shift (degrees), B-factor (Å²), scale."""
        columns = [self._numbers(label) for label in _CTF_LABELS]
        columns += [
            self._numbers(label, default)
            for label, default in (("rlnPhaseShift", 0.0), ("rlnCtfBfactor", 0.0), ("rlnCtfScalefactor", 1.0))
        ]
        return np.stack(columns, axis=1)

    @property
    def has_poses(self) -> bool:
        """Whether the file gives orientations, not 0 throughout as RELION writes them at the start of a run."""
        labels = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
        return all(label in self.table for label in labels) and bool(np.any(self.euler))

    @property
    def euler(self) -> np.ndarray:
        """`(n, 3)` float64 rot, tilt, psi in degrees; 0 where the file has none."""
        labels = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
        return np.stack([self._numbers(label, 0.0) for label in labels], axis=1)

    @property
    def origin_angst(self) -> np.ndarray:
        """`(n, 2)` float64 shifts in Å, x then y, that centre the particles when applied; 0 where there are none."""
        return np.stack([self._numbers(label, 0.0) for label in ("rlnOriginXAngst", "rlnOriginYAngst")], axis=1)

    @property
    def random_subset(self) -> np.ndarray | None:
        """`(n,)` int64 half, 1 or 2, of each particle; None unless all have one."""
        if "rlnRandomSubset" not in self.table:
            return None
        subset = self._numbers("rlnRandomSubset")
        if (subset == 0).any():  # RELION's mark for not yet dealt
            return None
        if not np.isin(subset, (1, 2)).all():
            row = int(np.flatnonzero(~np.isin(subset, (1, 2)))[0])
            raise InputError(
                f"{self.source}, row {row + 1}: rlnRandomSubset is {subset[row]:g}, not 1 or 2; correct or "
                "remove the column"
            )
        return subset.astype(np.int64)

    @property
    def norm_correction(self) -> np.ndarray:
        """`(n,)` float64 rlnNormCorrection, 1 where the file has none."""
        norm = self._numbers("rlnNormCorrection", 1.0)
        if not (norm > 0).all():
            row = int(np.flatnonzero(~(norm > 0))[0])
            raise InputError(
                f"{self.source}, row {row + 1}: rlnNormCorrection is {norm[row]:g}, not positive; correct or "
                "remove the column"
            )
        return norm

    @cached_property
    def _groups(self) -> tuple[np.ndarray, list[str]]:
        table = self.table
        micrographs = None
        if "rlnMicrographName" in table:
            # RELION names groups by the micrograph, less the job that made it
            names = table["rlnMicrographName"].astype(str)
            unique = {name: _JOB_PREFIX.sub("", name) for name in pd.unique(names)}
            micrographs = names.map(unique)
        if "rlnGroupName" in table:
            keys = table["rlnGroupName"].astype(str)
        elif "rlnGroupNumber" in table:
            numbers, group = np.unique(self._numbers("rlnGroupNumber").astype(np.int64), return_inverse=True)
            names = [str(number) for number in numbers]
            if micrographs is not None:
                pairs = pd.DataFrame({"group": group, "name": micrographs}).drop_duplicates()
                if len(pairs) == len(numbers) == pairs["name"].nunique():
                    names = pairs.sort_values("group")["name"].tolist()
            return group.astype(np.int64), names
        elif micrographs is not None:
            keys = micrographs
        else:
            return np.zeros(len(self), np.int64), ["group"]
        group, names = pd.factorize(keys)
        return group.astype(np.int64), [str(name) for name in names]

    @property
    def group(self) -> np.ndarray:
        """`(n,)` int64 group of the intensity scale, from 0: rlnGroupName, else rlnGroupNumber, else the micrograph."""
        return self._groups[0]

    @property
    def group_names(self) -> list[str]:
        """Name of each group."""
        return self._groups[1]

    @cached_property
    def stacks(self) -> ImageStacks:
        """The stacks that hold the images."""
        return ImageStacks(self.table["rlnImageName"].tolist(), self._resolve, self.source)

    def images(self, indices: np.ndarray | list[int], out: np.ndarray | None = None) -> np.ndarray:
        """Images `(n, L, L)` float32, bright on dark, of rows of one box size; in ``out``, if there is one."""
        images = self.stacks.read(indices, out)
        if SIGN_LABEL in self.table:
            images *= self._numbers(SIGN_LABEL)[np.asarray(indices)].astype(np.float32)[:, None, None]
        return images

    def check(self, ctf: bool = True, particle_diameter: float | None = None) -> None:
        """Raise `InputError` for whatever would make a refinement of these particles fail or mean nothing.

        Parameters
        ----------
        ctf
            whether the CTF is corrected for, so that its columns are needed.
        particle_diameter
            Å; also asks that the images be normalised outside it.
        """
        if len(self) < 2:
            raise InputError(f"{self.source} has {len(self)} particle; two halves need at least two")
        if ctf:
            self._check_ctf()
        self.stacks.check()
        self._check_boxes()
        # these raise for what is not a number, or not a possible one
        _ = self.euler, self.origin_angst, self.norm_correction, self.random_subset, self.group
        if particle_diameter is not None:
            self._check_diameter(particle_diameter)
            self._check_normalised(particle_diameter)

    def write(self, path: str | Path, comment: str = "") -> None:
        """Write as RELION 5's data file."""
        write_star(path, {"optics": self.optics_table, "particles": self.located_table()}, comment)

    def located_table(self) -> pd.DataFrame:
        """``table`` with image names that are found from the current folder, whatever file they stand in."""
        table = self.table
        here = Path.cwd()
        names = {}
        for file, name in enumerate(self.stacks.files):
            if self.root is None and (here / name).is_file():
                continue
            try:
                found = self.stacks.path(file).resolve()
            except InputError:
                continue  # the images may be elsewhere by now; their names still are what was read
            names[file] = str(found.relative_to(here)) if found.is_relative_to(here) else str(found)
        if names:
            stacks = self.stacks
            old = table["rlnImageName"].tolist()
            new = [
                f"{stacks.position[row] + 1:06d}@{names[file]}"
                if (file := int(stacks.file[row])) in names
                else old[row]
                for row in range(len(old))
            ]
            table = table.assign(rlnImageName=new)
        return table

    def _resolve(self, name: str) -> Path:
        return find(name, root=self.root, beside=self.source.parent, where=str(self.source))

    def _numbers(self, label: str, default: float | None = None) -> np.ndarray:
        """`(n,)` float64 finite values of a column, or the default for all."""
        return _numbers(self.source, self.table, label, default)

    def _add_image_sizes(self) -> None:
        """rlnImageSize of old files, from the first stack of each group where that is to be found."""
        table = self.optics_table
        if "rlnImageSize" in table and _numbers(self.source, table, "rlnImageSize", block="optics").all():
            return
        sizes = []
        for row in range(len(table)):
            try:
                sizes.append(self._size_on_disc(row))
            except InputError:
                return  # `optics` and `check` say so when images are wanted
        table["rlnImageSize"] = np.array(sizes, np.int64)
        table["rlnImageDimensionality"] = 2

    def _size_on_disc(self, row: int) -> int:
        members = np.flatnonzero(self.optics_group == row)
        if len(members) == 0:
            raise InputError(f"{self.source}: optics group {row + 1} has no particles and no rlnImageSize; remove it")
        return self.stacks.header(int(self.stacks.file[members[0]])).shape[2]

    def _optics(self, row: int) -> Optics:
        table = self.optics_table

        def number(label: str, default: float) -> float:
            return float(_numbers(self.source, table, label, default, block="optics")[row])

        def series(label: str) -> tuple[float, ...]:
            text = str(table[label].iloc[row]) if label in table else ""
            try:
                return tuple(float(value) for value in text.strip("[]").replace(",", " ").split())
            except ValueError:
                raise InputError(
                    f"{self.source}: {label} of optics group {row + 1} is {text!r}, not a list of numbers; correct it"
                ) from None

        if "rlnImagePixelSize" not in table:
            raise InputError(f"{self.source} says no pixel size; give it as dataset.pixel_size=ANGSTROM")
        # CTF constants that are missing are asked for by `check`, where the CTF is wanted at all
        return Optics(
            name=str(table["rlnOpticsGroupName"].iloc[row])
            if "rlnOpticsGroupName" in table
            else f"opticsGroup{row + 1}",
            voltage=number("rlnVoltage", 300.0),
            cs=number("rlnSphericalAberration", 0.0),
            amplitude_contrast=number("rlnAmplitudeContrast", 0.0),
            pixel_size=number("rlnImagePixelSize", 0.0),
            box=int(number("rlnImageSize", 0.0)) or self._size_on_disc(row),
            beam_tilt=(number("rlnBeamTiltX", 0.0), number("rlnBeamTiltY", 0.0)),
            odd_zernike=series("rlnOddZernike"),
            even_zernike=series("rlnEvenZernike"),
            magnification=(
                number("rlnMagMat00", 1.0),
                number("rlnMagMat01", 0.0),
                number("rlnMagMat10", 0.0),
                number("rlnMagMat11", 1.0),
            ),
            premultiplied=bool(number("rlnCtfDataAreCtfPremultiplied", 0.0)),
            phase_flipped=bool(number("rlnCtfDataArePhaseFlipped", 0.0)),
            mtf=self._mtf(row),
            original_pixel_size=number("rlnMicrographOriginalPixelSize", 0.0) or None,
        )

    def _mtf(self, row: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        table = self.optics_table
        name = str(table["rlnMtfFileName"].iloc[row]) if "rlnMtfFileName" in table else ""
        if name in ("", "None", "nan"):
            return None
        try:
            path = self._resolve(name)
        except InputError as error:
            raise InputError(f"{error}\nor take the column rlnMtfFileName out to go without the MTF") from None
        for block in read_star(path).values():
            if "rlnResolutionInversePixel" in block and "rlnMtfValue" in block:
                frame = pd.DataFrame(block)
                frequencies, values = (
                    _numbers(path, frame, label, block="mtf") for label in ("rlnResolutionInversePixel", "rlnMtfValue")
                )
                return tuple(frequencies.tolist()), tuple(values.tolist())
        raise InputError(f"{path} has no columns rlnResolutionInversePixel and rlnMtfValue; give RELION's MTF file")

    def _check_ctf(self) -> None:
        missing = [label for label in _CTF_GROUP_LABELS if label not in self.optics_table]
        missing += [label for label in _CTF_LABELS if label not in self.table]
        if missing:
            raise InputError(
                f"{self.source} has no CTF: {', '.join(missing)} missing; estimate the CTF first or set ctf=false"
            )
        parameters = self.ctf_parameters
        defocus = np.abs(parameters[:, :2])
        if defocus.max() < 100.0:
            raise InputError(
                f"{self.source}: all defoci are below {defocus.max():.3g} Å, as if in µm; give rlnDefocusU and V in Å"
            )

    def _check_boxes(self) -> None:
        stacks = self.stacks
        pairs = np.unique(np.stack([self.optics_group, stacks.file], axis=1), axis=0)
        for group, file in pairs.tolist():
            optics = self.optics[group]
            size = stacks.header(file).shape[2]
            if size != optics.box:
                raise InputError(
                    f"{stacks.path(file)}: images of {size} px, but optics group {optics.name} of {self.source} says "
                    f"rlnImageSize {optics.box}; correct one of them"
                )
            if size % 2:
                raise InputError(
                    f"{stacks.path(file)}: images of {size} px; the box must be even, extract the particles again"
                )
        if "rlnImageDimensionality" in self.optics_table and (self.optics_table["rlnImageDimensionality"] != 2).any():
            raise InputError(f"{self.source}: rlnImageDimensionality is not 2; subtomograms cannot be refined here")

    def _check_diameter(self, diameter: float) -> None:
        if not diameter > 0:
            raise InputError(f"dataset.particle_diameter={diameter:g} is not positive; give Å")
        for optics in self.optics:
            if diameter > optics.box * optics.pixel_size:
                raise InputError(
                    f"dataset.particle_diameter={diameter:g} Å is larger than the box of {optics.box} px x "
                    f"{optics.pixel_size:g} Å = {optics.box * optics.pixel_size:.1f} Å (optics group {optics.name} of "
                    f"{self.source}); give a smaller diameter or extract with a larger box"
                )

    def _check_normalised(self, diameter: float) -> None:
        """RELION's test, on a sample: background mean within half a standard deviation of 0, that within 0.5 to 2.

        RELION stops at the first image; here a tenth of the sample may fail, since real sets hold edges and ice.
        """
        sample = np.unique(np.linspace(0, len(self) - 1, min(_NORM_CHECKED, len(self))).round().astype(np.int64))
        bad: list[tuple[int, float, float]] = []
        usable = 0
        for group, optics in enumerate(self.optics):
            rows = sample[self.optics_group[sample] == group]
            axis = np.arange(optics.box) - optics.box // 2
            radius = np.floor(diameter / (2 * optics.pixel_size) + 0.5)
            outside = axis[:, None] ** 2 + axis**2 > radius**2
            for row, image in zip(rows.tolist(), self.images(rows) if len(rows) else (), strict=True):
                image = image.astype(np.float64)
                if not np.isfinite(image).all() or np.ptp(image) == 0:
                    continue  # named and skipped when the run meets it
                usable += 1
                mean, deviation = float(image[outside].mean()), float(image[outside].std())
                if abs(mean) > 0.5 * deviation or not 0.5 <= deviation <= 2.0:
                    bad.append((row, mean, deviation))
        if usable == 0:
            raise InputError(
                f"{self.source}: all of {len(sample)} images looked at are constant or not finite; check the stack"
            )
        if len(bad) > usable / 10:
            row, mean, deviation = bad[0]
            raise InputError(
                f"{self.source}: {len(bad)} of {usable} images looked at are not normalised; row {row + 1} "
                f"({self.table['rlnImageName'].iloc[row]}) has background mean {mean:.3g} and standard deviation "
                f"{deviation:.3g} outside {diameter:g} Å, where 0 and 1 are expected. Normalise the images "
                "(relion_preprocess --norm --bg_radius PIXELS) or correct dataset.particle_diameter"
            )


def _tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Particle and optics tables of a STAR file of any version, origins not yet converted."""
    blocks = read_star(path)
    loops = {name: block for name, block in blocks.items() if isinstance(block, pd.DataFrame)}
    name = next((name for name in ("particles", *loops) if name in loops and "rlnImageName" in loops[name]), None)
    if name is None:
        raise InputError(
            f"{path} has no loop with the column rlnImageName (blocks: "
            f"{', '.join('data_' + block for block in blocks)}); give a particle STAR file"
        )
    table = loops[name]
    if "optics" not in blocks:
        return _regroup(path, table)
    optics = blocks["optics"]
    if isinstance(optics, dict):
        optics = pd.DataFrame({label: [value] for label, value in optics.items()})
    if len(optics) == 0 or "rlnOpticsGroup" not in optics:
        raise InputError(f"{path}: data_optics has no rlnOpticsGroup; write the file again with RELION 3.1 or later")
    if "rlnOpticsGroup" not in table:
        if len(optics) > 1:
            raise InputError(
                f"{path}: data_{name} has no rlnOpticsGroup to tell {len(optics)} optics groups apart; add it"
            )
        table["rlnOpticsGroup"] = optics["rlnOpticsGroup"].iloc[0]
    _group_rows(path, table, optics)
    return table, _in_use(table, optics)


def _in_use(table: pd.DataFrame, optics: pd.DataFrame) -> pd.DataFrame:
    """Optics groups that have particles: a selection may leave some without."""
    return optics[optics["rlnOpticsGroup"].isin(table["rlnOpticsGroup"])].reset_index(drop=True)


def _regroup(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table of RELION 3.0 or earlier, parted into particles and one optics group a combination of its constants."""
    if "rlnMagnification" in table and "rlnDetectorPixelSize" in table:
        magnification = _numbers(path, table, "rlnMagnification")
        if not (magnification > 0).all():
            row = int(np.flatnonzero(~(magnification > 0))[0])
            raise InputError(f"{path}, row {row + 1}: rlnMagnification is {magnification[row]:g}; correct it")
        # detector pixels in µm
        pixel = 1e4 * _numbers(path, table, "rlnDetectorPixelSize") / magnification
        table = table.drop(columns=["rlnMagnification", "rlnDetectorPixelSize"]).assign(rlnImagePixelSize=pixel)
    elif "rlnPixelSize" in table and "rlnImagePixelSize" not in table:
        table = table.rename(columns={"rlnPixelSize": "rlnImagePixelSize"})
    labels = [label for label in _GROUP_LABELS if label in table]
    if labels:
        constants = table[labels]
        optics = constants.drop_duplicates().reset_index(drop=True)
        number = constants.merge(optics.assign(number=np.arange(1, len(optics) + 1)), on=labels, how="left")["number"]
        numbers = number.to_numpy(np.int64)
    else:
        optics, numbers = pd.DataFrame(index=[0]), np.ones(len(table), np.int64)
    count = np.arange(1, len(optics) + 1)
    optics.insert(0, "rlnOpticsGroup", count)
    optics.insert(1, "rlnOpticsGroupName", [f"opticsGroup{group}" for group in count])
    return table.drop(columns=labels).assign(rlnOpticsGroup=numbers), optics


def _group_rows(path: Path, table: pd.DataFrame, optics: pd.DataFrame) -> np.ndarray:
    rows = {number: row for row, number in enumerate(optics["rlnOpticsGroup"].tolist())}
    groups = table["rlnOpticsGroup"].map(rows)
    if groups.isna().any():
        row = int(np.flatnonzero(groups.isna())[0])
        raise InputError(
            f"{path}, row {row + 1}: rlnOpticsGroup {table['rlnOpticsGroup'].iloc[row]} is not in data_optics; "
            "add it there"
        )
    return groups.to_numpy(np.int64)


def _set_pixel_size(path: Path, optics: pd.DataFrame, pixel_size: float | None) -> None:
    if pixel_size is None:
        return
    if "rlnImagePixelSize" in optics:
        stated = _numbers(path, optics, "rlnImagePixelSize", block="optics")
        if np.abs(stated / pixel_size - 1).max() > 1e-3:
            values = ", ".join(f"{value:g}" for value in np.unique(stated))
            log.warning("dataset.pixel_size=%g Å is used in place of %s Å in %s", pixel_size, values, path)
    optics["rlnImagePixelSize"] = float(pixel_size)


def _origins_to_angstrom(path: Path, table: pd.DataFrame, optics: pd.DataFrame) -> None:
    present = [label for label in _PIXEL_LABELS if label in table]
    if not present:
        return
    if "rlnImagePixelSize" not in optics:
        raise InputError(f"{path} has origins in pixels but no pixel size; give it as dataset.pixel_size=ANGSTROM")
    pixel = _numbers(path, optics, "rlnImagePixelSize", block="optics")[_group_rows(path, table, optics)]
    for label in present:
        position = table.columns.get_loc(label)
        values = _numbers(path, table, label) * pixel
        del table[label]
        if _PIXEL_LABELS[label] not in table:  # both in one file: Å counts, as in RELION
            table.insert(position, _PIXEL_LABELS[label], values)


def _numbers(
    path: Path, table: pd.DataFrame, label: str, default: float | None = None, block: str = "particles"
) -> np.ndarray:
    """Finite float64 values of a column, or the default for every row where there is no such column."""
    if label not in table:
        if default is None:
            raise InputError(f"{path} has no column {label} in data_{block}; add it")
        return np.full(len(table), default)
    values = pd.to_numeric(table[label], errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(
            f"{path}, row {row + 1} of data_{block}: {label} is {table[label].iloc[row]!r}, not a number; "
            "correct the row"
        )
    return values
