"""`python -m deploy.ray.batch IN OUT`: a job on Ray Data, without a service.

Each actor has an engine of its own, the one that the service has, and all adapters, which it loads
once. So an answer is that of the service, within what docs/exactness.md says of other batches.

    files -> Ray Data's blocks -> actors -> files, in order

OUT is a folder of JSON lines or Parquet with the columns of `FIELDS`. A text without an answer has
the reason in `error`. Ray runs a batch again whose actor or node is lost.
"""

import asyncio
import os
import sys
import tempfile
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
from pyarrow import fs
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from adapters.errors import AdapterError
from adapters.format.store import AdapterStore
from adapters.tokenizer import Encoding
from service.catalog.entry import Resolved
from service.client import Client, ClientError
from service.client.environment import api_key, ca_file
from service.client.errors import describe
from service.engine.interface import Completion, Entry, cost_of
from service.engine.observer import Observer
from service.errors import ServiceError
from service.http.classify import answers_of, label_sets_of
from service.http.predict import result_of
from service.http.texts import Text
from service.local import local_backend
from service.settings import PREFIX, InvalidSettings, read_settings
from service.start import StartFailed

T = TypeVar("T")

TREE = Path(__file__).resolve().parents[2]
READERS = ("jsonl", "csv", "parquet", "text")
# Columns of the output. labels: of an adapter that gives several. error: null with an answer.
FIELDS = (
    *("id", "adapter", "revision", "label", "score", "labels", "abstained"),
    *("tokens", "truncated", "error"),
)
# Texts of a call; with two calls at a time in an actor, one is read while the other runs.
BATCH_SIZE = 512
_CALLS = 2


class Classifier:
    """One actor: an engine and adapters.

    Args:
        settings: of the service, as in the environment.
        files: adapters' files by name, as an object of Ray.
        columns: of the texts, their second texts, adapters and ids; None: there is none.
        adapter: for texts that name none.
        truncate: False: a text longer than its adapter reads is an error.

    Raises:
        StartFailed: the engine cannot start, or an adapter does not fit its backbone.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        files: Any,
        columns: Mapping[str, str | None],
        adapter: str | None,
        truncate: bool,
    ) -> None:
        files = ray.get(files)
        self._columns = columns
        self._adapter = adapter
        self._truncate = truncate
        # Removed with the actor; the files are small beside the backbone.
        self._folder = tempfile.TemporaryDirectory(prefix="idspam-batch-")
        store = Path(self._folder.name)
        for name, content in files.items():
            AdapterStore(store).put(name, content)
        environ = dict(settings) | {f"{PREFIX}ADAPTER_DIR": str(store), f"{PREFIX}ZOO_DIR": "off"}
        self._backend = local_backend(read_settings(environ), Observer())
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True).start()
        self._await(self._backend.start())
        for name in files:
            try:
                self._backend.catalog.resolve(name)
            except AdapterError as error:
                raise StartFailed(f"adapter {name!r}: {error}") from None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a batch of rows, column by column."""
        rows = [self._prepare(row) for row in self._texts(batch)]
        self._classify(rows)
        return {name: [row.result.get(name) for row in rows] for name in FIELDS}

    def _texts(self, batch: Mapping[str, Any]) -> list["_Row"]:
        texts = batch[self._columns["text"] or "text"]
        others = {
            name: batch[column] if (column := self._columns[name]) is not None else None
            for name in ("text_pair", "adapter", "id")
        }

        def value(name: str, index: int) -> str | None:
            column = others[name]
            found = None if column is None else column[index]
            # Missing values of a table are NaN or None.
            return found if isinstance(found, str) else None if found != found else _text(found)

        return [
            _Row(text, value("text_pair", index), value("adapter", index), value("id", index))
            for index, text in enumerate(texts)
        ]

    def _prepare(self, row: "_Row") -> "_Row":
        """Find a row's adapter and read its text."""
        name = row.adapter or self._adapter
        row.result["id"], row.result["adapter"] = row.id, name
        if not isinstance(row.text, str):
            row.result["error"] = "invalid_request: the text is not a string"
        elif name is None:
            row.result["error"] = "invalid_request: the text names no adapter"
        else:
            try:
                row.resolved = self._backend.catalog.resolve(name)
                spec = row.resolved.spec
                row.encoding = self._backend.engine.info.encoder.encode(
                    row.text, row.pair, max_length=spec.max_length
                )
                if row.encoding.truncated and not self._truncate:
                    row.result["error"] = (
                        f"invalid_request: longer than the {spec.max_length} tokens of its adapter"
                    )
            except AdapterError as error:
                row.result["error"] = str(error)
        return row

    def _classify(self, rows: Sequence["_Row"]) -> None:
        asked = [row for row in rows if "error" not in row.result]
        if not asked:
            return
        try:
            completion = self._await(self._predict(asked))
        except (AdapterError, ServiceError) as error:
            if len(asked) == 1:
                asked[0].result["error"] = str(error)
                return
            # All are answered or none. Which of them is it?
            for row in asked:
                self._classify([row])
            return
        texts = [row.as_text() for row in asked]
        answers = answers_of(
            texts,
            [row.read for row in asked],
            completion,
            dict(label_sets_of(texts, completion.rows)),
        )
        for index, row in enumerate(asked):
            row.result |= result_of(answers, index, row.id, 1)

    async def _predict(self, rows: Sequence["_Row"]) -> Completion:
        entries = [
            Entry(row.found.key, row.read, cost_of(row.read, row.found.spec)) for row in rows
        ]
        return await self._backend.engine.predict(entries)

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Row:
    """A text on its way. result: its columns of the output so far."""

    __slots__ = ("adapter", "encoding", "id", "pair", "resolved", "result", "text")

    def __init__(self, text: Any, pair: str | None, adapter: str | None, id: str | None) -> None:
        self.text, self.pair, self.adapter, self.id = text, pair, adapter, id
        self.resolved: Resolved | None = None
        self.encoding: Encoding | None = None
        self.result: dict[str, Any] = {}

    @property
    def found(self) -> Resolved:
        assert self.resolved is not None
        return self.resolved

    @property
    def read(self) -> Encoding:
        assert self.encoding is not None
        return self.encoding

    def as_text(self) -> Text:
        return Text(self.text, self.pair, self.found.key, self.found.spec, "text")


