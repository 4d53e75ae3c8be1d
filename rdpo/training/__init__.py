"""pairs with reference log-probs -> policy.

Shapes in this room: P pairs in a micro-batch, S = 2P sequences (all chosen, then all rejected),
T padded length, C completion tokens of all sequences together, H hidden size, V vocabulary.
"""
