"""The callback in other trainers, run by their own commands: `make test-trainers` installs them, each in an
environment of its own. Without those, nothing runs here but TRL, which is among what the tests need.
"""
