"""The JSON of the Open Inference Protocol V2's requests. Knows no tensor's bytes and no route.

Strict in what it names. Fields and parameters that select nothing here (`priority`, `sequence_id`,
a model's configuration) are ignored, as the servers of this protocol ignore them.
"""

import asyncio
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import InvalidRequest, MalformedRequest, TooLarge
from service.http.bodies import read_body
from service.http.errors import faults_of

# --- merged from service.routes.oip_schemas

# Microseconds.
MAX_TIMEOUT = 3_600_000_000
# More than any valid request has: a body of junk must not become a list of its faults.
_MANY = 8


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class InputParameters(_Lenient):
    """binary_data_size: bytes behind the JSON that are this tensor's."""

    binary_data_size: int | None = Field(default=None, ge=0)
    shared_memory_region: object = None


class InputTensor(_Lenient):
    """data: row after row, flat or nested as the shape says; None if it follows the JSON."""

    name: str
    datatype: str
    shape: list[int] = Field(max_length=_MANY)
    parameters: InputParameters | None = None
    data: list[object] | None = None


class OutputParameters(_Lenient):
    """classification: how many of the best classes to return instead of scores; 0 is scores."""

    binary_data: bool | None = None
    classification: int = Field(default=0, ge=0)
    shared_memory_region: object = None


class RequestedOutput(_Lenient):
    name: str
    parameters: OutputParameters | None = None


class RequestParameters(_Lenient):
    """timeout: microseconds; 0 is the service's default. truncate: false refuses long texts."""

    binary_data_output: bool = False
    timeout: int = Field(default=0, ge=0, le=MAX_TIMEOUT)
    truncate: bool = True


class InferRequest(_Lenient):
    """Texts for one model, and what to say of them."""

    id: str | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] = Field(max_length=_MANY)
    outputs: list[RequestedOutput] | None = Field(default=None, max_length=_MANY)


class IndexRequest(_Lenient):
    """ready: leave out what cannot be asked."""

    ready: bool = False


class LoadRequest(_Lenient):
    """parameters: `config`, text which is not looked at, and one `file:PATH`, base64."""

    parameters: dict[str, object] | None = None


# --- merged from service.routes.oip_bodies

M = TypeVar("M", bound=BaseModel)

LENGTH_HEADER = "Inference-Header-Content-Length"
# What `zlib.decompressobj` must be told of a format.
_WINDOWS = {"gzip": 31, "deflate": 15}


async def read_parts(request: Request, limit: int) -> tuple[bytes, bytes]:
    """The JSON of a request, empty if it has no body, and the bytes behind it.

    Args:
        limit: of the body in bytes, as it comes and decompressed.

    Raises:
        HTTPException: 415, another kind of body.
        TooLarge: over `limit` bytes.
        MalformedRequest: it cannot be decompressed, or has no JSON of the announced length.
        ClientDisconnect: the client went away while sending.
    """
    _check_kind(request)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOWS:
        known = ", ".join(_WINDOWS)
        raise HTTPException(415, f"Content-Encoding is {encoding[:64]}, expected {known} or none")
    body = await read_body(request, limit)
    if encoding in _WINDOWS:
        body = await asyncio.to_thread(_decompressed, body, encoding, limit)
    announced = request.headers.get(LENGTH_HEADER)
    if announced is None:
        return body, b""
    # Digits of other scripts are digits, too.
    plain = announced.isascii() and announced.isdigit()
    if not plain or int(announced[:20]) > len(body):
        raise MalformedRequest(
            f"{LENGTH_HEADER} is {announced[:20]!r}, the body has {len(body)} bytes"
        )
    length = int(announced[:20])
    return body[:length], body[length:]


def parsed(model: type[M], text: bytes) -> M:
    """JSON as a model.

    Raises:
        MalformedRequest: not JSON.
        InvalidRequest: with every fault and its place.
    """
    try:
        content: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(faults_of(error.errors())) from None


