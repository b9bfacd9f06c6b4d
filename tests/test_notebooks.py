"Every notebook runs, each in a process of its own: what it patches into fastai ends with it. Front matter `requires: [cifar10]` skips one where those data are missing."
import pytest
from conftest import require, root, slow
from fastcore.nbio import nb_frontmatter, read_nb
from nbdev.doclinks import nbglob
from run import run_notebook

nbs = nbglob(root/'nbs', as_path=True).sorted()

def listed(nb, key):
    "The words under `key` in the front matter of notebook `nb`"
    res = nb_frontmatter(read_nb(nb)).get(key) or []
    return res.split() if isinstance(res, str) else res

@pytest.mark.parametrize('nb', [pytest.param(f, id=f.relative_to(root/'nbs').as_posix(), marks=[pytest.mark.slow]*bool(listed(f, 'slow'))) for f in nbs])
def test_notebook(nb):
    require(*listed(nb, 'requires'))
    fine,said = run_notebook(nb)
    assert fine, said

def test_a_notebook_that_fails_is_told(tmp_path): ...
