"""tokens -> log-probs: the one forward on which reference and training stand."""