def _check_kind(request: Request) -> None:
    """
    Raises:
        HTTPException: 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Triton's client names none. A web page may do so too without its browser asking first whether
    # it may, but its requests have an origin.
    if not kind and "origin" in request.headers:
        raise HTTPException(415, "no Content-Type, expected application/json")
    if kind not in ("", "application/json", "application/octet-stream"):
        raise HTTPException(415, f"Content-Type is {kind[:64]}, expected application/json")


def _decompressed(data: bytes, encoding: str, limit: int) -> bytes:
    stream = zlib.decompressobj(_WINDOWS[encoding])
    try:
        found = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if len(found) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes when decompressed")
    if not stream.eof or stream.unused_data:
        fault = "has bytes behind its end" if stream.eof else "is cut off"
        raise MalformedRequest(f"the body's {encoding} stream {fault}")
    return found


# --- merged from service.routes.oip_tensors

INPUTS = ("text", "text_pair")
DEFAULT_OUTPUTS = ("label", "probs")
OUTPUTS = (*DEFAULT_OUTPUTS, "truncated", "tokens")

_LENGTH = struct.Struct("<I")
# By numpy's kind: the protocol's name, and the bytes that travel; strings are packed instead.
_DATATYPES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"O": ("BYTES", "O"), "f": ("FP32", "<f4"), "i": ("INT32", "<i4"), "b": ("BOOL", "?")}
)
_MAX_SHOWN = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output as it was asked for. classes: so many of the best instead of scores."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """A tensor of an answer: float32, int32, bool, or strings as objects; its shape is the array's.

    binary: behind the JSON and not in it.
    """

    name: str
    values: npt.NDArray[Any]
    binary: bool


def texts_of(
    inputs: Sequence[InputTensor], attached: bytes, *, limit: int
) -> list[tuple[str, str | None]]:
    """Texts and pairs of a request.

    `text` is [N] or [N, 1], with as many in `text_pair` if they are pairs; or [N, 2], both in one.
    An empty string is a text like any other, also as the second of a pair.

    Args:
        attached: what follows the JSON.
        limit: of texts.

    Raises:
        InvalidRequest: tensors that are missing, unknown, of a wrong type or shape, or not what
        their shape says.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    rest = memoryview(attached)
    for tensor in inputs:
        shown = _shown(tensor.name)
        if tensor.name not in INPUTS:
            raise _invalid(f"input {shown}: no such input; there are {', '.join(INPUTS)}")
        if tensor.name in found:
            raise _invalid(f"input {shown}: given twice")
        try:
            found[tensor.name], rest = _read(tensor, rest, limit)
        except InvalidRequest as error:
            raise _invalid(f"input {shown}: {error}") from None
    if "text" not in found:
        raise _invalid("input 'text': missing")
    if rest:
        raise _invalid(f"{len(rest)} bytes behind the JSON belong to no input")
    texts, pairs = found["text"], found.get("text_pair")
    if texts.shape[1] == 2:
        if pairs is not None:
            raise _invalid("input 'text_pair': 'text' is of shape [N, 2] and has the pairs already")
        return [(text, pair) for text, pair in texts.tolist()]
    if pairs is None:
        return [(text, None) for text in texts[:, 0].tolist()]
    if len(pairs) != len(texts):
        raise _invalid(f"input 'text_pair': {len(pairs)} texts, but 'text' has {len(texts)}")
    return list(zip(texts[:, 0].tolist(), pairs[:, 0].tolist(), strict=True))


def wanted_of(request: InferRequest) -> list[Wanted]:
    """The outputs that a request asks for, in its order; naming none is `DEFAULT_OUTPUTS`.

    Raises:
        InvalidRequest: an output that is unknown, named twice, or asked for as it cannot be.
    """
    every = request.parameters is not None and request.parameters.binary_data_output
    if not request.outputs:
        return [Wanted(name, every) for name in DEFAULT_OUTPUTS]
    found: dict[str, Wanted] = {}
    for output in request.outputs:
        name, parameters = output.name, output.parameters or OutputParameters()
        place = f"output {_shown(name)}"
        if name not in OUTPUTS:
            raise _invalid(f"{place}: no such output; there are {', '.join(OUTPUTS)}")
        if name in found:
            raise _invalid(f"{place}: named twice")
        if parameters.shared_memory_region is not None:
            raise _invalid(f"{place}: shared memory is not supported")
        if parameters.classification and name != "probs":
            raise _invalid(f"{place}: 'classification' is for 'probs'")
        binary = every if parameters.binary_data is None else parameters.binary_data
        found[name] = Wanted(name, binary, parameters.classification)
    return list(found.values())


