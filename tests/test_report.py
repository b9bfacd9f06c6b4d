"The report: what is in it, what of it survives damage and malice, and how it looks in a real browser."
import re
import matplotlib, numpy as np, pandas as pd, pytest
matplotlib.use('agg')
import matplotlib.pyplot as plt
from conftest import Page
from run_notebooks import forked
from PIL import Image
from feature_erosion.cli import main
from feature_erosion.paper.report import report
from feature_erosion.files import save_json
from feature_erosion.runs.store import Run, RunStore, environment
from feature_erosion.runs.sweep import sweep

script = '<script>document.title="hacked"</script><img src=x onerror="document.title=\'hacked\'">'
evil_svg = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60" onload="parent.document.title=\'hacked\'"><script>document.title="hacked"</script><image href="http://127.0.0.1:9/x.png" width="9" height="9"/><rect width="90" height="60"/></svg>'

def figure(run, name):
    fig,ax = plt.subplots(figsize=(7,3))
    ax.plot([0,1])
    run.save_figure(name, fig)

def done(run, **values):
    run.begin()
    run.save_metrics(values)
    run.update(status='finished', seed=0)
    return run.path

def results(folder, **config):
    "A figure of the paper, with claims"
    config = {**dict(figure='fig1', title='Erosion', preset='cpu', model=dict(arch='vgg19', width=.25)), **config}
    run = RunStore(folder.parent).run(folder.name, **config)
    figure(run, 'fig1')
    claims = dict(claim=['Clean accuracy falls','Rank falls',script], paper='yes', ours='88.1% to 24.3%', n=3)
    run.save_table('claims', pd.DataFrame(dict(claims, mean=-.638123, low=-.7, high=-.5, agrees=[True,False,'in part'])))
    history = pd.DataFrame(np.random.RandomState(0).rand(180,15), columns=[f'a_long_name_{i}' for i in range(15)])
    run.save_table('history', history.rename_axis('epoch').reset_index())
    return done(run, seconds=75)

def make_run(store, name, **config):
    run = RunStore(store).run(name, **config)
    run.append(dict(table='epochs', phase='pretrain', clean=.9), dict(table='epochs', phase='erode', clean=.2),
               dict(table='evals', phase='erode', clean=.2))
    figure(run, 'phases')
    run.update(sessions=[dict(environment(), python='0.0.1')])
    return done(run, clean=.2123456)

@pytest.fixture
def folder(tmp_path):
    "Two figures and two runs, some of whose text wants to be markup"
    d = tmp_path/'all <i>of it'
    for n in 'fig10','fig2': results(d/n, figure=n)
    make_run(d, 'a', lr=.1, note=script, long='x'*3000)
    make_run(d, 'b', lr=.2, **{script:1})
    (d/'fig2'/'figures'/'evil.svg').write_text(evil_svg)
    return d

def headings(html): return [re.sub('<.*?>', '', o) for o in re.findall(r'<h[12]>(.*?)</h[12]>', html)]

def test_results(tmp_path):
    out = report(results(tmp_path/'r'))
    html = out.read_text()
    assert out==tmp_path/'r'/'report.html' and headings(html)==['Figure 1: Erosion','Claims','history','Settings','Versions']
    for word in ('1 of 3 agree', '-0.638 (-0.700 to -0.500)', 'model.arch', '1 min 15 s', '180 rows × 16 columns',
                 '… 168 more rows …', environment()['torch']):
        assert word in html, word
    assert html.count('<img ')==1 and 'alt="Figure 1: Erosion: fig1"' in html   # the PNG, not the SVG as well

def test_run(tmp_path):
    html = report(make_run(tmp_path, 'a', lr=.1, model=dict(arch='vgg19'))).read_text()
    assert headings(html)==['a','Last evaluation','history: epochs','history: evals','Settings','Versions']
    for word in ('finished', '0.2123', 'model.arch', environment()['python']): assert word in html, word
    assert '0.0.1' not in html   # the last session's versions

def test_classes_called_by_numbers(tmp_path):
    "In a table of an own run, 007 stays 007"
    run = RunStore(tmp_path).run('a')
    run.save_table('classes', pd.DataFrame(dict(label=['007','042'], n=[1,2])))
    html = report(done(run, clean=.5)).read_text()
    assert '<td>007</td>' in html and '042' in html

def test_a_table_of_one_column(tmp_path):
    run = RunStore(tmp_path).run('a')
    run.save_table('classes', pd.DataFrame(dict(n=[1,2])))
    assert '2 rows × 1 column<' in report(done(run, clean=.5)).read_text()

