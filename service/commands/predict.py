"""`python -m service predict`: the texts of a file or of standard input, to JSON lines or a table.

A line of output is the service's answer for one text, in the order of the input. However the
command ends, it has written whole lines, and has answered all texts before the one that failed.
"""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from cli.shell import Command, CommandFailed
from service.client import ClientError, Input, Refused, Result, Retries
from service.client.batch import IN_FLIGHT, PER_REQUEST
from service.client.errors import describe
from service.commands.flags import (
    add_answers,
    add_service,
    client_of,
    count,
    options_of,
    positive_seconds,
)
from service.commands.reading import (
    READERS,
    STDIN,
    TEXT,
    Record,
    TextColumns,
    format_of,
    name_of,
    open_inputs,
    reader_of,
    tell_terminal,
)
from service.commands.writing import EXTRAS, READABLE, WRITERS, Answered, Writer

if TYPE_CHECKING:
    from service.client import Client
    from service.commands.progress import Advance

STDOUT = "-"
_LISTED = 20
_PLACE = re.compile(r"\binputs\.(\d+)")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default=STDIN,
        metavar="FILE",
        help="texts, one a line, or .jsonl, .csv, .tsv, each also .gz; - is standard input",
    )
    parser.add_argument("--adapter", metavar="NAME", help="for texts that name no adapter")
    add_service(parser)
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--output", default=STDOUT, metavar="F", help="where answers go; default: standard output"
    )
    writing.add_argument(
        "--format",
        choices=[*WRITERS],
        help=f"of the answers; default: from F's name, {READABLE} for --explain on a terminal, "
        "else jsonl",
    )
    writing.add_argument(
        "--with",
        dest="extras",
        type=_extras,
        default=(),
        metavar="X,X",
        help=f"further fields of answers, separated by commas: {', '.join(EXTRAS)}; all",
    )
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--input-format", choices=[*READERS], help="of FILE; default: from its name, else text"
    )
    # The second names are those of `batch`.
    reading.add_argument(
        *("--text-column", "--text-field"), default="text", metavar="C", help="%(default)s"
    )
    reading.add_argument(
        *("--text-pair-column", "--text-pair-field"),
        metavar="C",
        help="default: text_pair, if it exists",
    )
    add_answers(
        parser,
        no_truncate="stop at a text that is longer than its adapter reads, instead of cutting it",
    )
    sending = parser.add_argument_group("sending")
    sending.add_argument("--per-request", type=count, metavar="N", help="texts per request")
    sending.add_argument("--in-flight", type=count, metavar="N", help="requests at a time")
    sending.add_argument(
        "--retry-seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="how long to retry while the service is unreachable or busy; %(default)g",
    )


def run(arguments: Namespace) -> int:
    from service.commands.progress import progress_bar

    form = arguments.input_format or format_of(arguments.file)
    on_terminal = arguments.output == STDOUT and sys.stdout.isatty()
    form_of_answers = arguments.format or _format_of_output(arguments.output)
    if arguments.format is None and on_terminal and arguments.explain is not None:
        form_of_answers = READABLE
    write = WRITERS[form_of_answers](arguments.extras)
    in_flight = arguments.in_flight or IN_FLIGHT
    retries = Retries(attempts=10**6, seconds=arguments.retry_seconds)
    options = options_of(arguments)
    columns = TextColumns(arguments.text_column, arguments.text_pair_column)
    with ExitStack() as stack:
        client = stack.enter_context(client_of(arguments, retries=retries, connections=in_flight))
        file = stack.enter_context(open_inputs(arguments.file))
        # Reports a wrong address at once, not after all attempts.
        client.ready()
        if form == TEXT and arguments.adapter is None:
            raise CommandFailed(f"--adapter is missing: {_adapters_there(client)}")
        if arguments.file == STDIN:
            tell_terminal()
        output = stack.enter_context(_output(arguments.output, arguments.file))
        name = name_of(arguments.file)
        # Among lines for people a bar would be in the way.
        is_quiet = on_terminal and form_of_answers == READABLE
        bar = progress_bar(sys.stderr, Path(name).name, file.total)
        advance = (lambda *_: None) if is_quiet else stack.enter_context(bar)
        read = reader_of(form, guessed=arguments.input_format is None)
        work = _Work(read(file, columns), output, advance, write)
        results = client.classify(
            work.inputs(),
            arguments.adapter,
            per_request=arguments.per_request or PER_REQUEST,
            in_flight=in_flight,
            **options,
        )
        try:
            work.write(results)
        except Refused as error:
            raise CommandFailed(f"{name}: {work.with_lines(describe(error))}") from None
    if work.fault is not None:
        raise work.fault
    return 0


