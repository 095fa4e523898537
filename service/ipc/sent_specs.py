"""Specs of an adapter as the engine has sent them. Each is parsed when it is first asked for.

Parsing one of the zoo's takes 300 to 600 microseconds on a slow processor. A worker gets those of
all stored revisions at once, and thousands would keep it from its heartbeats until the engine gives
it up.
"""

from collections.abc import Iterator, Mapping

from adapters.format.spec import AdapterSpec


class SentSpecs(Mapping[str, AdapterSpec]):
    """Specs by revision.

    Args:
        specs: JSON that the engine has made from a valid spec, or a spec.
    """

    __slots__ = ("_specs",)

    def __init__(self, specs: dict[str, str | AdapterSpec]) -> None:
        self._specs = specs

    @classmethod
    def taken(cls, sent: Mapping[str, str | None], known: Mapping[str, AdapterSpec]) -> "SentSpecs":
        """Those of a message; None stands for one in `known`.

        Raises:
            KeyError: it is not there.
        """
        before = known._specs if isinstance(known, SentSpecs) else known
        return cls({key: before[key] if text is None else text for key, text in sent.items()})

    def __getitem__(self, revision: str) -> AdapterSpec:
        spec = self._specs[revision]
        if isinstance(spec, str):
            spec = self._specs[revision] = AdapterSpec.model_validate_json(spec)
        return spec

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
