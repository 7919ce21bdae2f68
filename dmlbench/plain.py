"""JSON and YAML that a stranger wrote, read into plain values: text, numbers, true, false, null, lists and mappings.

Both refuse what two readers could understand differently (a key twice, numbers that are none) and what takes more work
than its bytes are worth. The work is linear in the bytes; ``tests/test_bounds.py`` holds them to it.
"""

import json
import math
import re
from typing import Any, ClassVar

import yaml

MOST_DIGITS = 18
"""Digits of a whole number."""
MOST_NODES = 20_000
"""Values and keys in a YAML file."""


def read_json(raw: bytes | str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not UTF-8 or not JSON, a key is there twice, a number is infinite, not a number or longer than
            :data:`MOST_DIGITS`, or it is nested too deeply.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    pairs_by_key = dict(pairs)
    if len(pairs_by_key) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} is there twice")
            seen.add(key)
    return pairs_by_key


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"holds a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text[:40]}, which is not a finite number")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"holds {name}, which is not a number")


class _Loader(yaml.SafeLoader):
    """The values that JSON has, without aliases, merges and tags, and with each key once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise yaml.YAMLError(f"holds more than {MOST_NODES} values")
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def mapping(self, node: Any) -> Any:
        seen: set[str] = set()
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError("holds something else than its tag says")
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a key is no plain text")
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value[:80]!r} is there twice")
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}  # type: ignore[no-untyped-call]

    def sequence(self, node: Any) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            raise yaml.YAMLError("holds something else than its tag says")
        return [self.construct_object(item, deep=True) for item in node.value]  # type: ignore[no-untyped-call]

    def foreign(self, node: Any) -> Any:
        raise yaml.YAMLError(f"tag {str(node.tag)[:80]!r} is not allowed")


_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|", "~n", lambda text: None),
    ("bool", r"true|false", "tf", lambda text: text == "true"),
    ("int", rf"[-+]?(0|[1-9][0-9]{{0,{MOST_DIGITS - 1}}})", "-+0123456789", int),
    ("float", r"[-+]?[0-9]{1,40}\.[0-9]{0,40}([eE][-+]?[0-9]{1,3})?", "-+0123456789", _finite),
)
"""The kinds of plain scalars that are not text: pattern, first characters, value."""


def _scalar(pattern: str, read: Any) -> Any:
    def made(loader: _Loader, node: Any) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(pattern, node.value):
            raise yaml.YAMLError(f"{str(node.value)[:40]!r} is not what its tag says")
        return read(node.value)

    return made


for _kind, _pattern, _first, _read in _SCALARS:
    _Loader.add_implicit_resolver(
        _TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), [*_first, *([""] * (_kind == "null"))]
    )  # type: ignore[no-untyped-call]
    _Loader.add_constructor(_TAG + _kind, _scalar(_pattern, _read))
_Loader.add_constructor(_TAG + "str", _scalar(r"(?s:.*)", str))
_Loader.add_constructor(_TAG + "seq", _Loader.sequence)
_Loader.add_constructor(_TAG + "map", _Loader.mapping)
_Loader.add_constructor(None, _Loader.foreign)


def read_yaml(raw: bytes) -> Any:
    """The content of a YAML text that holds what JSON could: no tags, aliases, dates, other notations of numbers.

    Raises:
        ValueError: it is not UTF-8 or not such YAML, or holds more than :data:`MOST_NODES` values.
    """
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_Loader)  # a SafeLoader: no tag makes an object
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
