"Build the documentation site: with Quarto where it is installed, with smalldocs elsewhere. A warning, a broken link, or a picture without an alt text is an error."
import inspect, io, json, os, re, shutil, subprocess, sys, tempfile, warnings
from base64 import b64decode
from copy import copy
from functools import cache
from html import unescape
from importlib import import_module
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urlsplit

from bs4 import BeautifulSoup
from execnb.shell import CaptureShell
import fastcore.docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from fastcore.script import call_parse
from fastcore.xtras import working_directory
import nbdev.config
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from PIL import Image
try: from smalldocs import config, highlight, llms, notebook, site
except ImportError:
    sys.exit('smalldocs, which builds the site and the README, needs Python 3.11 or newer: make clean, then make PYTHON=python3.11 docs')

root = Path(__file__).resolve().parents[2]
quarto_only = 'format commonmark', 'unknown key format-links'  # what _quarto.yml and nbdev.yml say to Quarto alone

def stage(tmp):
    "Copy what the site is made of to `tmp`, so that building leaves the checkout as it is"
    # three of them are linked to from nbs
    for o in 'pyproject.toml', '_quarto.yml', 'CONTRIBUTING.md', 'CHANGELOG.md':
        shutil.copy(root/o, tmp)
    shutil.copytree(root/'nbs', tmp/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.*', '_tools', 'models'))
    with working_directory(tmp): refresh_quarto_yml()
    for f in (tmp/'nbs').rglob('*.ipynb'): say_what_users_get(f)

def say_what_users_get(f):
    "In a module's notebook, link to what `feature_erosion.all` has of it, which may be far down the page"
    nb = read_nb(f)
    mod = re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(c.source for c in nb.cells), re.M)
    if not mod or not (names := used(f'feature_erosion.{mod[1]}')): return
    nb.cells.insert(1, mk_cell(f"In `feature_erosion.all`: {', '.join(f'`{o}`' for o in names)}", 'markdown'))
    write_nb(nb, f)

def used(mod):
    "Names in `feature_erosion.all` from a module, and its methods on fastai's classes"
    users,names = public()[0],[o.removeprefix(f'{mod}.') for o in syms().get(mod, ())]
    methods = [o for o in names if o.count('.')==1 and not re.search(r'\._|\.(before|after)_', o)]
    return [o for o in names if o in users] + [o for o in methods if o.split('.')[0] in ('DataLoaders','Learner','Recorder')]

@cache
def syms():
    "Of each module, its functions, classes and methods"
    from feature_erosion._modidx import d
    return d['syms']

def shown_width(png:bytes):
    "Width in CSS pixels of a figure saved at twice its size, None for other pictures"
    im = Image.open(io.BytesIO(png))
    return im.width//2 if im.info.get('dpi', (0,))[0] > 120 else None

def half_size(m):
    "An `img` tag that shows a figure as large as matplotlib meant it; on a phone a wide one is smaller, and scrolls"
    if not (w := shown_width(b64decode(m[1]))): return m[0]
    img = m[0].replace('<img ', f'<img width="{w}" style="--w: {w}px" ')
    return f'<span class="wide-figure">{img}</span>' if w>600 else img

def sentences(m):
    "An output of one line, or with lines longer than a page is wide, breaks on a phone as well; the others have columns"
    lines = unescape(re.sub(r'<[^>]+>', '', m[2])).strip().splitlines()
    return f'{m[1]}<pre class="words">{m[2]}</pre>' if len(lines)==1 or max(map(len, lines), default=0)>95 else m[0]

def alt_of(opts, n):
    "A cell's options for its `n`th picture: of `fig-alt` smalldocs knows one for all, Quarto a list as well"
    alts = opts.get('fig-alt')
    return {**opts, 'fig-alt': alts[n] if n<len(alts) else None} if isinstance(alts, list) else opts

nbdev.config._load_toml = cache(nbdev.config._load_toml)   # it reads pyproject.toml five thousand times
CaptureShell.atexit_operations = lambda self: None   # each page's shell would collect all garbage once more
highlight.css_class = cache(highlight.css_class)
_figure,_output = notebook.figure,llms.output
notebook.figure = lambda img, opts, n: _figure(img, alt_of(opts, n), n)
llms.output = lambda out, name, files, folder, opts, n, caption: _output(out, name, files, folder, alt_of(opts, n), n, caption)

_docments,_unwrap_sym = fastcore.docments.docments,fastcore.docments._unwrap_sym
_dataclass_source = fastcore.docments.get_dataclass_source

