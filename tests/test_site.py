"""The site: in a real headless browser; nothing is loaded from elsewhere, and the page does what it says."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from shlex import quote

import pytest
from accessible import PROBLEMS
from browser import chromium

from dmlbench.board import Row, from_csv, rank, to_csv
from dmlbench.board.build import load_boards
from dmlbench.board.row import NUMBERS
from dmlbench.board.site import write_site
from dmlbench.board.site.boards import ORDER
from dmlbench.board.site.models import path_of
from dmlbench.board.site.overview import by_dataset, entries, merged
from dmlbench.board.site.words import words
from dmlbench.doubts.audit import FLAGS
from dmlbench.errors import DataError
from dmlbench.kinds.table import KINDS, numbers
from dmlbench.models.defended import network_of

BOARD = Path(__file__).resolve().parent.parent / "leaderboard"
CUB, DIGITS = "datasets/cub.html", "datasets/digits.html"
CLAIMS, ERS = "#ers-224-published", "#ers-digits"
MODEL = "models/digits-smallcnn-triplet-hm-lga-ics.html"
PANEL = "document.querySelector('.panel:not([hidden])')"


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


def opened(browser, site, address, **how):
    """A page, at the tab or the view that stands behind its ``#``."""
    path, _, view = address.partition("#")
    page = browser.page().open(site / path, **how)
    if view:
        page.js(f"location.hash = {json.dumps(view)}")
        page.js("new Promise((done) => setTimeout(done))")
    return page


def column(page, name):
    """The shown rows' values of a column of the shown table, from top to bottom."""
    return page.js(
        f"[...{PANEL}.querySelectorAll('tr.row')].filter(r => !r.hidden)"
        f".map(r => r.querySelector('[data-column=\"{name}\"]').dataset.value)"
    )


def click_head(page, name):
    page.js(f"{PANEL}.querySelector('th[data-column=\"{name}\"] .sort').click()")


def set_value(page, control, value):
    page.js(
        f"(() => {{ const c = {PANEL}.querySelector('.{control}'); c.value = {json.dumps(value)};"
        f" c.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def said(page):
    return page.js(f"{PANEL}.querySelector('.said').textContent")


@pytest.mark.parametrize("path", ["index.html", CUB, DIGITS, MODEL, "words.html"])
def test_nothing_is_complained_about_and_nothing_is_asked_for_elsewhere(site, browser, path):
    page = browser.page().open(site / path)
    if path in (CUB, DIGITS):
        click_head(page, "claimed_ers" if path == CUB else "ers")  # nothing is measured on CUB
        set_value(page, "search", "hm")
    page.js("document.querySelectorAll('.ask, .copy, .tabs a').forEach(e => e.click())")
    assert page.complaints == []
    assert [u for u in page.requests if not u.startswith("data:")] == [(site / path).resolve().as_uri()]


@pytest.mark.parametrize("width,dark", [(1280, False), (390, True)])
@pytest.mark.parametrize("address", ["index.html", CUB + CLAIMS, DIGITS + "#strict", MODEL, "words.html"])
def test_nothing_keeps_anybody_out(site, browser, address, width, dark):
    page = opened(browser, site, address, width=width, height=844, dark=dark)
    assert page.js(PROBLEMS) == []
    page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.js(PROBLEMS) == []


def test_the_rules_see_what_they_are_for(tmp_path, browser):
    (tmp_path / "x.html").write_text(
        "<title>t</title><main id=a><h1>x</h1><h3 style='color:#999'>y</h3><button></button><input><svg width=9 height=9></svg>"
        "<p id=a><button style='width:9px;height:9px;padding:0;display:block'>k</button><table><tr><td>1</table>"
        "<div style='overflow:auto;width:50px'><div style='width:900px'>z</div></div>"
    )
    found = {line.split(":")[0] for line in browser.page().open(tmp_path / "x.html").js(PROBLEMS)}
    assert found >= {
        "html-has-lang", "duplicate-id", "heading-order", "color-contrast", "link-name or button-name", "label", "svg-img-alt",
        "td-has-header", "scrollable-region-focusable",
    }  # fmt: skip


def test_sorting(site, browser):
    page = opened(browser, site, CUB + CLAIMS)
    click_head(page, "recall_at_1")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values, reverse=True) and len(values) == 66
    assert page.js(f"{PANEL}.querySelector('[data-column=recall_at_1]').getAttribute('aria-sort')") == "descending"
    click_head(page, "recall_at_1")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values) and values[0] == 0.8
    click_head(page, "model")
    names = column(page, "model")
    assert names == sorted(names, key=str.casefold) and page.js(f"{PANEL}.querySelectorAll('[aria-sort]').length") == 1
    assert said(page).startswith("66 of 66 rows") and "Model, ascending" in said(page)
    click_head(page, "arch")  # rows without a value come last, both ways
    assert column(page, "arch")[:3] == ["resnet18"] * 3 and column(page, "arch")[3] == ""
    click_head(page, "arch")
    assert column(page, "arch")[0] == "resnet18" and column(page, "arch")[-1] == ""


