"""RELION's own files: read, written again, the same blocks, labels, types and numbers."""

import numpy as np
import pandas as pd
import pytest

from torchem.data import relion
from torchem.data.star import read_star
from torchem.errors import InputError


def assert_same(written, original):
    """Equal blocks, labels in order, types, and numbers to RELION's printed digits."""
    assert list(written) == list(original)
    for name, block in original.items():
        assert list(written[name]) == list(block), name
        for label in block:
            ours, theirs = written[name][label], block[label]
            if isinstance(block, dict):
                assert type(ours) is type(theirs), (name, label)
                ours, theirs = pd.Series([ours]), pd.Series([theirs])
            assert ours.dtype == theirs.dtype, (name, label)
            if ours.dtype.kind == "f":
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=label)
            else:
                assert ours.tolist() == theirs.tolist(), (name, label)


@pytest.mark.parametrize("run", ["auto_cc", "auto_nocc", "class3d", "class2d"])
def test_files_of_relion_5_come_out_as_they_went_in(shared, tmp_path, run):
    kinds = {"model": 0, "sampling": 0, "optimiser": 0}
    for path in sorted((shared / "data/relion_parity" / run).glob("*.star")):
        kind = path.stem.split("_")[-1]
        if kind in kinds:
            kinds[kind] += 1
            record = getattr(relion, f"read_{kind}")(path)
            getattr(relion, f"write_{kind}")(tmp_path / "again.star", record, comment="torchem")
            assert_same(read_star(tmp_path / "again.star"), read_star(path))
    assert min(kinds.values()) >= 4


def test_model_of_relion_5(shared):
    model = relion.read_model(shared / "data/relion_parity/auto_cc/run_it004_half1_model.star")
    assert (model.box, model.pixel_size, model.current_size, model.padding) == (32, 7.08, 32, 2.0)
    (only,) = model.classes
    assert only.reference_image == "auto_cc/run_it004_half1_class001.mrc"
    assert only.data_vs_prior[6] == 47.828095 and only.fsc[13] == -0.00803
    assert only.orientability.shape == (17,) and only.pdf_direction.shape == (192,)
    assert model.group_names == ["mic0001.mrc"] and model.group_counts.tolist() == [38]
    assert len(model.sigma2_noise) == 1 and model.sigma2_noise[0][0] == 4.912558e-04


def test_whole_refinement_of_relion_4(shared):
    folder = shared / "data/metadata/relion4_refine3d"
    model = relion.read_model(folder / "run_it016_half1_model.star")
    assert (model.box, model.pixel_size, model.current_size) == (256, 1.244835, 254)
    assert len(model.group_names) == len(model.sigma2_noise) == 24
    assert model.group_names[0] == "Movies/20170629_00021_frameImage.mrc"
    assert model.classes[0].acc_trans == 0.248967 and model.orientational_prior_mode == 1
    sampling = relion.read_sampling(folder / "run_it016_sampling.star")
    assert (sampling.healpix_order, sampling.symmetry, sampling.offset_step) == (7, "D2", 0.373451)
    assert sampling.directions.shape == (len(model.classes[0].pdf_direction), 2)
    optimiser = relion.read_optimiser(folder / "run_it016_optimiser.star")
    assert optimiser.incr_size == 23 and optimiser.solvent_mask == "MaskCreate/job020/mask.mrc"
    assert optimiser.has_high_fsc is True and optimiser.nr_wo_gain == 3


def test_classification_of_relion_1(shared):
    stem = shared / "data/metadata/relion1_class3d/ref_output__out_it005_"
    model = relion.read_model(f"{stem}model.star")
    assert model.sigma_offset_angst == pytest.approx(2.039138 * 3.540002)  # pixels there
    assert model.classes[0].acc_trans == pytest.approx(2.177778 * 3.540002)
    assert model.classes[0].completeness is None
    with pytest.raises(InputError, match=r"in pixels.*pixel_size"):
        relion.read_sampling(f"{stem}sampling.star")
    sampling = relion.read_sampling(f"{stem}sampling.star", pixel_size=3.54)
    assert sampling.offset_range == pytest.approx(17.7) and sampling.perturb_instance == 0.187476
    optimiser = relion.read_optimiser(f"{stem}optimiser.star", pixel_size=3.54)
    assert optimiser.acc_trans == pytest.approx(2.177778 * 3.54) and optimiser.ctf


