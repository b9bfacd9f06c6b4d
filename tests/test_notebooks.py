"Every notebook runs, each in a process of its own: what it patches into fastai ends with it. Front matter `requires: [cifar10]` skips one where those data are missing."
import pytest
from conftest import require, root
from fastcore.nbio import mk_cell, nb_frontmatter, new_nb, read_nb, write_nb
from nbdev.doclinks import nbglob
from run import run_notebook

nbs = nbglob(root/'nbs', as_path=True).sorted()

def listed(nb, key):
    "The words under `key` in the front matter of notebook `nb`"
    res = nb_frontmatter(read_nb(nb)).get(key) or []
    return res.split() if isinstance(res, str) else res

def case(nb):
    why = nb_frontmatter(read_nb(nb)).get('slow')
    return pytest.param(nb, id=nb.relative_to(root/'nbs').as_posix(), marks=[pytest.mark.slow(why)] if why else [])

@pytest.mark.parametrize('nb', [*map(case, nbs)])
def test_notebook(nb):
    require(*listed(nb, 'requires'))
    fine,said = run_notebook(nb)
    assert fine, said

def ran(path, *cells):
    write_nb(new_nb(list(map(mk_cell, cells))), path)
    return run_notebook(path)

def test_a_notebook_that_fails(tmp_path):
    fine,said = ran(tmp_path/'bad.ipynb', '#| eval: false\n1/0', 'a = 2', 'assert a==3, "a is two"')
    assert not fine and 'AssertionError: a is two' in said and 'ZeroDivisionError' not in said

def test_a_notebook_leaves_nothing_behind(tmp_path):
    "Everything is imported already, in one thread; what one notebook patches the next does not see"
    cells = ["import os, sys\nassert 'fastai.learner' in sys.modules and os.environ['IN_TEST']",
        'from fastai.learner import Learner\nimport torch',
        "assert not hasattr(Learner, 'left_behind') and torch.get_num_threads()==1\nLearner.left_behind = 1"]
    for name in ('one','two'):
        fine,said = ran(tmp_path/f'{name}.ipynb', *cells)
        assert fine, said
