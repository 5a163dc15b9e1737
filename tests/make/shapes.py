"""How annotations of shapes are checked in the tests."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # An int is a float, as to mypy.


def checked(function):
    """The function with its annotations checked, where one of them is a shape."""
    said = getattr(function, "__annotations__", {}).values()
    return _check(function) if any("jaxtyping" in repr(one) for one in said) else function
