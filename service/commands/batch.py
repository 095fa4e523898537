"""`python -m service batch IN OUT`: a file of any number of texts over one service or several.

The output has one answer for each input, in order. It is all that is kept of a job: a run that was
stopped is begun again with the same command, and goes on after the last whole answer.
"""

import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from time import monotonic
from typing import TYPE_CHECKING

from cli.shell import Command, CommandFailed
from cli.text_files import TextFile
from service.client import ClientError, ErrorContent, Input, Retries, Unanswered
from service.client.environment import api_key, ca_file, service_url
from service.client.errors import describe
from service.commands.flags import OF_URL, add_answers, add_key, options_of, positive_seconds
from service.commands.journal import (
    FORMATS,
    STDOUT,
    Answer,
    FailedLine,
    Journal,
    Write,
    failed_line,
    format_of,
    open_journal,
)
from service.commands.reading import (
    MAX_LINE_BYTES,
    READERS,
    STDIN,
    TEXT,
    BadLine,
    Record,
    TextColumns,
    name_of,
    open_inputs,
    read_jsonl_on,
    reader_of,
    tell_terminal,
)
from service.commands.reading import format_of as input_format_of

if TYPE_CHECKING:
    from service.client.background import Background
    from service.commands.progress import Advance

# All inputs have an answer or an error, and there are errors.
SOME_FAILED = 1
# Inputs that were read and not yet written; the lines on their way have a bound of their own.
_HELD = 50_000
# Written at once.
_PIECE_BYTES = 64 * 1024
# Errors that every text without an adapter of its own would have.
_OF_THE_ADAPTER = frozenset(
    {
        *("adapter_damaged", "adapter_incompatible", "adapter_not_found", "adapter_unloaded"),
        "revision_not_found",
    }
)
# Between two notices of a service that fails.
_NOTICE_SECONDS = 10.0
_LOOK_SECONDS = 0.2


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="IN",
        help="texts, one a line, or .jsonl, .csv, .tsv, each also .gz; - is standard input",
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        help="answers as .jsonl, .csv or .tsv; a run goes on where the last one stopped; - is "
        "standard output",
    )
    parser.add_argument("--adapter", metavar="NAME", help="for texts that name no adapter")
    parser.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help=f"of a service, once for each replica; {OF_URL}",
    )
    add_key(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever OUT has already"
    )
    reading = parser.add_argument_group("reading and writing")
    reading.add_argument(
        "--input-format", choices=[*READERS], help="of IN; default: from its name, else text"
    )
    reading.add_argument(
        "--text-field",
        "--text-column",
        default="text",
        metavar="F",
        help="field or column of the texts; %(default)s",
    )
    reading.add_argument(
        "--text-pair-field",
        "--text-pair-column",
        metavar="F",
        help="default: text_pair, if it exists",
    )
    reading.add_argument(
        "--format", choices=[*FORMATS], help="of OUT; default: from its name, else jsonl"
    )
    add_answers(
        parser,
        no_truncate="a text longer than its adapter reads is an error, instead of being cut",
    )
    parser.add_argument(
        "--retry-seconds",
        type=positive_seconds,
        default=600.0,
        metavar="S",
        help="how long to go on while no service answers; %(default)g",
    )


def run(arguments: Namespace) -> int:
    from service.commands.progress import progress_lines

    form = arguments.input_format or input_format_of(arguments.input)
    if form == TEXT and arguments.adapter is None:
        raise CommandFailed("--adapter is missing: plain text names no adapter")
    output = FORMATS[arguments.format or format_of(arguments.output)]
    _refuse_same_file(arguments.input, arguments.output)
    columns = TextColumns(arguments.text_field, arguments.text_pair_field)
    with ExitStack() as stack:
        if arguments.input == STDIN:
            tell_terminal()
        background = _background(arguments)
        file = stack.enter_context(_inputs(arguments.input))
        read = reader_of(form, guessed=arguments.input_format is None)
        records: Iterator[Record | BadLine] = (
            read_jsonl_on(file, columns) if form == "jsonl" else read(file, columns)
        )
        journal = stack.enter_context(
            open_journal(arguments.output, output, records, anew=arguments.overwrite)
        )
        if journal.done:
            sys.stderr.write(f"{arguments.output}: goes on after {journal.done:,} answers\n")
        name = name_of(arguments.input)
        began = monotonic()
        advance = stack.enter_context(
            progress_lines(sys.stderr, Path(name).name, file.total, begun=file.position)
        )
        stack.enter_context(background)
        job = _Job(records, background, name=name, adapter=arguments.adapter)
        with job.reading():
            _write(job, journal, output.write, advance)
        seconds = monotonic() - began
    _summarise(journal, seconds)
    return SOME_FAILED if journal.failed else 0


