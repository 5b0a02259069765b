"""RELION 5's model, optimiser and sampling files: every block and label, in RELION's order.

Each record's fields stand in file order and name their label; a field with a default is what torchem does not vary
and RELION writes so. Older files (1.4 on) are read too; what they have in pixels becomes Å.
"""

# ruff: noqa: RUF009  (`_at` is dataclasses.field)

import dataclasses
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd

from torchem.data.star import read_star, write_star
from torchem.errors import InputError

Record = TypeVar("Record")

_FAR = 999.0  # Å or degrees, RELION's "not known yet"


def _at(label: str, default: Any = dataclasses.MISSING) -> Any:
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"label": label})
    return dataclasses.field(default=default, metadata={"label": label})


@dataclass(kw_only=True)
class ModelClass:
    """One reference of a model: its row of data_model_classes, its spectra and its direction probabilities.

    Attributes
    ----------
    acc_rot, acc_trans, resolution
        degrees, Å, Å.
    prior_offset_x, prior_offset_y
        Å; of 2D references only.
    data_vs_prior, fsc, completeness, sigma2, tau2, orientability
        `(shells,)`, one value a Fourier shell from 0; ``orientability`` (rlnSpectralOrientabilityContribution) is
        absent until accuracies were estimated.
    pdf_direction
        `(directions,)`; absent for 2D references.
    """

    reference_image: str = _at("rlnReferenceImage")
    distribution: float = _at("rlnClassDistribution")
    acc_rot: float = _at("rlnAccuracyRotations")
    acc_trans: float = _at("rlnAccuracyTranslationsAngst")
    resolution: float = _at("rlnEstimatedResolution", 0.0)
    overall_completeness: float = _at("rlnOverallFourierCompleteness", 0.0)
    prior_offset_x: float | None = _at("rlnClassPriorOffsetX", None)
    prior_offset_y: float | None = _at("rlnClassPriorOffsetY", None)
    data_vs_prior: np.ndarray = _at("rlnSsnrMap")
    fsc: np.ndarray = _at("rlnGoldStandardFsc")
    completeness: np.ndarray | None = _at("rlnFourierCompleteness", None)
    sigma2: np.ndarray = _at("rlnReferenceSigma2")
    tau2: np.ndarray = _at("rlnReferenceTau2")
    orientability: np.ndarray | None = _at("rlnSpectralOrientabilityContribution", None)
    pdf_direction: np.ndarray | None = None


@dataclass(kw_only=True)
class ModelFile:
    """A model file (run_it012_half1_model.star).

    Attributes
    ----------
    current_resolution, sigma_offset_angst
        Å.
    group_names, group_counts, group_scales
        one a group of the intensity scale.
    sigma2_noise
        `(shells,)` each, one an optics group (before RELION 5: one a group of the scale).
    """

    reference_dimension: int = _at("rlnReferenceDimensionality", 3)
    data_dimension: int = _at("rlnDataDimensionality", 2)
    box: int = _at("rlnOriginalImageSize")
    current_resolution: float = _at("rlnCurrentResolution")
    current_size: int = _at("rlnCurrentImageSize")
    padding: float = _at("rlnPaddingFactor", 2.0)
    is_helix: bool = _at("rlnIsHelix", False)
    interpolator: int = _at("rlnFourierSpaceInterpolator", 1)
    r_min_nn: int = _at("rlnMinRadiusNnInterpolation", 10)
    pixel_size: float = _at("rlnPixelSize")
    classes: list[ModelClass] = _at("rlnNrClasses")
    bodies: int = _at("rlnNrBodies", 1)
    group_names: list[str] = _at("rlnNrGroups")
    sigma2_noise: list[np.ndarray] = _at("rlnNrOpticsGroups")
    tau2_fudge: float = _at("rlnTau2FudgeFactor")
    norm_correction_average: float = _at("rlnNormCorrectionAverage")
    sigma_offset_angst: float = _at("rlnSigmaOffsetsAngst")
    orientational_prior_mode: int = _at("rlnOrientationalPriorMode", 0)
    sigma_prior_rot: float = _at("rlnSigmaPriorRotAngle", 0.0)
    sigma_prior_tilt: float = _at("rlnSigmaPriorTiltAngle", 0.0)
    sigma_prior_psi: float = _at("rlnSigmaPriorPsiAngle", 0.0)
    log_likelihood: float = _at("rlnLogLikelihood")
    average_pmax: float = _at("rlnAveragePmax")
    group_counts: np.ndarray = dataclasses.field()
    group_scales: np.ndarray = dataclasses.field()


