"The how-to pages, done as their readers do: files of a package of their own, installed beside this one, and found by name."
import ast, builtins, os, re, subprocess, sys
from importlib import import_module
import pandas as pd, pytest
from conftest import root
from feature_erosion import cli
from fastcore.nbio import read_nb

def files(page):
    "The files that a page shows: cells and blocks that begin with a comment with a file's name"
    cells = read_nb(root/f'nbs/howto/{page}.ipynb').cells
    texts = [c.source for c in cells if c.cell_type=='code']
    texts += [t for c in cells if c.cell_type=='markdown' for t in re.findall(r'^```\w*\n(.*?)^```', c.source, re.M|re.S)]
    return {m[1]:t for t in texts if (m := re.match(r'# ([\w.]+\.(?:py|toml))\n', t))}

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "Where the packages of two pages are installed; the recipe's networks train for an epoch, with one seed"
    tmp = tmp_path_factory.mktemp('packages')
    for page in 'pattern','recipe':
        (tmp/page).mkdir()
        for name,text in files(page).items():
            if name=='sizes.py':
                for a,b in ('lengths=(8,8,0)','lengths=(1,1,0)'),('seeds=2','seeds=1'):
                    assert text.count(a)==1
                    text = text.replace(a, b)
            (tmp/page/name).write_text(text)
    pip = sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--no-index'
    subprocess.run([*pip, '--target', tmp/'site', tmp/'pattern', tmp/'recipe'], check=True)
    return tmp/'site'

def run(cwd, *args, site=root):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(site), str(root)]))
    r = subprocess.run([sys.executable, *args], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not r.returncode, r.stdout
    return r.stdout

@pytest.mark.parametrize('page', ['pattern','measure','recipe'])
def test_at_most_two_files(page): assert 1<=len(files(page))<=2

@pytest.mark.slow('trains a network in a process of its own')
def test_pattern(installed, tmp_path, monkeypatch, capsys):
    small = '--data', 'digits', '--n', '64', '--n-valid', '60', '--arch', 'resnet20', '--width', '.25', '--iters', '2'
    run(tmp_path, '-m', 'feature_erosion.cli', 'run', 'fig1', *small, '--pattern', 'disc', '--size', '8', '--out', 'out',
        site=installed)
    assert list(pd.read_csv(tmp_path/'out/tables/history.csv').phase.unique())==['pretrain','erode','relearn']
    monkeypatch.syspath_prepend(installed)
    try: code = cli.main(['run','fig1','--pattern','disk'])
    except SystemExit as e: code = e.code
    said = capsys.readouterr().err
    assert code==2 and "'disk'" in said and 'disc' in said

@pytest.mark.slow('trains networks in a process of its own')
def test_recipe(installed, tmp_path):
    said = run(tmp_path, '-m', 'feature_erosion.cli', 'paper', 'sizes', '--preset', 'smoke', '--jobs', '1', site=installed)
    assert 'A square of 8 pixels' in said
    assert sorted(pd.read_csv(tmp_path/'runs/paper-smoke/sizes/tables/erosion.csv')['size'].unique())==[2,4,8]

@pytest.mark.slow('a process that imports everything')
def test_measure(tmp_path):
    (tmp_path/'zeros.py').write_text(files('measure')['zeros.py'])
    code = ("import torch; from torch import nn; from zeros import layer_zeros; m = nn.Sequential(nn.Flatten(), nn.ReLU());"
            "x = torch.tensor([[-1.,2.,3.,-4.]]*3); print(layer_zeros(m, [(x,torch.zeros(3))]).zeros.item())")
    assert run(tmp_path, '-W', 'ignore', '-c', code, site=tmp_path).strip().endswith('0.5')

def shown_code(nb):
    "The code that a page shows, cell by cell; blocks of Python in its text included"
    for c in nb.cells:
        if c.cell_type=='markdown': yield from re.findall(r'```python\n(.*?)```', c.source, re.S)
        elif c.cell_type=='code' and not re.search(r'#\|\s*(hide|echo: false)\b', c.source): yield c.source

def unknown(blocks):
    "Names that are used but neither defined nor imported, by code in the order of `blocks`"
    known,used = {*dir(builtins)},set()
    for o in (o for b in blocks for o in ast.walk(ast.parse(b))):
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)): known.add(o.name)
        elif isinstance(o, ast.arg): known.add(o.arg)
        elif isinstance(o, ast.ExceptHandler): known.add(o.name)
        elif isinstance(o, ast.Name): (used if isinstance(o.ctx, ast.Load) else known).add(o.id)
        elif isinstance(o, (ast.Import,ast.ImportFrom)):
            names = [a.asname or a.name.partition('.')[0] for a in o.names]
            known |= {*getattr(m := import_module(o.module), '__all__', vars(m))} if names==['*'] else {*names}
    return used-known

of_others = {'index.ipynb': {'old_dls'}, 'howdoi.ipynb': {'Client','SLURMCluster','joblib','mlflow','wandb'},
             'faq.ipynb': {'default_device'}}

@pytest.mark.parametrize('page', ['index','concept','howdoi','faq','gallery','tutorials/*','howto/*'])
def test_code_can_be_copied(page):
    "Every name that a page for users uses is defined or imported where one sees it"
    for f in (root/'nbs').glob(f'{page}.ipynb'):
        name = f.relative_to(root/'nbs').as_posix()
        assert (name,unknown(shown_code(read_nb(f))))==(name,of_others.get(name, set()))
    assert unknown(['from pathlib import Path\nx = Path(y)', 'def f(a): return a+b'])=={'y','b'}
