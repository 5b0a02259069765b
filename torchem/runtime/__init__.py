"""The machine: processes and devices, run folders, progress."""
