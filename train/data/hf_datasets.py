"""Rows of a data set on the Hugging Face hub, read with the `datasets` library."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from cli.text_files import Columns
from train.data.readers import Row
from train.errors import DataError

PREFIX = "hub:"

_NAME = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[^:@]+))?")
_LOCAL = "give a local .jsonl, .csv, .tsv or .parquet file instead"


@dataclass(frozen=True, slots=True)
class HubName:
    """`hub:name[:config][@split]`; the prefix is optional."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, source: str, *, split: str) -> "HubName":
        """
        Args:
            split: used if the name has none.

        Raises:
            DataError: not of this form.
        """
        match = _NAME.fullmatch(source.removeprefix(PREFIX))
        if match is None:
            raise DataError(
                "not a hub data set's name: expected hub:name[:config][@split]", source=source
            )
        return cls(match["name"], match["config"], match["split"] or split)


def read_hub(hub: HubName, columns: Columns, *, source: str) -> Iterator[Row]:
    """Rows of one split, numbered from 1. Labels are given by name, even where the hub has numbers.

    Raises:
        DataError: the library is missing, the hub cannot be reached, or it has no such data set,
            split or column.
    """
    dataset = _load(hub, source)
    columns.check(dataset.column_names, partial(DataError, source=source))
    selected = dataset.select_columns(columns.of(dataset.column_names))
    label_names = {
        column: feature.names
        for column, feature in selected.features.items()
        if hasattr(feature, "names")
    }
    for number, row in enumerate(selected, start=1):
        named = {
            column: _name(row[column], names, source=source, number=number)
            for column, names in label_names.items()
        }
        yield number, row | named


def _load(hub: HubName, source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hub data sets need the package datasets; {_LOCAL}", source=source
        ) from None
    datasets.disable_progress_bars()
    # It logs every retry; one line about the result is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(hub.name, hub.config, split=hub.split)
    # The library has no common base class for network, hub, format and configuration errors.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = _with_proxy(reason, datasets.config.HF_ENDPOINT)
        raise DataError(
            f"neither a file nor a hub data set that can be loaded ({reason}); {_LOCAL}",
            source=source,
        ) from None


def _with_proxy(reason: str, endpoint: str) -> str:
    """Why the hub cannot be asked, with the proxy on the way and the variable that names it."""
    import httpx

    from service.client import InvalidCall
    from service.client.proxies import proxy_of

    try:
        proxy = proxy_of(httpx.URL(endpoint))
    except InvalidCall as error:
        return str(error)
    return f"{reason}, {proxy}" if proxy else reason


def _name(index: int | None, names: list[str], *, source: str, number: int) -> str | None:
    if index is None:
        return None
    if not 0 <= index < len(names):
        raise DataError(
            f"label {index} has no name: this split is not labelled", source=source, line=number
        )
    return names[index]
