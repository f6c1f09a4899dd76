"""Pure functions over arrays: sampling, correlation, clustering, assignment and fit. No I/O, no state."""
