"""Several runs: round after round, arms of a comparison held against each other."""