def test_searching_and_filtering(site, browser, board):
    rows = merged(from_csv(board / "ers-224-published" / "cub.csv"))
    page = opened(browser, site, CUB + CLAIMS)
    set_value(page, "search", "ACT 32")
    assert set(column(page, "defense")) == {"ACT[R], 32 PGD steps", "ACT[S], 32 PGD steps"}
    set_value(page, "search", "")
    wanted = {r.model for r in rows if r.ers >= 38 and r.recall_at_1 > 25}
    assert wanted
    for filter in (
        "claimed_ers>=38 recall_at_1>25",
        "ERS>=38, R@1>25",
        "ers ≥ 38 R@1 % > 25",
        "Claimed ERS>=38 r@1>25",
    ):
        set_value(page, "filter", filter)
        assert set(column(page, "model")) == wanted, filter
    set_value(page, "filter", "arch=resnet18")
    assert len(column(page, "model")) == 3
    set_value(page, "filter", "arch!=resnet18")
    assert len(column(page, "model")) == 63
    set_value(page, "filter", 'defense~ICS defense~"32 PGD"')
    assert column(page, "defense") and all("ICS" in d and "32 PGD" in d for d in column(page, "defense"))
    set_value(page, "filter", "")
    set_value(page, "status-of", "measured")
    assert column(page, "model") == [] and said(page) == "0 of 66 rows"


@pytest.mark.parametrize(
    "filter,named", [("nonsense>", "nonsense>"), ("colour=red", "colour"), ("R@1>high", "high"), ("R@1>9 what", "what")]
)
def test_a_filter_that_is_not_understood_says_so(site, browser, filter, named):
    page = opened(browser, site, DIGITS + ERS)
    set_value(page, "filter", filter)
    assert page.js(f"{PANEL}.querySelector('.filter').getAttribute('aria-invalid')") == "true"
    assert "not applied" in said(page) and named in said(page)
    set_value(page, "filter", "R@1>95")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values and min(values) > 95 and "not applied" not in said(page)


def test_a_measured_filter_is_of_what_was_measured(site, browser, board):
    wanted = [r.model for r in from_csv(board / "ers-digits" / "digits.csv") if r.ers >= 40]
    page = opened(browser, site, DIGITS + ERS)
    set_value(page, "filter", "ERS>=40")
    assert column(page, "model") == wanted and wanted


def test_the_view_is_in_the_address(site, browser):
    page = opened(browser, site, DIGITS)
    page.js("document.querySelector('a[href=\"#strict\"]').click()")
    click_head(page, "recall_at_1")
    set_value(page, "search", "hm")
    set_value(page, "filter", "R@1>=93")
    address, wanted = page.js("location.hash"), column(page, "model")
    assert address.startswith("#strict&") and 1 < len(wanted) < 21
    again = opened(browser, site, DIGITS + address)
    assert column(again, "model") == wanted and again.js(f"{PANEL}.id") == "strict"
    assert again.js(f"{PANEL}.querySelector('.filter').value") == "R@1>=93"


