"""policy -> comparison with the start model -> published model and report."""
