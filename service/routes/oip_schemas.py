"""The JSON of the Open Inference Protocol V2's requests. Knows no tensor's bytes and no route.

Strict in what it names. Fields and parameters that select nothing here (`priority`, `sequence_id`,
a model's configuration) are ignored, as the servers of this protocol ignore them.
"""

from pydantic import BaseModel, ConfigDict, Field

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
