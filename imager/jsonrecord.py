"""Frozen dataclasses that go to JSON and come back checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from imager.errors import FormatError
from imager.extents import Extents


@dataclass(frozen=True)
class JsonRecord:
    """Base of dataclasses whose fields are str, int, bool, ``X | None``, ``tuple[X, ...]``,
    ``Extents`` or another record.

    Integers are sizes, offsets, counts and bit sets in this program: never negative.
    """

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values only; extents become ``[offset, length]`` pairs in bytes."""
        return {field.name: _encode(getattr(self, field.name)) for field in fields(self)}

    def to_bytes(self) -> bytes:
        """A JSON document for people too: indented, keys in order, always the same bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Self:
        """The record again. Raises FormatError, which names ``where``, for what is not JSON, and
        as ``from_json``."""
        try:
            document = json.loads(content)
        except ValueError as error:
            raise FormatError(f"{where}: not JSON: {error}") from None
        return cls.from_json(document)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The record again. Unknown keys are ignored, missing ones take the field's default.

        Raises FormatError for a value of the wrong type and for a missing key without default.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"{cls.__name__}: an object was expected, not {_kind(data)}")
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in fields(cls):
            where = f"{cls.__name__}.{field.name}"
            if field.name in data:
                values[field.name] = _decode(hints[field.name], data[field.name], where)
            elif field.default is MISSING and field.default_factory is MISSING:
                raise FormatError(f"{where} is missing")
        return cls(**values)


def _encode(value: object) -> object:
    if isinstance(value, JsonRecord):
        return value.to_json()
    if isinstance(value, Extents):
        return [[extent.offset, extent.length] for extent in value]
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(hint: Any, value: object, where: str) -> object:
    if get_origin(hint) in (UnionType, Union):
        if value is None and NoneType in get_args(hint):
            return None
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is tuple:
        items = _expect(list, value, where)
        return tuple(_decode(get_args(hint)[0], item, where) for item in items)
    if hint is Extents:
        return _decode_extents(_expect(list, value, where), where)
    if issubclass(hint, JsonRecord):
        return hint.from_json(value)
    return _expect(hint, value, where)


def _decode_extents(pairs: list[object], where: str) -> Extents:
    ranges = []
    for pair in pairs:
        numbers = [_expect(int, number, where) for number in _expect(list, pair, where)]
        if len(numbers) != 2 or sum(numbers) >= 1 << 64:
            raise FormatError(f"{where}: not a byte range: {numbers}")
        ranges.append((numbers[0], numbers[1]))
    return Extents(ranges)


def _expect(kind: type, value: object, where: str) -> Any:
    """``value`` when it is exactly of that type (a bool is no int here)."""
    if type(value) is not kind:
        raise FormatError(f"{where}: {kind.__name__} was expected, not {_kind(value)}")
    if kind is int and isinstance(value, int) and value < 0:
        raise FormatError(f"{where}: {value} is negative")
    return value


def _kind(value: object) -> str:
    return type(value).__name__
