"What the tests share: the checkout, copies of it, which data are on this machine, and what is left out when and why."
import os, re, shutil, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import pytest
from filelock import FileLock

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'nbs/_tools'))
# one thread in each process: on busy cores two wait for each other
for o in 'OMP_NUM_THREADS','LOKY_MAX_CPU_COUNT':
    os.environ.setdefault(o, '1')

def pytest_addoption(parser): parser.addoption('--quick', action='store_true', help='leave out the tests marked slow')

first = ['test_notebooks.py','test_paper.py', 'test_site.py','test_distributed.py', 'test_docs.py','test_sweep.py',
         'test_store.py','test_cli.py', 'test_questions.py','test_howto.py']   # what takes long, in turns

def halves(items):
    "Two workers begin at the start and in the middle, and at last take over from each other: what takes long comes first in both halves"
    one,two = ([o for f in first[i::2] for o in items if o.path.name==f] for i in (0,1))
    rest = [o for o in items if o.path.name not in first]
    n = max(0, len(items)//2-len(one))
    return [*one, *rest[:n], *two, *rest[n:]]

@pytest.hookimpl(trylast=True)   # without what was not asked for
def pytest_collection_modifyitems(config, items):
    for o in items if config.getoption('--quick') else []:
        if m := o.get_closest_marker('slow'): o.add_marker(pytest.mark.skip(reason=f'slow: {m.args[0]}'))
    items[:] = halves(items)

needs = re.findall(r'^\| `([\w-]+)` \|', (root/'CONTRIBUTING.md').read_text('utf-8'), re.M)

def works(kind, what, how):
    "Mark the test of a situation, a row of the page “What works with what”"
    return pytest.mark.works(kind=kind, what=what, how=how)

def why(rep): return rep.longrepr[2].removeprefix('Skipped: ')

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "A test may be skipped only for what the table in CONTRIBUTING.md lists"
    rep = yield
    if rep.skipped and not any(re.search(rf'\b{o}\b', why(rep)) for o in needs):
        rep.outcome,rep.longrepr = 'failed',f'skipped for a reason that is not listed in CONTRIBUTING.md: {why(rep)}'
    return rep

def pytest_terminal_summary(terminalreporter):
    "Each skipped test under the reason why"
    by = {}
    for o in terminalreporter.getreports('skipped'): by.setdefault(why(o), []).append(o.nodeid.removeprefix('tests/'))
    if by: terminalreporter.section('left out')
    for reason,names in sorted(by.items()): terminalreporter.line('\n    '.join([reason, *sorted(names)]))

def data_path(name):
    "Where the data called `name` would be"
    if name=='resnet20': return Path(os.environ.get('FEATURE_EROSION_RESNET20') or root/'no FEATURE_EROSION_RESNET20')
    from fastai.data.external import fastai_path
    return fastai_path('data')/name

def require(*names):
    "The paths of the data called `names`; the test is skipped, saying so, where one is missing"
    paths = {o:data_path(o) for o in names}
    missing = [f'{o} ({p})' for o,p in paths.items() if not p.exists()]
    if missing: pytest.skip(f'needs {", ".join(missing)}')
    return list(paths.values())

@pytest.fixture(scope='session', autouse=True)
def no_waiting_for_the_disk():
    "What is left after a power cut no test can tell, so none waits for the disk; processes that tests start do"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, 'fsync', lambda fd: None)
        yield

@pytest.fixture(scope='session')
def cifar10(): return require('cifar10')[0]

@pytest.fixture(scope='session')
def tiny_imagenet(): return require('tiny_imagenet_20')[0]

@pytest.fixture(scope='session')
def resnet20(): return require('resnet20')[0]

def python(*args, cwd=root):
    "Run Python with `args` in `cwd`, where its `feature_erosion` is the one of `cwd`; what it printed"
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'} | dict(PYTHONPATH=os.pathsep.join([str(cwd), os.environ.get('PYTHONPATH', '')]))
    r = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True)
    assert not r.returncode, r.stdout
    return r.stdout

@contextmanager
def shared(factory, name):
    "The path `name`, the same for all workers that test side by side, for one at a time"
    base = factory.getbasetemp()
    out = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/name
    with FileLock(f'{out}.lock'): yield out

