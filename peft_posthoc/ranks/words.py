"""The words that say a rank rule, in the order in which they are shown."""

OF_ONE = ("rank", "energy", "error")
"""Rules of one layer."""
SHARED = ("budget", "params")
"""Those that share ranks out among all layers."""
RULES = (*OF_ONE, *SHARED)
LIMITS = {"max_rank": "most", "min_rank": "least", "round_to": "multiple"}
"""By name, the field of the rule."""
WORDS = (*RULES, "weighting", *LIMITS)
