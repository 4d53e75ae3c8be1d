"""A run looked at, compared with another one, talked to, and given away to other programs."""