COMMAND = Command("classify a file's texts, to JSON lines or a table", run, add_arguments)


def _extras(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if names == ("all",):
        return EXTRAS
    if unknown := [name for name in names if name not in EXTRAS]:
        raise ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(EXTRAS)}, or all")
    return names


def _format_of_output(name: str) -> str:
    suffix = Path(name.lower()).suffix.removeprefix(".")
    return suffix if suffix in WRITERS else "jsonl"


def _adapters_there(client: "Client") -> str:
    """Half a sentence for the user who named no adapter."""
    try:
        names = [adapter.name for adapter in client.adapters() if adapter.state == "ready"]
    except ClientError:
        # This key may not list them, for instance.
        return "plain text names no adapter"
    if not names:
        return "and the service has no adapter that is ready"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"give one of {', '.join(names[:_LISTED])}{more}"


@contextmanager
def _output(name: str, source: str) -> Iterator[BinaryIO]:
    """The file for the answers; unbuffered, so that only whole lines are written.

    Raises:
        CommandFailed: it cannot be written.
    """
    if name == STDOUT:
        yield sys.stdout.buffer
        return
    path = Path(name)
    if source != STDIN and path.exists() and path.samefile(source):
        raise CommandFailed(f"--output {name}: this is the file that is read")
    try:
        file = path.open("wb", buffering=0)
    except OSError as error:
        raise CommandFailed(f"--output {name}: {error.strerror or error}") from None
    with file:
        yield cast(BinaryIO, _Whole(file, name))


class _Whole:
    """A file without a buffer, which may take a part of what it is given: it gets all or none."""

    def __init__(self, file: FileIO, name: str) -> None:
        self._file = file
        self._name = name

    def write(self, content: bytes) -> int:
        start = self._file.tell() if self._file.seekable() else None
        view = memoryview(content)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            if start is not None:
                with suppress(OSError):
                    self._file.truncate(start)
            raise CommandFailed(f"--output {self._name}: {error.strerror or error}") from None
        return len(content)

    def flush(self) -> None:
        self._file.flush()


class _Work:
    """Texts that were read but not yet answered, and answers that were not yet written.

    fault: the line that stopped the reading, if one did.
    """

    def __init__(
        self, records: Iterator[Record], output: BinaryIO, advance: "Advance", write: Writer
    ) -> None:
        self.fault: CommandFailed | None = None
        self._records = records
        self._output = output
        self._advance = advance
        self._line_of = write
        self._unanswered: deque[Record] = deque()
        self._answered = self._position = 0
        self._unwritten: list[bytes] = []

    def inputs(self) -> Iterator[str | Input]:
        """Reads one text at a time. A fault ends it, so that the texts before it are answered."""
        while True:
            # Reading may wait for a slow writer: write the answers so far before that.
            self._flush()
            try:
                record = next(self._records, None)
            except CommandFailed as error:
                self.fault = error
                return
            if record is None:
                return
            self._unanswered.append(record)
            yield record.input

    def write(self, results: Iterator[Result]) -> None:
        try:
            for result in results:
                record = self._unanswered.popleft()
                self._position = record.position
                self._answered += 1
                answered = Answered(self._answered, record.line, record.input, result)
                self._unwritten.append(self._line_of(answered))
        finally:
            self._flush()

    def with_lines(self, message: str) -> str:
        """An error's message, with lines of the file in place of `inputs.N`."""

        def line(place: re.Match[str]) -> str:
            index = int(place[1]) - self._answered
            known = 0 <= index < len(self._unanswered)
            return f"line {self._unanswered[index].line}" if known else place[0]

        return _PLACE.sub(line, message)

    def _flush(self) -> None:
        if not self._unwritten:
            return
        # Cleared first: lines that could not be written are not tried again.
        lines, self._unwritten = self._unwritten, []
        self._output.write(b"".join(lines))
        self._output.flush()
        self._advance(len(lines), self._position)