def test_folder_of_both(folder):
    html = report(folder).read_text()
    assert headings(html)==['all &lt;i&gt;of it','Figure 2: Erosion','Figure 10: Erosion','Runs','a','b']
    assert '2 figures · 2 runs · 2 of 6 claims agree with the paper' in html
    assert '<script' not in html and 'onerror="' not in html.replace('&lt;img src=x onerror="', '')
    assert 'x'*401 not in html and '(3,000 characters)' in html

def test_results_of_one_figure_say_where_they_are(tmp_path):
    for n in 'fig1','fig1_tried': results(tmp_path/n)
    html = report(tmp_path).read_text()
    assert html.count('<b>folder</b>')==1 and '<b>folder</b> fig1_tried' in html

def test_damaged_pieces_are_named(folder):
    (folder/'a'/'run.json').write_text('{"format": 1')
    (folder/'b'/'history.jsonl').write_text('{\n')
    (folder/'b'/'metrics.json').write_text('['*5000)
    tables = folder/'fig2'/'tables'
    (tables/'other.csv').write_bytes(b'a,b\n"\xff\xfe')
    (tables/'claims.csv').write_text('')
    (tables/'history.csv').write_text((tables/'history.csv').read_text().replace('1', '2', 1))   # one digit
    figures = folder/'fig10'/'figures'
    (figures/'fig1.svg').unlink()
    (figures/'fig1.png').write_bytes((figures/'fig1.png').read_bytes()[:2000])
    (figures/'broken.svg').write_text('<svg')
    (figures/'huge.png').write_bytes(b'0'*(6*2**20))
    html = report(folder).read_text()
    notes = re.findall(r'<li>((?!<a).*?)</li>', html)
    for f in ('run.json: damaged', 'history.jsonl: damaged', 'metrics.json', 'other.csv', 'claims.csv', 'fig1.png', 'broken.svg',
              'history.csv: damaged: it is not what was written', 'figures/fig1.svg: gone',
              'huge.png: not in this page: it has 6.0 MB'): assert any(o.startswith(f) for o in notes), f
    assert 'cannot be read' in html and str(folder) not in html and 'a_long_name_3' in html   # in fig10, which is whole
    assert headings(html)[1:]==['Figure 2: Erosion','Figure 10: Erosion','Runs','a','b'] and html.count('<img ')==4

def test_what_run_json_says_may_be_anything(tmp_path):
    "It carries a checksum, but anybody can make one"
    path = results(tmp_path/'r')
    odd = dict(title='\ud800\0\u202e', figure={'a':[1]}, n=float('inf'), preset=[1,2])
    files = {'/dev/zero':'1', '../../etc/passwd':'2', **{f'tables/{i}.csv':'3' for i in range(1000)}, 'figures/fig1.png':4}
    Run(path).update(settings=odd, sessions=[1,'x',None], files=files, created='<b>'*1000, error='x\ny', fit={script:script})
    html = report(path).read_text(errors='replace')
    assert '/dev/zero: gone' in html and 'more</li>' in html and html.count('<li>')<60 and '<script' not in html

@pytest.mark.parametrize('seconds', [float('nan'), float('inf'), -1, 'long'])
def test_seconds_may_be_anything(tmp_path, seconds):
    RunStore(tmp_path).run('a').save_metrics(dict(seconds=seconds, acc=.5))
    assert '<b>seconds</b>' in report(tmp_path/'a').read_text()

def test_too_many_pixels(tmp_path):
    results(tmp_path/'r')
    Image.new('1', (12000,12000)).save(tmp_path/'r'/'figures'/'bomb.png')
    html = report(tmp_path/'r').read_text()
    assert 'bomb.png: 12000×12000 pixels' in html and html.count('<img ')==1

