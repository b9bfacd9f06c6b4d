"Every notebook runs, in the order of their names. Front matter `requires: [cifar10]` skips one where those data are missing."
import signal
import pytest
from conftest import require, root
from fastcore.nbio import nb_frontmatter, read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

nbs = nbglob(root/'nbs', as_path=True).sorted()

def required(nb):
    "The names in `requires:` of the front matter of notebook `nb`"
    res = nb_frontmatter(read_nb(nb)).get('requires') or []
    return res.split() if isinstance(res, str) else res

@pytest.fixture(autouse=True)
def keep_ctrl_c():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # run_nb replaces it

@pytest.mark.parametrize('nb', nbs, ids=[f.relative_to(root/'nbs').as_posix() for f in nbs])
def test_notebook(nb):
    require(*required(nb))
    ok,_ = run_nb(nb, skip_flags=get_config(root).tst_flags.split(), basepath=root)
    assert ok, f'{nb.name}: see the traceback on stderr'
