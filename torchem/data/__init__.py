"""Files: particles, STAR, MRC, RELION's, cryoSPARC's and EMAN2's files, atomic models."""
