"""The console's modules as one file, so that a first load waits for one answer and not for twenty.

The sources stay plain modules, each at its own address. They are joined once, when the service
reads them: every module becomes an asynchronous function that runs when it is first imported, and
what it exports becomes an object. Only the forms of `import` and `export` that the console's
modules use are known; any other is an error.
"""

import re
from collections.abc import Iterator, Mapping
from posixpath import dirname, join, normpath

_IMPORT = re.compile(r'^import (\* as \w+|\{[^}]*\}) from "([^"]+)";$', re.MULTILINE)
_DYNAMIC = re.compile(r'\bimport\("([^"]+)"\)')
_EXPORTED = re.compile(
    r"^export ((?:async )?function\*? ?|async function\* |const |class )(\w+)", re.MULTILINE
)
_EXPORT_LIST = re.compile(r"^export \{([^}]*)\};$", re.MULTILINE)
_LEFT = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)
_START = """\
// The console's modules in one file; each is also at an address of its own, as it was written.
const modules = {};
const load = (name) => (modules[name] ??= sources[name]().catch((error) => forget(name, error)));
const forget = (name, error) => {
  delete modules[name];
  throw error;
};
const sources = {
"""


class NotJoinable(Exception):
    """A module uses `import` or `export` in an unknown form, or modules import each other."""


def joined(modules: Mapping[str, str], first: str) -> str:
    """All modules in one, which runs the module `first`.

    Args:
        modules: sources by path. What they import beside these is left to the browser.
        first: a path of `modules`.

    Raises:
        NotJoinable: see there.
    """
    _refuse_circles(modules, first, ())
    written = [f'"{path}": async () => {{\n{_body(modules, path)}}},\n' for path in modules]
    return f'{_START}{"".join(written)}}};\nload("{first}");\n'


def _body(modules: Mapping[str, str], path: str) -> str:
    exported: dict[str, str] = {}

    def imported(found: re.Match[str]) -> str:
        names = found[1].removeprefix("* as ").replace(" as ", ": ")
        return f"const {names} = await {_loading(modules, path, found[2])};"

    def declared(found: re.Match[str]) -> str:
        exported[found[2]] = found[2]
        return found[1] + found[2]

    def listed(found: re.Match[str]) -> str:
        for item in found[1].split(","):
            name, _, shown = item.strip().partition(" as ")
            exported[shown or name] = name
        return ""

    text = _DYNAMIC.sub(lambda found: _loading(modules, path, found[1]), modules[path])
    text = _IMPORT.sub(imported, text)
    text = _EXPORTED.sub(declared, text)
    text = _EXPORT_LIST.sub(listed, text)
    if found := _LEFT.search(text):
        raise NotJoinable(f"{path}: {found[0]}")
    # The address of the module itself, as if it had come alone.
    text = text.replace("import.meta.url", f'new URL("./{path}", import.meta.url).href')
    returned = ", ".join(f"{shown}: {name}" for shown, name in exported.items())
    return f"{text}return {{ {returned} }};\n"


def _loading(modules: Mapping[str, str], path: str, address: str) -> str:
    name = normpath(join(dirname(path), address))
    return f'load("{name}")' if name in modules else f'import("./{name}")'


def _refuse_circles(modules: Mapping[str, str], path: str, above: tuple[str, ...]) -> None:
    if path in above:
        raise NotJoinable(" -> ".join((*above, path)))
    for name in _imports(modules[path], path):
        if name in modules:
            _refuse_circles(modules, name, (*above, path))


def _imports(text: str, path: str) -> Iterator[str]:
    for pattern, group in ((_IMPORT, 2), (_DYNAMIC, 1)):
        for found in pattern.finditer(text):
            yield normpath(join(dirname(path), found[group]))
