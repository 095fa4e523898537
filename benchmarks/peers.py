"""This service beside Infinity: same weights, texts and load, in turns within one run, on the CPU.

Infinity serves the default backbone under a two-label classifier; this service serves it under one
adapter, or under many that the requests name at random. Ours carries prompt tokens that Infinity's
classifier does not have.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from adapters.adapter import random_adapter
from adapters.files import serialize
from adapters.loading import load_backbone, locate_default
from benchmarks.load import Figures, load, make_texts, write_bodies
from benchmarks.report import show, spread, write
from benchmarks.servers import infinity, service, write_classifier

MEAN_TOKENS = 26
TEXTS = 4096
# (texts a request, connections)
SHAPES = ((1, 32), (32, 4))
WARM_UP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Contender:
    """One server under one load: where to post, and the bodies by texts a request."""

    name: str
    url: str
    bodies: dict[int, Path]


def peers(*, infinity_python: Path, seconds: float, rounds: int, json: Path | None) -> None:
    """Ours in float32 and `auto`, with 1 and 16 adapters, Infinity in float32 and bfloat16."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_classifier(folder / "classifier")
        contenders = []
        for dtype in ("float32", "bfloat16"):
            url = stack.enter_context(
                infinity(
                    infinity_python,
                    folder / "classifier",
                    dtype=dtype,
                    log=folder / f"infinity-{dtype}.log",
                )
            )
            bodies = _bodies(folder, "infinity", _infinity_body)
            contenders.append(Contender(f"infinity {dtype}", f"{url}/classify", bodies))
        contenders += _ours(stack, folder, (1, 16), ("float32", "auto"))
        measured = _rounds(contenders, SHAPES, seconds=seconds, rounds=rounds)
    _report(
        "peers", measured, baseline="infinity float32", seconds=seconds, rounds=rounds, json=json
    )


def adapters(*, counts: Sequence[int], seconds: float, rounds: int, json: Path | None) -> None:
    """Throughput over the number of adapters that requests name at random."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = list(_ours(stack, folder, counts, ("float32", "auto")))
        measured = _rounds(contenders, SHAPES, seconds=seconds, rounds=rounds)
    for dtype in ("float32", "auto"):
        one = f"ours {dtype}, 1 adapter"
        chosen = {key: value for key, value in measured.items() if dtype in key[0]}
        _report(
            f"adapters, {dtype}", chosen, baseline=one, seconds=seconds, rounds=rounds, json=None
        )
    write(json, _figures(measured, seconds, rounds))


def _ours(
    stack: ExitStack, folder: Path, counts: Sequence[int], dtypes: Sequence[str]
) -> Iterator[Contender]:
    backbone = load_backbone(device="cpu")
    files = {
        f"task-{index}": serialize(random_adapter(backbone, seed=index))
        for index in range(max(counts))
    }
    for dtype in dtypes:
        store = folder / dtype
        store.mkdir()
        url = stack.enter_context(
            service(
                store, files, IDSPAM_DEVICE="cpu", IDSPAM_DTYPE=dtype, IDSPAM_LOG_LEVEL="warning"
            )
        )
        for count in counts:
            names = list(files)[:count]
            bodies = _bodies(folder, f"ours-{count}", _our_body(names))
            noun = "adapter" if count == 1 else "adapters"
            yield Contender(f"ours {dtype}, {count} {noun}", f"{url}/v1/predict", bodies)


def _bodies(folder: Path, name: str, body: Callable[[list[str]], Any]) -> dict[int, Path]:
    source, revision = locate_default()
    vocabulary = AutoTokenizer.from_pretrained(source, revision=revision).get_vocab()
    texts = make_texts(vocabulary, count=TEXTS, mean_tokens=MEAN_TOKENS)
    found = {}
    for size, _ in SHAPES:
        bodies = [body(texts[start : start + size]) for start in range(0, TEXTS, size)]
        found[size] = write_bodies(folder / f"{name}-{size}.jsonl", bodies)
    return found


def _infinity_body(texts: list[str]) -> Any:
    return {"input": texts, "model": "classifier"}


def _our_body(names: Sequence[str]) -> Callable[[list[str]], Any]:
    rng = random.Random(0)

    def body(texts: list[str]) -> Any:
        if len(texts) == 1:
            return {"inputs": texts[0], "adapter": rng.choice(names)}
        return {"inputs": [{"text": text, "adapter": rng.choice(names)} for text in texts]}

    return body


def _rounds(
    contenders: Sequence[Contender],
    shapes: Sequence[tuple[int, int]],
    *,
    seconds: float,
    rounds: int,
) -> dict[tuple[str, int], list[Figures]]:
    """Everyone once a round, so that a slow minute of the machine hits all alike."""
    measured: dict[tuple[str, int], list[Figures]] = {}
    console = Console(stderr=True)
    for number in range(rounds + 1):
        for contender in contenders:
            for size, connections in shapes:
                figures = load(
                    contender.url,
                    contender.bodies[size],
                    texts_per_request=size,
                    connections=connections,
                    seconds=seconds if number else WARM_UP_SECONDS,
                )
                if number:
                    measured.setdefault((contender.name, size), []).append(figures)
                    rate = f"{figures.texts_per_second:,.0f} texts/s"
                    console.print(
                        f"round {number}/{rounds}: {contender.name}, {size} a request: {rate}"
                    )
    return measured


def _report(
    title: str,
    measured: dict[tuple[str, int], list[Figures]],
    *,
    baseline: str,
    seconds: float,
    rounds: int,
    json: Path | None,
) -> None:
    rows = []
    for (name, size), figures in measured.items():
        rate = spread([item.texts_per_second for item in figures])
        # Ratios within a round, then their median: what the machine did to a whole round cancels.
        ratios = [
            mine.texts_per_second / theirs.texts_per_second
            for mine, theirs in zip(figures, measured[baseline, size], strict=True)
        ]
        rows.append(
            [
                name,
                str(size),
                f"{rate['median']:,.0f}",
                f"{rate['least']:,.0f}..{rate['most']:,.0f}",
                f"{spread(ratios)['median']:.2f}",
                f"{spread([item.p50_ms for item in figures])['median']:.1f}",
                f"{spread([item.p99_ms for item in figures])['median']:.1f}",
            ]
        )
    columns = ("server", "texts a request", "texts/s", "range", f"x {baseline}", "p50 ms", "p99 ms")
    show(f"{title}: {rounds} rounds of {seconds:.0f} s", columns, rows)
    write(json, _figures(measured, seconds, rounds))


def _figures(
    measured: dict[tuple[str, int], list[Figures]], seconds: float, rounds: int
) -> dict[str, Any]:
    return {
        "mean_tokens": MEAN_TOKENS,
        "seconds": seconds,
        "rounds": rounds,
        "figures": [
            {
                "server": name,
                "texts_per_request": size,
                "texts_per_second": spread([item.texts_per_second for item in figures]),
                "p50_ms": spread([item.p50_ms for item in figures]),
                "p99_ms": spread([item.p99_ms for item in figures]),
            }
            for (name, size), figures in measured.items()
        ],
    }