@dataclass(kw_only=True)
class SamplingFile:
    """A sampling file (run_it012_sampling.star).

    Attributes
    ----------
    psi_step
        degrees.
    offset_range, offset_step
        Å.
    perturb_instance, perturb_factor
        this iteration's perturbation in units of the step, and how large it may be.
    directions
        `(directions, 2)` rot and tilt in degrees; absent for 2D references.
    """

    is_3d: bool = _at("rlnIs3DSampling", True)
    is_3d_translational: bool = _at("rlnIs3DTranslationalSampling", False)
    healpix_order: int | None = _at("rlnHealpixOrder", None)
    symmetry: str | None = _at("rlnSymmetryGroup", None)
    tilt_limit: float | None = _at("rlnTiltAngleLimit", None)
    psi_step: float = _at("rlnPsiStep")
    offset_range: float = _at("rlnOffsetRange")
    offset_step: float = _at("rlnOffsetStep")
    helical_offset_step: float = _at("rlnHelicalOffsetStep", -1.0)
    perturb_instance: float = _at("rlnSamplingPerturbInstance")
    perturb_factor: float = _at("rlnSamplingPerturbFactor")
    healpix_order_original: int = _at("rlnHealpixOrderOriginal", 2)
    psi_step_original: float = _at("rlnPsiStepOriginal", -1.0)
    offset_range_original: float = _at("rlnOffsetRangeOriginal", -1.0)
    offset_step_original: float = _at("rlnOffsetStepOriginal", -1.0)
    directions: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.is_3d and self.tilt_limit is None:
            self.tilt_limit = -91.0


