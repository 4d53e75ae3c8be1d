"""prompts -> responses -> critiques -> revisions."""