def test_it_reads_and_writes_nothing_else(folder):
    written = lambda: {f:(f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob('*') if f.is_file() and f.name!='.lock'}
    before = written()
    out = report(folder)
    assert {f:o for f,o in written().items() if f!=out}==before

@pytest.mark.parametrize('out', [None,'page.html'])
def test_it_writes_over_pages_of_its_own_only(out, tmp_path):
    page = results(tmp_path/'r')/(out or 'report.html')
    page.write_text('<!doctype html><title>my notes</title>')
    with pytest.raises(ValueError, match='is no report'): report(tmp_path/'r', out and page)
    assert 'my notes' in page.read_text()
    page.write_text('')
    for _ in range(2): assert report(tmp_path/'r', out and page)==page and '<h1' in page.read_text()

def swept(ratio, net, seed): return dict(clean=1-ratio*(.5+.1*seed), valid_loss=ratio, **{script:seed})

def test_sweeps(tmp_path, browser):
    "Means and intervals over seeds, and a plot across runs, on a phone as well"
    sweep(swept, dict(ratio=[0,.5,1.], net=['a',script]), seeds=3, store=tmp_path/'s', n_jobs=1, progress=False)
    make_run(tmp_path/'s', 'another', lr=.1)
    html = report(tmp_path/'s').read_text()
    assert headings(html)==['s','Sweep: swept','Runs','another'] and '19 runs · 1 sweep' in html and '18 of 18 points' in html
    for cell in ('0.400 (0.300 to 0.500)', '0.700 (0.650 to 0.750)', '1.00 (1.00 to 1.00)', 'of two or three seeds the lowest and the highest'):
        assert cell in html, cell
    assert '<script' not in html
    with Page(browser, (tmp_path/'s'/'report.html').as_uri(), 390) as p:
        img = p.page.locator('#sweep0 img')
        assert p.overflow()<=0 and img.count()==1 and img.get_attribute('alt') and not p.errors
        assert img.bounding_box()['width']>550   # it scrolls in its box, and can be read
        assert p.page.locator('#sweep0 tbody tr').count()==6 and p.page.locator('nav a[href="#sweep0"]').count()==1

def test_a_sweep_that_cannot_be_shown(tmp_path):
    "Its numbers have a name that matplotlib reads as a broken formula; the rest of the page is there"
    sweep(lambda seed: {'a$\\b$':seed}, {}, seeds=2, store=tmp_path/'s', n_jobs=1, progress=False)
    html = report(tmp_path/'s').read_text()
    assert 'This sweep cannot be shown' in html and '2 runs · 1 sweep' in html

def report_often(folder):
    for _ in range(5): report(folder)

@pytest.mark.slow('two processes make ten reports')
def test_two_at_once(folder):
    both = [forked(report_often, folder) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both]==[0,0]
    assert headings((folder/'report.html').read_text())[-2:]==['a','b']
    assert not [*folder.rglob('*.part'), *folder.rglob('.try*')]

@pytest.mark.parametrize('path,out,words', [('nowhere',None,"path='"), ('empty',None,'nothing to report'),
    ('r','r/x.json','ends in .html'), ('r','r/run.json/x.html','cannot write there')])
def test_bad_arguments(path, out, words, tmp_path, capsys):
    results(tmp_path/'r')
    (tmp_path/'empty'/'.hidden').mkdir(parents=True)
    save_json(tmp_path/'empty'/'.hidden'/'run.json', {})
    with pytest.raises(ValueError, match=words): report(tmp_path/path, out and tmp_path/out)
    assert main(['report', str(tmp_path/path), *(['--out',str(tmp_path/out)] if out else [])])==2
    err = capsys.readouterr().err
    assert err.count('\n')==1 and words in err

def test_command(tmp_path, capsys):
    out = tmp_path/'new'/'page.html'
    assert main(['report', str(results(tmp_path/'r')), '--out', str(out)])==0
    assert capsys.readouterr().out.strip()==str(out) and out.read_text().startswith('<!doctype html>')

@pytest.mark.parametrize('scheme', ['light','dark'])
@pytest.mark.parametrize('width', [390,1280])
def test_in_a_browser(folder, browser, width, scheme):
    url = report(folder).as_uri()
    with Page(browser, url, width, scheme=scheme) as p:
        p.js("document.querySelectorAll('details').forEach(o => o.open = true)")
        assert p.overflow()<=0 and p.page.title()=='all <i>of it'
        images = p.images()
        assert len(images)==5 and all(o['width']>0 and o['alt'] for o in images)
        assert p.page.locator('script').count()==0 and script in p.page.locator('.claims').first.inner_text()
        assert script in p.page.inner_text('body')
        shade = sum(map(int, re.findall(r'\d+', p.js('getComputedStyle(document.body).backgroundColor'))))
        assert shade<150 if scheme=='dark' else shade>700
        assert len(p.contrasts())>100 and not [o for o in p.contrasts() if o['ratio']<4.5]
        assert not p.errors and not [o for o in p.requests if o!=url and not o.startswith('data:')]
        for a in p.page.locator('nav a').all(): assert p.page.locator(a.get_attribute('href')).count()==1

def test_prints_what_is_folded(folder, browser):
    with Page(browser, report(folder/'fig2').as_uri()) as p:
        p.page.emulate_media(media='print')
        assert p.js("[...document.querySelectorAll('details')].every(o => o.lastElementChild.getBoundingClientRect().height>20)")

def counted(seeds, finished, seed): return dict(clean=seeds+finished+seed)

def test_a_sweep_over_names_of_its_own_numbers(tmp_path):
    sweep(counted, dict(seeds=[10,20], finished=[0,.5]), seeds=2, store=tmp_path/'s', n_jobs=1, progress=False)
    html = report(tmp_path/'s').read_text()
    assert 'cannot be shown' not in html and '8 of 8 points' in html
    for cell in ('10.5 (10.0 to 11.0)', '21.0 (20.5 to 21.5)'): assert cell in html, cell
