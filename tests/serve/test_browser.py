"""The page in a real browser: as a file and as a service."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retrac_scale as rs
from retrac_scale.evaluate import largest_share, unique_fraction
from retrac_scale.measurement.halves import repeatability_of_rows
from retrac_scale.report import Pictures, norm_curve, write_report
from retrac_scale.serve import Limits, create_app
from retrac_scale.serve.library import Library
from tests.query.test_copies import planted
from tests.served import HOSTILE, QUERIES, build, of_classes, running

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, not installed here")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium, which is not installed here")
K = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return build(folder)


def answered(library: Library) -> dict[str, rs.TopK]:
    return {name: index.query(library.queries[name], K, side="both") for name, index in library.indexes.items()}


@pytest.fixture(scope="module")
def file(folder: Path, library: Library) -> str:
    assert library.store is not None
    curve = norm_curve(library.store)
    common: dict[str, Any] = {"curve": curve, "indexes": library.indexes, "queries": library.queries}
    return write_report(folder / "page.html", answered(library), library.pictures, title=HOSTILE, **common).as_uri()


@pytest.fixture(scope="module")
def service(library: Library) -> Iterator[str]:
    with running(create_app(library, token="t", limits=Limits(pixels=10_000), hosts=["127.0.0.1"])) as url:
        yield f"{url}/#token=t"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong unseen: no message on the console, no request to elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.allowed = []
    seen, asked = [], []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("dialog", lambda dialog: seen.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert [text for text in seen if not any(word in text for word in page.allowed)] == []
    assert [url for url in asked if not re.match(r"file:|data:|blob:|http://127\.0\.0\.1:", url)] == []


def shown(page: Any) -> list[str]:
    """Samples in the lists, as their pictures say."""
    return [
        alt.removeprefix("training sample ")
        for alt in page.locator(".result img").evaluate_all("x => x.map(i => i.alt)")
    ]


def test_a_file_shows_every_result_with_its_picture_and_score(page: Any, file: str, library: Library) -> None:
    page.goto(file)
    expected = []
    answers = answered(library)
    for query in range(QUERIES):
        expected += [str(x) for answer in answers.values() for x in answer.ids[query][answer.listed[query]]]
    assert shown(page) == expected
    page.wait_for_function("[...document.images].slice(0, 20).every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("h1").inner_text() == HOSTILE
    page.get_by_role("tab", name="Hubs and norms").click()
    table = page.locator("#specificity tbody tr").evaluate_all("rows => rows.map(r => r.innerText.split('\\t'))")
    for row, (name, answer) in zip(table, answers.items(), strict=True):
        proponents = answer.ids[:, :K]
        assert answer.listed[:, :K].all()
        share = f"{100 * largest_share(proponents):.0f} %"
        assert row == [name, str(K), f"{unique_fraction(proponents):.3f}", share]
    assert page.locator("svg.curve").get_attribute("aria-label").startswith("Mean gradient norm by timestep")
    assert page.locator(".warnings li").count() > 0


def test_a_file_leads_with_how_far_its_lists_would_come_again(page: Any, file: str, library: Library) -> None:
    page.goto(file)
    verdict = page.locator("#verdict p").first.inner_text()
    assert verdict.startswith(f"Measured again, so many of {K} names would come again: TracIn ")
    page.get_by_role("tab", name="How far to trust them").click()
    assert not page.locator("#answers").is_visible()
    card = page.get_by_role("tabpanel", name="How far to trust them")
    lines = card.get_by_role("listitem").all_inner_texts()
    for line, (name, index) in zip(lines, library.indexes.items(), strict=True):
        store = index.check_store()
        assert store is not None
        share = rs.repeatability(store, library.queries[name], index.estimator, K).overlap
        assert line.startswith(f"{name}: measured again, {K * share.value:.1f} of the {K} names would come again (")
    table = card.get_by_role("table")
    assert table.get_by_role("columnheader").all_inner_texts() == list(library.indexes)
    assert table.get_by_role("rowheader").first.inner_text() == "measured"
    assert table.get_by_role("row").nth(1).get_by_role("cell").all_inner_texts() == ["2 times", "2 times", "4 times"]
    ridge = rs.repeatability(library.indexes["ReTracRidge"], library.queries["ReTracRidge"], k=K)
    for query, share in enumerate(ridge.by_query):
        section = page.locator("article").nth(query).locator("section").last
        expected = f"Two halves of the measurements share {np.floor(K * share + 0.5):.0f} of the {K} proponents."
        assert section.locator(".shared").text_content() == expected


def test_estimators_that_cannot_tell_show_neither_whiskers_nor_doubt(page: Any, file: str) -> None:
    page.goto(file)
    first = page.locator("article").first
    for place, name in enumerate(("TracIn", "ReTrac", "ReTracRidge")):
        section = first.locator("section").nth(place)
        assert section.locator("h3").text_content() == name  # as it is written, shown yet or not
        assert (section.locator(".bar .error").count() > 0) == (name == "ReTracRidge")
    doubts = [line for line in page.locator(".warnings li").all_text_contents() if "≈" in line]
    assert [line.split(":")[0] for line in doubts] == ["ReTracRidge"]


def test_a_page_that_knows_nothing_of_it_has_no_such_card(page: Any, folder: Path, library: Library) -> None:
    out = write_report(folder / "plain.html", answered(library), library.pictures)
    page.goto(out.as_uri())
    assert page.get_by_role("tab").all_inner_texts() == ["Queries", "Hubs and norms"]
    assert page.locator(".shared:visible").count() == 0


@pytest.mark.parametrize("width", [420, 1280, 1920])
def test_the_first_querys_proponents_are_inside_the_first_screen(
    page: Any, file: str, service: str, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for address in (file, service):
        page.goto(address)
        page.locator(".result").first.wait_for()
        page.locator("#verdict p").first.wait_for()  # of the service it comes later
        box = page.locator(".strip.proponents").first.bounding_box()
        assert box["y"] + box["height"] <= 800, (address, box)


def test_tabs_are_reached_by_arrows_and_a_hub_leads_back(page: Any, file: str) -> None:
    page.goto(file)
    page.get_by_role("tab", name="Queries").focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == "tab-overview"
    assert page.locator("#overview").is_visible()
    page.locator(".hub").first.click()
    assert page.locator("#answers").is_visible()


def test_captions_keep_what_tells_two_pictures_apart(page: Any, folder: Path) -> None:
    names = [f"images/{maker}/{what}.png" for maker in ("apple", "google") for what in ("pear", "plum", maker)]
    names += [f"images/google/{'long' * 9}-{last}.png" for last in "ab"]
    rng = np.random.default_rng(0)
    index = rs.build_index(rs.write_store(None, {"c": rng.standard_normal((8, 1, 16))}, ids=names), rs.TracIn(), None)
    queries = rs.write_store(None, {"c": rng.standard_normal((1, 1, 16))})
    pictures = Pictures(rng.random((8, 8, 8)), index.ids, rng.random((1, 8, 8)))
    out = write_report(folder / "named.html", {"TracIn": index.query(queries, 8, side="both")}, pictures)
    page.goto(out.as_uri())
    told = dict(zip(shown(page), page.locator(".result .name").all_inner_texts(), strict=True))
    assert len(set(told.values())) == len(told)
    for name, caption in told.items():
        assert name.removesuffix(".png").endswith(caption.removeprefix("…"))
    assert told["images/apple/apple.png"] == "apple"
    assert told["images/google/pear.png"] == "google/pear"
    assert {told[name][-2:] for name in names[-2:]} == {"-a", "-b"}


def test_copies_stand_behind_the_best_of_them_when_they_are_unfolded(page: Any, folder: Path) -> None:
    index, queries, _, _ = planted()
    answer = index.query(queries, 3, duplicates="fold")
    assert answer.copies is not None
    pictures = Pictures(np.random.default_rng(0).random((len(index.ids), 8, 8)), index.ids, np.zeros((3, 8, 8)))
    page.goto(write_report(folder / "copies.html", {"TracIn": answer}, pictures).as_uri())
    assert shown(page) == [str(name) for name in answer.ids.ravel()]
    toggle = page.get_by_role("button", name="and 5 copies").first
    toggle.click()
    unfolded = page.locator(".copy img").evaluate_all("x => x.map(i => i.alt)")
    assert unfolded == [f"copy {name}" for name in answer.copies[0, 0]]
    page.locator("article").first.locator(".result").first.focus()
    page.keyboard.press("ArrowRight")
    assert toggle.evaluate("x => x === document.activeElement")
    page.keyboard.press("Enter")
    assert page.locator(".copy").count() == 0


def test_search_and_filters_leave_what_matches(page: Any, file: str, library: Library) -> None:
    page.goto(file)
    artists = library.indexes["TracIn"].columns["artist"]
    every = shown(page)
    page.get_by_label("artist").select_option("=" + HOSTILE)
    assert shown(page) == [sample for sample in every if artists[int(sample)] == HOSTILE]
    page.get_by_label("artist").select_option("")
    page.get_by_label("Search ids").fill("id:" + every[0])
    assert set(shown(page)) == {every[0]}
    assert re.fullmatch(
        rf"\d of {QUERIES} queries, {every.count(every[0])} of {len(every)} results",
        page.locator("#count").inner_text(),
    )
    page.get_by_label("Search ids").fill("bel")
    assert shown(page) == [sample for sample in every if artists[int(sample)] == "Bela"]
    page.get_by_label("Search ids").fill("")
    page.get_by_label("opponents", exact=True).uncheck()
    page.locator("#filters").get_by_label("TracIn").uncheck()
    page.locator("#filters").get_by_label("ReTrac", exact=True).uncheck()
    assert len(shown(page)) == QUERIES * K


def test_the_keyboard_reaches_a_result_and_its_explanation(page: Any, file: str) -> None:
    page.goto(file)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the queries
    page.locator("#filters input[type=checkbox]").last.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.innerText")
    assert "rank 2" in focused
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("button", name="Close").evaluate("x => x === document.activeElement")
    assert dialog.locator("table").count() == 3
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.innerText") == focused


def test_an_explanation_adds_up_to_its_score(page: Any, file: str) -> None:
    page.goto(file)
    page.locator(".result").first.click()
    dialog = page.get_by_role("dialog")
    score = float(dialog.locator("tr", has_text="score").first.inner_text().split("\t")[1].split(" ±")[0])
    (part,) = dialog.locator("table").nth(1).locator("td.number").all_inner_texts()
    assert float(part) == pytest.approx(score, rel=0.02)
    assert HOSTILE in dialog.inner_text() or "Anna" in dialog.inner_text() or "Bela" in dialog.inner_text()


def test_a_hub_leads_to_the_lists_that_hold_it(page: Any, file: str) -> None:
    page.goto(file)
    page.get_by_role("tab", name="Hubs and norms").click()
    hub = page.locator(".hub").first
    sample = hub.locator("img").get_attribute("alt").removeprefix("training sample ")
    hub.click()
    assert set(shown(page)) == {sample}


def test_group_totals_open_with_shares(page: Any, file: str, library: Library) -> None:
    page.goto(file)
    page.get_by_text("totals by artist").first.click()
    totals = page.locator(".groups table").first.locator("tbody th").all_inner_texts()
    assert sorted(totals) == sorted([HOSTILE, "Anna", "Bela"])
    index = library.indexes["TracIn"]
    answer = index.query(rs.take(library.queries["TracIn"], [0]), 3, group_by="artist")
    shares, errors = answer.shares, answer.share_errors
    assert shares is not None
    assert errors is not None
    row = page.locator(".groups table").first.locator("tbody tr").first
    assert row.get_by_role("rowheader").inner_text() == answer.ids[0, 0]
    expected = " ± ".join(f"{100 * values[0, 0]:.1f}" for values in (shares, errors))
    assert row.get_by_role("cell").first.inner_text() == f"{expected} %"
    assert row.locator(".bar .error").count() == 1


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_sticks_out_of_the_window(page: Any, file: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(file)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".result").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    close = page.get_by_role("button", name="Close").bounding_box()
    assert close["height"] < 45  # one line
    page.keyboard.press("Escape")
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        letters = (
            "x => x.filter(i => i.innerText.length > 2 && i.clientWidth && i.clientWidth < 20).map(i => i.innerText)"
        )
        assert page.locator("td, th").evaluate_all(letters) == []


def test_dark_and_light_text_is_readable(browser: Any, file: str) -> None:
    """Contrast of text and quiet text against their ground by WCAG's formula, at least 4.5."""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(file)
        for selector in (
            "h1",
            "#verdict p",
            "#trust li",
            "#halves td",
            "#count",
            ".result .name",
            ".hint",
            ".warnings li",
        ):
            ink, ground = page.locator(selector).first.evaluate(
                """x => { const ink = getComputedStyle(x).color; let y = x;
                while (getComputedStyle(y).backgroundColor === 'rgba(0, 0, 0, 0)') y = y.parentElement;
                return [ink, getComputedStyle(y).backgroundColor]; }"""
            )
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector, ink, ground)
        page.close()


