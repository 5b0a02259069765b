"""Files: particles, STAR, MRC, EMAN2's stacks, RELION's and cryoSPARC's metadata, alignments, atomic models."""
