"What the tests share: the checkout, copies of it, and which data are on this machine."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]

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

@pytest.fixture(scope='session')
def cifar10(): return require('cifar10')[0]

@pytest.fixture(scope='session')
def tiny_imagenet(): return require('tiny_imagenet_20')[0]

@pytest.fixture(scope='session')
def resnet20(): return require('resnet20')[0]

def python(*args, cwd=root):
    "Run Python with `args` in `cwd`, where its `feature_erosion` is the one of `cwd`; what it printed"
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'} | dict(PYTHONPATH=os.pathsep.join([str(cwd), os.environ.get('PYTHONPATH', '')]))
    r = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not r.returncode, r.stdout
    return r.stdout

@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout, without what is built in it"
    junk = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'runs', 'models', 'build', 'dist', '*.egg-info', '__pycache__', '.*_cache')
    return shutil.copytree(root, tmp_path/'a copy', symlinks=True, ignore=junk)