def classify(
    dataset: Dataset,
    files: Mapping[str, bytes],
    *,
    settings: Mapping[str, str] | None = None,
    columns: Mapping[str, str | None] | None = None,
    adapter: str | None = None,
    truncate: bool = True,
    actors: tuple[int, int] = (1, 1),
    cpus: float = 1,
    gpus: float = 0,
    batch_size: int = BATCH_SIZE,
) -> Dataset:
    """A data set of texts as one of answers, in the same order, with the columns of `FIELDS`.

    Args:
        files: adapters' files by name.
        settings, columns, adapter, truncate: as of `Classifier`; without `columns` the texts are in
            `text`.
        actors: at least and at most.
        cpus, gpus: of each actor.
        batch_size: texts of a call.
    """
    # A data set has the options of the time when it was made, and so have those made from it.
    dataset.context.execution_options.preserve_order = True
    least, most = actors
    lanes = {f"{PREFIX}CPU_LANES": str(max(1, min(4, int(cpus))))} if not gpus else {}
    return dataset.map_batches(
        Classifier,
        fn_constructor_args=(
            lanes | dict(settings or {}),
            # Once for all actors.
            ray.put(dict(files)),
            {"text": "text", "text_pair": None, "adapter": None, "id": None, **(columns or {})},
            adapter,
            truncate,
        ),
        batch_size=batch_size,
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus or None,
        max_concurrency=_CALLS,
    )


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0; 1 if some texts have no answer; 2 if the job cannot run."""
    parsed = _parser().parse_args(arguments)
    try:
        files = _files(parsed)
        settings = {key: value for key, value in os.environ.items() if key.startswith(PREFIX)}
        read_settings(settings)
        _refuse_filled(parsed.output)
        _connect(parsed.address)
        DataContext.get_current().execution_options.preserve_order = True
        columns = {
            "text": parsed.text_column,
            "text_pair": parsed.text_pair_column,
            "adapter": parsed.adapter_column,
            "id": parsed.id_column,
        }
        texts = _read(parsed)
        _refuse_unknown(columns, texts.columns() or [])
        answers = classify(
            texts,
            files,
            settings=settings,
            columns=columns,
            adapter=parsed.adapter,
            truncate=not parsed.no_truncate,
            actors=parsed.actors,
            cpus=parsed.cpus,
            gpus=parsed.gpus,
            batch_size=parsed.batch_size,
        ).materialize()
        failed = answers.filter(_has_error).count()
        if parsed.output_format == "parquet":
            answers.write_parquet(parsed.output)
        else:
            answers.write_json(parsed.output)
    except (ClientError, InvalidSettings, OSError, StartFailed) as error:
        message = describe(error) if isinstance(error, ClientError) else str(error)
        sys.stderr.write(f"batch: {message}\n")
        return 2
    except RayError as error:
        # The last line of a traceback says what happened.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.stderr.write(f"batch: {lines[-1] if lines else type(error).__name__}\n")
        return 2
    sys.stderr.write(f"{answers.count():,} texts, {failed:,} of them without an answer\n")
    return 1 if failed else 0


def _has_error(row: Mapping[str, Any]) -> bool:
    return row["error"] is not None


def _connect(address: str) -> None:
    environment = {"PYTHONPATH": str(TREE), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(environment)
    ray.init(
        address=address,
        runtime_env={"env_vars": environment},
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
    )


def _files(parsed: Namespace) -> dict[str, bytes]:
    """Adapters' files by name, from a folder or from a service.

    Raises:
        StartFailed: there are none. OSError, ClientError: they cannot be read.
    """
    if parsed.adapters is not None:
        folder = Path(parsed.adapters)
        found = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
        if not found:
            raise StartFailed(f"{folder}: no adapters (*.safetensors) there")
    else:
        with Client(parsed.url, api_key=api_key(None), ca=ca_file()) as client:
            names = [item.name for item in client.adapters() if item.state == "ready"]
            found = {name: client.download(name).data for name in names}
        if not found:
            raise StartFailed(f"{parsed.url}: no adapters there")
    if parsed.adapter is not None and parsed.adapter not in found:
        raise StartFailed(f"--adapter {parsed.adapter}: there are {', '.join(sorted(found))}")
    return found


def _refuse_filled(output: str) -> None:
    """
    Raises:
        StartFailed: the output has files already, with which the answers would be mixed.
        OSError: it is no folder, or cannot be read.
    """
    try:
        system, path = fs.FileSystem.from_uri(output) if "://" in output else (None, output)
        system = system or fs.LocalFileSystem()
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except ValueError as error:
        raise StartFailed(f"{output}: {error}") from None
    if found:
        raise StartFailed(
            f"{output}: {len(found):,} files are there already, and the answers would be mixed "
            "with them: name another folder, or remove it"
        )


def _refuse_unknown(columns: Mapping[str, str | None], there: Sequence[str]) -> None:
    """
    Raises:
        StartFailed: the input lacks a column that a flag names.
    """
    for name, column in columns.items():
        if column is not None and column not in there:
            raise StartFailed(
                f"--{name.replace('_', '-')}-column {column}: the input has the columns "
                f"{', '.join(there) or '(none)'}"
            )


def _read(parsed: Namespace) -> Dataset:
    form = parsed.format or _format_of(parsed.input)
    match form:
        case "csv":
            return ray.data.read_csv(parsed.input)
        case "parquet":
            return ray.data.read_parquet(parsed.input)
        case "text":
            return ray.data.read_text(parsed.input, drop_empty_lines=False)
    return ray.data.read_json(parsed.input, lines=True)


def _format_of(name: str) -> str:
    suffix = Path(name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return {"csv": "csv", "parquet": "parquet", "txt": "text"}.get(suffix, "jsonl")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _actors(value: str) -> tuple[int, int]:
    least, _, most = value.partition(",")
    if not (least.isdecimal() and (most or least).isdecimal()) or int(least) < 1:
        raise ArgumentTypeError(
            f"{value!r}: expected a number of actors, or the least and the most"
        )
    return int(least), max(int(least), int(most or least))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m deploy.ray.batch",
        description="Classify texts with Ray Data. Settings of the engine are IDSPAM_*.",
    )
    parser.add_argument("input", help="a file or folder, also of cloud storage")
    parser.add_argument("output", help="a folder, also of cloud storage")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapters", help="a folder of adapter files, NAME.safetensors")
    source.add_argument("--url", help="a service, whose adapters are downloaded once")
    parser.add_argument("--adapter", help="for texts that name none")
    parser.add_argument("--format", choices=READERS, help="of the input; default: from its name")
    parser.add_argument("--output-format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--text-pair-column")
    parser.add_argument("--adapter-column")
    parser.add_argument("--id-column")
    parser.add_argument("--no-truncate", action="store_true", help="a longer text is an error")
    parser.add_argument("--actors", type=_actors, default=(1, 1), help="a number, or LEAST,MOST")
    parser.add_argument("--cpus", type=float, default=1, help="of each actor; default: 1")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; default: 0")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--address", default="local", help="of a cluster; default: this machine")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