def test_the_skip_link_and_a_strange_address_leave_the_view_as_it_is(site, browser):
    page = opened(browser, site, DIGITS + "#strict&sort=model")
    for hash in ("tables", "%", "no-such-row"):
        page.js(f"location.hash = {json.dumps(hash)}")
        page.js("new Promise((done) => setTimeout(done))")
        assert page.js(f"{PANEL}.id") == "strict" and column(page, "model") == sorted(column(page, "model"))
    assert page.complaints == []


def test_columns_can_be_shown_and_hidden(site, browser):
    page = opened(browser, site, DIGITS + ERS)

    def seen(name):
        return page.js(f"{PANEL}.querySelector('td[data-column=\"{name}\"]').offsetWidth > 0")

    assert not seen("gtm_raw") and seen("ers")
    for name in ("gtm_raw", "ers"):
        page.js(f"{PANEL}.querySelector('.columns input[value=\"{name}\"]').click()")
    assert seen("gtm_raw") and not seen("ers")


def test_by_keyboard_alone(site, browser):
    page = browser.page().open(site / DIGITS)
    order = []
    for _ in range(40):
        page.key("Tab", "Tab", 9)
        order.append(page.js("document.activeElement.className || document.activeElement.textContent.trim()"))
        if page.js("document.activeElement.title") == "recall_at_1":
            break
    assert order[0] == "skip" and order.index("search") <= 6 and "filter" in order
    page.key("Enter", "Enter", 13, "\r")
    values = [float(v) for v in column(page, "recall_at_1")]
    assert values == sorted(values, reverse=True)
    page.js(f"{PANEL}.querySelector('.search').focus()")
    page.type("triplet-est")
    assert column(page, "model") == ["digits-smallcnn-triplet-est"]
    page.key("Enter", "Enter", 13, "\r")  # does not send the form anywhere
    assert column(page, "model") == ["digits-smallcnn-triplet-est"]
    page.js("document.querySelector('[role=tab][aria-selected=true]').focus()")
    page.key("ArrowRight", "ArrowRight", 39)
    assert page.js(f"{PANEL}.id") == "ers-digits" and page.js("document.activeElement.textContent") == "ers-digits"
    assert page.js("document.querySelector('.skip').getAttribute('href')") == "#tables"


def test_a_word_is_explained_where_it_stands(site, browser):
    page = browser.page().open(site / DIGITS)
    assert page.js("document.querySelectorAll('[popover]:popover-open').length") == 0
    page.js(f"{PANEL}.querySelector('th[data-column=ers] .ask').click()")
    assert KINDS["ers"].meaning in page.js("document.querySelector(':popover-open').textContent")
    page.key("Escape", "Escape", 27)
    assert page.js("document.querySelectorAll('[popover]:popover-open').length") == 0


def test_every_word_has_a_meaning():
    known = words()
    assert all(n.meaning for n in numbers().values()) and {*numbers(), "ers", "eps", "claimed_ers", "flags"} <= set(
        known
    )
    assert {f"flag-{flag}" for flag in FLAGS} <= set(known)
    for name, word in known.items():
        assert word.title and word.meaning.endswith((".", ")")), name
        if not name.startswith(("flag-", "status")):
            assert len(re.findall(r"[.;:)](?: |$)", word.meaning)) >= 2, name


@pytest.mark.parametrize("address", ["index.html", CUB + CLAIMS, DIGITS + ERS, DIGITS + "#strict", MODEL])
def test_on_a_phone_only_the_table_scrolls_sideways_and_a_score_is_seen(site, browser, address):
    page = opened(browser, site, address, width=390, height=844)
    assert page.js("document.documentElement.scrollWidth") <= 390
    if address != MODEL:
        right = f"[...{PANEL}.querySelectorAll('tr.row')].slice(0, 5).map(r => Math.min(...[...r.querySelectorAll('[data-column=ers],[data-column=claimed_ers],[data-column=smallest_eps]')].filter(c => c.dataset.value && c.offsetWidth).map(c => c.getBoundingClientRect().right)))"
        assert max(page.js(right)) <= 390
    narrow = opened(browser, site, address, width=360, height=740)
    assert narrow.js("document.documentElement.scrollWidth") <= 360
    small = page.js(
        "[...document.querySelectorAll('.sort,.controls input:not([type=checkbox]),.controls select,.tabs a')]"
        ".filter(e => e.offsetWidth && e.offsetHeight < 40).length"
    )
    assert small == 0