@dataclass(kw_only=True)
class OptimiserFile:
    """An optimiser file (run_it012_optimiser.star): the options of a run, and how far it is.

    Attributes
    ----------
    model_star2
        the other half's model; absent in a classification.
    best_resolution
        1/Å.
    acc_rot, changes_rot, smallest_changes_rot
        degrees.
    acc_trans, changes_trans, smallest_changes_trans
        Å.
    """

    output_root: str = _at("rlnOutputRootName")
    model_star: str = _at("rlnModelStarFile")
    model_star2: str | None = _at("rlnModelStarFile2", None)
    data_star: str = _at("rlnExperimentalDataStarFile")
    tomograms_star: str = _at("rlnTomoTomogramsFile", "")
    trajectories_star: str = _at("rlnTomoTrajectoriesFile", "")
    sampling_star: str = _at("rlnOrientSamplingStarFile")
    iteration: int = _at("rlnCurrentIteration")
    number_of_iterations: int = _at("rlnNumberOfIterations")
    split_random_halves: bool = _at("rlnDoSplitRandomHalves")
    low_resol_join_halves: float = _at("rlnJoinHalvesUntilThisResolution")
    oversampling: int = _at("rlnAdaptiveOversampleOrder")
    adaptive_fraction: float = _at("rlnAdaptiveOversampleFraction")
    random_seed: int = _at("rlnRandomSeed")
    particle_diameter: float = _at("rlnParticleDiameter")
    mask_edge: int = _at("rlnWidthMaskEdge", 5)
    zero_mask: bool = _at("rlnDoZeroMask")
    flatten_solvent: bool = _at("rlnDoSolventFlattening", True)
    solvent_correct_fsc: bool = _at("rlnDoSolventFscCorrection", False)
    solvent_mask: str = _at("rlnSolventMaskName", "None")
    solvent_mask2: str = _at("rlnSolventMask2Name", "None")
    bodies_star: str = _at("rlnBodyStarFile", "None")
    tau_spectrum: str = _at("rlnTauSpectrumName", "None")
    maximum_coarse_size: int = _at("rlnMaximumCoarseImageSize", -1)
    highres_limit: float = _at("rlnHighresLimitExpectation", -1.0)
    lowres_limit: float = _at("rlnLowresLimitExpectation", -1.0)
    incr_size: int = _at("rlnIncrementImageSize", 10)
    do_map: bool = _at("rlnDoMapEstimation", True)
    fast_subsets: bool = _at("rlnDoFastSubsetOptimisation", False)
    external_reconstruct: bool = _at("rlnDoExternalReconstruct", False)
    blush: bool = _at("rlnDoBlush", False)
    blush_no_trailing: bool = _at("rlnBlushNoSpectralTrailing", False)
    gradient_refine: bool = _at("rlnDoGradientRefine", False)
    stochastic_gradient: bool = _at("rlnDoStochasticGradientDescent", False)
    grad_em_iters: int = _at("rlnGradEmIters", 0)
    grad_has_converged: bool = _at("rlnGradHasConverged", False)
    grad_stepsize: float = _at("rlnGradCurrentStepsize", 0.0)
    grad_subset_order: int = _at("rlnGradSubsetOrder", 0)
    grad_suspend_finer: int = _at("rlnGradSuspendFinerSamplingIter", -1)
    grad_suspend_local: int = _at("rlnGradSuspendLocalSamplingIter", -1)
    sgd_initial_fraction: float = _at("rlnSgdInitialIterationsFraction", 0.3)
    sgd_final_fraction: float = _at("rlnSgdFinalIterationsFraction", 0.2)
    sgd_minimum_resolution: float = _at("rlnSgdMinimumResolution", 20.0)
    sgd_initial_resolution: float = _at("rlnSgdInitialResolution", -1.0)
    sgd_final_resolution: float = _at("rlnSgdFinalResolution", -1.0)
    sgd_initial_subset: int = _at("rlnSgdInitialSubsetSize", -1)
    sgd_final_subset: int = _at("rlnSgdFinalSubsetSize", -1)
    sgd_mu: float = _at("rlnSgdMuFactor", 0.0)
    sgd_skip_anneal: bool = _at("rlnSgdSkipAnneal", False)
    sgd_inactivity: float = _at("rlnSgdClassInactivityThreshold", 0.0)
    sgd_subset: int = _at("rlnSgdSubsetSize", -1)
    sgd_write_every: int = _at("rlnSgdWriteEverySubset", 10)
    sgd_stepsize: float = _at("rlnSgdStepsize", -1.0)
    sgd_stepsize_scheme: str = _at("rlnSgdStepsizeScheme", "")
    tau2_fudge_scheme: str = _at("rlnTau2FudgeScheme", "")
    tau2_fudge_arg: float = _at("rlnTau2FudgeArg", -1.0)
    maximum_significant: int = _at("rlnMaximumSignificantPoses", -1)
    auto_refine: bool = _at("rlnDoAutoRefine")
    auto_sampling: bool = _at("rlnDoAutoSampling", True)
    local_healpix_order: int = _at("rlnAutoLocalSearchesHealpixOrder", 4)
    nr_wo_gain: int = _at("rlnNumberOfIterWithoutResolutionGain", 0)
    best_resolution: float = _at("rlnBestResolutionThusFar")
    nr_wo_change: int = _at("rlnNumberOfIterWithoutChangingAssignments", 0)
    skip_align: bool = _at("rlnDoSkipAlign", False)
    skip_rotate: bool = _at("rlnDoSkipRotate", False)
    acc_rot: float = _at("rlnOverallAccuracyRotations", _FAR)
    acc_trans: float = _at("rlnOverallAccuracyTranslationsAngst", _FAR)
    changes_rot: float = _at("rlnChangesOptimalOrientations", _FAR)
    changes_trans: float = _at("rlnChangesOptimalOffsets", _FAR)
    changes_classes: float = _at("rlnChangesOptimalClasses", 9999999.0)
    smallest_changes_rot: float = _at("rlnSmallestChangesOrientations", _FAR)
    smallest_changes_trans: float = _at("rlnSmallestChangesOffsets", _FAR)
    smallest_changes_classes: int = _at("rlnSmallestChangesClasses", 9999999)
    local_symmetry: str = _at("rlnLocalSymmetryFile", "None")
    helical_refine: bool = _at("rlnDoHelicalRefine", False)
    ignore_helical_symmetry: bool = _at("rlnIgnoreHelicalSymmetry", False)
    fourier_mask: str = _at("rlnFourierMask", "None")
    helical_twist: float = _at("rlnHelicalTwistInitial", 0.0)
    helical_rise: float = _at("rlnHelicalRiseInitial", 0.0)
    helical_central: float = _at("rlnHelicalCentralProportion", 0.3)
    helical_n_start: int = _at("rlnNrHelicalNStart", 1)
    helical_inner_diameter: float = _at("rlnHelicalMaskTubeInnerDiameter", -1.0)
    helical_outer_diameter: float = _at("rlnHelicalMaskTubeOuterDiameter", -1.0)
    helical_local_refinement: bool = _at("rlnHelicalSymmetryLocalRefinement", False)
    helical_sigma_distance: float = _at("rlnHelicalSigmaDistance", -1.0)
    helical_keep_tilt: bool = _at("rlnHelicalKeepTiltPriorFixed", False)
    has_converged: bool = _at("rlnHasConverged", False)
    has_high_fsc: bool = _at("rlnHasHighFscAtResolLimit", False)
    large_size_increase_ago: int = _at("rlnHasLargeSizeIncreaseIterationsAgo", 0)
    norm: bool = _at("rlnDoCorrectNorm")
    scale: bool = _at("rlnDoCorrectScale")
    ctf: bool = _at("rlnDoCorrectCtf")
    center_classes: bool = _at("rlnDoCenterClasses", False)
    ctf_until_first_peak: bool = _at("rlnDoIgnoreCtfUntilFirstPeak", False)
    ctf_phase_flipped: bool = _at("rlnCtfDataArePhaseFlipped", False)
    ctf_only_flip: bool = _at("rlnDoOnlyFlipCtfPhases", False)
    refs_ctf_corrected: bool = _at("rlnRefsAreCtfCorrected", True)
    fix_sigma_noise: bool = _at("rlnFixSigmaNoiseEstimates", False)
    fix_sigma_offset: bool = _at("rlnFixSigmaOffsetEstimates", False)
    pool: int = _at("rlnMaxNumberOfPooledParticles", 3)
    offset_range_x: float = _at("rlnOffsetRangeX", -1.0)
    offset_range_y: float = _at("rlnOffsetRangeY", -1.0)
    offset_range_z: float = _at("rlnOffsetRangeZ", -1.0)


