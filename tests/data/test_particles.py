"""Particle files of every RELION version as RELION 5's, and each way in which they can be wrong."""

import logging

import numpy as np
import pandas as pd
import pytest

from torchem.data.mrc import write_stack
from torchem.data.particles import Particles
from torchem.data.star import read_star, write_star
from torchem.errors import InputError

N, BOX, PIXEL = 12, 16, 2.0


def optics_table(**changes):
    table = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnImagePixelSize": [PIXEL],
        "rlnImageSize": [BOX],
        "rlnImageDimensionality": [2],
    }
    return pd.DataFrame({label: value for label, value in (table | changes).items() if value is not None})


def particle_table(**changes):
    table = {
        "rlnImageName": [f"{row + 1:06d}@images.mrcs" for row in range(N)],
        "rlnMicrographName": [f"mic{row // 4}.mrc" for row in range(N)],
        "rlnOpticsGroup": [1] * N,
        "rlnDefocusU": np.linspace(1e4, 2e4, N),
        "rlnDefocusV": np.linspace(1e4, 2e4, N) - 300.0,
        "rlnDefocusAngle": np.linspace(0.0, 170.0, N),
    }
    return pd.DataFrame({label: value for label, value in (table | changes).items() if value is not None})


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(N, BOX, BOX)).astype(np.float32)


@pytest.fixture
def make(tmp_path, monkeypatch, images):
    """Writes images.mrcs and particles.star into the current folder and reads the latter."""
    monkeypatch.chdir(tmp_path)

    def _make(table=None, optics=None, stack=images, **read):
        write_stack("images.mrcs", stack, PIXEL)
        blocks = {"optics": optics_table() if optics is None else optics}
        blocks["particles"] = particle_table() if table is None else table
        write_star("particles.star", blocks)
        return Particles.read("particles.star", **read)

    return _make


# ---- what is read ----


