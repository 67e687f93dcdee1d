"""The page of `vgrout report` and `vgrout view` in a browser, as a reader has it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
from collections import Counter
from dataclasses import replace
from urllib.parse import quote

import pytest
from rich.console import Console

from experiments import stored
from vgrout.config import preset
from vgrout.envs.micro import problems
from vgrout.lab import explorer
from vgrout.lab.prereg import read
from vgrout.lab.report import page, report
from vgrout.lab.run import run
from vgrout.lab.runs import find
from vgrout.lab.view import bind
from vgrout.verify.browser import asked, chromium, missing, said, shape, visit

pytest.importorskip("duckdb")
# Where a browser is required, a missing one is an error of its fixture.
ABSENT = "" if os.environ.get("VGROUT_BROWSER") == "required" else missing()
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)

DECISION = """question = "Does routing on the pairs' direction make the model that ships hack less than vanilla GRPO?"
preset = "smoke"
settings = { steps = 4 }
seeds = [0, 1]
arms = ["routeV", "none"]
alpha = 0.05

[[primary]]
name = "P1"
says = "The model that routeV ships hacks held-out problems less than the one that vanilla GRPO ships"
arm = "routeV"
control = ["none"]
outcome = "hack"
side = "less"
"""
SELECTS = ("arm", "seed", "phase", "mode", "zone", "verdict")
TRAINED = {
    "keep": "keep: trained the deployed block",
    "absorb": "absorb: trained both blocks",
    "route": "route: trained the quarantine block",
}
THEMES = {"light": False, "dark": True}


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        shape(opened, 1280)
        yield opened


@pytest.fixture(scope="module")
def experiment(small_run, tmp_path_factory):
    """A preregistered experiment under way: a seed of each arm, and the second run has other settings."""
    folder = tmp_path_factory.mktemp("experiment")
    shutil.copytree(small_run, folder / small_run.name)
    run(replace(preset("smoke"), arm="none", seed=1, steps=2, eval_rollouts=4), folder / "none-s1")
    (folder / "decision.toml").write_text(DECISION)
    stored(folder, read(folder / "decision.toml"))
    return folder


@pytest.fixture(scope="module")
def address(experiment):
    """The experiment's page on disk."""
    out = experiment / "report.html"
    assert report([experiment], out, None, Console(file=io.StringIO())) == 0
    return out.as_uri()


@pytest.fixture(scope="module")
def rows(experiment):
    """Every rollout of the experiment by the name that the page gives it, with what a reader may ask for."""
    mode = {p.id: p.mode for split in ("train", "val", "test") for p in problems(split)}
    out = {}
    for made in find([experiment])[0]:
        for row in made.rollouts():
            known = {"arm": made.label, "seed": str(made.seed), "mode": mode[row["problem"]], "verdict": verdict(row)}
            out[f"{made.name}/{row['id']}"] = {**row, **known, "zone": row.get("zone"), "score": row.get("score")}
    return out


def verdict(row):
    hacked, solved = row["verdict_hacked"], row["verdict_solved"]
    if hacked or solved:
        return {(True, True): "hack and solution", (True, False): "hack", (False, True): "solution"}[hacked, solved]
    return "wrong" if row["verdict_compiled"] else "does not run"


def field(browser, name):
    return browser.find_element("id", f"x-{name}")


def choose(browser, name, value):
    offered = field(browser, name).find_elements("tag name", "option")
    next(option for option in offered if option.get_attribute("value") == value).click()


def shown(browser):
    """How many rollouts the page says that it shows."""
    return int(re.match(r"([\d,]+) of [\d,]+ rollouts", field(browser, "count").text)[1].replace(",", ""))


def style(browser, css, name):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return browser.execute_script(script, css, name)


def press(browser, keys):
    browser.find_element("tag name", "body").send_keys(keys)


def opened(browser):
    """The name of the rollout that is open, None where none is."""
    found = browser.find_elements("css selector", "#x-detail .x-link")
    return found[0].text if found else None


def facts(browser):
    names, values = (browser.find_elements("css selector", f"#x-detail dl {tag}") for tag in ("dt", "dd"))
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


# What it asks for.


def test_a_request_and_a_complaint_are_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<img src='http://127.0.0.1:9/image.png'><script>console.warn('look')</script><script>nothing()</script>"
    )
    visit(browser, (tmp_path / "page.html").as_uri())
    assert "http://127.0.0.1:9/image.png" in asked(browser)
    complaints = said(browser)
    assert any("look" in text for text in complaints) and any("nothing is not defined" in text for text in complaints)


