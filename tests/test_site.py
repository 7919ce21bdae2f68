"""The site: in a real headless browser; nothing is loaded from elsewhere, and the page does what it says."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import chromium

from dmlbench.board import Row, from_csv, rank, to_csv
from dmlbench.board.row import NUMBERS
from dmlbench.board.site import ORDER, _plot, write_site
from dmlbench.errors import DataError

BOARD = Path(__file__).resolve().parent.parent / "leaderboard"
CUB, DIGITS = "ers-224-published/cub.html", "ers-digits/digits.html"


@pytest.fixture(scope="module")
def board():
    if not BOARD.is_dir():
        pytest.skip("the board lies in the repository, which is not at hand")
    return BOARD


@pytest.fixture(scope="module")
def site(board, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    write_site(board, out)
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def column(page, name):
    """The shown rows' values of a column, from top to bottom."""
    return page.js(
        f"[...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden)"
        f".map(r => r.querySelector('[data-column=\"{name}\"]').dataset.value)"
    )


def click_head(page, name):
    page.js(f"document.querySelector('th[data-column=\"{name}\"] button').click()")


def set_value(page, control, value):
    page.js(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = {json.dumps(value)};"
        f" c.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def test_nothing_is_complained_about_and_nothing_is_asked_for_elsewhere(site, browser):
    for path in ["index.html", CUB, DIGITS]:
        page = browser.page().open(site / path)
        if path != "index.html":
            click_head(page, "ers")
            set_value(page, "search", "hm")
        page.js("document.title")
        assert page.complaints == []
        assert [u for u in page.requests if not u.startswith("data:")] == [(site / path).resolve().as_uri()]


def test_sorting(site, browser):
    page = browser.page().open(site / CUB)
    click_head(page, "recall_at_1")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values, reverse=True) and len(values) == 85
    assert page.js("document.querySelector('[data-column=recall_at_1]').getAttribute('aria-sort')") == "descending"
    click_head(page, "recall_at_1")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values) and values[0] == 0.8
    click_head(page, "model")
    names = column(page, "model")
    assert names == sorted(names, key=str.casefold) and page.js("document.querySelectorAll('[aria-sort]').length") == 1
    assert page.js("document.getElementById('said').textContent") == "85 of 85 rows, sorted by Model, ascending"
    click_head(page, "arch")  # rows without a value come last, both ways
    assert column(page, "arch")[:3] == ["resnet18"] * 3 and column(page, "arch")[3] == ""
    click_head(page, "arch")
    assert column(page, "arch")[0] == "resnet18" and column(page, "arch")[-1] == ""


def test_searching_and_filtering(site, browser, board):
    rows = from_csv(board / "ers-224-published" / "cub.csv")
    page = browser.page().open(site / CUB)
    set_value(page, "search", "ACT 32")
    assert set(column(page, "defense")) == {"ACT[R], 32 PGD steps", "ACT[S], 32 PGD steps"}
    set_value(page, "search", "")
    set_value(page, "filter", "claimed_ers>=38 recall_at_1>25")
    wanted = {r.model for r in rows if r.ers >= 38 and r.recall_at_1 > 25}
    assert set(column(page, "model")) == wanted and wanted
    set_value(page, "filter", "arch=resnet18")
    assert len(column(page, "model")) == 3
    set_value(page, "filter", "arch!=resnet18")
    assert len(column(page, "model")) == 82
    set_value(page, "filter", "defense~ics")
    assert all("ICS" in d for d in column(page, "defense"))
    set_value(page, "filter", "nonsense>")
    assert page.js("document.getElementById('filter').getAttribute('aria-invalid')") == "true"
    set_value(page, "filter", "")
    set_value(page, "status", "measured")
    assert column(page, "model") == [] and page.js("document.getElementById('said').textContent") == "0 of 85 rows"


