"""The page at ``/`` in a real browser: generate, switch student, and read an error."""

import http.client
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from fewstep.runtime import Bundle, Engine, Request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def browsing(browser: Browser, width: int = 1000, height: int = 800) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    assert problems == []
    page.close()


@pytest.fixture(scope="module")
def url(serving: Any, make_bundle: Callable[..., Path]) -> Iterator[str]:
    with serving(make_bundle(), make_bundle(is_guided=True)) as (_, (host, port)):
        yield f"http://{host}:{port}/"


def test_generate_shows_the_images_and_where_the_time_went(
    browser: Browser, url: str, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with browsing(browser) as page:
        page.goto(url)
        expect(page.locator("#about")).to_have_text("Random weights, for tests.")
        page.locator("#prompt").select_option("digit 3")
        page.locator("#solver").select_option("ddim")
        page.locator("#steps").select_option("8")
        page.locator("#seed").fill("11")
        page.locator("#n").fill("5")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#images img")).to_have_count(5)
        expect(page.locator("#status")).to_contain_text("5 by ddim with 8 steps")
        expect(page.locator("#images figcaption").first).to_have_text("seed 11")
        assert '"num_inference_steps":8' in page.locator("#curl").inner_text()
        shown = page.evaluate(
            """async () => {
                const image = document.querySelector("#images img");
                await image.decode();
                const canvas = Object.assign(document.createElement("canvas"), {width: 8, height: 8});
                canvas.getContext("2d").drawImage(image, 0, 0);
                return [...canvas.getContext("2d").getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 == 0);
            }"""
        )
        page.screenshot(path=tmp_path / "page.png")
        if shutil.which("curl"):  # the line gives what the page shows
            command = shlex.split(page.locator("#curl").inner_text())
            done = subprocess.run([*command, "--silent"], capture_output=True, check=True, timeout=60)
            sources = page.locator("#images img").evaluate_all("images => images.map(image => image.src)")
            told = [image["b64_json"] for image in json.loads(done.stdout)["data"]]
            assert [source.partition(",")[2] for source in sources] == told
    bundle = Bundle.load(make_bundle())
    (sample,) = Engine(bundle, threads=1).generate([Request(11, bundle.tableau("ddim", 8), 3)])
    assert shown == sample.to_uint8().ravel().tolist()


def test_a_guided_student_offers_its_guidance(browser: Browser, url: str) -> None:
    with browsing(browser) as page:
        page.goto(url)
        expect(page.locator("#guidance-field")).to_be_hidden()
        page.locator("#model").select_option("digits-guided")
        expect(page.locator("#guidance-field")).to_be_visible()
        page.locator("#guidance").fill("4")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#images img")).to_have_count(8)
        assert '"guidance_scale":4' in page.locator("#curl").inner_text()


def test_nothing_can_be_asked_before_the_students_are_known(browser: Browser, url: str) -> None:
    with browsing(browser) as page:
        held: list[Route] = []
        page.route("**/v1/models", lambda route: held.append(route))
        page.goto(url)
        expect(page.locator("#go")).to_be_disabled()
        held[0].continue_()
        expect(page.locator("#go")).to_be_enabled()


def test_an_error_of_the_server_is_shown_as_its_one_line(browser: Browser, url: str) -> None:
    with browsing(browser) as page:
        page.goto(url)
        expect(page.locator("#go")).to_be_enabled()  # it has the students, and will not set the bound again
        page.evaluate("document.querySelector('#n').max = 1000")
        page.locator("#n").fill("65")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text("n: at most 64 images in one request, got 65")
        expect(page.locator("#go")).to_be_enabled()


def test_the_page_works_from_the_keyboard_on_a_phone(browser: Browser, url: str) -> None:
    with browsing(browser, width=360, height=740) as page:
        page.goto(url)
        expect(page.locator("#go")).to_be_enabled()
        page.locator("#seed").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#images img")).to_have_count(8)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_steps_are_shown_as_they_come(browser: Browser, url: str) -> None:
    with browsing(browser) as page:
        page.goto(url)
        page.locator("#solver").select_option("ddim")
        page.locator("#steps").select_option("8")
        page.locator("#n").fill("2")
        page.evaluate(
            """() => {
                window.seen = new Set();
                new MutationObserver(() => document.querySelectorAll("#images figcaption").forEach(
                    caption => window.seen.add(caption.textContent)
                )).observe(document.querySelector("#images"), {childList: true, subtree: true, characterData: true});
            }"""
        )
        page.get_by_label("Show the steps").check()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#images figcaption").nth(0)).to_have_text("seed 0")
        expect(page.locator("#images figcaption").nth(1)).to_have_text("seed 1")
        expect(page.locator("#status")).to_contain_text("2 by ddim with 8 steps: first picture after")
        seen = set(page.evaluate("[...window.seen]"))
        assert any(text.startswith("step ") and text.endswith(" of 8") for text in seen), seen
        shown = page.locator("#images img").first.get_attribute("src")
        page.get_by_label("Show the steps").uncheck()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_contain_text("in the server")
        assert page.locator("#images img").first.get_attribute("src") == shown


def test_two_settings_stand_side_by_side(browser: Browser, url: str) -> None:
    with browsing(browser) as page:
        page.goto(url)
        expect(page.locator("#solver-b")).to_be_hidden()
        page.get_by_label("Compare two settings").check()
        page.locator("#solver").select_option("ddim")
        page.locator("#solver-b").select_option("dpmpp_2m")
        page.locator("#steps-b").select_option("2")
        page.locator("#n").fill("3")
        assert page.locator("#curl").inner_text().count("curl ") == 2
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text("Both are from the same seeds.")
        for side, told in (("", "3 by ddim with 4 steps"), ("-b", "3 by dpmpp_2m with 2 steps")):
            expect(page.locator(f"#images{side} img")).to_have_count(3)
            expect(page.locator(f"#told{side}")).to_contain_text(told)
            expect(page.locator(f"#images{side} figcaption").first).to_have_text("seed 0")
        boxes = [page.locator(selector).bounding_box() for selector in ("#images", "#images-b")]
        assert boxes[0] is not None
        assert boxes[1] is not None
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        page.get_by_label("Compare two settings").uncheck()
        expect(page.locator("#side-b")).to_be_hidden()


def test_no_condition_can_be_chosen(browser: Browser, url: str, make_bundle: Callable[..., Path]) -> None:
    with browsing(browser) as page:
        page.goto(url)
        page.locator("#prompt").select_option("no condition")
        assert '"prompt":""' in page.locator("#curl").inner_text()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#images img")).to_have_count(8)
        assert page.locator("#images img").first.get_attribute("alt") == "no condition, seed 0"


def test_the_page_follows_what_is_loaded_and_unloaded(
    browser: Browser, serving: Any, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "fewstep.toml"
    file.write_text("max_images = 6\n")
    flags = ("--no-grpc", "--simulate", "1+0", "--config", file)
    with (
        serving(make_bundle(), make_bundle(is_guided=True), *flags) as (_, (host, port)),
        browsing(browser) as page,
        closing(http.client.HTTPConnection(host, port)) as admin,
    ):

        def change(student: str, how: str) -> None:
            admin.request("POST", f"/v2/repository/models/{student}/{how}")
            answer = admin.getresponse()
            assert (answer.status, answer.read()) == (200, b"")

        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("note")).to_contain_text("simulated accelerator")
        expect(page.locator("#n")).to_have_attribute("max", "6")
        expect(page.locator("#n")).to_have_value("6")
        generate = page.get_by_role("button", name="Generate")
        generate.click()
        expect(page.locator("#images img")).to_have_count(6)
        change("digits", "unload")
        generate.click()
        expect(page.locator("#status")).to_have_text("model: 'digits' is not served; there is: digits-guided")
        expect(page.locator("#model")).to_have_value("digits-guided")
        generate.click()
        expect(page.locator("#status")).to_contain_text("6 by ancestral with 4 steps")
        change("digits-guided", "unload")
        generate.click()
        expect(page.locator("#status")).to_have_text("model: no student is served")
        expect(page.locator("#about")).to_contain_text("No student is served. Load one: POST /v2/repository/")
        expect(generate).to_be_disabled()
        page.reload()
        expect(page.locator("#about")).to_contain_text("No student is served.")
        expect(page.locator("#status")).to_have_text("")
        page.get_by_label("Compare two settings").check()
        change("digits", "load")
        page.evaluate("dispatchEvent(new Event('focus'))")
        expect(page.locator("#about")).to_have_text("Random weights, for tests.")
        generate.click()
        expect(page.locator("#images-b img")).to_have_count(6)
        change("digits-guided", "load")
        page.evaluate("dispatchEvent(new Event('focus'))")
        expect(page.locator("#model option")).to_have_text(["digits", "digits-guided"])
        expect(page.locator("#model")).to_have_value("digits")


def test_a_server_with_keys_asks_for_one(
    browser: Browser, serving: Any, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_API_KEY", "open-sesame")
    with serving(make_bundle(), "--no-grpc") as (_, (host, port)), browsing(browser) as page:
        page.goto(f"http://{host}:{port}/")
        expect(page.locator("#status")).to_contain_text("an API key is needed")
        expect(page.locator("#about")).to_have_text("")
        page.get_by_label("API key").fill("open-sesame")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#about")).to_have_text("Random weights, for tests.")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#images img")).to_have_count(8)
        assert "open-sesame" not in page.locator("#curl").inner_text()
        assert "Bearer $KEY" in page.locator("#curl").inner_text()
