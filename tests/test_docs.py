"The documentation builds without a warning, and its search, links and pages work."
import json, re, sys
from collections import Counter
from html import unescape
from urllib.parse import urlsplit
import pandas as pd, pytest
from bs4 import BeautifulSoup
from conftest import root
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import nbglob

pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')
sys.path.insert(0, str(root/'nbs/_tools'))
import docs
from docs import broken_links, without_alt

pytestmark = pytest.mark.slow('builds the site')
nbs = [f.relative_to(root/'nbs') for f in nbglob(root/'nbs', as_path=True).sorted()]
doc_url = get_config(root).doc_url

@pytest.fixture(scope='module')
def pages(site): return {f.relative_to(site).as_posix(): f.read_text('utf-8') for f in site.rglob('*.html')}

def test_every_notebook_has_a_page(pages): assert {nbpath2html(f).as_posix() for f in nbs} <= {*pages}

def test_every_page_is_in_the_sidebar_once(pages):
    side = re.search(r'<nav id="quarto-sidebar".*?</nav>', pages['index.html'], re.S)[0]
    links = Counter(o.removeprefix('./') for o in re.findall(r'href="([^"#]+)"', side))
    assert {nbpath2html(f).as_posix() for f in nbs} <= {*links} and {*links.values()}=={1}, links.most_common(20)

def test_search_finds_a_class(site):
    hits = [o for o in json.loads((site/'search.json').read_text('utf-8')) if 'ColorSquare' in o['section']+o['text']]
    assert any(o['href'].startswith('patterns.html#colorsquare') for o in hits)
    assert all((site/o['href'].partition('#')[0]).exists() for o in hits)

def test_source_links_point_at_the_definition(pages):
    links = [(f,int(n)) for p in pages.values() for f,n in re.findall(r'/blob/main/(feature_erosion/\S+?\.py)#L(\d+)', p)]
    lines = [(root/f).read_text('utf-8').splitlines()[n-1] for f,n in links]
    assert any(o.startswith('class ColorSquare') for o in lines)
    assert not [o for o in lines if not re.match(r'\s*(@|class |(async )?def )', o)]

def test_a_default_of_none_is_no_type(pages):
    api = pages['phases.html']
    assert 'until' in api and not [n for n,p in pages.items() if 'NoneType' in p]

def test_types_are_those_that_one_would_write(mains):
    signatures = [o for m in mains.values() for p in m.find_all('pre') if (o := p.get_text()).startswith('def ')]
    assert len(signatures)>300 and not [o for o in signatures if re.search(r'^ +\w+:(<|\S*Meta\b)', o, re.M)]

def test_comments_stay_with_their_arguments(mains):
    "That of `**kwargs` is not the result's, and a function that returns nothing does not show what another one returns"
    def signature(page, name): return mains[page].find('h3', id=name.lower()).find_next('pre').get_text()
    assert '**settings, # Settings to store' in (run := signature('runs/store.html', 'RunStore.run')) and run.endswith(')->Run:')
    assert signature('plots.html', 'legend_beside').endswith('**kwargs, # Passed to `legend`\n):')
    assert signature('recover.html', 'Recovery').endswith('\n):') and signature('unlearning.html', 'by_pattern').endswith('\n)->None:')
    assert '    arch:str, # As in `create_model`, ' in (net := signature('paper/nets.html', 'Net')) and net.endswith('\n):')
    assert 'scales:dict={}, # A `Scale` by preset' in signature('paper/recipes.html', 'Recipe')
    assert signature('learner.html', 'Learner.layer_cka').endswith('): # Settings in `attrs`')

def test_a_heading_names_what_is_defined_below_it(mains):
    "Double underscores are not taken for Markdown, and a method in a wrapper is under its class, with its source"
    heads = [h for m in mains.values() if m for h in m.find_all('h3', id=True) if h.find_previous_sibling('hr')]
    names = {h.get_text():h.find_next('pre').get_text() for h in heads}
    assert len(names)>300 and not [n for n,o in names.items() if not re.match(rf'(async )?def {n.rpartition(".")[2]}\(', o)]
    assert {'Learner.at_phase','TensorImages.set_split_idx','Interpretation.__getitem__'} <= {*names}
    assert not [h.get_text() for h in heads if h.find_previous_sibling().get_text()!='source']

