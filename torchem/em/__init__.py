"""Expectation maximization: gold-standard refinement of one or several references."""
