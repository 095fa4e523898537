"""The paper's kind of table: methods down, tasks across, the best prompt of each column in bold."""

from collections.abc import Mapping, Sequence

from train.experiments.scores import Score, mean_of
from train.markdown import table

# Everything else puts soft prompts into a frozen backbone.
NO_PROMPT = ("majority-class", "head-only", "head-only-mean", "lora", "fine-tuning")


def score_table(columns: Sequence[str], rows: Mapping[str, Sequence[Score]]) -> str:
    """Percent, with the mean over all columns where there are several.

    Args:
        columns: their heads, Markdown.
        rows: by method, a score for every column.
    """
    several = len(columns) > 1
    scores = {
        name: [*found, *([mean_of(found)] if several else [])] for name, found in rows.items()
    }
    contenders = [name for name in rows if name not in NO_PROMPT]
    texts = {name: [score.percent() for score in found] for name, found in scores.items()}
    for column in range(len(columns) + several):
        best = _best([scores[name][column] for name in contenders])
        for name in contenders:
            if best is not None and _shown(scores[name][column]) == best:
                texts[name][column] = f"**{texts[name][column]}**"
    head = ["method", *columns, *(["mean"] if several else [])]
    return table(head, [[name, *found] for name, found in texts.items()])


def controls_first(methods: Sequence[str]) -> list[str]:
    """What has no adapter at all stands on top, beside the majority class."""
    return sorted(methods, key=lambda method: not method.startswith("head-only"))


def _best(scores: Sequence[Score]) -> float | None:
    """Of equal figures all are the best: what is not shown is no difference."""
    return max((shown for score in scores if (shown := _shown(score)) is not None), default=None)


def _shown(score: Score) -> float | None:
    return None if score.mean is None else round(100 * score.mean, 1)