@pytest.mark.parametrize("address", ["index.html", CUB + CLAIMS, DIGITS + ERS, "datasets/omniglot-small.html"])
def test_on_a_desk_the_table_begins_on_the_first_screen_and_its_rows_are_low(site, browser, address):
    page = opened(browser, site, address, width=1280, height=900)
    page.js("scrollTo(0, 0)")
    assert page.js(f"{PANEL}.querySelector('tr.row').getBoundingClientRect().bottom") < 500
    assert (
        page.js(
            f"Math.max(...[...{PANEL}.querySelectorAll('tr.row')].filter(r => !r.querySelector('.flag')).map(r => r.offsetHeight))"
        )
        <= 66
    )
    assert page.js(f"{PANEL}.querySelector('.scroll').scrollWidth <= {PANEL}.querySelector('.scroll').clientWidth")


def test_points_of_the_plot_lead_to_their_rows(site, browser):
    page = opened(browser, site, DIGITS + ERS)
    points = page.js(f"{PANEL}.querySelectorAll('a.point').length")
    assert points == page.js(f"{PANEL}.querySelectorAll('tr.row').length")
    row = page.js(f"{PANEL}.querySelectorAll('a.point')[3].getAttribute('href')")
    again = opened(browser, site, DIGITS + row)
    assert again.js(f"{PANEL}.id") == "ers-digits" and again.js("document.querySelector('tr:target').id") == row[1:]


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
        assert "style" not in found


def test_every_link_inside_the_site_leads_somewhere(site):
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    assert len(pages) >= 40
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


def test_each_measured_model_has_a_page_with_all_that_makes_it_again(site, board):
    rows = [row for one in load_boards(board).values() for row in one if row.dataset == "digits"]
    curves = [row.model for row in rows if row.ers is None and row.eps is not None]
    for row in from_csv(board / "ers-digits" / "digits.csv"):
        text, network = unescape((site / path_of(row.model)).read_text(encoding="utf-8")), network_of(row.model)
        assert f"dmlbench evaluate --model {quote(row.model)} --dataset digits --protocol ers-digits --out" in text
        assert f"weights/{network}.safetensors" in text and (row.weights_sha256 in text or network != row.model)
        assert f"dmlbench train {network} " in text and text.count('class="plot eps"') == curves.count(row.model)
        run = json.loads((site / "runs" / f"{row.submission}.json").read_text())
        assert run["model"]["id"] == row.model
        assert (site / "checkpoints" / path_of(row.model).split("/")[1]).with_suffix(".json").is_file()
        assert (f"behind {row.model.split(':')[-2:][0]}" in text) == (network != row.model)
    text = (site / MODEL).read_text(encoding="utf-8")
    assert "@misc{" in text and "2203.01439" in text
    stale = (site / "models" / "mnist-conv3-triplet-est-2.html").read_text(encoding="utf-8")
    assert "--protocol ers-28@1 " in stale
    doubted = (site / "models" / "omniglot-small-conv3-triplet-ca-tride.html").read_text(encoding="utf-8")
    said = json.loads((site / "runs" / "omniglot-small-conv3-triplet-ca-tride-strict.json").read_text())["warnings"]
    assert "audit-F3" in {w["flag"] for w in said} and "Doubts" in doubted


def test_a_claim_is_never_shown_as_measured_and_stands_once(site):
    text = (site / CUB).read_text(encoding="utf-8")
    measured = re.findall(r'<td data-column="ers" data-value="([^"]*)"', text)
    claimed = re.findall(r'<td data-column="claimed_ers" data-value="([^"]*)"', text)
    assert set(measured) <= {""} and "" not in claimed and len(claimed) == 2 * 66
    assert (BOARD / "ers-224-published" / "cub.csv").read_bytes() == (
        site / "ers-224-published" / "cub.csv"
    ).read_bytes()


