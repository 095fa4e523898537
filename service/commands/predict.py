"""`python -m service predict`: a file or standard input, through a running service, to JSON lines.

A line of output is the service's answer for one text, in the order of the input. Whatever ends the
command, what it has written is whole lines, and answers all texts before the one that is at fault.
"""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from service.commands import CommandFailed
from service.commands.flags import add_service, client_of, count, positive_seconds, words_of

if TYPE_CHECKING:
    from service.client import Input, Result
    from service.commands.progress import Showing
    from service.commands.reading import Record

HELP = "classify a file's texts, to JSON lines"
STDIN, STDOUT = "-", "-"
_PLACE = re.compile(r"\binputs\.(\d+)")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default=STDIN,
        metavar="FILE",
        help="texts, one a line, or .jsonl, .csv, .tsv, each also .gz; - is standard input",
    )
    parser.add_argument("--adapter", metavar="NAME", help="for the texts that name none")
    add_service(parser)
    parser.add_argument(
        "--output", default=STDOUT, metavar="F", help="where answers go; default: standard output"
    )
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--format", choices=["text", "jsonl", "csv", "tsv"], help="default: as FILE's name says"
    )
    reading.add_argument("--text-column", default="text", metavar="C", help="%(default)s")
    reading.add_argument("--text-pair-column", metavar="C", help="default: text_pair, if there")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--top-k", type=count, metavar="N", help="labels to give; default: all")
    answers.add_argument("--explain", action="store_true", help="what the prompt was made of")
    answers.add_argument(
        "--no-truncate",
        action="store_true",
        help="end at a text that is longer than its adapter reads, instead of cutting it",
    )
    sending = parser.add_argument_group("sending")
    sending.add_argument("--per-request", type=count, metavar="N", help="texts of one request")
    sending.add_argument("--in-flight", type=count, metavar="N", help="requests at a time")
    sending.add_argument(
        "--retry-seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="how long a request is repeated while the service is away or busy; %(default)g",
    )


def run(arguments: Namespace) -> int:
    from service.client import Refused, Retries
    from service.client.batching import IN_FLIGHT, PER_REQUEST
    from service.commands.progress import showing
    from service.commands.reading import READERS, TEXT, Columns, format_of, opened

    form = arguments.format or format_of(arguments.file)
    if form == TEXT and arguments.adapter is None:
        raise CommandFailed("--adapter is missing: lines of text name none")
    in_flight = arguments.in_flight or IN_FLIGHT
    retries = Retries(attempts=10**6, seconds=arguments.retry_seconds)
    options = {"truncate": not arguments.no_truncate, "explain": arguments.explain}
    if arguments.top_k is not None:
        options["top_k"] = arguments.top_k
    with ExitStack() as stack:
        client = stack.enter_context(client_of(arguments, retries=retries, connections=in_flight))
        source = stack.enter_context(opened(arguments.file))
        # Whoever typed a wrong address is told at once, not when all attempts were made.
        client.ready()
        output = stack.enter_context(_output(arguments.output, arguments.file))
        columns = Columns(arguments.text_column, arguments.text_pair_column)
        shown = stack.enter_context(showing(sys.stderr, Path(source.name).name, source.total))
        work = _Work(READERS[form](source, columns), output, shown)
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
            raise CommandFailed(f"{source.name}: {work.placed(words_of(error))}") from None
    if work.fault is not None:
        raise work.fault
    return 0


@contextmanager
def _output(name: str, source: str) -> Iterator[BinaryIO]:
    """Where lines go; unbuffered, so that what is written is whole lines.

    Raises:
        CommandFailed: nothing can be written there.
    """
    if name == STDOUT:
        yield sys.stdout.buffer
        return
    path = Path(name)
    if source != STDIN and path.exists() and path.samefile(source):
        raise CommandFailed(f"--output {name}: that is the file that is read")
    try:
        file = path.open("wb", buffering=0)
    except OSError as error:
        raise CommandFailed(f"--output {name}: {error.strerror or error}") from None
    with file:
        yield cast(BinaryIO, file)


class _Work:
    """What was read and is not answered yet, and what was answered and is not written yet.

    fault: the line that reading ended at, if it did not end at the end.
    """

    def __init__(self, records: "Iterator[Record]", output: BinaryIO, shown: "Showing") -> None:
        from msgspec.json import Encoder

        self.fault: CommandFailed | None = None
        self._records = records
        self._output = output
        self._shown = shown
        self._encode = Encoder().encode
        self._unanswered: deque[tuple[int, int]] = deque()
        self._answered = self._position = 0
        self._unwritten: list[bytes] = []

    def inputs(self) -> "Iterator[str | Input]":
        """Reads no further than it is asked to, and a fault only ends it: what is before it is to
        be answered."""
        while True:
            # Reading may wait for a slow writer; whoever reads the answers must not.
            self._flush()
            try:
                record = next(self._records, None)
            except CommandFailed as error:
                self.fault = error
                return
            if record is None:
                return
            self._unanswered.append((record.line, record.position))
            yield record.input

    def write(self, results: "Iterator[Result]") -> None:
        try:
            for result in results:
                _, self._position = self._unanswered.popleft()
                self._answered += 1
                self._unwritten.append(self._encode(result) + b"\n")
        finally:
            self._flush()

    def placed(self, message: str) -> str:
        """An error's words, with lines instead of places among all inputs."""

        def line(found: re.Match[str]) -> str:
            place = int(found[1]) - self._answered
            known = 0 <= place < len(self._unanswered)
            return f"line {self._unanswered[place][0]}" if known else found[0]

        return _PLACE.sub(line, message)

    def _flush(self) -> None:
        if not self._unwritten:
            return
        # Taken first: what could not be written is not tried again.
        lines, self._unwritten = self._unwritten, []
        self._output.write(b"".join(lines))
        self._output.flush()
        self._shown.advance(len(lines), self._position)
