"""The oracle's comparison: plain data against plain data, type-exact, in the parent process.

Covers: `same`, a pure function of two values; `parses`, whether a text compiles.
Does not cover: running anything (`sandbox.py`); tolerances and any-order answers, a policy of the problem's data.
"""

import warnings

from vgrout.envs.sandbox import MISSING, too_long

_ATOMS = (type(None), bool, int, float, str)


def same(value: object, expected: object) -> bool:
    """Whether `value` is the plain data `expected`: same types at every level (bool is not int, int is not float,
    list is not tuple) and equal content. Dicts ignore the order of keys.

    Floats compare by `==`: 0.0 equals -0.0, and NaN equals nothing, itself included. MISSING equals nothing, itself
    included. Raises TypeError where `expected` is not plain data.
    """
    if value is MISSING or expected is MISSING:
        return False
    kind = type(expected)
    if kind in _ATOMS:
        return type(value) is kind and value == expected
    if kind is list or kind is tuple:
        pairs_fit = type(value) is kind and len(value) == len(expected)
        return pairs_fit and all(same(a, b) for a, b in zip(value, expected, strict=True))
    if kind is set or kind is dict:
        wanted = {_key(item): item for item in expected}
        if type(value) is not kind or len(value) != len(expected):
            return False
        found = {_key(item, plain=False): item for item in value}
        if kind is set:
            return found.keys() == wanted.keys()
        return all(key in found and same(value[found[key]], expected[wanted[key]]) for key in wanted)
    raise TypeError(f"expected value is not plain data: {kind.__name__}")


def _key(item: object, plain: bool = True) -> object:
    """A hashable stand-in for a set member or dict key: equal for two items exactly if they are `same`. Without
    `plain`, an item that is not plain data gets one that equals no other; with it, that is a TypeError."""
    if type(item) is tuple:
        return (tuple, *(_key(part, plain) for part in item))
    if type(item) in _ATOMS:
        return object() if item != item else (type(item), item)  # only NaN differs from itself
    if plain:
        raise TypeError(f"expected value is not plain data: {type(item).__name__}")
    return object()


def parses(source: str) -> bool:
    """Whether the text is at most 64 KiB of UTF-8 and compiles as a Python program. Runs nothing, warns of nothing."""
    if too_long(source):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(source, "<candidate>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True