def test_relion_5(make, images):
    particles = make(
        particle_table(
            rlnAngleRot=np.arange(N) * 10.0,
            rlnAngleTilt=np.arange(N) * 5.0,
            rlnAnglePsi=-np.arange(N) * 3.0,
            rlnOriginXAngst=np.arange(N) * 0.5,
            rlnOriginYAngst=np.arange(N) * -0.5,
            rlnPhaseShift=[90.0] * N,
            rlnCtfScalefactor=[0.8] * N,
            rlnNormCorrection=np.linspace(0.5, 1.5, N),
            rlnRandomSubset=[1, 2] * (N // 2),
            mineOwnColumn=["x"] * N,
        ),
        optics_table(
            rlnBeamTiltX=[0.1],
            rlnBeamTiltY=[-0.2],
            rlnOddZernike=["[1,2.5,-3]"],
            rlnEvenZernike=["[4]"],
            rlnMagMat00=[1.01],
            rlnMagMat01=[0.02],
            rlnMagMat10=[0.03],
            rlnMagMat11=[0.99],
            rlnCtfDataAreCtfPremultiplied=[1],
        ),
    )
    particles.check(particle_diameter=20.0)
    assert len(particles) == N and particles.has_poses
    np.testing.assert_array_equal(particles.euler[2], [20, 10, -6])
    np.testing.assert_array_equal(particles.origin_angst[3], [1.5, -1.5])
    np.testing.assert_array_equal(particles.ctf_parameters[0], [1e4, 9700, 0, 90, 0, 0.8])
    np.testing.assert_array_equal(particles.norm_correction, np.linspace(0.5, 1.5, N))
    assert particles.random_subset.tolist() == [1, 2] * (N // 2)
    (optics,) = particles.optics
    assert (optics.voltage, optics.cs, optics.amplitude_contrast) == (300.0, 2.7, 0.1)
    assert (optics.pixel_size, optics.box, optics.premultiplied) == (PIXEL, BOX, True)
    assert optics.beam_tilt == (0.1, -0.2) and optics.magnification == (1.01, 0.02, 0.03, 0.99)
    assert optics.odd_zernike == (1.0, 2.5, -3.0) and optics.even_zernike == (4.0,)
    np.testing.assert_array_equal(particles.images([5, 1]), images[[5, 1]])
    assert particles.group_names == ["mic0.mrc", "mic1.mrc", "mic2.mrc"]
    assert particles.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_is_absent_has_its_neutral_value(make):
    particles = make(particle_table(rlnMicrographName=None))
    assert not particles.has_poses and not particles.euler.any() and not particles.origin_angst.any()
    assert particles.random_subset is None and (particles.norm_correction == 1).all()
    assert (particles.ctf_parameters[:, 3:] == [0, 0, 1]).all()
    assert particles.group_names == ["group"] and not particles.group.any()


def test_old_version_becomes_the_new_one(make, images):
    magnification, detector = 20000.0, 5.0  # µm: 2.5 Å
    write_stack("images.mrcs", images, 2.5)
    table = particle_table(
        rlnOpticsGroup=None,
        rlnVoltage=[300.0] * 8 + [200.0] * 4,
        rlnSphericalAberration=[2.7] * N,
        rlnAmplitudeContrast=[0.1] * N,
        rlnMagnification=[magnification] * N,
        rlnDetectorPixelSize=[detector] * N,
        rlnOriginX=np.arange(N) * 1.0,
        rlnOriginY=np.arange(N) * -2.0,
        rlnOriginXPrior=np.arange(N) * 3.0,
        rlnAutopickFigureOfMerit=np.arange(N) * 1.0,
    )
    write_star("old.star", {"": table})
    particles = Particles.read("old.star")
    particles.check(particle_diameter=30.0)
    np.testing.assert_allclose(particles.origin_angst, np.stack([np.arange(N) * 2.5, np.arange(N) * -5.0], 1))
    np.testing.assert_allclose(particles.table["rlnOriginXPriorAngst"], np.arange(N) * 7.5)
    for label in ("rlnOriginX", "rlnVoltage", "rlnMagnification", "rlnDetectorPixelSize"):
        assert label not in particles.table
    assert "rlnAutopickFigureOfMerit" in particles.table
    assert [group.voltage for group in particles.optics] == [300.0, 200.0]
    assert [group.box for group in particles.optics] == [BOX, BOX]  # from the stack
    assert particles.optics_group.tolist() == [0] * 8 + [1] * 4
    particles.write("new.star")
    again = Particles.read("new.star")
    assert list(read_star("new.star")) == ["optics", "particles"]
    pd.testing.assert_frame_equal(again.table, particles.table)
    assert again.optics == particles.optics


def test_pixel_size_given_by_the_user(make, images, caplog):
    table = particle_table(rlnOpticsGroup=None, rlnOriginX=[2.0] * N, rlnOriginY=[1.0] * N)
    write_stack("images.mrcs", images, PIXEL)
    write_star("old.star", {"": table})
    with pytest.raises(InputError, match=r"dataset\.pixel_size"):
        Particles.read("old.star")
    particles = Particles.read("old.star", pixel_size=1.5)
    assert particles.optics[0].pixel_size == 1.5 and particles.origin_angst[0].tolist() == [3.0, 1.5]
    with caplog.at_level(logging.WARNING):
        assert make(pixel_size=1.9).optics[0].pixel_size == 1.9
    assert "in place of 2 Å" in caplog.text
    with pytest.raises(InputError, match="not positive"):
        make(pixel_size=-1.0)


def test_groups_of_the_scale(make):
    named = make(particle_table(rlnGroupName=["b"] * 5 + ["a"] * 7))
    assert named.group_names == ["b", "a"] and named.group.tolist() == [0] * 5 + [1] * 7
    numbered = make(particle_table(rlnGroupNumber=[7] * 5 + [3] * 7))
    assert numbered.group_names == ["3", "7"] and numbered.group.tolist() == [1] * 5 + [0] * 7
    # numbers that stand for micrographs are named by them, as RELION does; job folders do not count
    names = [f"MotionCorr/job002/Movies/mic{row // 4}.mrc" for row in range(N)]
    both = make(particle_table(rlnMicrographName=names, rlnGroupNumber=[3] * 4 + [2] * 4 + [1] * 4))
    assert both.group_names == ["Movies/mic2.mrc", "Movies/mic1.mrc", "Movies/mic0.mrc"]
    assert both.group.tolist() == [2] * 4 + [1] * 4 + [0] * 4


def test_several_optics_groups_of_their_own_box(make, images):
    write_stack("small.mrcs", images[:, :8, :8], 4.0)
    names = [f"{row + 1}@{'small' if row % 2 else 'images'}.mrcs" for row in range(N)]
    two = {label: list(values) * 2 for label, values in optics_table().items()}
    two |= {"rlnOpticsGroup": [5, 3], "rlnImageSize": [BOX, 8], "rlnImagePixelSize": [2.0, 4.0]}
    particles = make(particle_table(rlnImageName=names, rlnOpticsGroup=[5, 3] * (N // 2)), pd.DataFrame(two))
    particles.check(particle_diameter=20.0)
    assert particles.optics_group.tolist() == [0, 1] * (N // 2)
    assert particles.images([1, 3]).shape == (2, 8, 8)
    half = particles.select([1, 3])
    assert len(half) == 2 and half.images([0]).shape == (1, 8, 8) and half.optics_group.tolist() == [0, 0]
    assert [optics.box for optics in half.optics] == [8]  # groups without particles go
    assert len(particles.select(particles.optics_group == 0)) == N // 2


def test_subset_not_yet_dealt(make):
    assert make(particle_table(rlnRandomSubset=[0, 1] * (N // 2))).random_subset is None


def test_poses_of_a_run_that_has_not_begun_are_none(make):
    zeros = [0.0] * N
    assert not make(particle_table(rlnAngleRot=zeros, rlnAngleTilt=zeros, rlnAnglePsi=zeros)).has_poses


def test_mtf_is_read_from_its_own_file(make):
    mtf = pd.DataFrame({"rlnResolutionInversePixel": [0.0, 0.25, 0.5], "rlnMtfValue": [1.0, 0.8, 0.5]})
    optics = optics_table(rlnMtfFileName=["mtf.star"], rlnMicrographOriginalPixelSize=[1.0])
    particles = make(optics=optics)
    with pytest.raises(InputError, match=r"mtf\.star not found(.|\n)*rlnMtfFileName"):
        particles.check()
    write_star("mtf.star", {"": mtf})
    particles = make(optics=optics)
    assert particles.optics[0].mtf == ((0.0, 0.25, 0.5), (1.0, 0.8, 0.5))
    assert particles.optics[0].original_pixel_size == 1.0
    write_star("mtf.star", {"": mtf.drop(columns="rlnMtfValue")})
    with pytest.raises(InputError, match="rlnMtfValue"):
        make(optics=optics).check()


def test_images_are_found_from_wherever_the_file_is_written(make, tmp_path, monkeypatch, images):
    make()
    (tmp_path / "runs").mkdir()
    Particles.read("particles.star").write("runs/same.star", comment="simulated")
    assert read_star("runs/same.star")["particles"]["rlnImageName"].iloc[0] == "000001@images.mrcs"
    assert (tmp_path / "runs/same.star").read_text().startswith("# simulated\n")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")  # found by the STAR file's folder, so not by RELION's rule
    Particles.read("../particles.star").write("out.star")
    assert read_star("out.star")["particles"]["rlnImageName"].iloc[2] == f"000003@{tmp_path / 'images.mrcs'}"
    np.testing.assert_array_equal(Particles.read("out.star").images([2]), images[2:3])
    monkeypatch.chdir(tmp_path.parent)
    Particles.read(tmp_path / "particles.star").write(tmp_path / "up.star")
    table = read_star(tmp_path / "up.star")["particles"]
    assert table["rlnImageName"].iloc[0] == f"000001@{tmp_path.name}/images.mrcs"


# ---- what is refused, with the file, the row and the remedy ----


def replace(values, row, value):
    values = list(values)
    values[row] = value
    return values


TABLES = {
    "index past the end": (dict(rlnImageName=replace(particle_table()["rlnImageName"], 4, "99@images.mrcs")),
                           r"particles\.star, row 5: image 99@images\.mrcs is past the end.*12 images"),
    "image name": (dict(rlnImageName=replace(particle_table()["rlnImageName"], 1, "b@images.mrcs")),
                   r"row 2: .*rlnImageName"),
    "missing stack": (dict(rlnImageName=["1@gone.mrcs"] * N), r"gone\.mrcs not found(.|\n)*dataset\.root(.|\n)*Tried"),
    "no defocus": (dict(rlnDefocusV=None), r"no CTF: rlnDefocusV missing.*ctf=false"),
    "defocus in µm": (dict(rlnDefocusU=[1.5] * N, rlnDefocusV=[1.4] * N), "as if in µm"),
    "garbled defocus": (dict(rlnDefocusU=replace(["15000"] * N, 6, "15x00")), r"row 7 .*rlnDefocusU is '15x00'"),
    "NaN angle": (dict(rlnAnglePsi=replace([0.0] * N, 2, np.nan)), "row 3 .*rlnAnglePsi"),
    "garbled origin": (dict(rlnOriginXAngst=replace(["0"] * N, 2, "?")), "row 3 .*rlnOriginXAngst"),
    "subset": (dict(rlnRandomSubset=replace([1] * N, 1, 3)), "row 2: rlnRandomSubset is 3"),
    "norm": (dict(rlnNormCorrection=replace([1.0] * N, 1, -0.5)), "row 2: rlnNormCorrection is -0.5"),
    "group number": (dict(rlnGroupNumber=replace(["1"] * N, 1, "one")), "row 2 .*rlnGroupNumber"),
    "optics group": (dict(rlnOpticsGroup=replace([1] * N, 3, 2)), "row 4: rlnOpticsGroup 2 is not in data_optics"),
}  # fmt: skip
OPTICS = {
    "no voltage": (dict(rlnVoltage=None), "no CTF: rlnVoltage"),
    "no pixel size": (dict(rlnImagePixelSize=None), r"no pixel size.*dataset\.pixel_size"),
    "bad pixel size": (dict(rlnImagePixelSize=[0.0]), "rlnImagePixelSize is 0"),
    "garbled voltage": (dict(rlnVoltage=["300kV"]), "rlnVoltage is '300kV'"),
    "other size": (dict(rlnImageSize=[20]), "images of 16 px, but .*rlnImageSize 20"),
    "subtomograms": (dict(rlnImageDimensionality=[3]), "subtomograms"),
    "Zernike": (dict(rlnOddZernike=["[1,x]"]), "rlnOddZernike of optics group 1"),
    "no number": (dict(rlnOpticsGroup=None), "no rlnOpticsGroup"),
}


@pytest.mark.parametrize(("changes", "says"), TABLES.values(), ids=TABLES)
def test_wrong_particle_columns(make, changes, says):
    with pytest.raises(InputError, match=says) as error:
        make(particle_table(**changes)).check(particle_diameter=20.0)
    assert "particles.star" in str(error.value)


@pytest.mark.parametrize(("changes", "says"), OPTICS.values(), ids=OPTICS)
def test_wrong_optics(make, changes, says):
    with pytest.raises(InputError, match=says):
        make(optics=optics_table(**changes)).check(particle_diameter=20.0)


def test_ctf_is_asked_for_only_where_wanted(make):
    table = particle_table(rlnDefocusU=None, rlnDefocusV=None, rlnDefocusAngle=None)
    make(table, optics_table(rlnVoltage=None)).check(ctf=False)


def test_too_few_particles(make):
    with pytest.raises(InputError, match=r"particles\.star has 1 particle"):
        make(particle_table().iloc[:1]).check()
    with pytest.raises(InputError, match="no particles"):
        make(particle_table().iloc[:0])


def test_truncated_and_misread_stacks(make, tmp_path):
    particles = make()
    path = tmp_path / "images.mrcs"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"images\.mrcs is truncated"):
        particles.check()
    path.write_bytes(b"GIF89a" * 1000)
    with pytest.raises(InputError, match=r"images\.mrcs.*MRC"):
        Particles.read("particles.star").check()


def test_odd_and_oblong_boxes(make, images):
    with pytest.raises(InputError, match="box must be even"):
        make(optics=optics_table(rlnImageSize=[15]), stack=images[:, :15, :15]).check()
    with pytest.raises(InputError, match="not square"):
        make(stack=images[:, :14]).check()


@pytest.mark.parametrize(
    ("diameter", "says"), [(0.0, "not positive"), (-5.0, "not positive"), (32.1, "larger than the box")]
)
def test_particle_diameter(make, diameter, says):
    with pytest.raises(InputError, match=rf"dataset\.particle_diameter={diameter:g}.*{says}"):
        make().check(particle_diameter=diameter)


@pytest.mark.parametrize(("scale", "offset"), [(3.0, 0.0), (0.3, 0.0), (1.0, 0.8), (200.0, 1000.0)])
def test_images_that_are_not_normalised(make, images, scale, offset):
    with pytest.raises(InputError, match=r"12 of 12 .*row 1 \(000001@images\.mrcs\).*relion_preprocess"):
        make(stack=images * scale + offset).check(particle_diameter=20.0)


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_a_few_odd_images_are_let_pass(make, images):
    images[3] *= 10
    images[5] = np.nan
    images[6] = 1.0
    make(stack=images).check(particle_diameter=20.0)
    images[:] = 0
    with pytest.raises(InputError, match="constant or not finite"):
        make(stack=images).check(particle_diameter=20.0)


def test_files_that_hold_no_particles(tmp_path):
    path = tmp_path / "mics.star"
    write_star(path, {"optics": optics_table(), "micrographs": pd.DataFrame({"rlnMicrographName": ["a.mrc"]})})
    with pytest.raises(InputError, match=r"mics\.star has no loop with the column rlnImageName .*data_micrographs"):
        Particles.read(path)
    with pytest.raises(InputError, match=r"none\.star"):
        Particles.read(tmp_path / "none.star")
    with pytest.raises(InputError, match=r"dataset\.root"):
        Particles.read(path, root=tmp_path / "nowhere")


def test_several_optics_groups_need_a_column(make):
    two = pd.DataFrame({label: list(values) * 2 for label, values in optics_table().items()})
    two["rlnOpticsGroup"] = [1, 2]
    with pytest.raises(InputError, match="no rlnOpticsGroup to tell 2"):
        make(particle_table(rlnOpticsGroup=None), two)
    assert make(particle_table(rlnOpticsGroup=None)).optics_group.tolist() == [0] * N


# ---- other programs' files ----


def test_real_particles_pass(shared):
    particles = Particles.read(shared / "data/apoferritin/particles.star")
    particles.check(particle_diameter=140.0)
    assert len(particles) == 2205 and len(particles.group_names) == 19
    assert particles.images([2204]).shape == (1, 96, 96)
    assert particles.ctf_parameters[0].tolist() == [19923.57, 19026.47, -53.89, 0, 0, 1]


def test_simulated_particles_pass(shared):
    particles = Particles.read(shared / "data/relion_parity/particles.star")
    particles.check(particle_diameter=200.0)
    run = Particles.read(shared / "data/relion_parity/auto_cc/run_it004_data.star")  # one folder below its images
    run.check(particle_diameter=200.0)
    assert np.bincount(run.random_subset).tolist() == [0, 38, 42]
    assert run.group_names == ["mic0001.mrc"] and run.euler[0].tolist() == [50.625, 62.720387, 151.875]
    assert not Particles.read(shared / "data/relion_parity/auto_cc/run_it000_data.star").has_poses


def test_written_data_file_has_relions_columns_and_types(shared, tmp_path):
    for run in ("auto_cc", "class2d", "class3d"):
        path = shared / f"data/relion_parity/{run}/run_it004_data.star"
        Particles.read(path).write(tmp_path / "data.star")
        ours, theirs = read_star(tmp_path / "data.star"), read_star(path)
        assert list(ours) == list(theirs)
        for name in theirs:
            assert ours[name].dtypes.to_dict() == theirs[name].dtypes.to_dict()
            same = ours[name].drop(columns="rlnImageName", errors="ignore")
            pd.testing.assert_frame_equal(same, theirs[name].drop(columns="rlnImageName", errors="ignore"))


def test_relion_4_example(shared):
    particles = Particles.read(shared / "data/metadata/relion4_refine3d/run_it016_data.star")
    assert len(particles) == 4748 and len(particles.group_names) == 24
    assert particles.origin_angst[0].tolist() == [1.66368, -1.57289]
    row = particles.optics_table.iloc[0]
    assert row["rlnImagePixelSize"] == 1.244835 and row["rlnMagMat11"] == 0.998469
    optics = Particles(particles.table, particles.optics_table.drop(columns="rlnMtfFileName"), particles.source).optics[
        0
    ]
    assert optics.odd_zernike[-1] == -1.3038997201 and len(optics.even_zernike) == 9
    assert optics.beam_tilt == (0.017075, -0.14782) and optics.magnification[1] == 0.001953


def test_relion_31_example(shared):
    particles = Particles.read(shared / "data/metadata/relion31_betagal_tutorial.star")
    assert len(particles) == 4501 and particles.optics_table["rlnImagePixelSize"].tolist() == [1.244531]
    assert particles.origin_angst[0].tolist() == [0.34896, 0.348955]
    assert particles.euler[0].tolist() == [-27.06145, 7.977661, -144.05007]


def test_relion_30_example(shared):
    particles = Particles.read(shared / "data/metadata/relion30_particles.star")
    pixel = 5e4 / 37369.207031
    assert len(particles) == 17 and particles.optics_table["rlnVoltage"].tolist() == [300.0, 200.0]
    np.testing.assert_allclose(particles.optics_table["rlnImagePixelSize"], pixel)
    np.testing.assert_allclose(particles.origin_angst[5], [0.4496 * pixel, 0.9496 * pixel])
    assert particles.optics_group.tolist() == [0] * 8 + [1] * 9
    assert particles.group_names == ["micrograph.mrc"] and particles.random_subset[:4].tolist() == [2, 2, 1, 1]


def test_relion_14_example(shared):
    folder = shared / "data/metadata/relion1_class3d"
    for name in ("ap_s_c2d_red.star", "ref_output__out_it005_data.star"):
        particles = Particles.read(folder / name)
        assert len(particles) == 9
        np.testing.assert_allclose(particles.optics_table["rlnImagePixelSize"], 3.54, rtol=1e-5)
    first = Particles.read(folder / "ap_s_c2d_red.star")
    np.testing.assert_allclose(first.origin_angst[0], [0.967665 * 3.540002, -0.032335 * 3.540002], rtol=1e-6)
    assert first.ctf_parameters[0, :3].tolist() == [33863.558594, 34295.921875, 36.07]
    assert first.table["rlnParticleSelectZScore"].iloc[0] == 0.516504
