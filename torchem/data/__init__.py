"""Files: particles, STAR, MRC, RELION's and cryoSPARC's metadata, atomic models."""
