"""What cannot be joined. tests/console/test_joined.py runs joined modules in a browser."""

import re

import pytest

from service.http.console.joined import NotJoinable, joined


@pytest.mark.parametrize(
    "line",
    [
        "export default 1;",
        "export let changes = 1;",
        'export * from "./api.js";',
        'import api from "./api.js";',
        "import './api.js';",
    ],
)
def test_a_form_that_is_not_known_is_refused_by_its_line(line: str) -> None:
    with pytest.raises(NotJoinable) as refused:
        joined({"app.js": f"// A module.\n{line}\n"}, "app.js")
    assert str(refused.value) == f"app.js: {line}"


def test_modules_that_import_each_other_are_refused() -> None:
    modules = {
        "a.js": 'import { b } from "./parts/b.js";\n',
        "parts/b.js": 'import { a } from "../a.js";\n',
    }
    with pytest.raises(NotJoinable, match=re.escape("a.js -> parts/b.js -> a.js")):
        joined(modules, "a.js")
