"""Run notebooks as `nbdev-test` does, each in a process of its own, forked from one that has imported all libraries.

python nbs/_tools/run_notebooks.py                                all of them, two at a time
python nbs/_tools/run_notebooks.py --save nbs/tutorials/*.ipynb   these, and keep their outputs"""
import multiprocessing as mp, os, sys, tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from time import perf_counter
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parents[2]
# Not this package: a notebook that uses what a later one adds, or what its own later cells add, is to fail
imports = ['fastai.vision.all', 'nbdev.test', 'IPython.display', 'matplotlib_inline.backend_inline',
           'captum.attr', 'timm', 'efficientnet_lite_pytorch', 'sklearn.linear_model', 'sklearn.pipeline', 'joblib', 'hypothesis']

@contextmanager
def _quiet(warnings='ignore:`torch.jit'):
    "Processes that start here do not pass on what importing torch's friends warns of"
    before = os.environ.get('PYTHONWARNINGS')
    os.environ['PYTHONWARNINGS'] = ','.join(filter(None, [before, warnings]))
    try: yield
    finally: os.environ.pop('PYTHONWARNINGS') if before is None else os.environ.update(PYTHONWARNINGS=before)

def forked(f, *args):
    "A process, not yet started, that calls `f` with all libraries imported; what it patches ends with it"
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(imports)
    with _quiet(): forkserver.ensure_running()
    return ctx.Process(target=_alone, args=(f, args))

def _alone(f, args):
    mp.set_start_method('fork', force=True)   # of loaders' workers: else each imports everything again
    try: f(*args)
    finally:
        # joblib's workers stay for what may come, and this process would wait for them
        for p in mp.active_children():
            p.terminate()

def _run(nb, log, save):
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for o in (1,2): os.dup2(fd, o)
    from nbdev.test import nbdev_test
    nbdev_test(str(nb), n_workers=0, save=save)

def run_notebook(nb, save=False):
    "Whether notebook `nb` ran to its end, and what it said; with `save` its outputs are kept"
    with tempfile.TemporaryDirectory() as tmp:
        p = forked(_run, Path(nb).absolute(), log := Path(tmp)/'log', save)
        p.start(), p.join()
        said = log.read_text() if log.exists() else ''
    return p.exitcode==0 and 'Success' in said, said

def main(nbs, save=False, jobs=2):
    "Run notebooks `nbs`, `jobs` at a time; whether all ran to their end"
    def one(nb):
        start = perf_counter()
        fine,said = run_notebook(nb, save)
        print(f"{'' if fine else said}{'ran' if fine else 'FAILED'} {perf_counter()-start:6.1f} s  {nb}", flush=True)
        return fine
    with ThreadPoolExecutor(jobs) as pool: return all(pool.map(one, nbs))

if __name__=='__main__':
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument('nbs', nargs='*', help='notebooks; by default all', metavar='NOTEBOOK')
    p.add_argument('--save', action='store_true', help='keep their outputs')
    p.add_argument('--jobs', type=int, default=2, help='how many at a time')
    args = p.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.exit(not main(args.nbs or nbglob(root/'nbs', as_path=True).sorted(), args.save, args.jobs))
