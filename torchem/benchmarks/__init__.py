"""Speed and error of the hot operations on a GPU, beside the rates of the same machine in the same run."""
