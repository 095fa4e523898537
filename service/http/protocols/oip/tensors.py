"""Bodies of the Open Inference Protocol V2: their JSON, the tensors in it and those after it.

A request:  read_parts -> InferRequest -> read_texts, selected_outputs
An answer:  encode_answer

Fields and parameters that mean nothing here (`priority`, `sequence_id`, a model's configuration)
are ignored, as other servers of this protocol ignore them.
"""

import asyncio
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import InvalidRequest, MalformedRequest, TooLarge
from service.http.bodies import content_type, hold, read_body
from service.http.classify import ranked
from service.http.openapi.schemas import MAX_INTEGER, Integer, Lenient, Whole
from service.http.turns import in_turns

INPUTS = ("text", "text_pair")
DEFAULT_OUTPUTS = ("label", "probs")
OUTPUTS = (*DEFAULT_OUTPUTS, "truncated", "tokens", "predicted", "abstained", "revision")

LENGTH_HEADER = "Inference-Header-Content-Length"
MAX_TIMEOUT_MICROSECONDS = 3_600_000_000
# More tensors than any valid request has: a body of junk must not become a long list of faults.
_MAX_TENSORS = 8
_MAX_SHOWN = 64
# Written in a millisecond.
_PART_VALUES = 2048
# `wbits` of `zlib.decompressobj` for each content encoding.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
# BYTES: the length of each element precedes it.
_LENGTH = struct.Struct("<I")
# By the kind of a numpy type: the protocol's name and the binary layout; strings are packed.
_DATATYPES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"O": ("BYTES", "O"), "f": ("FP32", "<f4"), "i": ("INT32", "<i4"), "b": ("BOOL", "?")}
)


class InputParameters(Lenient):
    """binary_data_size: how many of the bytes after the JSON are this tensor's."""

    binary_data_size: Annotated[int, Field(ge=0), Whole] | None = None
    shared_memory_region: object = None


class InputTensor(Lenient):
    """data: row after row, flat or nested like the shape; None if it follows the JSON."""

    name: str
    datatype: str
    shape: list[Integer] = Field(max_length=_MAX_TENSORS)
    parameters: InputParameters | None = None
    data: list[object] | None = None


class OutputParameters(Lenient):
    """classification: return this many of the best classes instead of scores; 0 returns scores."""

    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=0, le=MAX_INTEGER), Whole] = 0
    shared_memory_region: object = None


class RequestedOutput(Lenient):
    name: str
    parameters: OutputParameters | None = None


class RequestParameters(Lenient):
    """timeout: microseconds; 0 is the service's default. truncate: false refuses long texts.
    abstain_below: in place of the adapter's own threshold."""

    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0, le=MAX_TIMEOUT_MICROSECONDS), Whole] = 0
    truncate: bool = True
    abstain_below: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class InferRequest(Lenient):
    """Texts for one model, and which outputs to return."""

    id: str | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] = Field(max_length=_MAX_TENSORS)
    outputs: list[RequestedOutput] | None = Field(default=None, max_length=_MAX_TENSORS)


class IndexRequest(Lenient):
    """ready: leave out adapters that cannot be served."""

    ready: bool = False


