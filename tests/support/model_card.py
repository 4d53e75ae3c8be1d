"""What a model card tells of the run that made the model."""

FACTS = {"version": "1", "evaluation": {"prompts": 0, "rewards": [], "kl": None}, "pairs": 1, "lineage": {}}
