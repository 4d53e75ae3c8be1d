"""The stages of a run: what each one reads, what its output depends on, and what it does."""
