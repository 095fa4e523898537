"""`python -m service keys ...`: create, list and revoke the keys of a file.

A running service reads the file again within seconds; these commands never ask it.
"""

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli.shell import Command, CommandFailed
from cli.tables import print_table

if TYPE_CHECKING:
    from service.access.key_file import KeyRecord

FILE_VARIABLE = "IDSPAM_KEYS_FILE"


def add_arguments(parser: ArgumentParser) -> None:
    from service.access.scopes import SCOPES

    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, help: str, work: Callable[[Namespace], None]) -> ArgumentParser:
        action: ArgumentParser = actions.add_parser(name, help=help)
        action.add_argument(
            "--file", type=Path, metavar="FILE", help=f"of the keys; default: ${FILE_VARIABLE}"
        )
        action.set_defaults(work=work)
        return action

    create = add("create", "a new key; prints its token, which is shown only now", _create)
    create.add_argument("name", help="of its holder: in logs, metrics and quotas")
    create.add_argument(
        "--scopes",
        type=_items,
        metavar="S,S",
        default=["predict"],
        help=f"some of {', '.join(SCOPES)}; all; default: predict",
    )
    create.add_argument(
        "--adapters",
        type=_items,
        metavar="A,A",
        help="names, or prefixes as team-*; default: all adapters",
    )
    create.add_argument(
        "--expires", type=_time, metavar="TIME", help="ISO time (UTC unless it says otherwise)"
    )
    create.add_argument(
        "--weight",
        type=_number,
        metavar="W",
        default=1.0,
        help="its share of the device where keys compete, relative to theirs; default: 1",
    )
    create.add_argument("--requests-per-minute", type=_whole, metavar="N", help="default: no limit")
    create.add_argument("--tokens-per-minute", type=_whole, metavar="N", help="default: no limit")
    create.add_argument(
        "--line", action="store_true", help="write no file: print the line for IDSPAM_KEYS too"
    )
    listing = add("list", "all keys of the file", _list)
    listing.add_argument("--json", action="store_true", help="a line of JSON for each, no hashes")
    revoke = add("revoke", "a key; its line stays, to tell whose it was", _revoke)
    revoke.add_argument("name", help="name or id of the key")


def run(arguments: Namespace) -> int:
    from service.access.key_file import BadKeys

    try:
        arguments.work(arguments)
    except BadKeys as error:
        raise CommandFailed(str(error)) from None
    return 0


COMMAND = Command("create, list, revoke the service's keys", run, add_arguments)


def _create(arguments: Namespace) -> None:
    from service.access.key_file import KeyRecord, faults, parse, read_text, split_lines, write
    from service.access.keys import new_token
    from service.access.scopes import SCOPES

    token, key_id, secret = new_token()
    now = datetime.now(UTC).replace(microsecond=0)
    record = KeyRecord(
        id=key_id,
        name=arguments.name,
        scopes=list(SCOPES) if arguments.scopes == ["all"] else arguments.scopes,
        adapters=arguments.adapters,
        expires=arguments.expires,
        weight=arguments.weight,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        created=now,
        hash=str(secret),
    )
    if fault := next(faults(record), None):
        raise CommandFailed(fault)
    if record.expires is not None and record.expires <= now:
        raise CommandFailed(f"--expires {record.expires.isoformat()}: is over")
    if arguments.line:
        sys.stdout.write(f"{token}\n{record.line()}\n")
        return
    path = _file(arguments)
    with _locked(path):
        lines = split_lines(read_text(path)) if path.exists() else []
        # Also refuses to add to a file that the service would refuse.
        for stored in parse("\n".join(lines), str(path)):
            if stored.key.name == record.name and stored.key.revoked is None:
                raise CommandFailed(f"{stored.place}: the name {record.name!r} is taken")
        lines = [*lines, record.line()]
        _written(lambda: write(path, lines), path)
    sys.stdout.write(f"{token}\n")
    sys.stderr.write(
        f"key {record.name!r} is in {path}; this is the only time that its token is shown\n"
    )


def _list(arguments: Namespace) -> None:
    import msgspec

    from service.access.key_file import read_text, records

    path = _file(arguments)
    found = [record for _, record in records(read_text(path), str(path))]
    if arguments.json:
        for record in found:
            fields = msgspec.to_builtins(record)
            shown = {key: value for key, value in fields.items() if key != "hash"}
            sys.stdout.write(msgspec.json.encode(shown).decode() + "\n")
        return
    _print_table(found)


def _revoke(arguments: Namespace) -> None:
    from service.access.key_file import parse, read_text, records, split_lines, write

    path = _file(arguments)
    with _locked(path):
        text = read_text(path)
        parse(text, str(path))
        lines = list(split_lines(text))
        active = [item for item in records(text, str(path)) if item[1].revoked is None]
        asked = (item for item in active if arguments.name in (item[1].name, item[1].id))
        index, record = next(asked, (-1, None))
        if record is None:
            names = ", ".join(sorted(record.name for _, record in active)) or "none"
            raise CommandFailed(f"{path}: no key {arguments.name!r} that could be revoked; {names}")
        record.revoked = datetime.now(UTC).replace(microsecond=0)
        lines[index] = record.line()
        _written(lambda: write(path, lines), path)
    sys.stdout.write(f"{record.name} {record.id} revoked\n")


def _print_table(found: "list[KeyRecord]") -> None:
    headings = ("name", "id", "state", "scopes", "adapters", "expires", "weight", "per minute")
    rows = []
    for record in found:
        quotas = [
            f"{quota} {what}"
            for quota, what in (
                (record.requests_per_minute, "requests"),
                (record.tokens_per_minute, "tokens"),
            )
            if quota is not None
        ]
        rows.append(
            (
                record.name,
                record.id,
                _state(record),
                ",".join(record.scopes),
                "all" if record.adapters is None else ",".join(record.adapters),
                "never" if record.expires is None else record.expires.isoformat(),
                f"{record.weight:g}",
                ", ".join(quotas) or "-",
            )
        )
    print_table(headings, rows)


def _state(record: "KeyRecord") -> str:
    if record.revoked is not None:
        return "revoked"
    return "expired" if record.expires and record.expires <= datetime.now(UTC) else "valid"


def _file(arguments: Namespace) -> Path:
    path = arguments.file or os.environ.get(FILE_VARIABLE)
    if not path:
        raise CommandFailed(f"which file? give --file, or set {FILE_VARIABLE}")
    return Path(path).expanduser()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time changes the files of a folder."""
    import fcntl

    folder = path.resolve().parent
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CommandFailed(f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _written(work: Callable[[], None], path: Path) -> None:
    try:
        work()
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror or error}") from None


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _time(value: str) -> datetime:
    from service.access.key_file import parse_time

    try:
        return parse_time(value)
    except ValueError:
        raise ArgumentTypeError(f"{value!r}: expected a time as 2027-01-31T00:00:00Z") from None


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ArgumentTypeError(f"{value!r}: expected a number") from None


def _whole(value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise ArgumentTypeError(f"{value!r}: expected a whole number")
    return int(value[:20])