def encoded(head: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if tensors follow that.

    Args:
        head: what the JSON says before its outputs.
    """
    tensors, attached = [], []
    for output in outputs:
        datatype, layout = _DATATYPES[output.values.dtype.kind]
        tensor: dict[str, Any] = {
            "name": output.name,
            "shape": list(output.values.shape),
            "datatype": datatype,
        }
        flat = output.values.ravel()
        if output.binary:
            data = packed(flat) if layout == "O" else flat.astype(layout).tobytes()
            attached.append(data)
            tensors.append(tensor | {"parameters": {"binary_data_size": len(data)}})
        else:
            tensors.append(tensor | {"data": flat.tolist()})
    start = orjson.dumps({**head, "outputs": tensors})
    return b"".join([start, *attached]), len(start) if attached else None


def packed(strings: Sequence[str] | npt.NDArray[Any]) -> bytes:
    """Elements of BYTES, each behind its length."""
    encoded = [text.encode() for text in strings]
    return b"".join(part for data in encoded for part in (_LENGTH.pack(len(data)), data))


def unpacked(data: bytes | memoryview, count: int) -> Iterator[str]:
    """The `count` elements that `packed` made these bytes of.

    Raises:
        InvalidRequest: there are fewer or more of them, or one is not UTF-8.
    """
    view, end = memoryview(data), 0
    for index in range(count):
        start = end + _LENGTH.size
        if start > len(view):
            raise _invalid(f"the data ends before element {index} of {count}")
        end = start + _LENGTH.unpack_from(view, end)[0]
        if end > len(view):
            raise _invalid(f"the data ends within element {index} of {count}")
        try:
            yield str(view[start:end], "utf-8")
        except UnicodeDecodeError:
            raise _invalid(f"element {index} is not UTF-8") from None
    if end < len(view):
        raise _invalid(f"{len(view) - end} bytes are left behind its {count} elements")


def classes_of(
    scores: npt.NDArray[np.float32], labels: Sequence[str], count: int
) -> npt.NDArray[np.object_]:
    """`score:index:label` of the best labels of each row, the best first: [N, at most count].

    Args:
        scores: [N, labels].
    """
    # Stable: of equal scores the earlier label, as everywhere.
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    rows = [
        [f"{row[index]:f}:{index}:{labels[index]}" for index in order]
        for row, order in zip(scores, best, strict=True)
    ]
    return np.array(rows, dtype=object)


def _read(
    tensor: InputTensor, rest: memoryview, limit: int
) -> tuple[npt.NDArray[np.object_], memoryview]:
    """Strings [N, 1 or 2], and what of the attached bytes is left for the next tensor."""
    parameters = tensor.parameters or InputParameters()
    if parameters.shared_memory_region is not None:
        raise _invalid("shared memory is not supported")
    rows, columns = _shape_of(tensor, limit)
    size = parameters.binary_data_size
    if size is None:
        if tensor.data is None:
            raise _invalid("no 'data', and no 'binary_data_size' of what follows the JSON")
        strings = _flat(tensor.data, tensor.shape, rows * columns)
    else:
        if tensor.data is not None:
            raise _invalid("'data' and 'binary_data_size' exclude each other")
        if size > len(rest):
            raise _invalid(f"binary_data_size is {size}, the body has {len(rest)} bytes left")
        strings = list(unpacked(rest[:size], rows * columns))
        rest = rest[size:]
    # Not np.array(strings): it would take their lengths for a type.
    found = np.empty(rows * columns, dtype=object)
    found[:] = strings
    return found.reshape(rows, columns), rest


def _shape_of(tensor: InputTensor, limit: int) -> tuple[int, int]:
    if tensor.datatype != "BYTES":
        raise _invalid(f"datatype {_shown(tensor.datatype)}, expected 'BYTES'")
    shape, widths = tensor.shape, (1, 2) if tensor.name == "text" else (1,)
    if not 1 <= len(shape) <= 2 or shape[0] < 0 or (len(shape) == 2 and shape[1] not in widths):
        pairs = " or, for pairs, [N, 2]" if 2 in widths else ""
        raise _invalid(f"shape {shape}, expected [N] or [N, 1]{pairs}")
    if shape[0] == 0:
        raise _invalid(f"shape {shape}, expected at least one text")
    if shape[0] > limit:
        raise _invalid(f"shape {shape}, at most {limit} texts are allowed")
    return shape[0], shape[1] if len(shape) == 2 else 1


def _flat(data: Sequence[object], shape: Sequence[int], count: int) -> list[str]:
    """The `count` strings of a tensor's `data`, whose rows may be lists if its shape has rows."""
    if len(shape) == 2 and any(isinstance(row, list) for row in data):
        if len(data) != shape[0]:
            raise _invalid(f"{len(data)} rows, its shape says {shape[0]}")
        items: list[object] = []
        for index, row in enumerate(data):
            if not isinstance(row, list) or len(row) != shape[1]:
                raise _invalid(f"row {index} is not a list of {shape[1]}, as its shape says")
            items += row
        data = items
    # First: what is far too long is not looked through.
    if len(data) != count:
        raise _invalid(f"{len(data)} elements, its shape says {count}")
    strings = [item for item in data if isinstance(item, str)]
    if len(strings) < count:
        index = next(index for index, item in enumerate(data) if not isinstance(item, str))
        raise _invalid(f"element {index} is not a string")
    return strings


def _invalid(fault: str) -> InvalidRequest:
    return InvalidRequest([fault])


def _shown(name: str) -> str:
    """A name of the caller's, at a length that fits a sentence."""
    return repr(name[:_MAX_SHOWN])