COMMAND = Command("classify a file of any size over one or more services", run, add_arguments)


@dataclass(slots=True)
class _Read:
    """An input that was read, or why reading ended. fault: it is not sent."""

    record: Record | BadLine | None
    fault: Exception | None = None


class _Job:
    """Reads inputs in a thread, sends them, and gives their answers in order.

    Args:
        name: of the input, for errors.
        adapter: of the flags.
    """

    def __init__(
        self,
        records: Iterator[Record | BadLine],
        background: "Background",
        *,
        name: str,
        adapter: str | None,
    ) -> None:
        self._records = records
        self._background = background
        self._name = name
        self._adapter = adapter
        self._read: Queue[_Read] = Queue(_HELD)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="reading", daemon=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reads until the block ends. The thread may wait for an input that does not come; it does
        not keep the process."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopped = True

    def answers(self) -> Iterator[list[tuple[Answer, Record | BadLine]]]:
        """Some at a time, as they come.

        Raises:
            ClientError, CommandFailed: after all answers before it.
        """
        ready: list[tuple[Answer, Record | BadLine]] = []
        arrived: list[bytes] = []
        while True:
            item = self._next(ready)
            if item is None:
                yield ready
                ready = []
                continue
            if item.record is None:
                yield ready
                if item.fault is not None:
                    raise item.fault
                return
            if isinstance(item.record, BadLine):
                ready.append((_bad(item.record), item.record))
                continue
            if not arrived:
                # In reverse, to take them from the end.
                arrived = self._background.answers(wait=False)[::-1]
            if not arrived:
                yield ready
                ready = []
                arrived = self._background.answers()[::-1]
            try:
                ready.append((self._answer(arrived.pop(), item.record), item.record))
            except CommandFailed:
                yield ready
                raise

    def _next(self, ready: list[tuple[Answer, Record | BadLine]]) -> _Read | None:
        """The next input; None if answers are ready to be written meanwhile."""
        try:
            return self._read.get_nowait()
        except Empty:
            pass
        while not ready:
            try:
                return self._read.get(timeout=_LOOK_SECONDS)
            except Empty:
                # An error of the stream must not wait for the next input.
                self._background.check()
        return None

    def _answer(self, line: bytes, record: Record) -> Answer:
        """
        Raises:
            CommandFailed: the adapter of the flags cannot be used at all.
        """
        from service.client.operations import stream_answer

        answer = stream_answer(line)
        if not isinstance(answer, Unanswered):
            return answer
        own = isinstance(record.input, Input) and record.input.adapter is not None
        if answer.error.type in _OF_THE_ADAPTER and not own:
            raise CommandFailed(f"{self._name}, line {record.line}: {answer.error.message}")
        return failed_line(answer, record.line)

    def _run(self) -> None:
        from service.client.operations import stream_line

        fault: Exception | None = None
        try:
            for record in self._records:
                fault = self._missing_adapter(record)
                if fault is not None or not self._hand_over(_Read(record)):
                    break
                sent = isinstance(record, BadLine) or self._background.put(
                    stream_line(record.input), wait=True
                )
                if not sent:
                    return
        except Exception as error:
            fault = error
        self._background.close()
        self._hand_over(_Read(None, fault))

    def _missing_adapter(self, record: Record | BadLine) -> CommandFailed | None:
        if self._adapter is not None or isinstance(record, BadLine):
            return None
        if isinstance(record.input, Input) and record.input.adapter is not None:
            return None
        place = f"{self._name}, line {record.line}"
        return CommandFailed(f"{place}: the text names no adapter, and there is no --adapter")

    def _hand_over(self, item: _Read) -> bool:
        while not self._stopped:
            try:
                self._read.put(item, timeout=_LOOK_SECONDS)
            except Full:
                continue
            return True
        return False


