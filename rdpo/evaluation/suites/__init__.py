"""Prompts of other kinds than the job's, and what is read off both models' answers to them without a judge."""