def snapshot():
    "The checkout's files with their times, and its folders; without `models`, where Learners in tests beside this one save"
    found = (f for d in (root, root/'nbs', root/'feature_erosion') for f in d.glob('*') if f.name[0]!='.' and f.name!='models')
    return {f: f.is_file() and f.stat().st_mtime_ns for f in found}

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The documentation, built aside once for all tests; `docs.py` fails on any warning"
    pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')
    with shared(tmp_path_factory, 'the site') as out:
        if out.exists(): return out
        before = snapshot()
        assert 'warning' not in python('nbs/_tools/docs.py', '--out', out).lower()
        assert snapshot() == before, 'building the documentation changed the checkout'
    return out

@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout, without what is built in it"
    built = '.git', '.venv', '_docs', '_proc', 'models', 'build', 'dist', '*.egg-info', '__pycache__', '.*_cache'
    junk = shutil.ignore_patterns(*built)
    ours = lambda folder, names: junk(folder, names) | ({'runs'} if Path(folder)==root else set())
    return shutil.copytree(root, tmp_path/'a copy', symlinks=True, ignore=ours)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Where torch's hub keeps weights files, for this test an empty folder"
    import torch
    monkeypatch.setattr(torch.hub, '_hub_dir', None)   # what `set_dir` sets goes before the environment
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    folder = Path(torch.hub.get_dir())/'checkpoints'
    folder.mkdir(parents=True)
    return folder

@pytest.fixture(scope='module')
def browser():
    "A chromium that is installed here, with playwright; the test is skipped, saying so, where one of them is missing"
    sync = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    exe = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
    if not exe: pytest.skip('needs chromium on the PATH')
    quiet = 'no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync'
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=[f'--{o}' for o in quiet.split()])
        yield b
        b.close()

class Page:
    "A page of `browser`, with what went wrong in it and what it asked the network for"
    def __init__(self, browser, url, width=1280, height=900, scheme='light'):
        self.errors,self.requests = [],[]
        self.page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type in ('error','warning') else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', lambda r: self.requests.append(r.url))
        self.go(url)
    def go(self, url):
        "To another page, and forget what went wrong before"
        self.errors.clear(); self.requests.clear()
        self.page.goto(str(url))
    def look(self, width, scheme):
        "The same page at another width, in another scheme"
        self.page.set_viewport_size(dict(width=width, height=900))
        self.page.emulate_media(color_scheme=scheme)
        self.page.wait_for_function("dark => document.documentElement.classList.contains('quarto-dark')===dark",
                                    arg=scheme=='dark')
    def __enter__(self): return self
    def __exit__(self, *args): self.page.close()
    def js(self, code): return self.page.evaluate(code)
    def overflow(self): return self.js('document.documentElement.scrollWidth - innerWidth')
    def images(self): return self.page.eval_on_selector_all('img', 'els => els.map(o => ({width:o.naturalWidth, alt:o.alt}))')
    def contrasts(self): return self.js(contrasts)

contrasts = """() => {   // WCAG 2 contrast of each visible text with the colour behind it
  const rgba = s => { const v = s.match(/[\\d.]+/g).map((o,i) => s.startsWith('color(') && i<3 ? 255*o : Number(o)); return v.length>3 ? v : [...v,1] }
  const lum = c => { const [r,g,b] = c.slice(0,3).map(v => (v/=255)<=.04045 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b }
  const seen = new Map(), own = e => { const c = rgba(getComputedStyle(e).backgroundColor); return c[3]==1 ? c : behind(e.parentElement) }
  const behind = e => { if (!e) return [255,255,255,1]; if (!seen.has(e)) seen.set(e, own(e)); return seen.get(e) }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), res = []
  for (let n; n = walk.nextNode(); ) {
    const e = n.parentElement
    if (!n.data.trim() || !e.checkVisibility()) continue
    const [a,b] = [lum(rgba(getComputedStyle(e).color)), lum(behind(e))].sort((x,y) => y-x)
    res.push({text:n.data.trim().slice(0,40), ratio:(a+.05)/(b+.05)}) }
  return res }"""