def luminance(color: str) -> float:
    channels = np.array([int(x) for x in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_of_a_thousand_results_the_first_lists_are_drawn_and_the_others_on_demand(page: Any, folder: Path) -> None:
    rng = np.random.default_rng(0)

    index = rs.build_index(rs.write_store(None, {"c": rng.standard_normal((1000, 1, 16))}), rs.TracIn(), None)
    queries = rs.write_store(None, {"c": rng.standard_normal((50, 1, 16))})
    pictures = Pictures(rng.integers(0, 255, (1000, 32, 32, 3), dtype=np.uint8), index.ids, rng.random((50, 32, 32)))
    out = write_report(folder / "many.html", {"TracIn": index.query(queries, 10, side="both")}, pictures)
    page.goto(out.as_uri())
    assert "1000 of 1000 results" in page.locator("#count").inner_text()
    assert len(shown(page)) == 800  # 40 queries: what a key press in the search box has to draw again
    page.get_by_role("button", name="Show more").click()
    assert len(shown(page)) == 1000


def test_the_service_answers_an_id_and_explains_it(page: Any, service: str, library: Library) -> None:
    page.goto(service)
    opened = page.get_by_role("article")
    opened.wait_for()
    assert opened.get_attribute("aria-label") == "Query 0"  # the first stored one, without a word
    choices = page.get_by_label("Pictures to ask about").get_by_role("button")
    assert choices.all_inner_texts() == [str(number) for number in range(QUERIES)]
    assert not page.locator("#specificity").is_visible()
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill("3")
    page.get_by_label("only samples where").fill("artist == 'Anna'")
    choices.nth(2).click()
    page.get_by_role("article", name="Query 2").wait_for()
    first = page.get_by_role("article").first
    answers = [
        index.query(rs.take(library.queries[name], [2]), 3, side="both", where="artist == 'Anna'")
        for name, index in library.indexes.items()
    ]
    assert shown(first) == [str(sample) for answer in answers for sample in answer.ids[answer.listed]]
    page.get_by_role("tab", name="How far to trust them").click()
    told = page.get_by_role("tabpanel", name="How far to trust them")
    told.get_by_text("of the 10 names would come again").first.wait_for()
    assert told.get_by_role("listitem").count() == len(library.indexes)
    page.get_by_role("tab", name="Queries").click()
    first.locator(".shared:visible").wait_for()
    index = library.indexes["ReTracRidge"]
    one = index.query_rows(rs.take(library.queries["ReTracRidge"], [2]))
    share = repeatability_of_rows(index, one, np.array(["2"]), 3, where="artist == 'Anna'").by_query[0]
    expected = f"Two halves of the measurements share {np.floor(3 * share + 0.5):.0f} of the 3 proponents."
    assert first.locator(".shared:visible").all_inner_texts() == [expected]
    page.locator(".result").first.click()
    page.get_by_role("dialog").get_by_text("By timestep of the query").wait_for()
    page.get_by_role("button", name="Close").click()
    page.get_by_text("totals by artist").first.click()
    page.locator(".groups tbody tr").first.wait_for()
    assert "token" not in page.url


def test_the_service_takes_an_upload_and_refuses_a_bad_one(page: Any, service: str, tmp_path: Path) -> None:
    page.allowed = ["422"]  # Chromium tells of refused requests
    page.goto(service)
    page.get_by_role("article", name="Query 0").wait_for()
    page.get_by_text("more options").click()
    pixels = np.random.default_rng(3).integers(0, 255, (12, 12), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    (tmp_path / "bad.png").write_bytes(b"\x80\x04\x95 this is a pickle")
    page.locator("#file").set_input_files(str(tmp_path / "own.png"))
    page.get_by_role("button", name="Upload and ask").click()
    page.get_by_text("upload, ").wait_for()
    assert page.locator(".asked figcaption").first.inner_text() == "upload, resized from 12 x 12 to 8 x 8"
    page.locator("#file").set_input_files(str(tmp_path / "bad.png"))
    page.get_by_role("button", name="Upload and ask").click()
    page.get_by_text("the file is no image").wait_for()
    page.get_by_label("only samples where").fill("artist ==")
    page.get_by_label("Pictures to ask about").get_by_role("button").nth(1).click()
    page.get_by_text("is no expression").wait_for()


def opened(page: Any, service: str) -> Any:
    """The page with the tools for a part of its first query, and the surface to draw on."""
    page.goto(service)
    page.get_by_role("button", name="ask about a part").first.click()
    surface = page.get_by_role("application", name="The picture")
    surface.wait_for()
    return surface


def drag(page: Any, surface: Any, first: tuple[int, int], last: tuple[int, int]) -> None:
    """From the middle of a pixel of the 8 x 8 picture to that of another."""
    frame = surface.bounding_box()
    points = [
        [frame[axis] + frame["width"] * (x + 0.5) / 8 for axis, x in zip("xy", p, strict=True)] for p in (first, last)
    ]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=6)
    page.mouse.up()


def proponents(library: Library, region: Any, views: bool = False) -> list[str]:
    """What the index under common noise names for a part of the first stored query, five each side, sketched here."""
    assert library.measured is not None
    pixels = torch.from_numpy(library.pictures.query(0).astype(np.float32))[None, None] / 127.5 - 1
    asked = rs.Samples(pixels, library.measured.task, library.measured.checkpoints, region=region, views=views)
    answer = library.indexes["ReTracRidge"].query(asked, K, side="both")
    return [str(sample) for sample in answer.ids[answer.listed]]


def told_by(page: Any, part: Any, drawn: Callable[[], None]) -> list[str]:
    """The samples in a part's lists once the service has answered what is drawn."""
    with page.expect_response("**/api/region"):
        drawn()
    part.locator(".result").first.wait_for()
    page.wait_for_function("!asking.now")
    return shown(part.locator("section").last)


def test_a_box_that_is_dragged_has_its_own_lists(page: Any, service: str, library: Library) -> None:
    surface = opened(page, service)
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    part = page.get_by_role("article", name="query 0, box 1, 2, 6, 5")
    assert told_by(page, part, lambda: drag(page, surface, (5, 4), (1, 2))) == proponents(library, (1, 2, 6, 5))
    part.get_by_role("button", name="remove").click()
    assert page.get_by_role("article").count() == 1


def test_a_picture_and_its_parts_are_asked_about_in_views_by_a_tick(page: Any, service: str, library: Library) -> None:
    surface = opened(page, service)
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    region = page.locator("#region")
    tick = region.get_by_label("also moved, smaller, larger, lighter or darker")
    page.get_by_label("fold copies").check()
    tick.check()
    region.get_by_role("alert").get_by_text("Copies are not folded").wait_for()
    page.get_by_label("fold copies").uncheck()
    tick.uncheck()

    def by_keys() -> None:
        tick.focus()
        page.keyboard.press("Space")
        region.get_by_text("Asking in 9 views").wait_for()

    whole = page.get_by_role("article", name="query 0, in views", exact=True)
    assert told_by(page, whole, by_keys) == proponents(library, None, views=True)
    assert region.get_by_text("Asking in 9 views").count() == 0
    assert whole.locator(".groups").count() == 0  # totals of what is in no one list
    whole.locator("section").last.locator(".result").first.click()
    page.get_by_text("Of the query's views, the one with this score: ").wait_for()
    page.keyboard.press("Escape")
    boxed = page.get_by_role("article", name="query 0, box 1, 2, 6, 5, in views")
    found = told_by(page, boxed, lambda: drag(page, surface, (5, 4), (1, 2)))
    assert found == proponents(library, (1, 2, 6, 5), views=True)
    plain = page.get_by_role("article", name="query 0, box 1, 2, 6, 5", exact=True)
    assert told_by(page, plain, tick.uncheck) == proponents(library, (1, 2, 6, 5))


def test_what_is_asked_in_views_is_given_up_for_what_is_drawn_next(page: Any, service: str, library: Library) -> None:
    page.allowed = ["ERR_ABORTED"]
    surface = opened(page, service)
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    region = page.locator("#region")
    first = page.get_by_role("article", name="query 0, box 0, 5, 8, 8", exact=True)
    told_by(page, first, lambda: drag(page, surface, (0, 5), (7, 7)))
    region.get_by_label("also moved").check()
    region.get_by_text("Asking in 9 views").wait_for()
    with page.expect_event("requestfailed") as given_up:
        region.get_by_label("also moved").uncheck()
    assert given_up.value.post_data_json["views"] is True
    region.get_by_text("Asking").wait_for(state="hidden")
    assert shown(first.locator("section").last) == proponents(library, (0, 5, 8, 8))
    assert page.locator("#region-alert").text_content() == ""


def test_an_upload_is_asked_about_in_views_where_the_service_measures(
    page: Any, service: str, library: Library, tmp_path: Path
) -> None:
    with running(create_app(Library(library.indexes, library.pictures, queries=library.queries))) as plain:
        page.goto(plain)
        page.get_by_role("article", name="Query 0").wait_for()
        page.get_by_text("more options").click()
        assert page.get_by_label("also moved").count() == 0
        page.goto(service)
    page.get_by_role("article", name="Query 0").wait_for()
    page.get_by_text("more options").click()
    Image.fromarray(np.asarray(library.pictures.query(0))).save(tmp_path / "own.png")
    page.locator("#file").set_input_files(str(tmp_path / "own.png"))
    page.get_by_label("results per side").fill(str(K))
    page.locator("#upload").get_by_label("also moved").check()
    page.get_by_role("button", name="Upload and ask").click()
    page.locator("#ask").get_by_text("Asking in 9 views").wait_for()
    page.get_by_text("upload, in views").wait_for()
    first = page.get_by_role("article").first
    assert shown(first.locator("section").last) == proponents(library, None, views=True)


@pytest.mark.slow
def test_parts_are_painted_kept_beside_each_other_and_turned_round(page: Any, service: str, library: Library) -> None:
    surface = opened(page, service)
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    box = page.get_by_role("article", name="query 0, box 0, 0, 4, 8")
    first = told_by(page, box, lambda: drag(page, surface, (0, 0), (3, 7)))
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="brush").click()
    page.get_by_label("size of the brush").fill("2")
    mask = np.zeros((8, 8), np.float32)
    mask[3:5, 1:7] = 1  # a brush of two pixels, from (1, 3) to (5, 3)
    painted = page.get_by_role("article", name="query 0, what is painted")
    assert told_by(page, painted, lambda: drag(page, surface, (1, 3), (5, 3))) == proponents(library, mask)
    rest = page.get_by_role("article", name="query 0, all but what is painted")
    turned = told_by(page, rest, lambda: page.get_by_label("all but this").check())
    assert turned == proponents(library, rs.AllBut(mask))
    assert shown(box.locator("section").last) == first == proponents(library, (0, 0, 4, 8))
    left, right = (part.bounding_box() for part in (box, rest))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert painted.count() == 0  # it gave way to what was drawn next
    page.get_by_role("button", name="Clear").click()
    assert page.evaluate("drawn.painted") is False


@pytest.mark.slow
def test_a_part_is_chosen_by_keys_by_numbers_and_by_touch(browser: Any, service: str, library: Library) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 800}, has_touch=True)
    page = context.new_page()
    surface = opened(page, service)
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    surface.focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "Shift+ArrowUp"):  # the first makes the box 2, 2, 6, 6
        page.keyboard.press(key)
    part = page.get_by_role("article", name="query 0, box 1, 3, 5, 6")
    assert told_by(page, part, lambda: None) == proponents(library, (1, 3, 5, 6))
    page.get_by_label("bottom").fill("8")
    part = page.get_by_role("article", name="query 0, box 1, 3, 5, 8")
    assert told_by(page, part, lambda: page.keyboard.press("Enter")) == proponents(library, (1, 3, 5, 8))
    page.get_by_label("right", exact=True).fill("9")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("reaches outside").wait_for()
    part = page.get_by_role("article", name="query 0, box 4, 4, 5, 5")
    frame = surface.bounding_box()
    touch = lambda: page.touchscreen.tap(frame["x"] + frame["width"] * 4.5 / 8, frame["y"] + frame["height"] * 4.5 / 8)  # noqa: E731
    assert told_by(page, part, touch) == proponents(library, (4, 4, 5, 5))
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    context.close()


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Library]]:
    """A service of a model that is told classes, and what it serves."""
    library = of_classes(tmp_path_factory.mktemp("told"))
    with running(create_app(library, hosts=["127.0.0.1"])) as url:
        yield url, library