def test_columns_can_be_shown_and_hidden(site, browser):
    page = browser.page().open(site / DIGITS)

    def seen(name):
        return page.js(f"document.querySelector('td[data-column=\"{name}\"]').offsetWidth > 0")

    assert not seen("gtm_raw") and seen("ers")
    for name in ("gtm_raw", "ers"):
        page.js(f"document.querySelector('.columns input[value=\"{name}\"]').click()")
    assert seen("gtm_raw") and not seen("ers")


def test_by_keyboard_alone(site, browser):
    page = browser.page().open(site / DIGITS)
    order = []
    for _ in range(120):
        page.key("Tab", "Tab", 9)
        order.append(page.js("document.activeElement.id || document.activeElement.textContent.trim()"))
        if order[-1] == "R@1 %":
            break
    assert order[0] == "Skip to the content" and "search" in order and "filter" in order
    page.key("Enter", "Enter", 13, "\r")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values, reverse=True)
    page.js("document.getElementById('search').focus()")
    page.type("triplet-est")
    assert column(page, "model") == ["digits-smallcnn-triplet-est"]
    page.key("Enter", "Enter", 13, "\r")  # does not send the form anywhere
    assert column(page, "model") == ["digits-smallcnn-triplet-est"]


@pytest.mark.parametrize("path", ["index.html", CUB, DIGITS])
def test_on_a_phone_only_the_table_scrolls_sideways(site, browser, path):
    page = browser.page().open(site / path, width=360, height=740)
    assert page.js("document.documentElement.scrollWidth") <= 360
    small = page.js(
        "[...document.querySelectorAll('button,input:not([type=checkbox]),select')]"
        ".filter(e => e.offsetWidth && e.offsetHeight < 40).length"
    )
    assert small == 0