class LoadRequest(Lenient):
    """parameters: `config`, a text that is ignored, and one `file:PATH` in base64."""

    parameters: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class SelectedOutput:
    """An output that an answer will have. classes: this many of the best instead of scores."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class OutputTensor:
    """A tensor of an answer: float32, int32, bool, or strings as objects.

    binary: sent after the JSON and not in it.
    """

    name: str
    values: npt.NDArray[Any]
    binary: bool


async def read_parts(request: Request, limit: int) -> tuple[bytes, bytes]:
    """The JSON of a request, empty if it has no body, and the bytes after it.

    Args:
        limit: of the body in bytes, both as sent and decompressed.

    Raises:
        HTTPException: 415, another content type or encoding.
        TooLarge: over `limit` bytes.
        MalformedRequest: it cannot be decompressed, or is shorter than its announced JSON.
        Overloaded, ...: as `read_body`.
    """
    kind = content_type(request)
    # Triton's client names no type. Neither may a web page of another origin, and its browser would
    # not ask first; but such a request has an origin.
    if not kind and "origin" in request.headers:
        raise HTTPException(415, "no Content-Type, expected application/json")
    if kind not in ("", "application/json", "application/octet-stream"):
        raise HTTPException(415, f"Content-Type is {kind[:64]}, expected application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOW_BITS:
        known = ", ".join(_WINDOW_BITS)
        raise HTTPException(415, f"Content-Encoding is {encoding[:64]}, expected {known} or none")

    body = await read_body(request, limit)
    if encoding != "identity":
        body = await asyncio.to_thread(_decompress, body, encoding, limit)
        hold(request, len(body))
    announced = request.headers.get(LENGTH_HEADER)
    if announced is None:
        return body, b""
    # `isdigit` alone also accepts the digits of other scripts.
    is_number = announced.isascii() and announced.isdigit()
    if not is_number or int(announced[:20]) > len(body):
        raise MalformedRequest(
            f"{LENGTH_HEADER} is {announced[:20]!r}, the body has {len(body)} bytes"
        )
    length = int(announced[:20])
    return body[:length], body[length:]


def _decompress(data: bytes, encoding: str, limit: int) -> bytes:
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        body = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if len(body) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes when decompressed")
    if not stream.eof or stream.unused_data:
        fault = "has bytes after its end" if stream.eof else "is cut off"
        raise MalformedRequest(f"the body's {encoding} stream {fault}")
    return body


def read_texts(
    inputs: Sequence[InputTensor], attached: bytes, *, limit: int
) -> list[tuple[str, str | None]]:
    """The texts and pairs of a request.

    `text` is [N] or [N, 1], with as many in `text_pair` if they are pairs; or [N, 2], both in one.
    An empty string is a text like any other, also as the second of a pair.

    Args:
        attached: the bytes after the JSON.
        limit: of texts.

    Raises:
        InvalidRequest: a tensor is missing, unknown, of a wrong type or shape, or its data does not
        fit its shape.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    rest = memoryview(attached)
    for tensor in inputs:
        place = f"input {_shown(tensor.name)}"
        if tensor.name not in INPUTS:
            raise _invalid(f"{place}: no such input; there are {', '.join(INPUTS)}")
        if tensor.name in arrays:
            raise _invalid(f"{place}: given twice")
        try:
            arrays[tensor.name], rest = _read_tensor(tensor, rest, limit)
        except InvalidRequest as error:
            raise _invalid(f"{place}: {error}") from None
    if "text" not in arrays:
        raise _invalid("input 'text': missing")
    if rest:
        raise _invalid(f"{len(rest)} bytes after the JSON belong to no input")
    texts, pairs = arrays["text"], arrays.get("text_pair")
    if texts.shape[1] == 2:
        if pairs is not None:
            raise _invalid("input 'text_pair': 'text' is of shape [N, 2] and has the pairs already")
        return [(text, pair) for text, pair in texts.tolist()]
    if pairs is None:
        return [(text, None) for text in texts[:, 0].tolist()]
    if len(pairs) != len(texts):
        raise _invalid(f"input 'text_pair': {len(pairs)} texts, but 'text' has {len(texts)}")
    return list(zip(texts[:, 0].tolist(), pairs[:, 0].tolist(), strict=True))


def _read_tensor(
    tensor: InputTensor, rest: memoryview, limit: int
) -> tuple[npt.NDArray[np.object_], memoryview]:
    """Strings [N, 1 or 2], and the attached bytes that are left for the next tensors."""
    parameters = tensor.parameters or InputParameters()
    if parameters.shared_memory_region is not None:
        raise _invalid("shared memory is not supported")
    rows, columns = _dimensions(tensor, limit)
    size = parameters.binary_data_size
    if size is None:
        if tensor.data is None:
            raise _invalid("no 'data', and no 'binary_data_size' of bytes after the JSON")
        strings = _flatten(tensor.data, tensor.shape, rows * columns)
    else:
        if tensor.data is not None:
            raise _invalid("'data' and 'binary_data_size' exclude each other")
        if size > len(rest):
            raise _invalid(f"binary_data_size is {size}, the body has {len(rest)} bytes left")
        strings = list(unpack_strings(rest[:size], rows * columns))
        rest = rest[size:]
    # Not np.array(strings), which would make an array of fixed-width strings.
    array = np.empty(rows * columns, dtype=object)
    array[:] = strings
    return array.reshape(rows, columns), rest