def test_claims_are_merged_where_everything_is_the_same(board):
    rows = from_csv(board / "ers-224-published" / "cub.csv")
    kept = merged(rows)
    assert len(kept) == 66
    for row in rows:  # a loop over all pairs is the oracle
        alike = [k for k in kept if k.defense == row.defense and k.ers == row.ers and k.recall_at_1 == row.recall_at_1]
        assert len(alike) == 1 and row.source in alike[0].source
    measured = from_csv(board / "ers-digits" / "digits.csv")
    assert merged(measured) == measured


def small_board(folder, **boards):
    for name, rows in boards.items():
        protocol, dataset = name.split("__")
        (folder / protocol.replace("_", "-")).mkdir(parents=True, exist_ok=True)
        (folder / protocol.replace("_", "-") / f"{dataset}.csv").write_bytes(to_csv(rank(rows)))
    return folder


def row(protocol, dataset="digits", **more):
    return Row(**{"protocol": protocol, "dataset": dataset, "model": "m", "status": "reproduced", **more})


def test_what_several_boards_say_of_a_model_stands_side_by_side():
    boards = {
        "ers-digits/digits": [row("ers-digits", ers=40.0, ers_lo=35.0, ers_hi=45.0, recall_at_1=90.0, flags="collapsed")],
        "ers-digits-published/digits": [row("ers-digits-published", ers=47.0, claimed_ers=50.0)],
        "strict/digits": [row("strict", worst_case_recall_at_1=15.0, eps=40 / 255)],
        "strict-fast/digits": [row("strict-fast", worst_case_recall_at_1=12.0, eps=40 / 255)],
        "strict-l2/digits": [row("strict-l2", worst_case_recall_at_1=1.0)],
        "clustering/digits": [row("clustering", clustering_nmi_attacked=9.0, status="stale")],
    }  # fmt: skip
    (entry,) = entries(by_dataset(boards)["digits"])
    cells = entry.cells
    assert (cells["ers"].text, cells["ers"].extra, cells["recall_at_1"].text) == ("40.0", "35.0 – 45.0", "90.0")
    assert (cells["worst_case_recall_at_1"].text, cells["worst_case_recall_at_1"].at) == ("12.0", "eps 40/255")
    assert (cells["clustering_nmi_attacked"].text, cells["clustering_nmi_attacked"].note) == ("9.0", "stale")
    assert cells["claimed_ers"].text == "50.0" and "47.0" in cells["claimed_ers"].note
    assert entry.flags == ("collapsed",) and entry.row.protocol == "ers-digits"