def test_users_names_come_first(mains):
    "The page of each of our names in `feature_erosion.all` has a link to it before its first section"
    import feature_erosion.all as ours
    homes = {n:o.__module__.removeprefix('feature_erosion.').replace('.', '/') for n,o in vars(ours).items()
             if getattr(o, '__module__', '').startswith('feature_erosion.') and n in ours.__all__}
    assert len(homes)>50
    tops = {o:{a.get_text() for a in mains[f'{o}.html'].find('h2').find_all_previous('a')} for o in {*homes.values()}}
    assert not [n for n,home in homes.items() if n not in tops[home]]
    index = {a.get_text():a['href'] for a in mains['all.html'].find_all('a')}
    assert not [n for n,home in homes.items() if not index.get(n, '').startswith(f'{home}.html#')], index


def test_a_number_beside_several_rows_moves_none_of_them():
    "It is repeated in each row for phones, and hidden elsewhere"
    d = pd.DataFrame(dict(lr=[.1,.1,.2,.2], network=['a','b','a','b'], clean=[1,2,3,4])).set_index(['lr','network'])
    t = BeautifulSoup(re.sub(r'<table\b.*?</table>', docs.labelled, d.to_html(), flags=re.S), 'html.parser')
    rows = [r.find_all(['th','td']) for r in t.tbody.find_all('tr')]
    assert [len(r) for r in rows]==[3]*4 and [o.get_text() for o in rows[1]]==['0.1','b','2']
    assert [('again' in o['class'], o.has_attr('rowspan')) for o,*_ in rows]==[(False,True),(True,False)]*2

@pytest.fixture(scope='module')
def mains(pages): return {p: BeautifulSoup(html, 'html.parser').main for p,html in pages.items()}

def text_or_more(p):
    "What follows a paragraph on its page, and whether it is more than text"
    o = p.find_next(['p','h2','h3','h4','pre','table','ul','ol','img','hr'])   # `hr` is above a function
    return o is not None and (o.name not in ('p','h2','h3','h4') or bool(o.find('math')))

def test_headings_and_paragraphs_are_whole(mains):
    "The code that a paragraph introduces is on the page, or it is no introduction; nbdev's mark for headings to hide is not shown"
    found = [(n,o) for n,m in mains.items() if m for o in m.find_all(['h1','h2','h3','h4','p'])]
    dashed = [(n,o.get_text()) for n,o in found if o.name!='p' and o.get_text().strip().endswith(' -')]
    cut = [(n,o.get_text()[-80:]) for n,o in found if o.name=='p' and o.get_text().strip().endswith(':') and not text_or_more(o)]
    assert not dashed and not cut

def test_each_name_is_documented_once(mains):
    def names(main): return [h.get_text(' ', strip=True) for h in main.find_all('h3', id=True)]
    assert not {p:twice for p,o in mains.items() if (twice := [k for k,n in Counter(names(o)).items() if n>1])}

def test_every_heading_has_a_text(mains):
    "Where all cells below it are the library's own, a sentence says what is done there"
    def bare(main):
        hs = main.find_all(['h1','h2','h3','h4'])
        follows = [(a, b, a.find_next(string=lambda o: o.strip() and a not in o.parents)) for a,b in zip(hs, hs[1:])]
        return [a.get_text() for a,b,o in follows if b.name<=a.name and b in o.parents]
    assert not {p:o for p,main in mains.items() if (o := bare(main))}

def test_names_in_backticks_are_links(pages):
    assert any(re.search(r'<a href="\S*patterns\.html#\S+"><code>', html) for name,html in pages.items() if name!='patterns.html')
    # they lead somewhere else, within the site
    assert not [name for name,html in pages.items() if re.search(rf'<a href="{name.rpartition("/")[2]}"[^>]*><code>', html)]
    assert not [name for name,html in pages.items() if re.search(rf'<a href="{re.escape(doc_url)}', html)]

def test_no_markdown_is_left_over(pages):
    "As of a link around a name in backticks, which becomes a link of its own"
    def text(html):
        return re.sub(r'<[^>]+>', '', re.sub(r'<(pre|script|style)\b.*?</\1>', '', html[html.find('<main'):], flags=re.S))
    assert not [(name, m[0]) for name,html in pages.items() for m in re.finditer(r'.{30}\]\([\w./#:-]+\)', text(html))]

def test_a_wrong_address_leads_home(site, pages):
    "The page for it is shown at any address, so its links begin at the site's root; search leaves it out"
    page = pages['404.html']
    assert f'<base href="{urlsplit(doc_url).path}">' in page
    assert all((site/o).is_file() for o in re.findall(r'<li><a href="([^"#]+)"', page.split('<main')[1]))
    assert 'href="index.html"' in page
    assert not [o for o in json.loads((site/'search.json').read_text('utf-8')) if o['href'].startswith('404')]

