"""The physics that refinement, alignment and simulation share: optics, masks, projections, symmetry, resolution."""