def _dimensions(tensor: InputTensor, limit: int) -> tuple[int, int]:
    """Rows and columns."""
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


def _flatten(data: Sequence[object], shape: Sequence[int], count: int) -> list[str]:
    """The `count` strings of a tensor's `data`; rows may be lists if the shape has two numbers."""
    if len(shape) == 2 and any(isinstance(row, list) for row in data):
        if len(data) != shape[0]:
            raise _invalid(f"{len(data)} rows, its shape says {shape[0]}")
        elements: list[object] = []
        for index, row in enumerate(data):
            if not isinstance(row, list) or len(row) != shape[1]:
                raise _invalid(f"row {index} is not a list of {shape[1]}, as its shape says")
            elements += row
        data = elements
    # Checked first, so that a list that is far too long is not searched.
    if len(data) != count:
        raise _invalid(f"{len(data)} elements, its shape says {count}")
    strings = [element for element in data if isinstance(element, str)]
    if len(strings) < count:
        index = next(index for index, element in enumerate(data) if not isinstance(element, str))
        raise _invalid(f"element {index} is not a string")
    return strings


def selected_outputs(request: InferRequest) -> list[SelectedOutput]:
    """The outputs that a request names, in its order; `DEFAULT_OUTPUTS` if it names none.

    Raises:
        InvalidRequest: an output is unknown, named twice, or has a parameter that it cannot have.
    """
    all_binary = request.parameters is not None and request.parameters.binary_data_output
    if not request.outputs:
        return [SelectedOutput(name, all_binary) for name in DEFAULT_OUTPUTS]
    selected: dict[str, SelectedOutput] = {}
    for output in request.outputs:
        name, parameters = output.name, output.parameters or OutputParameters()
        place = f"output {_shown(name)}"
        if name not in OUTPUTS:
            raise _invalid(f"{place}: no such output; there are {', '.join(OUTPUTS)}")
        if name in selected:
            raise _invalid(f"{place}: named twice")
        if parameters.shared_memory_region is not None:
            raise _invalid(f"{place}: shared memory is not supported")
        if parameters.classification and name != "probs":
            raise _invalid(f"{place}: 'classification' is for 'probs'")
        binary = all_binary if parameters.binary_data is None else parameters.binary_data
        selected[name] = SelectedOutput(name, binary, parameters.classification)
    return list(selected.values())


async def encode_answer(
    head: Mapping[str, Any], outputs: Sequence[OutputTensor]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if tensors follow that.

    Args:
        head: the fields of the JSON before its outputs.
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
            packed = (
                map(pack_strings, _parts(flat))
                if layout == "O"
                else [flat.astype(layout).tobytes()]
            )
            data = b"".join(await in_turns(packed))
            attached.append(data)
            tensors.append(tensor | {"parameters": {"binary_data_size": len(data)}})
        else:
            listed = (orjson.dumps(part.tolist())[1:-1] for part in _parts(flat))
            parts = await in_turns(listed)
            tensors.append(tensor | {"data": orjson.Fragment(b"[" + b",".join(parts) + b"]")})
    text = orjson.dumps({**head, "outputs": tensors})
    return b"".join([text, *attached]), len(text) if attached else None


def _parts(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(values), _PART_VALUES):
        yield values[start : start + _PART_VALUES]


def top_classes(
    scores: npt.NDArray[np.float32], labels: Sequence[str], count: int
) -> Iterator[list[str]]:
    """`score:index:label` of the best labels of each row, the best first: [N, at most count].

    Args:
        scores: [N, labels].
    """
    for row in scores:
        yield [f"{score:f}:{index}:{labels[index]}" for index, score in ranked(row, count)]


def pack_strings(strings: Iterable[str]) -> bytes:
    """Elements of BYTES, each after its length."""
    encoded = [text.encode() for text in strings]
    return b"".join(part for data in encoded for part in (_LENGTH.pack(len(data)), data))


def unpack_strings(data: bytes | memoryview, count: int) -> Iterator[str]:
    """The inverse of `pack_strings` for `count` elements.

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
        raise _invalid(f"{len(view) - end} bytes are left after its {count} elements")


def _invalid(fault: str) -> InvalidRequest:
    return InvalidRequest([fault])


def _shown(name: str) -> str:
    """A name that the client sent, short enough for a sentence."""
    return repr(name[:_MAX_SHOWN])
