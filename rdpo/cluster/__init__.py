"""The machines: connecting to Ray, what a pool of actors takes, where it fits, what is installed there."""