def said(sym, **kwargs):
    "Docments with those of `*args` and `**kwargs`, which fastcore else takes for that of the result; a class returns nothing"
    d = _docments(sym, args_kwargs=True, **kwargs)
    if inspect.isclass(sym) and kwargs.get('full') and 'return' in d:
        d['return'].update(docment=None, anno=inspect.Parameter.empty)
    return d

def dataclass_source(cls):
    "Of one in a notebook, which has no file, that of its module: the comments of its fields are there"
    homes = [mod for mod,names in syms().items() if f'{mod}.{cls.__name__}' in names]
    return inspect.getsource(getattr(import_module(homes[0]), cls.__name__)) if homes else _dataclass_source(cls)

def unwrapped(sym):
    "What a wrapper such as `contextmanager` wraps, under the name that `patch` gave it"
    inner = _unwrap_sym(sym)
    if inspect.isfunction(sym) and inspect.isfunction(inner): inner.__qualname__ = sym.__qualname__
    return inner

vars(fastcore.docments).update(docments=said, _unwrap_sym=unwrapped, get_dataclass_source=dataclass_source)

def texts(row):
    "The text of each column in a row of a table's head"
    return [o for c in row.find_all('th') for o in [c.get_text(' ', strip=True)]*int(c.get('colspan', 1))]

def whole_row(row, above):
    "Repeat, hidden on wide screens, the cells that reach down from rows `above`: as a card a row stands alone"
    for j,(cell,n) in sorted(above.items()):
        again = copy(cell)
        again.attrs = {'class': ['again']}
        row.insert(j, again)
        above[j] = cell,n-1
    above.update({j:(c,int(c['rowspan'])-1) for j,c in enumerate(row.find_all(['th','td'])) if c.has_attr('rowspan')})
    return {j:(c,n) for j,(c,n) in above.items() if n}

re_number = re.compile(r'[-−+×]?[\d.,]+( ?[%×s]|e[-+]?\d+)?|nan|NaN|–|')

def to_the_right(t):
    "Columns of numbers, and their heads, go to the right; all else begins at the left"
    for row in t.thead.find_all('tr'): row.attrs.pop('style', None)
    rows = [[c for c in r.find_all(['th','td']) for _ in range(int(c.get('colspan', 1)))] for r in t.find_all('tr')]
    n = max(map(len, rows))
    for cells in zip(*(o for o in rows if len(o)==n)):
        body = [c.get_text().strip() for c in cells if c.find_parent('tbody')]
        if any(body) and all(map(re_number.fullmatch, body)):
            for c in cells: c['class'] = [*c.get('class', []), 'number']

def one_head(t):
    "Pandas puts the names of an index in a row of their own: they go to the heads of the columns, where there is room"
    rows = [r.find_all('th') for r in t.thead.find_all('tr')]
    if len(rows)<2 or len(rows[-1])!=len(rows[-2]): return
    pairs = [(a,b) for a,b in zip(*rows[-2:]) if b.get_text().strip()]
    if any(a.get_text().strip() for a,_ in pairs): return
    for a,b in pairs: a.replace_with(b)
    t.thead.find_all('tr')[-1].decompose()

def labelled(m):
    "A table of words as `cards`, whose cells say what they are where they stand alone; one of numbers as `numbers`"
    t,above = BeautifulSoup(m[0], 'html.parser').table,{}
    if not (t.thead and t.tbody): return m[0]
    one_head(t)
    labels = [', '.join(filter(None, o)) for o in zip(*map(texts, t.thead.find_all('tr')))]
    for row in t.tbody.find_all('tr'):
        for c in row.find_all(string=lambda o: not o.strip(), recursive=False): c.extract()
        above = whole_row(row, above)
        cells = row.find_all(['th','td'])
        for c,label in zip(cells, labels):
            # a long first cell is a title
            if label and len(cells)>2 and (c is not cells[0] or len(c.get_text())<3):
                c['data-label'] = label.rstrip('?')
    to_the_right(t)
    longest = max((len(c.get_text()) for c in t.tbody.find_all(['th','td'])), default=0)
    rest = [c.get_text().strip() for r in t.tbody.find_all('tr') for c in r.find_all(['th','td'])[1:]]
    measured = len(labels)>2 and all(not o or re_number.fullmatch(o) for o in rest)   # numbers, however long the names of rows
    words = not (measured or t.find(class_='row_heading')) and longest>(24 if len(labels)>2 else 60)
    t['class'] = [*t.get('class', []), 'cards' if words else 'numbers']
    return re.sub(r'`([^`<>]+)`', r'<code>\1</code>', str(t))

def mathml(m):
    "TeX to MathML, which browsers show without scripts"
    from latex2mathml.converter import convert
    return convert(unescape(m[2]).strip(), display='inline' if m[1]=='(' else 'block')

