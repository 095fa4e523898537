"""The catalog as the holder of a key sees it."""

from adapters.errors import UnknownAdapter
from adapters.format.uploads import ReceivedFile
from service.access.keys import Key, forbidden_adapter
from service.catalog.entry import CatalogEntry, Change, ChangeResult, Condition, Inspection
from service.catalog.view import CatalogView


class HiddenAdapters(UnknownAdapter):
    """As its base, but it names no adapter: this key may not list them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ())
        self.args = (f"no adapter is named {name!r}",)


class RestrictedCatalog(CatalogView):
    """A view of a catalog that hides what a key is not for.

    Asking for an adapter that the key is not for is `Forbidden`, whether or not there is one: the
    answer depends on the name alone.
    """

    def __init__(self, whole: CatalogView, key: Key) -> None:
        super().__init__(whole.root)
        self._whole = whole
        self._key = key
        self._entries = whole._entries

    def __len__(self) -> int:
        return len(self.entries())

    def entry(self, name: str) -> CatalogEntry:
        self._require(name)
        try:
            return super().entry(name)
        except UnknownAdapter as error:
            if "adapters:read" not in self._key.scopes:
                raise HiddenAdapters(name) from None
            raise UnknownAdapter(name, list(filter(self._key.may_use, error.known))) from None

    def entries(self) -> list[CatalogEntry]:
        return [entry for entry in super().entries() if self._key.may_use(entry.name)]

    def check(self, name: str, condition: Condition, *, stage: bool = False) -> None:
        self._require(name)
        super().check(name, condition, stage=stage)

    async def apply(self, change: Change) -> ChangeResult:
        self._require(change.name)
        return await self._whole.apply(change)

    async def inspected(self, file: ReceivedFile) -> Inspection:
        return await self._whole.inspected(file)

    def _require(self, name: str) -> None:
        """
        Raises:
            Forbidden: the key is not for an adapter of this name.
        """
        if not self._key.may_use(name):
            raise forbidden_adapter(self._key, name)
