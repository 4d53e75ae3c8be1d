"""answers -> scores -> preference pairs -> reference log-probs."""