def read_model(path: str | Path) -> ModelFile:
    """Model file of RELION 1.4 to 5 or torchem."""
    path = Path(path)
    blocks = read_star(path)
    general = _values(path, blocks, "model_general")
    pixel_size = float(general.get("rlnPixelSize", 1.0))
    _to_angstrom(general, {"rlnSigmaOffsets": "rlnSigmaOffsetsAngst"}, pixel_size)
    table = _frame(path, blocks, "model_classes")
    if "rlnAccuracyTranslations" in table:
        table["rlnAccuracyTranslationsAngst"] = table["rlnAccuracyTranslations"] * pixel_size
    classes = []
    for number, row in enumerate(table.to_dict("records"), 1):
        spectra = _frame(path, blocks, f"model_class_{number}")
        columns = {label: spectra[label].to_numpy(np.float64) for label in spectra}
        item = _record(path, ModelClass, {**row, **columns}, block=f"model_classes and data_model_class_{number}")
        if (name := f"model_pdf_orient_class_{number}") in blocks:
            distribution = _frame(path, blocks, name)["rlnOrientationDistribution"]
            item.pdf_direction = distribution.to_numpy(np.float64)
        classes.append(item)
    groups = _frame(path, blocks, "model_groups")
    # one spectrum an optics group in RELION 5, one a group before
    kind = "optics_group" if "model_optics_group_1" in blocks else "group"
    spectra = [_frame(path, blocks, name)["rlnSigma2Noise"] for name in _numbered(blocks, f"model_{kind}_")]
    return _record(
        path,
        ModelFile,
        general,
        block="model_general",
        classes=classes,
        sigma2_noise=[spectrum.to_numpy(np.float64) for spectrum in spectra],
        group_names=[str(name) for name in groups["rlnGroupName"]],
        group_counts=groups["rlnGroupNrParticles"].to_numpy(np.int64),
        group_scales=groups["rlnGroupScaleCorrection"].to_numpy(np.float64),
    )


