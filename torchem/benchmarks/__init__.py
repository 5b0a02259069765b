"""Speed, memory and error of operations and refinements, beside the rates of the same machine in the same run."""
