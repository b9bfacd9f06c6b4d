"The built site in a real browser: search, links, pictures and colours, on a desk and on a phone."
import json, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import pytest
from conftest import Page, root

expect = pytest.importorskip('playwright.sync_api', reason='chromium is driven by playwright').expect

pytestmark = pytest.mark.slow('builds the site')

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def url(browser, site):
    "Where the site is served while the tests of this module run"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def front(browser, url):
    "The first page, in which one may search"
    with Page(browser, url) as p: yield p

def test_search_finds_a_class(browser, url):
    with Page(browser, url) as p:
        p.page.locator('.smalldocs-search input').first.press_sequentially('ColorSquare')
        p.page.locator('.smalldocs-search-results a[href*="patterns.html"]').first.click()
        p.page.wait_for_url('**/patterns.html*')
        assert p.page.locator('#colorsquare').count()==1

@pytest.mark.parametrize('query,first',
                         [('ratio','DataLoaders.inject'), ('wandb','Log to Weights & Biases'), ('rank','Numerical rank'),
                          ('layer_rank','layer_rank'),
    ('probe','Learner.layer_probe'), ('tolerance','WatchErosion'), ('colorsqare','ColorSquare'),
    ('grad-cam','Grad-CAM: where it looks'), ('figure 1','Figure 1: collapse'), ('custom loss','Use my own loss'),
    ('multi gpu','Can I use several GPUs'), ('jpeg','JpegQuality'), ('text','Does it work for'),
    ('phases','Phases'), ('cli','Command line'), ('half-life','Forgetting and half-life'), ('vit','Vision transformers'),
    ('changelog','Changelog'), ('forgetting','forgetting'), ('own data','Your own data'),
    ('how to use my own dataset','Your own data'), ('What is CKA?','CKA'), ('how do I use a GPU','Is my GPU used')])
def test_search_shows_first_what_users_meet(front, query, first):
    "Public names and pages that tell how to come before the inside of the library; a slip of the finger is forgiven"
    field = front.page.locator('.smalldocs-search input').first
    field.clear()
    expect(front.page.locator('.smalldocs-search-results.show')).to_have_count(0)
    field.press_sequentially(query)
    hits = front.page.locator('.smalldocs-search-results.show').first
    expect(hits.locator('a').first).to_contain_text(first)
    assert not front.errors

def test_search_shows_the_inside_of_the_library_last(browser, url, site):
    kinds = {o['href']:o['kind'] for o in json.loads((site/'search.json').read_text('utf-8'))}
    with Page(browser, url) as p:
        p.page.locator('.smalldocs-search input').first.press_sequentially('tolerance')
        hits = p.page.locator('.smalldocs-search-results.show').first.locator('a')
        expect(hits.first).to_contain_text('WatchErosion')
        got = [kinds[o.get_attribute('href').removeprefix('./')] for o in hits.all()]
    assert len(got)>5 and got[1:]==sorted(got[1:])

def test_sidebar_leads_everywhere(browser, url):
    with Page(browser, url) as p:
        links = p.page.eval_on_selector_all('#quarto-sidebar a[href]', 'els => els.map(o => o.href)')
        links = [o for o in dict.fromkeys(links) if not o.startswith(f'{url}#')]
        assert len(links)>=len(list((root/'nbs').glob('[0-9]*.ipynb'))) and all(o.startswith(url) for o in links)
        assert not [o for o in links if p.page.request.get(o).status!=200]

@pytest.mark.slow('every page, at two widths')
def test_every_page(browser, url, site):
    "On a desk and, dark, on a phone, nothing goes wrong, comes from elsewhere or sticks out at the right, and each picture is there and has an alt text"
    bad = []
    looks = (1280,'light'),(390,'dark')
    with Page(browser, url) as p:
        # which has its files at the published root
        for name in sorted(f.relative_to(site).as_posix() for f in site.rglob('*.html') if f.name!='404.html'):
            p.go(url+name)
            for width,scheme in looks:
                p.look(width, scheme)
                if (wide := p.overflow())>0: bad.append((name, f'{wide} pixels too wide, {scheme}'))
                bad += [(name, o) for o in p.images() if not o['width'] or not o['alt']]
            bad += [(name, o) for o in p.errors+[r for r in p.requests if not r.startswith((url, 'data:'))]]
            looks = looks[::-1]   # the next page opens as this one was seen last
    assert not bad