def write_model(path: str | Path, model: ModelFile, comment: str = "") -> None:
    """Write a model as RELION 5 does."""
    blocks: dict[str, Any] = {"model_general": _labelled(model)}
    blocks["model_classes"] = pd.DataFrame([_labelled(item) for item in model.classes])
    for number, item in enumerate(model.classes, 1):
        blocks[f"model_class_{number}"] = _spectra(model, {**_arrays(item)})
    blocks["model_groups"] = pd.DataFrame(
        {
            "rlnGroupNumber": np.arange(1, len(model.group_names) + 1),
            "rlnGroupName": np.array(model.group_names, dtype=object),
            "rlnGroupNrParticles": np.asarray(model.group_counts, np.int64),
            "rlnGroupScaleCorrection": np.asarray(model.group_scales, np.float64),
        }
    )
    for number, spectrum in enumerate(model.sigma2_noise, 1):
        columns = {"rlnSigma2Noise": np.asarray(spectrum, np.float64)}
        blocks[f"model_optics_group_{number}"] = _spectra(model, columns, angstrom=False)
    for number, item in enumerate(model.classes, 1):
        if item.pdf_direction is not None:
            distribution = {"rlnOrientationDistribution": np.asarray(item.pdf_direction, np.float64)}
            blocks[f"model_pdf_orient_class_{number}"] = pd.DataFrame(distribution)
    write_star(path, blocks, comment)


def read_sampling(path: str | Path, pixel_size: float | None = None) -> SamplingFile:
    """Sampling file of RELION 1.4 to 5 or torchem; before 3.1 offsets are in pixels of ``pixel_size`` Å."""
    path = Path(path)
    blocks = read_star(path)
    general = _values(path, blocks, "sampling_general")
    if "rlnOffsetRangeOriginal" not in general:
        size = _needed(path, pixel_size)
        for label in ("rlnOffsetRange", "rlnOffsetStep"):
            _to_angstrom(general, {label: label}, size)
    directions = None
    if "sampling_directions" in blocks:
        table = _frame(path, blocks, "sampling_directions")
        directions = table[["rlnAngleRot", "rlnAngleTilt"]].to_numpy(np.float64)
    return _record(path, SamplingFile, general, block="sampling_general", directions=directions)


def write_sampling(path: str | Path, sampling: SamplingFile, comment: str = "") -> None:
    """Write a sampling as RELION 5 does."""
    blocks: dict[str, Any] = {"sampling_general": _labelled(sampling)}
    if sampling.directions is not None:
        directions = np.asarray(sampling.directions, np.float64)
        columns = {"rlnAngleRot": directions[:, 0], "rlnAngleTilt": directions[:, 1]}
        blocks["sampling_directions"] = pd.DataFrame(columns)
    write_star(path, blocks, comment)


def write_particles(path: str | Path, tables: bytes, columns: Mapping[str, np.ndarray], comment: str = "") -> None:
    """Write a data file: pickled tables by block name, the particles' with new columns, or new values in its own."""
    blocks: dict[str, pd.DataFrame] = pickle.loads(tables)
    blocks["particles"] = blocks["particles"].assign(**columns)
    write_star(path, blocks, comment)


