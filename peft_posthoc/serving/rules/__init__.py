"""Adapters that are not as serving engines expect them: a file of rules for each topic, `table` with all of them.

What engines do with such adapters is known from their code, and from running it. A new rule is one new entry in the
file of its topic, beside the function that finds it.
"""