def test_from_disk_it_asks_nobody(browser, address):
    visit(browser, address)
    read_through(browser)
    requests = asked(browser)
    assert address in requests and not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    assert said(browser) == []


def test_on_a_port_it_asks_that_port_alone(browser, experiment):
    with bind([experiment], 0, Console(file=io.StringIO())) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            origin = f"http://127.0.0.1:{server.server_address[1]}/"
            visit(browser, origin)
            read_through(browser)
            requests, complaints = asked(browser), said(browser)
        finally:
            server.shutdown()
    assert origin in requests and not [url for url in requests if not url.startswith((origin, "data:", "blob:"))]
    assert complaints == []


def read_through(browser):
    """Use everything that a page has."""
    choose(browser, "verdict", "solution")
    press(browser, "jjk")
    assert opened(browser)
    for summary in browser.find_elements("tag name", "summary"):
        summary.click()
    browser.find_element("id", "theme").click()


# Filters.


@pytest.mark.parametrize("name", SELECTS)
def test_a_choice_shows_what_has_it(browser, address, rows, name):
    visit(browser, address)
    assert shown(browser) == len(rows)
    counts = Counter(row[name] for row in rows.values() if row[name] is not None)
    offered = {o.get_attribute("value") for o in field(browser, name).find_elements("tag name", "option")} - {""}
    assert len(counts) > 1 and offered >= counts.keys()
    for value in sorted(offered):
        choose(browser, name, value)
        assert shown(browser) == counts[value], value
    choose(browser, name, "")
    assert shown(browser) == len(rows)


def test_choices_add_up(browser, address, rows):
    visit(browser, address)
    left = [row for row in rows.values() if (row["arm"], row["phase"], row["zone"]) == ("routeV", "train", "route")]
    choose(browser, "arm", "routeV"), choose(browser, "phase", "train"), choose(browser, "zone", "route")
    assert left and shown(browser) == len(left)
    counts = Counter(line.strip() for row in left for line in {*row["text"].splitlines()} if line.strip())
    text = next(line for line, count in counts.items() if 1 < count < len(left))
    field(browser, "text").send_keys(text.upper())  # its case does not matter
    assert shown(browser) == sum(text.lower() in row["text"].lower() for row in left) < len(left)
    choose(browser, "seed", "1")
    assert shown(browser) == 0 and not browser.find_elements("css selector", ".x-row")