def read_optimiser(path: str | Path, pixel_size: float | None = None) -> OptimiserFile:
    """Optimiser file of RELION 1.4 to 5 or torchem; before 3.1 shifts are in pixels of ``pixel_size`` Å."""
    path = Path(path)
    general = _values(path, read_star(path), "optimiser_general")
    if "rlnOverallAccuracyTranslations" in general:
        pixels = {"rlnOverallAccuracyTranslations": "rlnOverallAccuracyTranslationsAngst"}
        pixels |= {label: label for label in ("rlnChangesOptimalOffsets", "rlnSmallestChangesOffsets")}
        _to_angstrom(general, pixels, _needed(path, pixel_size))
    return _record(path, OptimiserFile, general, block="optimiser_general")


def write_optimiser(path: str | Path, optimiser: OptimiserFile, comment: str = "") -> None:
    """Write an optimiser as RELION 5 does."""
    write_star(path, {"optimiser_general": _labelled(optimiser)}, comment)


def _values(path: Path, blocks: Mapping[str, Any], name: str) -> dict[str, Any]:
    block = blocks.get(name)
    if not isinstance(block, dict):
        raise InputError(f"{path} has no block data_{name}; give the file that RELION wrote")
    return dict(block)


def _frame(path: Path, blocks: Mapping[str, Any], name: str) -> pd.DataFrame:
    block = blocks.get(name)
    if not isinstance(block, pd.DataFrame):
        raise InputError(f"{path} has no table data_{name}; the file is cut short, give a whole one")
    return block


def _numbered(blocks: Mapping[str, Any], prefix: str) -> list[str]:
    names = [name for name in blocks if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
    return sorted(names, key=lambda name: int(name[len(prefix) :]))


def _needed(path: Path, pixel_size: float | None) -> float:
    if pixel_size is None:
        raise InputError(f"{path} is of RELION 3.0 or earlier, in pixels; say what a pixel is (pixel_size, Å)")
    return pixel_size


def _to_angstrom(values: dict[str, Any], labels: Mapping[str, str], pixel_size: float) -> None:
    for old, new in labels.items():
        if old in values:
            values[new] = float(values.pop(old)) * pixel_size


def _record(path: Path, kind: type[Record], values: Mapping[str, Any], *, block: str, **rest: Any) -> Record:
    """A record from its labelled values, each of its field's type; labels it does not know are passed over."""
    found = dict(rest)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        label = item.metadata.get("label")
        if item.name in rest or label is None:
            continue
        if label in values:
            types = [entry for entry in get_args(item.type) or (item.type,) if entry is not type(None)]
            try:
                value = values[label]
                found[item.name] = value if types[0] is np.ndarray else types[0](value)
            except ValueError:
                raise InputError(f"{path}: {label} is {values[label]!r}, not {types[0].__name__}; correct it") from None
        elif item.default is dataclasses.MISSING:
            raise InputError(f"{path} has no {label} in data_{block}; give a whole file of RELION or torchem")
    return kind(**found)


def _labelled(record: Any) -> dict[str, Any]:
    """Single values of a record by label, a list as its length, what is None or an array left out."""
    block: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if "label" not in item.metadata or value is None or isinstance(value, np.ndarray):
            continue
        kinds = get_args(item.type) or (item.type,)
        if isinstance(value, list):
            value = len(value)
        elif float in kinds:
            value = float(value)
        elif bool in kinds or int in kinds:
            value = int(value)
        block[item.metadata["label"]] = value
    return block


def _arrays(record: Any) -> dict[str, np.ndarray]:
    values = {item.metadata.get("label"): getattr(record, item.name) for item in dataclasses.fields(record)}
    return {
        label: np.asarray(value, np.float64)
        for label, value in values.items()
        if label and isinstance(value, np.ndarray)
    }


def _spectra(model: ModelFile, columns: Mapping[str, np.ndarray], angstrom: bool = True) -> pd.DataFrame:
    """Columns by shell, headed by shell number and resolution in 1/Å and, if wanted, Å (999 at 0)."""
    index = np.arange(len(next(iter(columns.values()))))
    frequency = index / (model.box * model.pixel_size)
    head: dict[str, np.ndarray] = {"rlnSpectralIndex": index, "rlnResolution": frequency}
    if angstrom:
        head["rlnAngstromResolution"] = np.divide(1.0, frequency, out=np.full(len(index), _FAR), where=index > 0)
    return pd.DataFrame({**head, **columns})