def _write(job: _Job, journal: Journal, write: Write, advance: "Advance") -> None:
    for answers in job.answers():
        pieces: list[bytes] = []
        size = 0
        for answer, record in answers:
            journal.failed += isinstance(answer, FailedLine)
            pieces.append(write(answer, record.line))
            size += len(pieces[-1])
            if size >= _PIECE_BYTES:
                journal.write(b"".join(pieces))
                pieces, size = [], 0
        if pieces:
            journal.write(b"".join(pieces))
        if answers:
            journal.done += len(answers)
            advance(len(answers), answers[-1][1].position)


def _bad(record: BadLine) -> FailedLine:
    return FailedLine(None, record.line, ErrorContent("malformed_request", record.message))


def _background(arguments: Namespace) -> "Background":
    """
    Raises:
        ClientError: none of the services answers.
    """
    from service.client import Client
    from service.client.background import Background
    from service.client.operations import stream_params
    from service.client.streaming import STREAM_SECONDS, Lines
    from service.client.transport import Address

    key, ca = api_key(arguments.api_key), ca_file()
    urls = list(dict.fromkeys(map(service_url, arguments.url or [None])))
    addresses = [Address(url, key, {}, 60.0 + STREAM_SECONDS, 1, ca) for url in urls]
    failures: list[ClientError] = []
    for url in urls:
        # A wrong address is reported at once, not after all attempts.
        with Client(url, api_key=key, ca=ca) as client:
            try:
                client.ready()
            except ClientError as error:
                failures.append(error)
    if len(failures) == len(urls):
        raise failures[0]
    for failure in failures:
        sys.stderr.write(f"{describe(failure)}; the others are asked meanwhile\n")
    params, headers = stream_params(arguments.adapter, options_of(arguments))
    return Background(
        partial(
            Lines,
            addresses,
            params=params,
            headers=headers,
            retries=Retries(attempts=10**6, seconds=arguments.retry_seconds),
            failed=_Notices().failed,
        )
    )


class _Notices:
    """Tells of services that fail, not too often."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def failed(self, url: str, error: ClientError, delay: float) -> None:
        now = monotonic()
        if now - self._told.get(url, -_NOTICE_SECONDS) < _NOTICE_SECONDS:
            return
        self._told[url] = now
        sys.stderr.write(f"{url}: {describe(error)}; again in {delay:.1f} s\n")


@contextmanager
def _inputs(name: str) -> Iterator[TextFile]:
    """As `open_inputs`. Standard input is read in a thread, which the interpreter's own file object
    would not survive."""
    if name != STDIN or not _has_descriptor():
        with open_inputs(name) as file:
            yield file
        return

    def fault(message: str, *, line: int | None = None) -> CommandFailed:
        place = name_of(name) if line is None else f"{name_of(name)}, line {line}"
        return CommandFailed(f"{place}: {message}")

    own = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115  # a thread may be reading it
    yield TextFile(own, fault, max_line_bytes=MAX_LINE_BYTES)


def _has_descriptor() -> bool:
    try:
        return sys.stdin.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _refuse_same_file(source: str, target: str) -> None:
    if source == STDIN or target == STDOUT:
        return
    path = Path(target)
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise CommandFailed(f"{target}: this is the file that is read")


def _summarise(journal: Journal, seconds: float) -> None:
    from cli.progress import duration

    failed = f", {journal.failed:,} of them without a result" if journal.failed else ""
    sys.stderr.write(f"{journal.done:,} answers{failed}, in {duration(seconds)}\n")