for_users = re.compile(r'(index|concept|howdoi|glossary|gallery|faq|changelog)\.|(howto|tutorials)/|paper/[a-z]')
for_few = re.compile(r'0[0-7]_|paper/0|runs/0[02]_|(21_all|built|works|trust|benchmarks|contributing)\.')

@cache
def public():
    "What `from feature_erosion.all import *` brings, and the names of all modules"
    ours = {name.removeprefix(f'{mod}.').partition('.')[0] for mod,names in syms().items() for name in names
            if name.count('.')==mod.count('.')+1}
    text = (root/'feature_erosion/all.py').read_text()
    return {o.strip() for l in re.findall(r'^from \.\S+ import (.*)', text, re.M) for o in l.split(',')}, ours

def kind(src, section):
    "How early search shows a section: 0 for public names and what tells how to, 2 for the inside of the library, 1 for the rest"
    (users,ours),name = public(),section.partition('.')[0]
    if for_users.match(src) or name in users or ('.' in section and name.isidentifier() and name not in ours): return 0
    return 2 if for_few.match(src) else 1

class Site(site.Site):
    "smalldocs, with nbdev's page names and doclinks, figures at their real size, and maths without scripts"
    def read(self, src):
        page = super().read(src)
        page.out = PurePosixPath(nbpath2html(src)) if src.suffix=='.ipynb' else page.out
        return page
    def find_page(self, target): return next((p for p in self.pages.values() if p.out==target), None) or super().find_page(target)
    def resolve(self, href, page, record=True):
        return super().resolve(re.sub(rf'^{re.escape(get_config().doc_url)}', '/', href), page, record)
    def llms_link(self, href, page):
        path,frag = urldefrag(self.resolve(href, page, False))
        return f'{path}.md' if path.endswith('.html') and ':' not in path else href
    def render_page(self, page):
        super().render_page(page)
        page.html = re.sub(r'<img [^>]*?src="data:image/png;base64,([^"]+)"[^>]*>', half_size, page.html)
        page.html = re.sub(r'(<div class="cell-output[^"]*">\s*)<pre>(.*?)</pre>', sentences, page.html, flags=re.S)
        page.html = re.sub(r'<table\b.*?</table>', labelled, page.html, flags=re.S)
        page.html = re.sub(r'\\([(\[])(.*?)\\[)\]](?=</span>)', mathml, page.html, flags=re.S)
        page.env['math'] = False
    def write_search(self):
        "The index with the `kind` of each section, and a search that knows it"
        super().write_search()
        f,src = self.out/'search.json',{str(p.out):p.src.as_posix() for p in self.pages.values()}
        found = [o for o in json.loads(f.read_text('utf-8')) if not o['href'].startswith('404')]
        f.write_text(json.dumps([dict(o, kind=kind(src[o['href'].partition('#')[0]], o['section'])) for o in found]), 'utf-8')
        with open(self.out/'site_libs/fuse/fuse.min.js', 'a') as o:
            o.write((Path(__file__).parent/'search.js').read_text('utf-8'))
    def build(self):
        super().build()
        for p in self.pages.values():  # patterns.html.md is the address in the docstring of the module
            text,files = self.llms_copy(p)
            for name,data in {f'{p.out.name}.md': text.encode(), **files}.items():
                f = self.out/p.out.parent/name
                f.parent.mkdir(exist_ok=True)
                f.write_bytes(data)
        missing = self.out/'404.html'   # shown at whatever address was asked for
        missing.write_text(missing.read_text('utf-8').replace('<head>',
                                                              f'<head>\n<base href="{urlsplit(get_config().doc_url).path}">', 1),
                                                              'utf-8')
        for f in self.out.glob('site_libs/themes/*.css'): f.write_text(re.sub(r'@import url\(http.*?\);', '', f.read_text()))

def tidy(f):
    "Drop from a processed notebook what smalldocs would show or complain about"
    nb = read_nb(f)
    for c in nb.cells:
        if c.cell_type=='markdown': c.source = re.sub(r'\A(#\|.*\n?)+', '', c.source)
        if c.cell_type=='raw': c.source = re.sub(r'^output-file:.*\n', '', c.source, flags=re.M)
        for o in c.get('outputs', []):   # in a signature: the notebook's own classes, and a default of `None` taken for a type
            if md := o.get('data', {}).get('text/markdown'):
                md = re.sub(r':?\bNoneType\b', '', ''.join(md).replace('__main__.', '').replace('<factory>', '{}'))
                o['data']['text/markdown'] = re.sub(r'^(#+ .*\.)__(\w+)__', r'\1\_\_\2\_\_', md, flags=re.M)
    write_nb(nb, f)

