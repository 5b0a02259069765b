"""The machine: processes and devices, CPU settings, run folders, progress."""