def test_real_pictures_come_first_and_measured_ones_before_claims(tmp_path):
    def claim(dataset):
        return [row("ers-224-published", dataset, status="claimed", ers=1.0, claimed_ers=1.0, source="a paper")]

    boards = {
        "ers-digits/digits": [row("ers-digits", ers=99.0)],
        "ers-224-published/cub": claim("cub"),
        "ers-224/grocery": [row("ers-224", "grocery", ers=5.0)],
        "ers-224/lfw": [row("ers-224", "lfw", ers=3.0)],
        "ers-224/unheard-of": [row("ers-224", "unheard-of", ers=4.0)],
    }  # fmt: skip
    assert list(by_dataset(boards)) == ["lfw", "grocery", "unheard-of", "cub", "digits"]
    folder = small_board(
        tmp_path / "b", **{n.replace("-", "_").replace("/", "__"): r for n, r in boards.items() if "heard" not in n}
    )
    assert "index.html" in write_site(folder, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert text.index(">lfw<", text.index("<main")) < text.index(">cub<", text.index("<main"))


def test_hostile_text_is_text(tmp_path):
    """Past every check of the row model: the templates escape by themselves."""
    evil = '"><script>document.title="owned"</script><img src=x onerror=1>'
    honest = row("ers-digits", ers=40.0, recall_at_1=90.0, ers_lo=35.0, ers_hi=45.0)
    hostile = honest.model_copy(
        update={
            "model": evil,
            "defense": evil,
            "flags": evil.replace(" ", ""),
            "source": evil,
            "paper": evil,
            "paper_url": "javascript:1",
        }
    )
    from dmlbench.board import site as module

    shown = {
        "ers-digits/digits": [
            hostile,
            hostile.model_copy(update={"status": "claimed", "claimed_ers": 1.0, "worst_part": evil}),
        ]
    }
    folder = small_board(tmp_path / "b", ers_digits__digits=[honest])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_boards", lambda _: shown)
        pages = write_site(folder, tmp_path / "out")
    assert len(pages) == 4
    for page in pages:
        text = (tmp_path / "out" / page).read_text(encoding="utf-8")
        assert "<script>document" not in text and "<img" not in text and 'href="javascript' not in text
        assert ("&lt;script&gt;document" in text) == (page != "words.html"), page


def test_a_flag_is_explained_beside_the_row(tmp_path):
    folder = small_board(tmp_path / "b", ers_digits__digits=[row("ers-digits", ers=40.0, flags="collapsed")])
    write_site(folder, tmp_path / "out")
    for page in ("index.html", "datasets/digits.html", "models/m.html"):
        text = (tmp_path / "out" / page).read_text(encoding="utf-8")
        assert 'popovertarget="word-flag-collapsed"' in text and FLAGS["collapsed"] in text.replace("&#39;", "'")


def test_the_same_board_gives_the_same_bytes(board, tmp_path):
    folder = tmp_path / "b"
    for protocol in ("ers-digits", "strict"):
        (folder / protocol).mkdir(parents=True)
        shutil.copy(board / protocol / "digits.csv", folder / protocol)
        name = f"digits-smallcnn-triplet-act-{protocol}"
        shutil.copytree(board / "submissions" / name, folder / "submissions" / name)
    for out in ("a", "b2"):
        write_site(folder, tmp_path / out)
    found = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert found == {p: (tmp_path / "b2" / p).read_bytes() for p in found} and len(found) > 25
    text = found[Path("models/digits-smallcnn-triplet-act.html")]
    assert text.count(b'class="plot eps"') == 1 and b"currentColor" in text and b"#000000" not in text


def test_the_site_from_the_command_line(typed, tmp_path):
    folder = small_board(tmp_path / "b", ers_digits__digits=[row("ers-digits", ers=40.0, recall_at_1=90.0)])
    (folder / "submissions").mkdir()
    for name in ("ers-digits",):
        shutil.rmtree(folder / name)
    (folder / "submissions" / "claimed-x").mkdir()
    stated = row("ers-digits", status="claimed", ers=40.0, recall_at_1=90.0, source="a paper")
    (folder / "submissions" / "claimed-x" / "claims.csv").write_bytes(to_csv([stated]))
    done = typed("leaderboard", "build", "--board", folder, "--site", tmp_path / "s")
    assert re.search(rf"{len(list((tmp_path / 's').rglob('*.html')))} pages", done.out)
    assert (tmp_path / "s" / "index.html").is_file()
    (tmp_path / "file").write_text("x")
    assert (
        "cannot be written"
        in typed("leaderboard", "build", "--check", "--board", folder, "--site", tmp_path / "file" / "s", code=4).err
    )
    with pytest.raises(DataError, match="holds no board"):
        write_site(tmp_path, tmp_path / "t")


def test_where_there_is_no_checkout_the_packaged_board_is_shown(typed, tmp_path, monkeypatch):
    """In a package most submissions are not at hand: their rows are."""
    folder = small_board(tmp_path / "package", ers_digits__digits=[row("ers-digits", ers=40.0, submission="gone")])
    monkeypatch.setattr("dmlbench.board.build.board_folder", lambda: folder)
    assert "4 pages" in typed("leaderboard", "build", "--site", tmp_path / "s").out
    text = (tmp_path / "s" / "models" / "m.html").read_text(encoding="utf-8")
    assert "40.0" in text and "dmlbench evaluate --model m " in text and "runs/gone" not in text


def test_every_column_has_a_place_and_a_kind():
    assert {*ORDER, "protocol", "dataset", "schema_version"} == set(Row.model_fields)
    assert {"ers", "rank", "recall_at_1", "tma_raw", "n_queries"} <= NUMBERS
    assert not {"model", "status", "paper_url", "weights_sha256", "date"} & NUMBERS