def test_a_class_is_chosen_for_a_picture_and_in_a_part_of_it(page: Any, conditional: tuple[str, Library]) -> None:
    url, library = conditional
    assert library.measured is not None
    page.goto(url)
    page.get_by_role("button", name="ask about a part or an idea").first.click()
    page.get_by_text("more options").click()
    page.get_by_label("results per side").fill(str(K))
    pixels = torch.from_numpy(library.pictures.image(0).astype(np.float32))[None, None] / 127.5 - 1
    part = page.locator("#region")

    def expected(**asked: Any) -> list[str]:
        samples = rs.Samples(pixels, library.measured.task, library.measured.checkpoints, **asked)  # type: ignore[union-attr]
        answer = library.indexes["ReTracRidge"].query(samples, K, side="both")
        return [str(sample) for sample in answer.ids[answer.listed]]

    whole = page.get_by_role("article", name="training sample 0, about class 3", exact=True)
    found = told_by(page, whole, lambda: part.get_by_label("about the class").select_option("3"))
    assert found == expected(concept=rs.Concept(3))
    against = page.get_by_role("article", name="training sample 0, about class 3 against 7", exact=True)
    found = told_by(page, against, lambda: part.get_by_label("against").select_option("7"))
    assert found == expected(concept=rs.Concept(3, against=7))
    boxed = page.get_by_role("article", name="training sample 0, box 1, 2, 6, 5, about class 3 against 7")
    surface = page.get_by_role("application", name="The picture")
    found = told_by(page, boxed, lambda: drag(page, surface, (5, 4), (1, 2)))
    assert found == expected(concept=rs.Concept(3, against=7), region=(1, 2, 6, 5))


def test_a_model_that_is_told_nothing_has_no_field_for_an_idea(page: Any, service: str) -> None:
    opened(page, service)
    page.get_by_text("more options").click()
    assert page.get_by_label("about the").count() == 0
    assert page.get_by_label("against").count() == 0


def test_the_service_asks_for_its_token(page: Any, service: str) -> None:
    page.allowed = ["401"]
    page.goto(service.split("#")[0])
    page.locator("#token").fill("wrong")
    page.get_by_role("button", name="Enter").click()
    page.get_by_role("alert").get_by_text("send the token").wait_for()
    page.locator("#token").fill("t")
    page.get_by_role("button", name="Enter").click()
    page.get_by_role("article", name="Query 0").wait_for()
    page.get_by_label("part of a name").fill("3")
    page.locator("#choices li:only-child button").wait_for()
    assert page.locator("#choices button").get_attribute("value") == "3"