@pytest.mark.parametrize("name, least, most", [("step", "from", "to"), ("score", "above", "below")])
def test_a_range_shows_what_is_in_it(browser, address, rows, name, least, most):
    values = sorted(row[name] for row in rows.values() if row.get(name) is not None)
    apart = sorted(set(values))
    low, high = apart[len(apart) // 4], apart[-1 - len(apart) // 4]
    if name == "score":  # the page rounds scores
        low, high = round(low, 2) + 0.00005, round(high, 2) + 0.00005
    assert values[0] < low < high < values[-1]
    for keys, want in (
        ({least: low}, [v for v in values if v >= low]),
        ({most: high}, [v for v in values if v <= high]),
        ({least: low, most: high}, [v for v in values if low <= v <= high]),
    ):
        visit(browser, address)
        for key, value in keys.items():
            field(browser, key).send_keys(str(value))
        assert shown(browser) == len(want) not in (0, len(values)), keys


@pytest.mark.parametrize("name", ["from", "to", "above", "below"])
def test_what_is_no_number_is_marked_and_ignored(browser, address, rows, name):
    visit(browser, address)
    border = style(browser, f"#x-{name}", "borderTopColor")
    field(browser, name).send_keys("two")
    assert shown(browser) == len(rows) and "what is no number is ignored" in field(browser, "count").text
    assert field(browser, name).get_attribute("aria-invalid") == "true"
    assert style(browser, f"#x-{name}", "borderTopColor") != border
    field(browser, name).send_keys("\b\b\b1")
    assert shown(browser) < len(rows) and "ignored" not in field(browser, "count").text
    assert field(browser, name).get_attribute("aria-invalid") == "false"
    assert style(browser, f"#x-{name}", "borderTopColor") == border


# A rollout, and addresses.


@pytest.mark.parametrize("zone", TRAINED)
def test_a_click_opens_a_rollout(browser, address, rows, zone):
    visit(browser, address)
    choose(browser, "arm", "routeV"), choose(browser, "zone", zone)
    browser.find_elements("css selector", ".x-row")[1].click()
    row = rows[opened(browser)]
    task = next(p.task for p in problems("train") if p.id == row["problem"])
    parts = {css: browser.find_element("css selector", f"#x-detail {css}") for css in (".x-prompt", "mark", ".x-code")}
    text = {css: part.get_property("textContent") for css, part in parts.items()}
    assert text == {".x-prompt": row["prompt"], "mark": row["prompt"].removeprefix(task), ".x-code": row["text"]}
    assert text["mark"] and style(browser, "#x-detail mark", "backgroundColor") != "rgba(0, 0, 0, 0)"
    told = facts(browser)
    assert told["zone"] == TRAINED[zone] and told["verdict"].split(",")[0] == row["verdict"]
    assert float(told["reward"]) == row["reward"] and told["problem"] == f"{row['problem']}, loophole {row['mode']}"
    assert float(told["score"].split(";")[0]) == pytest.approx(row["score"], abs=5e-5)
    assert told["phase"] == f"train, step {row['step']}" and told["written by"] == row["source"]


def test_j_and_k_move(browser, address, rows):
    visit(browser, address)
    choose(browser, "arm", "none")
    names, seen = [name for name, row in rows.items() if row["arm"] == "none"], []
    for key in "jjjkkkj" + 25 * "j":
        press(browser, key)
        seen.append(opened(browser))
    assert seen == [names[i] for i in (0, 1, 2, 1, 0, 0, 1, *range(2, 27))]
    line = browser.find_element("css selector", ".x-open")
    inside = """const [a, b] = [...arguments].map((e) => e.getBoundingClientRect());
        return a.top >= b.top && a.bottom <= b.bottom"""
    assert browser.execute_script(inside, line, field(browser, "list"))
    field(browser, "text").send_keys("j")
    assert field(browser, "text").get_property("value") == "j" and opened(browser) == seen[-1]


def test_an_address_names_what_is_open(browser, address, rows):
    visit(browser, address)
    choose(browser, "verdict", "wrong"), field(browser, "from").send_keys("1")
    press(browser, "jjj")
    name, count, code = opened(browser), shown(browser), field(browser, "detail").text
    assert name in rows and quote(name, safe="") in browser.current_url
    visit(browser, browser.current_url)
    assert (opened(browser), shown(browser), field(browser, "detail").text) == (name, count, code)
    assert rows[name]["text"] == browser.find_element("css selector", ".x-code").get_property("textContent")
    other = next(iter(rows))  # the first of the list, so that its line is there
    follow(browser, f"rollouts?rollout={quote(other, safe='')}")
    assert opened(browser) == other != name and shown(browser) == len(rows)
    assert len(browser.find_elements("css selector", ".x-open")) == 1
    follow(browser, "rollouts?rollout=nobody")
    assert opened(browser) is None and not browser.find_elements("css selector", ".x-open")
    visit(browser, f"{address}#rollouts?rollout=nobody")
    assert opened(browser) is None and "nobody is not in this page" in field(browser, "detail").text
    assert in_sight(browser, "rollouts")


def follow(browser, place):
    """Go to another place of the page that is open."""
    script = """const [place, done] = arguments;
        addEventListener("hashchange", () => done(), { once: true });
        location.hash = place;"""
    browser.execute_async_script(script, place)


SECTIONS = ("verdict", "arms", "plane", "training", "modes", "rollouts", "provenance")


@pytest.mark.parametrize("id", [*SECTIONS, "run-routeV-s0", "run-none-s1"])
def test_an_address_leads_to_a_part(browser, address, id):
    shape(browser, 1280, 60)
    try:
        visit(browser, address)
        assert not in_sight(browser, id)
        visit(browser, f"{address}#{id}")
        assert in_sight(browser, id)
    finally:
        shape(browser, 1280)


def in_sight(browser, id):
    script = """const box = document.getElementById(arguments[0]).getBoundingClientRect();
        return box.height > 0 && box.top > -1 && box.bottom <= innerHeight"""
    return browser.execute_script(script, id)


# Looks.

COLOURS = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
# The least contrast of any text with what is behind it, by WCAG's formula, and that text.
CONTRAST = """
const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const over = (top, below) => below.map((c, i) => top[i] * top[3] + c * (1 - top[3]));
const behind = (node) => {
  const own = rgba(getComputedStyle(node).backgroundColor);
  return over(own, own[3] === 1 || !node.parentElement ? [255, 255, 255] : behind(node.parentElement));
};
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
let least = [99, ""];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
  if (!text || node.closest("svg, script") || !node.checkVisibility()) continue;
  const back = behind(node), front = over(rgba(getComputedStyle(node).color), back);
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  if (ratio < least[0]) least = [ratio, `${node.className} ${text}`];
}
return least;
"""


def test_a_theme_is_a_choice(browser, address):
    seen = {}
    for name, dark in THEMES.items():
        shape(browser, 1280, dark=dark)
        visit(browser, address)
        seen[name] = browser.execute_script(COLOURS)
        browser.find_element("id", "theme").click()
        seen[f"switched {name}"] = browser.execute_script(COLOURS)
        browser.find_element("id", "theme").click()
        assert browser.execute_script(COLOURS) == seen[name]
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    assert seen["light"] == seen["switched dark"] and seen["dark"] == seen["switched light"]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_too_wide_or_too_faint(browser, address, rows, theme, width):
    """With a hack open and everything unfolded. Wide tables and figures scroll by themselves."""
    shape(browser, width, phone=width == 390, dark=THEMES[theme])
    try:
        hack = next(name for name, row in rows.items() if row["verdict"] == "hack")
        visit(browser, f"{address}#rollouts?rollout={quote(hack, safe='')}")
        for details in browser.find_elements("tag name", "summary"):
            details.click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ratio, text = browser.execute_script(CONTRAST)
        assert ratio >= 4.5, text
    finally:
        shape(browser, 1280)


# What a model may have written, and a great deal of it.

PAYLOAD = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><svg onload=window.hacked=1>"


def test_what_a_rollout_says_is_text(browser, experiment, tmp_path):
    hostile = tmp_path / "<img src=x onerror=window.hacked=1>-s0"
    shutil.copytree(experiment / "routeV-s0", hostile)
    for name in ("rollouts", "verdicts"):
        lines = [json.loads(line) for line in (hostile / f"{name}.jsonl").read_text().splitlines()]
        lines[0]["id"] = PAYLOAD
        if name == "rollouts":
            lines[0] |= {"text": f"{PAYLOAD}\n# {'x' * 5000}\n'{PAYLOAD}'", "prompt": 50 * PAYLOAD, "source": PAYLOAD}
        (hostile / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (hostile / "provenance.json").write_text(json.dumps({PAYLOAD: PAYLOAD}))
    (tmp_path / "page.html").write_text(page([tmp_path])[0])
    shape(browser, 390, phone=True)
    try:
        visit(browser, (tmp_path / "page.html").as_uri())
        press(browser, "j")
        browser.find_element("css selector", "#x-detail summary").click()
        for css, text in ((".x-code", lines_of(hostile)["text"]), (".x-prompt", 50 * PAYLOAD)):
            assert browser.find_element("css selector", css).get_property("textContent") == text
        assert opened(browser).endswith(PAYLOAD) and facts(browser)["written by"] == PAYLOAD
        assert browser.execute_script("return window.hacked === undefined && !document.querySelector('img')")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert said(browser) == []
    finally:
        shape(browser, 1280)


def lines_of(folder):
    return json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])