def test_broken_links_are_found(tmp_path):
    "Those of the site itself are errors of `docs.py`"
    (tmp_path/'logo.svg').write_text('<svg/>')
    (tmp_path/'index.html').write_text('<h1 id="here">x</h1>')
    (tmp_path/'bad.html').write_text('<a href="index.html#nowhere">x</a> <a href="missing.html">x</a> <img src="logo.svg"> '
                                     '<a href="index.html">x</a> <a href="index.html#here">x</a>')
    assert broken_links(tmp_path) == ['bad.html: broken link index.html#nowhere', 'bad.html: broken link missing.html']

def test_pictures_without_alt_texts_are_found(tmp_path):
    "Those of the site itself are errors of `docs.py`"
    for n,alt in enumerate(['alt="a digit"', 'alt="png"', 'alt=""', '']):
        (tmp_path/f'{n}.html').write_text(f'<img {alt} src="x.png">')
    assert [o.partition(':')[0] for o in without_alt(tmp_path)] == ['1.html','2.html','3.html']

def test_each_figure_of_a_cell_has_its_own_alt_text(site, pages):
    page = (site/'patterns.html.md').read_text('utf-8')
    for word in 'clean','conflict','shuffled','pattern_only':
        assert f'alt="{word}, ' in pages['patterns.html'] and f'![{word}, ' in page

def test_labels_of_cells():
    "A cell that reaches over two rows is there for each, and labels join the rows of the head"
    df = pd.DataFrame({('rank','before'):[1,2,3], ('rank','after'):['a short text','a text that is longer than a number','x']},
                      index=pd.MultiIndex.from_tuples([('a',1),('a',2),('b',1)], names=['net','seed']))
    html = re.sub(r'<table.*</table>', docs.labelled, df.to_html(), flags=re.S)
    rows = BeautifulSoup(html, 'html.parser').tbody.find_all('tr')
    assert [[c.get_text() for c in r.find_all(['th','td'])][:2] for r in rows]==[['a','1'],['a','2'],['b','1']]
    assert [[c.get('class')==['again'] for c in r.find_all(['th','td'])] for r in rows]==[4*[False],[True]+3*[False],4*[False]]
    assert [c.get('data-label') for c in rows[1].find_all(['th','td'])]==['net','seed','rank, before','rank, after']
    assert 'class="dataframe cards"' in html
    assert 'numbers' in re.sub(r'<table.*</table>', docs.labelled, df[[('rank','before')]].to_html(), flags=re.S)

def test_heads_and_kinds_of_tables():
    "The names of an index are heads like the others where there is room; a table of numbers with long names is no table of words"
    df = pd.DataFrame(dict(ours=['a text that is as long as a claim']), index=pd.Index(['a first cell'], name='claim'))
    def heads(d): return [[c.get_text() for c in r.find_all('th')] for r in
        BeautifulSoup(re.sub(r'<table.*</table>', docs.labelled, d.to_html(), flags=re.S), 'html.parser').thead.find_all('tr')]
    def kind(d): return re.search(r'dataframe (\w+)', re.sub(r'<table.*</table>', docs.labelled, d.to_html(), flags=re.S))[1]
    long = pd.Index(['a name that is longer than a column of numbers'], name='method')
    assert kind(pd.DataFrame(dict(now=[.5], then=[.25]), long))=='numbers'
    assert kind(pd.DataFrame(dict(now=[.5], then=['yes']), long))=='cards'
    assert heads(df)==[['claim','ours']] and heads(df.rename_axis(columns='what'))==[['what','ours'],['claim','']]

def test_address_in_each_docstring_exists(site):
    urls = [u for f in (root/'feature_erosion').rglob('*.py')
            for u in re.findall(rf'^Docs: {re.escape(doc_url)}(\S+?)"*$', f.read_text('utf-8'), re.M)]
    assert urls and not [u for u in urls if not (site/u).is_file()]

def test_site_needs_no_network(site, pages):
    outside = r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//'
    assert not [name for name,html in pages.items() if re.search(outside, html)]
    assert not [f for f in site.rglob('*.css') if re.search(r'@import url\(["\']?(?:https?:)?//', f.read_text('utf-8'))]

def test_dark_mode_has_a_switch(pages):
    assert all('quarto-color-scheme-toggle' in html and 'darkly' in html for html in pages.values())

def test_saved_outputs_are_shown(pages):
    "A line that a cell printed or returned is on the page of its notebook"
    for f in nbs:
        cells = json.loads((root/'nbs'/f).read_text('utf-8'))['cells']
        shown = [c for c in cells if not re.match(r'#\|(?! fig-alt:)', ''.join(c['source'])) and c.get('outputs')]
        lines = [l.strip() for c in shown for o in c['outputs'] for l in ''.join(o.get('text', '')).splitlines()]
        page = unescape(pages[nbpath2html(f).as_posix()])
        assert not [l for l in lines if l not in page]
