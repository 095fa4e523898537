"""Modules joined into one script, in a browser."""

import pytest

from service.http.console.joined import joined
from tests.support.browser import Console

pytestmark = pytest.mark.slow

MODULES = {
    "first.js": """\
import * as api from "./api.js";
import { put as set, once } from "./parts/dom.js";
const { late } = await import("./pages/late.js");
globalThis.results = [api.put(1), api.delete(), set(2), once, late(), import.meta.url];
""",
    "api.js": """\
import { once } from "./parts/dom.js";
export const put = (value) => [value, once];
const del = () => "gone";
export { del as delete };
""",
    "parts/dom.js": """\
globalThis.runs = (globalThis.runs ?? 0) + 1;
export const once = globalThis.runs;
export function put(value) {
  return { value };
}
""",
    "pages/late.js": """\
import { once } from "../parts/dom.js";
export async function* unused() {}
export class Unused {}
export function late() {
  return [once, new URL("late.css", import.meta.url).pathname.split("/").at(-2)];
}
""",
}


def test_joined_modules_do_what_they_do_alone(console: Console) -> None:
    script = joined(MODULES, "first.js")
    kind = "text/javascript"
    console.page.route("**/x/one.js", lambda route: route.fulfill(body=script, content_type=kind))
    console.run('() => import("./x/one.js")')
    console.page.wait_for_function("globalThis.results")
    *values, address = console.run("() => results")
    # Every module runs once, and all share what it exports.
    assert values == [[1, 1], "gone", {"value": 2}, 1, [1, "pages"]]
    # The address of a module is as if it had come alone.
    assert address.endswith("/x/first.js")
