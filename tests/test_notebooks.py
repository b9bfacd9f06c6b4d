"Every notebook runs, each in a process of its own: what it patches into fastai ends with it. Front matter `requires: [cifar10]` skips one where those data are missing."
import pytest
from conftest import require, root
from fastcore.nbio import mk_cell, nb_frontmatter, new_nb, read_nb, write_nb
from nbdev.doclinks import nbglob
from run_notebooks import run_notebook

nbs = nbglob(root/'nbs', as_path=True).sorted()

slow = {'tutorials/collapse.ipynb': 'two trainings on CIFAR-10',   # the longest first
        'tutorials/hidden.ipynb': 'two trainings of ResNet-20, and four networks through `recover`',
        'tutorials/inside.ipynb': 'CIFAR-10 through five measures; each has a notebook of its own',
        'tutorials/your_own.ipynb': 'trains on image files, one by one',
        'tutorials/finetune.ipynb': 'a training on CIFAR-10 and two searches',
        'tutorials/cluster.ipynb': 'workers of joblib and dask that import everything',
        'measures/03_probes.ipynb': 'some fifty probes to their optimum, and a thousand epochs; tests/test_probes.py has the same functions',
        '15_mitigations.ipynb': 'many trainings; tests/test_mitigations.py has the same functions',
        'paper/00_nets.ipynb': 'trains and stores networks, as tests/test_paper.py does',
        'runs/04_sweep.ipynb': 'workers that import everything; tests/test_sweep.py has the same functions',
        '17_unlearning.ipynb': 'many trainings; tests/test_unlearning.py has the same functions',
        'tutorials/own_model.ipynb': 'the models of tests/test_layers_of_models.py and test_models.py',
        '18_watch.ipynb': 'many trainings; tests/test_watch.py has the same functions',
        '16_recover.ipynb': 'many trainings; tests/test_recover.py has the same functions',
        '19_shortcut.ipynb': 'many searches; tests/test_shortcut.py has the same functions',
        'gallery.ipynb': 'every plot once; each is made in the notebook of its own',
        'tutorials/resist.ipynb': 'twenty trainings',
        'measures/05_plasticity.ipynb': 'many trainings; tests/test_plasticity.py has the same functions',
        'howdoi.ipynb': 'a training for almost every answer; each has a notebook of its own',
        'measures/04_attribution.ipynb': 'many trainings; tests/test_attribution.py has the same functions',
        'howto/recipe.ipynb': 'nine trainings, as test_recipe in tests/test_howto.py',
        'paper/02_figures.ipynb': 'trains what tests/test_paper.py trains for all figures',
        'paper/04_questions.ipynb': 'the recipe of tests/test_questions.py, with pictures',
        'measures/06_inside.ipynb': 'four measures of two networks, together and alone; each has a notebook of its own',
        'tutorials/start.ipynb': 'what the home page and the notebook on Learners train',
        'concept.ipynb': 'no code of its own; what it shows, the home page trains as well'}

def required(nb):
    "The names in `requires:` of the front matter of notebook `nb`"
    res = nb_frontmatter(read_nb(nb)).get('requires') or []
    return res.split() if isinstance(res, str) else res

def name(nb): return nb.relative_to(root/'nbs').as_posix()

def case(nb): return pytest.param(nb, id=name(nb), marks=[pytest.mark.slow(slow[name(nb)])] if name(nb) in slow else [])

@pytest.mark.parametrize('nb', [case(o) for o in sorted(nbs, key=lambda o: [*slow, name(o)].index(name(o)))])
def test_notebook(nb):
    require(*required(nb))
    fine,said = run_notebook(nb)
    assert fine, said

def test_each_slow_notebook_is_there(): assert {*slow}<={*map(name, nbs)}

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
        "assert not hasattr(Learner, 'left_behind') and torch.get_num_threads()==int(os.environ['OMP_NUM_THREADS'])\nLearner.left_behind = 1"]
    for name in ('one','two'):
        fine,said = ran(tmp_path/f'{name}.ipynb', *cells)
        assert fine, said

def test_a_notebook_has_only_what_it_imports(tmp_path):
    "Methods that a module adds to a class are not there before it is imported"
    cells = 'from fastai.learner import Learner\nassert not hasattr(Learner, "recover")', 'from feature_erosion.recover import *\nassert hasattr(Learner, "recover")'
    fine,said = ran(tmp_path/'one.ipynb', *cells)
    assert fine, said