@pytest.mark.parametrize('name', ['index','benchmarks','runs/sweep','measures/cka','cli'])
def test_sidebar_shows_where_one_is(browser, url, name):
    "Without scrolling"
    inside = "(() => { const r = document.querySelector('#quarto-sidebar .active').getBoundingClientRect(); return r.top>0 && r.bottom<innerHeight })()"
    with Page(browser, f'{url}{name}.html', height=900) as p: assert p.js(inside)

misplaced = """() => [...document.querySelectorAll('main table.dataframe thead th')].filter(h => h.innerText.trim())
  .filter(h => (getComputedStyle(h).textAlign=='right')!=h.classList.contains('number')).map(h => h.innerText)"""

@pytest.mark.parametrize('name', ['paper/fig5','paper/claims','paper/resist'])
def test_heads_stand_above_their_columns(browser, url, name):
    "Numbers to the right, words to the left, also where pandas brings a style of its own"
    with Page(browser, f'{url}{name}.html') as p:
        assert p.page.locator('main table.dataframe thead th').count() and p.js(misplaced)==[]

too_wide = """() => [...document.querySelectorAll('main table')].filter(t => t.checkVisibility() && Math.max(t.scrollWidth, t.parentElement.scrollWidth)>t.parentElement.clientWidth+1)
  .map(t => [t.className, t.innerText.slice(0, 60)])"""

@pytest.mark.parametrize('name', ['index','benchmarks','works','faq','paper/claims','paper/fig1','tutorials/own_model'])
def test_tables_on_a_phone(browser, url, name):
    "Each row of a table of words is a card that says what its values are; only numbers scroll, beside the names of their rows"
    with Page(browser, f'{url}{name}.html', 390) as p:
        assert not [o for o in p.js(too_wide) if 'numbers' not in o[0]]
        heads = p.js("[...document.querySelectorAll('table.numbers tbody th:first-child')].map(o => getComputedStyle(o).position)")
        assert {*heads}<={'sticky'}

def test_wide_figures_can_be_read_on_a_phone(browser, url):
    "They scroll in their own place; on a desk they are as large as matplotlib meant them"
    size = "[...document.querySelectorAll('.wide-figure img')].map(o => [o.clientWidth, o.closest('.cell-output').clientWidth])"
    with Page(browser, f'{url}paper/resist.html', 390) as p:
        assert (got := p.js(size)) and all(w>=460 for w,_ in got) and p.overflow()<=0
    with Page(browser, f'{url}tutorials/finetune.html', 390) as p:   # a figure of 11 inches, and sentences
        assert max(w for w,_ in p.js(size))>600 and p.overflow()<=0
        said = p.js("[...document.querySelectorAll('.cell-output-stdout pre code')].map(o => [o.scrollWidth, o.clientWidth])")
        assert said and all(w<=room for w,room in said)
    with Page(browser, f'{url}paper/resist.html', 1280) as p: assert (got := p.js(size)) and all(w<=room for w,room in got)

def test_cards_repeat_what_reaches_over_several_rows(browser, url):
    "A row stands alone on a phone; on a desk nothing is there twice"
    for width,shown in ((390,True),(1280,False)):
        with Page(browser, f'{url}benchmarks.html', width) as p:
            assert p.js("[...document.querySelectorAll('.again')].every(o => o.checkVisibility()==%s)" % str(shown).lower())
    with Page(browser, f'{url}paper/claims.html', 390) as p:
        row = p.page.locator('table.cards tbody tr').first
        assert row.locator('td').all_inner_texts()[0]=='error-free'
        assert row.locator('td').first.get_attribute('data-label')=='paper'

def test_dark_mode_stays(browser, url):
    "The switch turns the page dark, and the next page as well"
    light = 'getComputedStyle(document.body).backgroundColor'
    with Page(browser, url) as p:
        before = p.js(light)
        p.page.locator('.quarto-color-scheme-toggle:visible').first.click()
        dark = p.js(light)
        p.page.goto(url+'patterns.html')
        assert p.js(light)==dark!=before

@pytest.mark.slow('the contrast of each text on four pages, in both themes')
@pytest.mark.parametrize('name', ['index','patterns','benchmarks','tutorials/start'])
def test_text_can_be_read(browser, url, name):
    "Contrast of at least 4.5 to 1 (WCAG 2, AA)"
    with Page(browser, f'{url}{name}.html') as p:
        for scheme in 'light','dark':
            p.look(1280, scheme)
            p.page.wait_for_function('!document.getAnimations().length')   # links fade into their colour
            found = p.contrasts()
            assert found and not [o for o in found if o['ratio']<4.5], scheme
