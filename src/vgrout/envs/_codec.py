"""Plain data as one line of ASCII JSON: what goes into a program's process, and what comes back. Standard library only.

null, true, 1, "text", ["i","0x.."] a large integer, ["f","0x1.8p+1"] a float, ["l",..] list, ["t",..] tuple,
["s",..] set, ["d",key,value,..] dict. Exact builtin types only; anything else is `Refused`.
"""

from __future__ import annotations

import builtins
import json
import re

# Functions defined below look builtins up in this copy, out of reach of a program that replaces builtins.
__builtins__ = dict(vars(builtins))

DEPTH = 64  # nesting of a value
NODES = 200_000  # atoms of a value, and CONTAINER for each container
CONTAINER = 8  # about what an empty one takes in memory, in atoms
HASHED = 10_000  # dict keys and set members of a value: ones that collide are quadratic to put together
TEXT = 4 << 20  # characters in all strings of a value
INT_BITS = 1 << 16  # size of an integer
SAFE_INT = 1 << 53  # beyond this an integer travels as tagged hex
SAME_HASH = 16  # dict keys or set members that may share one hash


class Refused(ValueError):
    """The value is not plain data within the limits, or the text does not encode one."""


_TAGS = {list: '["l"', tuple: '["t"', set: '["s"', dict: '["d"'}
_HEX_INT = re.compile(rf"-?0x[0-9a-f]{{1,{INT_BITS // 4}}}", re.ASCII)
_HEX_FLOAT = re.compile(r"-?(0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}|inf)|nan", re.ASCII)
_quote = json.encoder.encode_basestring_ascii


def encode(value: object) -> str:
    """The line for a value. Raises `Refused` where it is not plain data within the limits."""
    parts: list[str] = []
    _write(value, 0, parts, [NODES, TEXT, HASHED])
    line = "".join(parts)
    if line.count("[") > NODES:
        raise Refused("too many brackets in texts")
    return line


def _write(item, depth, parts, left):
    kind = type(item)
    left[0] -= CONTAINER if kind in _TAGS else 1
    left[2] -= len(item) if kind is set or kind is dict else 0
    if left[0] < 0 or left[2] < 0 or depth > DEPTH:
        raise Refused("value is too deep or too large")
    if item is None or kind is bool:
        parts.append("null" if item is None else "true" if item else "false")
    elif kind is int and item.bit_length() <= INT_BITS:
        parts.append(f"{item}" if -SAFE_INT <= item <= SAFE_INT else f'["i","{item:#x}"]')
    elif kind is float:
        parts.append(f'["f","{item.hex()}"]')
    elif kind is str and len(item) <= left[1]:
        left[1] -= len(item)
        parts.append(_quote(item))
    elif kind in _TAGS and len(item) > 1 and set(map(type, item)) == {int} and kind is not dict and _small(item):
        left[0] -= len(item)
        if left[0] < 0:
            raise Refused("value is too large")
        parts += (_TAGS[kind], ",", ",".join(map(str, item)), "]")
    elif kind in _TAGS:
        parts.append(_TAGS[kind])
        for part in item if kind is not dict else [part for pair in item.items() for part in pair]:
            parts.append(",")
            _write(part, depth + 1, parts, left)
        parts.append("]")
    else:
        raise Refused("not plain data, or too large")


def _small(numbers) -> bool:
    return -SAFE_INT <= min(numbers) and max(numbers) <= SAFE_INT


def _refuse(_):
    raise Refused("not part of the encoding")


def _small_int(digits: str) -> int:
    if len(digits) > 17 or not -SAFE_INT <= (number := int(digits)) <= SAFE_INT:
        raise Refused("integer out of range")
    return number


# The scanner itself: a program that replaces functions of `json` does not reach it.
_scan = json.JSONDecoder(
    parse_int=_small_int, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_refuse
).scan_once


def _hashable(keys: list) -> list:
    # Equal hashes make a table quadratic to build; real data has few.
    hashes = sorted(map(hash, keys))
    if any(a == b for a, b in zip(hashes, hashes[SAME_HASH:], strict=False)):
        raise Refused("too many equal hashes")
    return keys


def decode(text: bytes | str, depth: int = DEPTH) -> object:
    """The value that `encode` wrote as `text`, as fresh objects. Pure; raises `Refused` for any other input.

    Memory stays below about 30 times the length of `text`, and what comes back below some 20 MB.
    """
    try:
        text = text.decode("ascii") if isinstance(text, bytes) else text
        if text.count("[") > NODES:  # each makes a list of the scanner's, before anything is counted
            raise Refused("too many brackets")
        tree, end = _scan(text, 0)
        if end != len(text):
            raise Refused("text after the value")
        return _build(tree, depth, [NODES, HASHED])
    except Refused:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError, StopIteration) as error:
        raise Refused(f"malformed: {type(error).__name__}") from None


def _build(tree, depth, left):
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise Refused("value is too deep or too large")
    if type(tree) is not list:
        return tree
    tag, parts = tree[0], tree[1:]
    if tag == "i" and len(parts) == 1 and _HEX_INT.fullmatch(parts[0]):
        return int(parts[0], 16)
    if tag == "f" and len(parts) == 1 and _HEX_FLOAT.fullmatch(parts[0]):
        return float.fromhex(parts[0])
    if tag not in ("l", "t", "s", "d"):
        raise Refused("unknown tag")
    left[0] -= CONTAINER - 1
    left[1] -= len(parts) if tag == "s" else len(parts) // 2 if tag == "d" else 0
    if left[1] < 0:
        raise Refused("too many keys and members")
    if list in set(map(type, parts)):
        built = [_build(part, depth - 1, left) for part in parts]
    else:
        built, left[0] = parts, left[0] - len(parts)
        if left[0] < 0 or depth < 1:
            raise Refused("value is too deep or too large")
    if tag == "d":
        return dict(zip(_hashable(built[::2]), built[1::2], strict=True))
    return built if tag == "l" else tuple(built) if tag == "t" else set(_hashable(built))
