"Every notebook runs, each in a process of its own: what it patches into fastai ends with it. Front matter `requires: [cifar10]` skips one where those data are missing."
import os, subprocess, sys
from pathlib import Path
import pytest
from conftest import require, root
from fastcore.nbio import nb_frontmatter, read_nb
from nbdev.doclinks import nbglob

nbs = nbglob(root/'nbs', as_path=True).sorted()

def required(nb):
    "The names in `requires:` of the front matter of notebook `nb`"
    res = nb_frontmatter(read_nb(nb)).get('requires') or []
    return res.split() if isinstance(res, str) else res

@pytest.mark.parametrize('nb', nbs, ids=[f.relative_to(root/'nbs').as_posix() for f in nbs])
def test_notebook(nb):
    require(*required(nb))
    r = subprocess.run([Path(sys.executable).with_name('nbdev-test'), nb, '--n-workers', '0'], cwd=root, env={**os.environ, 'PYTHONWARNINGS':'ignore:`torch.jit'}, capture_output=True, text=True)
    assert r.returncode==0 and 'Success' in r.stdout, r.stdout+r.stderr
