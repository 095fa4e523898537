"""`python -m service adapters ...`: list, show, upload, download, roll back, delete."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from service.commands import CommandFailed
from service.commands.flags import add_service, client_of

if TYPE_CHECKING:
    from service.client import AdapterDetail, AdapterSummary, Client, Published

HELP = "list, show, upload, download, roll back, delete adapters"
SUFFIX = ".safetensors"
_SHORT = 12
_PIPE_WIDTH = 4096


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str) -> ArgumentParser:
        added: ArgumentParser = actions.add_parser(name, help=help, allow_abbrev=False)
        add_service(added)
        return added

    def answering(name: str, help: str) -> ArgumentParser:
        added = action(name, help)
        added.add_argument("--json", action="store_true", help="as the service says it")
        return added

    answering("list", "all of them")
    answering("show", "one, with its revisions").add_argument("name")
    upload = answering("upload", "publish a file")
    upload.add_argument("file", type=Path, metavar="FILE")
    upload.add_argument("--name", help=f"to serve it under; default: FILE's, without {SUFFIX}")
    conditions = upload.add_mutually_exclusive_group()
    conditions.add_argument("--if-match", metavar="REVISION", help="only over this one; * is any")
    conditions.add_argument("--new", action="store_true", help="only if the name is new")
    download = action("download", "save a file")
    download.add_argument("name")
    download.add_argument("--revision", metavar="R", help="its first characters")
    download.add_argument("--output", type=Path, metavar="F", help=f"default: NAME{SUFFIX}")
    rollback = answering("rollback", "serve an earlier revision again")
    rollback.add_argument("name")
    rollback.add_argument("--revision", metavar="R", help="its first characters; default: previous")
    rollback.add_argument("--if-match", metavar="REVISION", help="only if this one is served")
    delete = action("delete", "forget a name and all its revisions")
    delete.add_argument("name")
    delete.add_argument("--if-match", metavar="REVISION", help="only if this one is served")


def run(arguments: Namespace) -> int:
    with client_of(arguments) as client:
        _ACTIONS[arguments.action](client, arguments)
    return 0


def _list(client: "Client", arguments: Namespace) -> None:
    found = client.adapters()
    if arguments.json:
        _write_json(found)
    else:
        _show_table(found)


def _show(client: "Client", arguments: Namespace) -> None:
    found = client.adapter(arguments.name)
    if arguments.json:
        _write_json(found)
    else:
        for name, value in _described(found).items():
            _say(f"{name:<14} {value}")


def _upload(client: "Client", arguments: Namespace) -> None:
    name = arguments.name or arguments.file.name.removesuffix(SUFFIX)
    try:
        data = arguments.file.read_bytes()
    except OSError as error:
        raise CommandFailed(
            f"{arguments.file}: cannot be read: {error.strerror or error}"
        ) from None
    made = client.upload(
        name,
        data,
        if_match=arguments.if_match,
        if_none_match="*" if arguments.new else None,
    )
    _tell(made, arguments)


def _download(client: "Client", arguments: Namespace) -> None:
    from adapters.format.durable import write_atomically

    path = arguments.output or Path(arguments.name + SUFFIX)
    if arguments.output is None and path.exists():
        raise CommandFailed(f"{path} exists; --output {path} writes over it")
    file = client.download(arguments.name, arguments.revision)
    try:
        write_atomically(path, file.data)
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror or error}") from None
    _say(f"{path} {file.revision} {len(file.data)} bytes")


def _rollback(client: "Client", arguments: Namespace) -> None:
    _tell(
        client.rollback(arguments.name, arguments.revision, if_match=arguments.if_match), arguments
    )


def _delete(client: "Client", arguments: Namespace) -> None:
    client.delete(arguments.name, if_match=arguments.if_match)
    _say(f"{arguments.name} deleted")


_ACTIONS: Mapping[str, Callable[["Client", Namespace], None]] = MappingProxyType(
    {
        "list": _list,
        "show": _show,
        "upload": _upload,
        "download": _download,
        "rollback": _rollback,
        "delete": _delete,
    }
)


def _show_table(found: "list[AdapterSummary]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "state", "revision", "labels", "method", "backbone", "created", "size"):
        table.add_column(heading, justify="right" if heading in ("labels", "size") else "left")
    for item in found:
        row = (
            item.name,
            item.state,
            (item.revision or "-")[:_SHORT],
            str(len(item.labels)),
            item.method or "-",
            item.backbone or "-",
            (item.created or "-")[:10],
            _size(item.size),
        )
        table.add_row(*(Text(cell, no_wrap=True) for cell in row))
    # A pipe has no width: nothing may be cut there.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, width=width).print(table)
    for item in found:
        if item.reason is not None:
            _say(f"{item.name}: {item.reason}")


def _described(found: "AdapterDetail") -> dict[str, str]:
    labels = ", ".join(found.labels[:20]) + (", ..." if len(found.labels) > 20 else "")
    described = {
        "name": found.name,
        "state": found.state,
        "revision": found.revision or "-",
        "reason": found.reason,
        "labels": f"{len(found.labels)}: {labels}",
        "method": found.method,
        "backbone": found.backbone,
        "prompt length": found.prompt_length,
        "created": found.created,
        "size": _size(found.size),
        "earlier": ", ".join(item[:_SHORT] for item in found.revisions if item != found.revision),
    }
    return {name: str(value) for name, value in described.items() if value not in (None, "")}


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f} MiB"


def _tell(made: "Published", arguments: Namespace) -> None:
    if arguments.json:
        _write_json(made)
    else:
        _say(f"{made.name} {made.revision} {made.outcome}")


def _write_json(content: object) -> None:
    import msgspec

    _say(msgspec.json.encode(content).decode())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