def model(classes, reference_dimension=3):
    shells = 5
    rng = np.random.default_rng(3)
    items = [
        relion.ModelClass(
            reference_image=f"run_class{k:03d}.mrc",
            distribution=1 / classes,
            acc_rot=1.0,
            acc_trans=2,  # an int where RELION has a float
            data_vs_prior=rng.random(shells),
            fsc=rng.random(shells),
            completeness=rng.random(shells),
            sigma2=rng.random(shells) * 1e-7,
            tau2=rng.random(shells),
            pdf_direction=rng.random(12) if reference_dimension == 3 else None,
            prior_offset_x=None if reference_dimension == 3 else 0.0,
            prior_offset_y=None if reference_dimension == 3 else 0.0,
        )
        for k in range(1, classes + 1)
    ]
    return relion.ModelFile(
        reference_dimension=reference_dimension,
        box=8,
        current_resolution=np.float64(10),
        current_size=np.int64(8),
        pixel_size=2.0,
        classes=items,
        sigma2_noise=[rng.random(shells), rng.random(shells)],
        tau2_fudge=1,
        norm_correction_average=0.1 + 0.2,
        sigma_offset_angst=10.0,
        log_likelihood=1e9,
        average_pmax=1 / 3,
        group_names=["a b.mrc", "7"],
        group_counts=[3, 4],
        group_scales=[0.9, 1.1],
    )


@pytest.mark.parametrize(("classes", "dimension"), [(1, 3), (2, 3), (3, 2)])
def test_models_round_trip_exactly(tmp_path, classes, dimension):
    ours = model(classes, dimension)
    relion.write_model(tmp_path / "m.star", ours)
    again = relion.read_model(tmp_path / "m.star")
    general = read_star(tmp_path / "m.star")["model_general"]
    assert general["rlnNrClasses"] == classes and general["rlnNrOpticsGroups"] == general["rlnNrGroups"] == 2
    assert isinstance(general["rlnTau2FudgeFactor"], float) and isinstance(general["rlnCurrentImageSize"], int)
    assert again.norm_correction_average == ours.norm_correction_average
    assert again.group_names == ours.group_names
    for mine, theirs in zip(ours.classes, again.classes, strict=True):
        for name in ("data_vs_prior", "fsc", "completeness", "sigma2", "tau2", "pdf_direction"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.sigma2_noise, again.sigma2_noise)
    spectrum = read_star(tmp_path / "m.star")["model_class_1"]
    assert spectrum["rlnAngstromResolution"].tolist() == [999, 16, 8, 16 / 3, 4]


def test_2d_sampling_has_no_directions(tmp_path):
    ours = relion.SamplingFile(
        is_3d=False, psi_step=12.0, offset_range=6.0, offset_step=4.0, perturb_instance=0.1, perturb_factor=0.5
    )
    relion.write_sampling(tmp_path / "s.star", ours)
    blocks = read_star(tmp_path / "s.star")
    assert list(blocks) == ["sampling_general"] and "rlnHealpixOrder" not in blocks["sampling_general"]
    assert relion.read_sampling(tmp_path / "s.star") == ours


def test_incomplete_files_are_named(tmp_path):
    path = tmp_path / "broken.star"
    path.write_text("data_other\n_rlnX 1\n")
    for read in (relion.read_model, relion.read_sampling, relion.read_optimiser):
        with pytest.raises(InputError, match=r"broken\.star has no block"):
            read(path)
    path.write_text("data_sampling_general\n_rlnPsiStep 7.5\n_rlnOffsetRangeOriginal 1\n")
    with pytest.raises(InputError, match="has no rlnOffsetRange in data_sampling_general"):
        relion.read_sampling(path)
    relion.write_model(path, model(1))
    path.write_text(path.read_text().split("data_model_groups")[0])
    with pytest.raises(InputError, match="no table data_model_groups"):
        relion.read_model(path)
    path.write_text(
        "data_optimiser_general\n_rlnCurrentIteration four\n_rlnOutputRootName a\n_rlnModelStarFile a\n"
        "_rlnExperimentalDataStarFile a\n_rlnOrientSamplingStarFile a\n"
    )
    with pytest.raises(InputError, match="rlnCurrentIteration is 'four', not int"):
        relion.read_optimiser(path)