def with_smalldocs():
    "Build the staged project with smalldocs; the site and what it warned of"
    with warnings.catch_warnings(record=True) as ws:
        warnings.filterwarnings('always', module='nbdev|fastcore')
        proc = proc_nbs('nbs', n_workers=0)
    for f in proc.rglob('*.ipynb'): tidy(f)
    s = Site(config.load(proc), quiet=True)
    s.build()
    return s.out, [str(w.message) for w in ws if Path(w.filename).parent.name=='nbdev'] + [w for w in s.warnings if not w.startswith(quarto_only)]

def with_quarto():
    "Build the staged project with `nbdev-docs`; the site and what it warned of"
    cmd = 'from nbdev.quarto import nbdev_docs; nbdev_docs.__wrapped__()'
    r = subprocess.run([sys.executable, '-c', cmd], env={**os.environ, 'PYTHONPATH': str(root)}, stderr=subprocess.STDOUT,
                       stdout=subprocess.PIPE, text=True)
    if r.returncode: sys.exit(r.stdout)
    return Path('_docs').resolve(), [l for l in r.stdout.splitlines() if 'WARN' in l]

re_link = re.compile(r'(?<!<base )\b(?:href|src)="([^"]*)"')

def ids(page, cache={}):
    "The anchors of a page"
    if page not in cache: cache[page] = set(re.findall(r'\bid="([^"]+)"', page.read_text())) | {''}
    return cache[page]

def target(page, href):
    "The file and the anchor of a local link of `page`, None for links to elsewhere"
    if re.match(r'[a-zA-Z][\w+.-]*:|//', href): return
    path,frag = urldefrag(unescape(href))
    f = (page.parent/unquote(path.split('?')[0])).resolve() if path else page
    return (f/'index.html' if f.is_dir() else f), unquote(frag)

def nearest(out):
    "A doclink to something without a heading of its own goes to its class, or else to the page; on that page it is none"
    names = {link for mod in syms().values() for link,_ in mod.values()}
    def fix(page, m):
        f,frag = target(page, m[1]) or (page,'')
        if f'{os.path.relpath(f, out)}#{frag}' not in names: return m[0]
        while f.exists() and frag not in ids(f): frag = frag.rpartition('.')[0]
        return f'href="{m[1].partition("#")[0]}{"#"*bool(frag)}{frag}"'
    for page in out.rglob('*.html'):
        text = re.sub(r'\bhref="([^"]*#[^"]*)"', lambda m: fix(page, m), page.read_text())
        page.write_text(re.sub(rf'<a href="{re.escape(page.name)}"[^>]*>(<code>[^<]*</code>)</a>', r'\1', text))

def broken_links(out):
    "Links within the site at `out` that lead nowhere, as `page: link`"
    def bad(f, frag): return not f.is_file() or (f.suffix=='.html' and frag not in ids(f))
    links = ((p, h) for p in sorted(out.rglob('*.html')) for h in dict.fromkeys(re_link.findall(p.read_text())))
    return [f'{p.relative_to(out)}: broken link {h}' for p,h in links if (t := target(p, h)) and bad(*t)]

def without_alt(out):
    "Pictures of the site at `out` that tell nothing to who does not see them, as `page: what`"
    def bad(page):
        return [n for n,img in enumerate(re.findall(r'<img\b[^>]*>', page.read_text()))
                if not re.search(r'\balt="(?!png")[^"]*\w', img)]
    return [f'{p.relative_to(out)}: picture {n} has no alt text, give its cell `#| fig-alt: ...` (with ": " in it in quotes)'
            for p in sorted(out.rglob('*.html')) for n in bad(p)]

@call_parse
def main(
    out:Path=root/'_docs', # Where the site goes; what is there is replaced
):
    "Build the documentation site"
    out = Path(out).absolute()
    if out.exists() and not (out/'search.json').exists():
        sys.exit(f'{out} is not a site built here: remove it, or choose another place')
    sys.path.insert(0, str(root))
    with tempfile.TemporaryDirectory() as tmp:
        stage(Path(tmp))
        with working_directory(tmp): site,problems = with_quarto() if shutil.which('quarto') else with_smalldocs()
        nearest(site)
        problems += broken_links(site) + without_alt(site)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)
    for p in problems: print(f'warning: {p}', file=sys.stderr)
    if problems: sys.exit(f'{len(problems)} problem(s) in the documentation')
    print(f'{len(list(out.rglob("*.html")))} pages in {out}')