def test_fifty_thousand_rollouts(browser, experiment, tmp_path):
    runs, _ = find([experiment])
    held = explorer.table(runs)
    few, many = explorer.packed(held), 50_000
    columns = {name: [values[i % len(values)] for i in range(many)] for name, values in held["columns"].items()}
    columns |= {"id": list(range(many)), "step": [i // 100 for i in range(many)]}
    packed = explorer.packed({**held, "columns": columns, "ids": [f"id-{i}" for i in range(many)]})
    html = page([experiment])[0]
    assert html.count(few) == 1
    (tmp_path / "page.html").write_text(html.replace(few, packed))
    visit(browser, (tmp_path / "page.html").as_uri())
    assert shown(browser) == many
    choose(browser, "arm", "none")
    arms = [run.label for run in runs]
    none = [i for i in range(many) if arms[columns["run"][i]] == "none"]
    assert shown(browser) == len(none)
    field(browser, "from").send_keys("400")
    late = [i for i in none if columns["step"][i] >= 400]
    assert shown(browser) == len(late) > 1000
    for part in (0.5, 1.0):
        script = """const list = document.getElementById("x-list"), done = arguments[1];
            list.scrollTop = arguments[0] * list.scrollHeight;
            requestAnimationFrame(() => requestAnimationFrame(done));"""
        browser.execute_async_script(script, part)
        lines = browser.find_elements("css selector", ".x-row")
        assert 0 < len(lines) < 60
        browser.execute_script("arguments[0].click()", lines[-1])  # a click of the driver scrolls to it before
        last = int(opened(browser).rsplit("-", 1)[1])
    assert last == late[-1]
