"""The arrays of a run in the least room that gives them back exactly: what a bundle on the board holds.

Outcomes become a table (:func:`tabulated`): arrays of one type lie in one array, so that a compressor sees what they share, and
queries of one class next to each other, since their outcomes are similar. Percentages that are ``k`` of ``n`` are stored as ``k``. Adversarial images
become indices (:func:`stacked`) into the few values that their pixels take. Bundles made before the table
hold each array for itself, in its smallest type (:func:`narrowed`); they are read by the same function.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped, UInt

from dmlbench.errors import DataError
from dmlbench.plain import read_json

LABEL, STEPS, COLUMNS = "table/label", "table/steps", "table/columns"
"""Members of a table: each query's class, the differences of the queries' rows, and what the columns are, as JSON."""

MOST = 65534
"""The largest n of a share: 65535 stands for a missing one."""


def tabulated(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outcomes of Q queries as a table; without ``query`` and ``label``, as :func:`narrowed` has them.

    ``table/label`` (Q,) and ``table/steps`` (Q,) are in the run's order. ``table/<type>`` (K, Q, ...) are K arrays of that type,
    the queries ordered by class. ``table/columns`` is a JSON list of ``[name, member, n]`` in the order in which they lie in
    their members; ``n`` is null, or the number of entries of which a percentage is a share: the member then holds
    ``k`` with value ``100 * (k / n)`` in float32, and its type's largest number for NaN. Arrays of other lengths stay by themselves.
    """
    label, query = arrays.get("label"), arrays.get("query")
    if label is None or query is None or label.ndim != 1 or query.shape != label.shape or query.dtype.kind not in "iu":
        return narrowed(arrays)
    order = label.argsort(kind="stable")
    columns: list[tuple[str, str, int | None]] = []
    stacks: dict[str, list[np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for name in sorted(set(arrays) - {"label", "query"}):
        values = arrays[name]
        if values.shape[:1] != label.shape:
            rest[name] = values
            continue
        column, n = _shares(values) or (_narrow(values), None)
        member = "-".join([f"table/{column.dtype}", *map(str, column.shape[1:])])
        columns.append((name, member, n))
        stacks.setdefault(member, []).append(column[order])
    return {
        **narrowed(rest),
        LABEL: _narrow(label),
        STEPS: _narrow(np.diff(query.astype(np.int64), prepend=0)),
        COLUMNS: np.frombuffer(json.dumps(columns).encode(), np.uint8),
        **{member: np.stack(parts) for member, parts in stacks.items()},
    }


def untabulated(members: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outcomes again, from a table or from arrays that lie by themselves, in the types of :func:`widened`.

    Raises:
        ValueError: the members do not fit one another.
    """
    rest = dict(members)
    label, steps, text = (rest.pop(name, None) for name in (LABEL, STEPS, COLUMNS))
    if label is None and steps is None and text is None:
        return widened(members)
    if label is None or steps is None or text is None:
        raise ValueError(f"{LABEL}, {STEPS} and {COLUMNS} are not all there")
    if label.ndim != 1 or steps.shape != label.shape or label.dtype.kind not in "iu" or steps.dtype.kind not in "iu":
        raise ValueError(f"{LABEL} and {STEPS} are not one whole number for each query")
    if not rest.keys().isdisjoint(("label", "query")):
        raise ValueError("label or query lies beside table/label and table/steps")
    columns = read_json(text.tobytes())
    if not isinstance(columns, list) or not all(map(_is_column, columns)):
        raise ValueError(f"{COLUMNS} is not a list of [name, member, n]")
    stacks = {member: rest.pop(member, None) for member in dict.fromkeys(member for _, member, _ in columns)}
    order = label.argsort(kind="stable")
    arrays = {"label": label, "query": steps.cumsum(dtype=np.int64), **rest}
    taken = dict.fromkeys(stacks, 0)
    for name, member, n in columns:
        stack, at = stacks[member], taken[member]
        if stack is None or stack.shape[1:2] != label.shape or at >= len(stack):
            raise ValueError(f"{member} is not an array of all columns that {COLUMNS} names, for each query")
        if name in arrays:
            raise ValueError(f"{COLUMNS} names {name!r} twice, or another array")
        if n is not None and stack.dtype.kind != "u":
            raise ValueError(f"{member} holds no shares")
        arrays[name] = np.empty_like(stack[at])
        arrays[name][order] = stack[at]
        if n is not None:
            arrays[name] = _percent(arrays[name], n)
        taken[member] += 1
    if any(stack is not None and taken[member] < len(stack) for member, stack in stacks.items()):
        raise ValueError(f"{COLUMNS} names fewer columns than there are")
    return widened(arrays)


def _is_column(item: object) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 3
        and all(isinstance(text, str) for text in item[:2])
        and (item[2] is None or (type(item[2]) is int and 0 < item[2] <= MOST))
    )


def _percent(k: UInt[np.ndarray, "*q"], n: int) -> Float[np.ndarray, "*q"]:
    """100 * (k / n) in float32; NaN for the largest number of the type."""
    values = k.astype(np.float32) / np.float32(n) * np.float32(100)
    values[k == np.iinfo(k.dtype).max] = np.nan
    return values


def _shares(values: Shaped[np.ndarray, "*q"]) -> tuple[np.ndarray, int] | None:
    """(k, n) with :func:`_percent` of them the same bits, for the smallest n there is; None without one."""
    missing = np.isnan(values) if values.dtype == np.float32 else None
    if missing is None or missing.all() or np.signbit(values[~missing]).any() or values[~missing].max() > 100:
        return None
    some = np.quantile(values[~missing], np.linspace(0, 1, 7), method="nearest")
    possible = np.arange(1, MOST + 1)
    for value in some:
        k = np.rint(value * possible / np.float64(100)).astype(np.float32)
        possible = possible[k / possible.astype(np.float32) * np.float32(100) == value]
    for n in possible[:8]:
        k = np.rint(values[~missing] * n / np.float64(100)).astype(np.int64)
        kind = np.uint8 if k.max() < np.iinfo(np.uint8).max else np.uint16
        counts = np.full(values.shape, np.iinfo(kind).max, kind)
        counts[~missing] = k
        if np.array_equal(_percent(counts, int(n)), values, equal_nan=True):
            return counts, int(n)
    return None


def narrowed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each array in the smallest type that holds every value of it exactly: whole numbers from 0 up unsigned, others in
    half floats. :func:`widened` undoes it."""
    return {name: _narrow(values) for name, values in arrays.items()}


def _narrow(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "iu" and values.min(initial=0) >= 0:
        return values.astype(min(np.min_scalar_type(values.max(initial=0)), values.dtype, key=lambda t: t.itemsize))
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return half if np.array_equal(half.astype(values.dtype), values, equal_nan=True) else values
    return values


def widened(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What :func:`narrowed` made small, and no run has, in the types that sums and indices are made with: unsigned
    numbers as int64, half floats as float32."""
    wide = {"u": np.int64, "f": np.float32}
    return {
        name: values.astype(wide[values.dtype.kind])
        if values.dtype.kind == "u" or values.dtype == np.float16
        else values
        for name, values in arrays.items()
    }


def stacked(sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample with its adversarial images as one array of indices into the few values that their pixels take.

    Parts share clean images and step lengths, so this is what compresses; :func:`unstacked` gives the same bits back.
    ``stack/names`` lists the P parts as JSON, ``stack/values`` is float32, ``stack/index`` (S, C, H, W, P).
    """
    names = [name for name, values in sample.items() if values.ndim == 4 and values.dtype == np.float32]
    if not names or len({sample[name].shape for name in names}) > 1:
        return dict(sample)
    bits = np.stack([sample[name] for name in names], axis=-1).view(np.uint32)
    values, index = np.unique(bits, return_inverse=True)
    return {
        **{name: array for name, array in sample.items() if name not in names},
        "stack/names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
        "stack/values": values.view(np.float32),
        "stack/index": _narrow(index.reshape(bits.shape)),
    }


def unstacked(sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sample with one array (S, C, H, W) of adversarial images for each part.

    Raises:
        ValueError: the arrays of the stack do not fit one another.
    """
    rest = dict(sample)
    names, values, index = (rest.pop(f"stack/{key}", None) for key in ("names", "values", "index"))
    if (names is None) != (values is None) or (names is None) != (index is None):
        raise ValueError("stack/names, stack/values and stack/index are not all there")
    if names is None or values is None or index is None:
        return dict(sample)
    parts = read_json(names.tobytes())
    if not isinstance(parts, list) or not all(isinstance(name, str) for name in parts):
        raise ValueError("stack/names is not a list of texts")
    if len(set(parts)) < len(parts) or not rest.keys().isdisjoint(parts):
        raise ValueError("stack/names holds a name twice, or that of another array")
    fits = index.dtype.kind == "u" and index.ndim == 5 and values.ndim == 1 and values.dtype == np.float32
    if not fits or len(parts) != index.shape[-1] or (index.size and index.max() >= len(values)):
        raise ValueError("stack/index does not fit stack/names and stack/values")
    return {**rest, **{name: values[index[..., i]] for i, name in enumerate(parts)}}


def npz_bytes(arrays: Mapping[str, np.ndarray], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A compressed npz with the same bytes for the same arrays, whenever it is made.

    Args:
        compression: of :mod:`zipfile`; ``ZIP_LZMA`` takes a third less room and several times as long.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as bundle:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name.replace('/', '|')}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            bundle.writestr(info, member.getvalue(), compress_type=compression)
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an npz file; nothing is unpickled."""
    try:
        raw = path.read_bytes()
        with np.load(io.BytesIO(raw), allow_pickle=False) as data:
            if len(data.files) != int.from_bytes(raw[-12:-10], "little"):  # what the zip's end says, unread by zipfile
                raise ValueError("its list of arrays is damaged")
            return {name.replace("|", "/"): data[name] for name in data.files}
    except Exception as error:  # zipfile, zlib, numpy and OS errors alike mean: not readable
        raise DataError(f"{path} cannot be read: {error}") from None