def luminance(colour):
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(site, browser, dark):
    page = browser.page().open(site / DIGITS, dark=dark)
    paper = luminance(page.js("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.1) == dark
    for selector in ("body", "a", "small", "figcaption", ".hint", ".status", "tbody th"):
        ink = luminance(page.js(f"getComputedStyle(document.querySelector('main {selector}, {selector}')).color"))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, (selector, contrast)


def test_points_of_the_plot_lead_to_their_rows(site, browser):
    page = browser.page().open(site / DIGITS)
    points = page.js("[...document.querySelectorAll('svg')][0].querySelectorAll('a.point').length")
    assert points == page.js("document.querySelectorAll('#board tbody tr').length")
    assert page.js("[...document.querySelectorAll('a.point')].every(a => document.querySelector('tr' + CSS.escape(a.getAttribute('href')).replace('\\\\#', '#')))")  # fmt: skip


class Links(HTMLParser):
    """Every id and every address of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            assert found["id"] not in self.ids, found["id"]
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.addresses.append(found["href"])
        if "src" in found or (tag == "link" and not found.get("href", "").startswith("data:")):
            self.loaded.append((tag, found))


def test_every_link_inside_the_site_leads_somewhere(site):
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    assert len(pages) >= 7
    for path, links in pages.items():
        assert links.loaded == []
        for address in links.addresses:
            if address.startswith("https://"):
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file() and target.is_relative_to(site.resolve()), (path, address)
            if anchor:
                assert anchor in pages[target].ids, (path, address)


def test_each_measured_row_links_its_checkpoint_its_run_and_its_command(site):
    text = (site / DIGITS).read_text(encoding="utf-8")
    for name in ("none", "est", "act", "hm-lga", "hm-lga-ics"):
        assert (
            f"dmlbench evaluate --model digits-smallcnn-triplet-{name} --dataset digits --protocol ers-digits" in text
        )
        run = json.loads((site / "runs" / f"digits-smallcnn-triplet-{name}-ers-digits.json").read_text())
        assert run["model"]["id"] == f"digits-smallcnn-triplet-{name}"
        assert (site / "checkpoints" / f"digits-smallcnn-triplet-{name}-ers-digits.json").is_file()


def test_a_claim_is_never_shown_as_measured(site):
    text = (site / CUB).read_text(encoding="utf-8")
    measured = re.findall(r'<td data-column="ers" data-value="([^"]*)"', text)
    claimed = re.findall(r'<td data-column="claimed_ers" data-value="([^"]*)"', text)
    assert set(measured) == {""} and len(claimed) == 85 and "" not in claimed
    assert (BOARD / "ers-224-published" / "cub.csv").read_bytes() == (
        site / "ers-224-published" / "cub.csv"
    ).read_bytes()


def test_hostile_text_is_text(tmp_path, board):
    """Past every check of the row model: the template escapes by itself."""
    folder = tmp_path / "leaderboard"
    shutil.copytree(board, folder)
    rows = from_csv(folder / "ers-digits" / "digits.csv")
    evil = '"><script>document.title="owned"</script><img src=x onerror=1>'
    hostile = rows[0].model_copy(update={"model": evil, "defense": evil, "flags": evil.replace(" ", "")})
    from dmlbench.board import site as module

    pages = module._environment().get_template("board.html.j2").render(
        boards=[], statuses={}, flags={}, root="../", current="x",
        **module._board("ers-digits/digits", [hostile], {"ers-digits/digits": [hostile]}, {}),
    )  # fmt: skip
    assert "<script>document" not in pages and "<img" not in pages and "&lt;script&gt;document" in pages


def test_worst_case_recall_joins_from_the_strict_board(tmp_path):
    def row(**more):
        return Row(**{"dataset": "digits", "model": "m", "status": "reproduced", **more})

    folder = tmp_path / "leaderboard"
    for protocol, rows in {
        "ers-digits": [
            row(protocol="ers-digits", ers=40.0, ers_lo=35.0, ers_hi=45.0, recall_at_1=90.0, flags="collapsed")
        ],
        "strict": [row(protocol="strict", worst_case_recall_at_1=15.0, worst_case_area=40.0)],
        "strict-fast": [row(protocol="strict-fast", worst_case_recall_at_1=12.0, worst_case_area=41.0)],
    }.items():
        (folder / protocol).mkdir(parents=True)
        (folder / protocol / "digits.csv").write_bytes(to_csv(rank(rows)))
    write_site(folder, tmp_path / "out")
    text = (tmp_path / "out" / "ers-digits" / "digits.html").read_text()
    assert "Worst-case R@1 % 12.0, ERS 40.0" in text and text.count("<svg") == 2
    assert 'href="#flag-collapsed"' in text and 'id="flag-collapsed"' in text and "nearly constant" in text


def test_an_interval_that_ends_at_zero_stays_on_the_axis():
    row = Row(
        protocol="p", dataset="d", model="m", status="reproduced", recall_at_1=90.0, ers=25.0, ers_lo=0.0, ers_hi=28.0
    )
    (point,) = (plot := _plot([row], "recall_at_1", "ers", "x", "y", "", ""))["points"]
    assert point["low"] == max(tick["at"] for tick in plot["ticks_y"])


def test_the_site_from_the_command_line(typed, board, tmp_path):
    done = typed("leaderboard", "build", "--check", "--board", board, "--site", tmp_path / "s")
    assert re.search(rf"{len(list((tmp_path / 's').rglob('*.html')))} pages", done.out)
    assert (tmp_path / "s" / "index.html").is_file()
    (tmp_path / "file").write_text("x")
    assert (
        "cannot be written"
        in typed("leaderboard", "build", "--check", "--board", board, "--site", tmp_path / "file" / "s", code=4).err
    )
    with pytest.raises(DataError, match="holds no board"):
        write_site(tmp_path, tmp_path / "t")


def test_every_column_has_a_place_and_a_kind():
    assert {*ORDER, "protocol", "dataset", "schema_version"} == set(Row.model_fields)
    assert {"ers", "rank", "recall_at_1", "tma_raw", "n_queries"} <= NUMBERS
    assert not {"model", "status", "paper_url", "weights_sha256", "date"} & NUMBERS
