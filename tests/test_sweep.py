"Sweeps on loky, dask and ray, with workers that die."
import enum, hashlib, importlib, logging, multiprocessing, os, re, signal, sys, time, tracemalloc, types, warnings
from collections import OrderedDict, defaultdict, namedtuple
from functools import cached_property, partial, update_wrapper, wraps
from pathlib import Path
import fastai.vision.all as fv, joblib, numpy as np, pandas as pd, pytest
from fastai.vision.all import L, TensorImage, nn, plt, torch
from torch.nn import Linear
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.context import set_start_method
from joblib.externals.loky.process_executor import TerminatedWorkerError
from fastprogress import fastprogress
from conftest import root
from feature_erosion.runs import keys
from feature_erosion.runs.keys import Untold, _file, _is_installed, differences, key_of, recipe
from feature_erosion.runs.store import RunStore
from feature_erosion.runs.sweep import Sweep, _caller, _other_code, sweep

def point(a, seed, run):
    "Dies the first time at a=2; writes down at which attempt it came to its end"
    if a==2 and not (mark := run.path/'died').exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.2)
    with open(run.path.parent/'log.txt', 'a') as f: f.write(f'{a},{seed} {run.info["tries"]}\n')
    return dict(y=10*a+seed, random=float(torch.rand(1)), threads=torch.get_num_threads())

def always_dies(a, seed):
    if a==1: os.kill(os.getpid(), signal.SIGKILL)
    return dict(y=a)

def beside_a_killer(a, seed, run):
    "a=1 kills its worker while a=0 is at work beside it; a=0 comes to its end at the third attempt, if it lives"
    other = next(o for o in run.store if o.settings['a']==0)
    if a==0: time.sleep(1 if run.info['tries']>2 else 60)
    while other.info['tries']<run.info['tries']: time.sleep(.01)
    if a==1: os.kill(os.getpid(), signal.SIGKILL)
    return dict(y=a)

class DiesOnArrival:
    def __init__(self): self.home = os.getpid()
    def __setstate__(self, state): os._exit(1)
    def __call__(self, a, seed): return dict(y=a)

def check(df, folder):
    assert df.status.tolist()==['finished']*6 and df.y.tolist()==[10,11,20,21,30,31]
    done = (folder/'log.txt').read_text().splitlines()   # a neighbour of the dead may have been cut off before its result was kept
    assert len(done)==len(set(done)) and {o.split()[0] for o in done}=={f'{a},{s}' for a in (1,2,3) for s in (0,1)}
    assert df.random.iloc[0]==df.random.iloc[2]!=df.random.iloc[1]   # seeded
    again = sweep(point, dict(a=[1,2,3]), seeds=2, store=folder, n_jobs=1, progress=False)
    assert again.y.tolist()==df.y.tolist() and (folder/'log.txt').read_text().splitlines()==done   # loaded, not computed

@pytest.mark.slow('workers that import everything, several times')
def test_loky_loses_a_worker(tmp_path):
    with pytest.warns(UserWarning, match='a worker was lost'):
        df = sweep(point, dict(a=[1,2,3]), seeds=2, store=tmp_path, n_jobs=2, progress=False)
    check(df, tmp_path)
    assert (df.threads==max(1, min(torch.get_num_threads(), joblib.cpu_count()//2))).all()

@pytest.fixture
def forked():
    "Workers that begin sooner: forked from a process that has imported all libraries, but not this package"
    multiprocessing.set_forkserver_preload(['fastai.vision.all'])
    get_reusable_executor().shutdown(wait=True)
    set_start_method('forkserver', force=True)
    yield
    get_reusable_executor().shutdown(wait=True)
    set_start_method('loky', force=True)

@pytest.fixture
def lesson(tmp_path, monkeypatch):
    "A module of the user's, and a function that goes by it"
    name,old = f'lesson{os.getpid()}',os.environ.get('PYTHONPATH', '')
    f = tmp_path/f'{name}.py'
    f.write_text('C = 1\ndef f(x): return x*C\n')
    monkeypatch.syspath_prepend(tmp_path)
    for k,v in dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{old}', PYTHONDONTWRITEBYTECODE='1').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    yield f,importlib.import_module(name)
    get_reusable_executor().shutdown(wait=True)   # workers with this path
    del sys.modules[name]

def by_lesson(module):
    "A function that workers get by value, and its module by name"
    def fn(a, seed): return dict(y=module.f(a))
    return fn

@pytest.mark.slow('new workers, three times')
def test_workers_have_the_code_of_this_process(forked, lesson, tmp_path, monkeypatch):
    """Workers of an earlier sweep have imported a module that was reloaded since: new ones start. A constant that was set by hand is in no file: an error.
    A relative store is found wherever the workers of an earlier sweep were started"""
    f,m = lesson
    def go(store): return sweep(by_lesson(m), dict(a=[1,2]), store=store, n_jobs=2, progress=False).y.tolist()
    assert go(tmp_path/'runs')==[1,2]
    f.write_text('C = 100\ndef f(x): return x*C+5\n')
    importlib.reload(m)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match='2 of 2 points are computed again'): assert go('runs')==[105,205]
    m.C = 7
    with pytest.raises(ValueError, match=r'a worker has other code than this process: .*\.C: was 7, is 100.*pass values'):
        go('other')
    assert [r.status for r in RunStore('other')]==['new']*2

def reads(seed): return dict(y=float(Path('data.txt').read_text()), third=float(torch.tensor(1/3)))

def test_workers_are_in_the_folder_of_this_process(tmp_path, monkeypatch):
    "Those of an earlier sweep may have begun in another, with another default dtype; afterwards both are as before"
    (here := tmp_path/'here').mkdir()
    for d,v in ((tmp_path,'1'), (here,'2')): (d/'data.txt').write_text(v)
    run, = RunStore(tmp_path/'runs').recipe_runs(reads, [dict(seed=0)])
    monkeypatch.chdir(here)
    torch.set_default_dtype(torch.float64)
    try: call = _caller(reads, None, 3)
    finally: torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'getpid', lambda: -1)   # as in a worker
    assert call(0, dict(seed=0), run.path)==(0, dict(status='finished', y=2., third=1/3))
    assert Path.cwd()==tmp_path and torch.get_default_dtype()==torch.float32

def shows(seed):
    print('said')
    return dict(y=sum(fastprogress.progress_bar(range(3))))

def test_workers_show_no_bars(tmp_path, monkeypatch, capsys):
    "They would overwrite one another, and that of the sweep; what the function prints is shown"
    run, = RunStore(tmp_path).recipe_runs(shows, [dict(seed=0)])
    call = _caller(shows, None, 3)
    monkeypatch.setattr(os, 'getpid', lambda: -1)   # as in a worker
    assert call(0, dict(seed=0), run.path)==(0, dict(status='finished', y=3)) and capsys.readouterr().out=='said\n'

def goes(seed, to):
    os.chdir(to)
    return dict(y=1)

def test_a_function_that_goes_to_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunStore('runs').once(goes, seed=0, to='/').metrics==dict(y=1)
    assert RunStore(tmp_path/'runs').runs().status.tolist()==['finished']

def test_a_file_larger_than_memory(tmp_path):
    "It is read in parts: a data set in one file may have a hundred gigabytes"
    (tmp_path/'data').write_bytes(big := bytes(range(256))*2**16)
    tracemalloc.start()
    try: told,(_,most) = _file(tmp_path/'data'),tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert told==hashlib.sha256(big).hexdigest()[:16] and most<len(big)/4

def test_a_store_among_the_files_is_refused(tmp_path):
    "Each run would change them"
    (tmp_path/'data.txt').write_text('1')
    with pytest.raises(ValueError, match='files=.*lies in this folder.*a folder outside'):
        RunStore(tmp_path/'runs').once(reads, files=[tmp_path/'data.txt', tmp_path], seed=0)
    assert not (tmp_path/'runs').exists()

@pytest.mark.parametrize('fn', [lambda seed, a: 1/0, lambda seed, a: None, lambda seed, a: dict(name='x')])
@pytest.mark.filterwarnings('ignore:2 of 2 points failed')
def test_a_summary_of_nothing(tmp_path, fn):
    with pytest.raises(ValueError, match='nothing to summarise: no point is finished, or none has numbers'):
        sweep(fn, dict(a=[1,2]), store=tmp_path, n_jobs=1, progress=False).summary()

def test_other_code_of_the_same_function():
    "Only what both have told counts, and not the text of a file"
    was = dict(code='a', uses={'m':dict(source='1', uses={'C':1, 'f':'as f'}), 'gone':2})
    assert _other_code(was, dict(code='a', uses={'m':dict(source='2', uses={'C':1, 'f':dict(code='b')})}))==[]
    assert _other_code(was, dict(code='a', uses={'m':dict(source='1', uses={'C':3})}))==['uses.m.uses.C: was 1, is 3']

def test_names_of_the_result_are_no_settings(tmp_path):
    for k in ('status','error'):
        with pytest.raises(ValueError, match=f"grid: '{k}' is a column of the result"):
            sweep(lambda seed, **kw: dict(y=1.), {k:[1,2]}, store=tmp_path, n_jobs=1, progress=False)

def logged(rows, seed, **kw):
    learn = fv.Learner(None, nn.Linear(1, 1), loss_func=nn.MSELoss())
    learn.recorder = types.SimpleNamespace(evals=pd.DataFrame(rows), history=pd.DataFrame([dict(phase='a', iters=7, y=.5)]))
    return learn

@pytest.mark.parametrize('grid,want', [
    (dict(rows=[[dict(clean=.5, pattern=.75)]], pattern=['square']), dict(clean=.5, pattern='square', pattern_measured=.75)),
    (dict(rows=[[]], iters=[9], phase=['b']), dict(iters=9, iters_measured=7, phase_measured='a', y=.5))])
def test_columns_of_a_learner_called_like_settings(tmp_path, grid, want):
    "A point is not lost when it is finished: its columns get another name"
    df = sweep(logged, grid, store=tmp_path, n_jobs=1, progress=False)
    assert df.status.tolist()==['finished'] and df.iloc[0][list(want)].to_dict()==want

def test_values_that_are_no_settings(tmp_path):
    "What the message offers is what a grid takes"
    for bad in (object(), torch.zeros(2)):
        with pytest.raises(ValueError, match='give .*number.* or .*dict') as e:
            sweep(lambda seed, **kw: dict(y=1.), dict(a=[bad,2]), store=tmp_path, n_jobs=1, progress=False)
        assert 'want' not in str(e.value)

def test_none_among_numbers_is_drawn(tmp_path):
    "As a place of its own, since it has none on a scale"
    df = sweep(lambda seed, wd: dict(acc=.5 if wd is None else wd), dict(wd=[None,.1,.2]), seeds=2, store=tmp_path, n_jobs=1,
               progress=False)
    means,dots = df.plot_means('wd', 'acc').lines[:2]
    assert list(means.get_xdata())==['None','0.1','0.2'] and list(means.get_ydata())==[.5,.1,.2] and len(dots.get_xdata())==6

@pytest.mark.slow('new workers, twice')
def test_a_point_that_always_dies(forked, tmp_path):
    with pytest.warns(UserWarning) as w:
        df = sweep(always_dies, dict(a=[0,1,2]), store=tmp_path, n_jobs=2, attempts=2, progress=False)
    assert df.status.tolist()==['finished','failed','finished'] and 'its worker died 2 times' in df.error[1]
    assert any('1 of 3 points failed' in str(o.message) for o in w)

@pytest.mark.slow('six workers, one after the other')
def test_a_neighbour_is_not_blamed(forked, tmp_path):
    with pytest.warns(UserWarning): df = sweep(beside_a_killer, dict(a=[0,1]), store=tmp_path, n_jobs=2, progress=False)
    assert df.status.tolist()==['finished','failed'] and 'its worker died 3 times' in df.error[1]

@pytest.mark.slow('new workers, twice')
def test_workers_that_cannot_begin(forked, tmp_path):
    "No point is ever begun: an error, not one attempt after the other for ever"
    with pytest.warns(UserWarning, match='a worker was lost') as w, pytest.raises(TerminatedWorkerError):
        sweep(DiesOnArrival(), dict(a=[0,1]), store=tmp_path, n_jobs=2, attempts=2, progress=False)
    assert sum('a worker was lost' in str(o.message) for o in w)==1

@pytest.mark.slow('a cluster of workers that import everything')
def test_dask_loses_a_worker(tmp_path):
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=None) as cluster, distributed.Client(cluster):
        with joblib.parallel_config('dask'): df = sweep(point, dict(a=[1,2,3]), seeds=2, store=tmp_path, progress=False)
    check(df, tmp_path)

def test_ray_loses_a_worker(tmp_path):
    ray = pytest.importorskip('ray')
    from ray.util.joblib import register_ray
    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
             runtime_env=dict(env_vars={'PYTHONPATH':os.pathsep.join(map(str, (root/'tests', root)))}))
    try:
        with joblib.parallel_config('ray'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            df = sweep(point, dict(a=[1,2,3]), seeds=2, store=tmp_path, n_jobs=2, progress=False)
    finally: ray.shutdown()
    check(df, tmp_path)

def quit(a, seed): sys.exit(3) if a==1 else None
def array(a, seed): return dict(acc=np.zeros(3))
def tensor(a, seed): return dict(acc=torch.tensor(.5*a))
def taken(a, seed): return dict(status=a)
def grid_name(a, seed): return dict(a=a)

@pytest.mark.parametrize('fn,says',
                         [(quit,r'called sys.exit\(3\)'), (array,r'acc of shape \(3,\): want one number'),
                          (taken,'status: these names are taken'), (grid_name,'a: these names are taken')])
def test_a_point_that_returns_what_is_no_number(tmp_path, fn, says):
    "One failed point with a clear error, and the sweep goes on"
    with pytest.warns(UserWarning, match=says): df = sweep(fn, dict(a=[1]), store=tmp_path, n_jobs=1, progress=False)
    assert df.status.tolist()==['failed']

def test_a_tensor_of_one_number(tmp_path):
    assert sweep(tensor, dict(a=[1,2]), store=tmp_path, n_jobs=1, progress=False).acc.tolist()==[.5,1.]

offset = 0
def plus(a, b, seed): return dict(y=a+b+offset)

def test_old_numbers_are_not_taken_for_new_ones(tmp_path, monkeypatch):
    "Another argument of a partial, another global, another body, another lambda"
    run = lambda fn: sweep(fn, dict(a=[1,2]), store=tmp_path, n_jobs=1, progress=False).y.tolist()
    assert run(partial(plus, b=2))==run(partial(plus, b=2))==[3,4]
    with pytest.warns(UserWarning, match='2 of 2 points are computed again: function.keywords.b: was 2, is 3'):
        assert run(partial(plus, b=3))==[4,5]
    monkeypatch.setattr(sys.modules[__name__], 'offset', 10)
    with pytest.warns(UserWarning, match='computed again: function.partial.uses.offset: was 0, is 10'):
        assert run(partial(plus, b=2))==[13,14]
    one,two = (lambda a, seed: dict(y=a*2)),(lambda a, seed: dict(y=a*3))
    assert run(one)==[2,4]
    with pytest.warns(UserWarning, match='computed again'): assert run(two)==[3,6]

def test_a_module_in_a_package_is_part_of_a_function(tmp_path, monkeypatch):
    "`import package.part`, then `package.part.f()`; modules may import each other"
    package = tmp_path/'a_package_of_mine'
    package.mkdir()
    (package/'__init__.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    def written(number):
        (package/'part.py').write_text(f'import a_package_of_mine\nfrom . import base\nnumber = {number}\ndef f(): return base.g()+number\n')
        (package/'base.py').write_text('from . import part\ndef g(): return 0*part.number\n')
        for k in [k for k in sys.modules if k.startswith('a_package_of_mine')]: del sys.modules[k]
        space = dict(__name__='__main__')
        exec('import a_package_of_mine.part\ndef point(seed): return dict(y=a_package_of_mine.part.f())', space)
        return sweep(space['point'], {}, store=tmp_path/'s', n_jobs=1, progress=False).y.tolist()
    assert written(1)==written(1)==[1] and len(RunStore(tmp_path/'s'))==1
    with pytest.warns(UserWarning, match='computed again'): assert written(222)==[222]

@pytest.mark.parametrize('how',
                         ['from .part import f', 'from . import part; f = part.f',
                          'from a_package_of_theirs import part; f = part.f',
                          'import a_package_of_theirs.part as part; f = part.f',
                                 'import a_package_of_theirs; f = a_package_of_theirs.f'])
@pytest.mark.parametrize('imported', [False, True])
def test_a_module_imported_inside_of_a_function(tmp_path, monkeypatch, how, imported):
    "Relatively, or for the first time when the function is called: what it uses counts, and what that uses in turn"
    package = tmp_path/'a_package_of_theirs'
    package.mkdir()
    (package/'part.py').write_text('from .base import g\ndef f(): return g()\n')
    monkeypatch.syspath_prepend(tmp_path)
    def written(number):
        (package/'__init__.py').write_text(f'def f():\n    from .part import f\n    return f()')
        (package/'base.py').write_text(f'def g(): return {number}\n')
        for k in [k for k in sys.modules if k.startswith('a_package_of_theirs')]: del sys.modules[k]
        importlib.invalidate_caches()
        if imported: importlib.import_module('a_package_of_theirs.part')
        space = dict(__name__='__main__', __package__='a_package_of_theirs')
        exec(f'def point(seed):\n    {how}\n    return dict(y=f())', space)
        return sweep(space['point'], {}, store=tmp_path/'s', n_jobs=1, progress=False).y.tolist()
    assert written(1)==written(1)==[1] and len(RunStore(tmp_path/'s'))==1
    with pytest.warns(UserWarning, match='computed again'): assert written(222)==[222]

def test_a_module_of_yours_with_a_name_of_the_standard_library(tmp_path, monkeypatch):
    "Python finds a script's own `sched.py` first"
    monkeypatch.syspath_prepend(tmp_path)
    def told(number):
        (tmp_path/'sched.py').write_text(f'def rate(): return {number}\n')
        monkeypatch.delitem(sys.modules, 'sched', raising=False)
        importlib.invalidate_caches()
        _is_installed.cache_clear()
        space = dict(__name__='__main__')
        exec('import sched\nfrom sched import rate\ndef a(seed): return dict(y=rate())\n'
             'def b(seed): return dict(y=sched.rate())\ndef c(seed):\n    import sched\n    return dict(y=sched.rate())', space)
        return [key_of(recipe(space[o])) for o in 'abc']
    try: assert told(1)==told(1) and all(x!=y for x,y in zip(told(1), told(222)))
    finally: _is_installed.cache_clear()

@pytest.mark.parametrize('how',
                         ['getattr(models_of_mine, "net")(seed)', 'vars(models_of_mine)["net"](seed)',
                          'pick(models_of_mine)(seed)', 'getattr(held[0], "net")(seed)'])
@pytest.mark.parametrize('head,name', [('','models_of_mine'), ('import models_of_mine as M','M'),
                                       ('from a_kit import models_of_mine as M','M'), ('import a_kit.models_of_mine as M','M'),
                                       ('import a_kit.models_of_mine','a_kit.models_of_mine')])
def test_a_function_found_by_its_name_in_a_module(tmp_path, monkeypatch, how, head, name):
    "What the module uses in turn is part of it: which function is meant is known only when it is called"
    (tmp_path/'a_kit').mkdir()
    for d in '.','a_kit': (tmp_path/d/'models_of_mine.py').write_text(
        'from fastai.vision.all import *\nimport blocks_of_mine as b\nloss = nn.CrossEntropyLoss()\n'
        'def net(seed): return b.block(seed)\n')
    monkeypatch.syspath_prepend(tmp_path)
    def told(number):
        (tmp_path/'blocks_of_mine.py').write_text(f'def block(seed): return dict(y={number})\n')
        for k in [k for k in sys.modules if '_of_mine' in k or 'a_kit' in k]: monkeypatch.delitem(sys.modules, k)
        importlib.invalidate_caches()
        space = dict(__name__='__main__')
        exec(f'import models_of_mine\nheld = [models_of_mine]\ndef pick(m): return getattr(m, "net")\n'
             f'def point(seed):\n    {head}\n    return {how.replace("models_of_mine", name)}', space)
        return recipe(space['point'])['function'],space['point'](0)
    one,same,other = told(1),told(1),told(222)
    assert one==same==(one[0],dict(y=1)) and other[1]==dict(y=222) and one[0]!=other[0]

@pytest.mark.parametrize('how', ['importlib.import_module(name)', 'import_module(name)', '__import__(name)', 'sys.modules[name]'])
def test_a_module_chosen_at_run_time_cannot_be_compared(how):
    space = dict(__name__='__main__', importlib=importlib, import_module=importlib.import_module, sys=sys)
    exec(f'def point(seed, name): return {how}.net(seed)', space)
    with pytest.raises(Untold, match=r'calls (import_module|__import__|sys\.modules), so what it'): recipe(space['point'])

def by_hand(seed): return dict(y=handmade.value)
def broken(seed):
    import a_module_that_fails
def absent(seed):
    try: import no_module_of_this_name
    except ImportError: return dict(y=1)
handmade = types.ModuleType('handmade')
handmade.value = 1

def test_a_module_that_cannot_be_compared(tmp_path, monkeypatch):
    "It is in no file, or fails; one that is not there is no fault"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'a_module_that_fails.py').write_text('1/0')
    with pytest.raises(Untold, match='handmade, whose code is in no file'): recipe(by_hand)
    with pytest.raises(Untold, match='a_module_that_fails, which cannot be imported here .ZeroDivisionError'): recipe(broken)
    assert recipe(absent)['function']['uses']['import no_module_of_this_name']['source'] is None

def kind_of(x, seed): return dict(y=['dict','list','tuple'].index(type(x).__name__))

def test_a_function_gets_what_is_stored(tmp_path):
    "The same key, the same argument: a tuple is a list; numbers as names in a dict would become text"
    run = lambda x: sweep(kind_of, dict(x=[x]), store=tmp_path, n_jobs=1, progress=False).y.tolist()
    assert run((1,2))==run([1,2])==[1] and RunStore(tmp_path/'b').once(kind_of, x=(1,(2,)), seed=0).metrics==dict(y=1)
    with pytest.raises(ValueError, match='x=.*names in a dict are text, 1 is not'): run({1:'a'})
    with pytest.raises(ValueError, match='x=.*names in a dict are text, None is not'):
        RunStore(tmp_path).once(kind_of, x=[{None:1}], seed=0)
    assert run({'1':'a'})==[0]

@pytest.mark.parametrize('grid,says',
                         [(dict(a=[1,True,2]),'grid: a must be lists of different values .1, 1.0 and True are equal'),
                          (dict(a=[0.,0]),'grid: a must be lists of different values'), (dict(a={1,2}),'grid: a must be lists'),
                                       (dict(a=(i for i in range(3))),'grid: a must be lists'),
                                       (dict(a=[root]),'grid: a: PosixPath cannot be kept'),
                                       ([('a',[1,2])],'grid=.*must be a dict of lists'),
                                       ({1:[1,2]},'grid=.*must be a dict of lists'),
                                       (dict(a=np.array(1)),'grid: a must be lists'), (dict(a=slice(3)),'grid: a must be lists'),
                                       (dict(a=np.eye(2)),'a=.*JSON can hold')])
def test_a_grid_that_is_refused_is_named(tmp_path, grid, says):
    with pytest.raises(ValueError, match=says): sweep(tensor, grid, store=tmp_path)

@pytest.mark.parametrize('seeds', [2., None, 'x', 0, [1.5], [-1], [2**32], [1,1], [[1]]])
def test_seeds_that_are_refused_are_named(tmp_path, seeds):
    with pytest.raises(ValueError, match='seeds=.*must be a number of seeds'):
        sweep(tensor, dict(a=[1]), seeds=seeds, store=tmp_path)

@pytest.mark.parametrize('seeds', [np.int64(2), np.arange(2), range(2), (0,1), [np.int32(0),1]])
def test_seeds_in_any_form(tmp_path, seeds):
    assert sweep(tensor, dict(a=[1]), seeds=seeds, store=tmp_path, n_jobs=1, progress=False).seed.tolist()==[0,1]

@pytest.mark.parametrize('seed', [1.5, 'x', None, -1, 2**32])
def test_a_seed_that_is_refused_is_named(tmp_path, seed):
    with pytest.raises(ValueError, match='seed=.*must be a whole number from 0 to'):
        RunStore(tmp_path).once(tensor, a=1, seed=seed)
    assert not list(tmp_path.iterdir())

def test_the_environment_is_no_setting(tmp_path):
    from os import getenv
    def f(seed): return dict(y=float(getenv('ANY_NAME') or 0))
    with pytest.warns(UserWarning, match='getenv reads the environment'): sweep(f, {}, store=tmp_path, n_jobs=1, progress=False)

def test_a_value_given_twice_is_refused(tmp_path):
    "Its runs would count twice in the mean and its interval"
    with pytest.raises(ValueError, match='grid: k must be lists of different values'):
        sweep(tensor, dict(k=[int(o) for o in np.linspace(1, 3, 5)]), store=tmp_path)

def été(seed): return dict(y=1.)

def test_a_function_with_a_name_in_any_alphabet(tmp_path):
    assert sweep(été, {}, store=tmp_path, n_jobs=1, progress=False).y.tolist()==[1.]

def test_a_store_that_can_only_be_read(tmp_path, monkeypatch):
    "A finished sweep is loaded without a lock, and nothing in it is written"
    run = lambda: sweep(near_the_top, dict(ratio=[0]), seeds=2, store=tmp_path, n_jobs=1, progress=False).acc.tolist()
    once = lambda: RunStore(tmp_path).once(near_the_top, ratio=0, seed=0).metrics['acc']
    want = run(),once()
    for p in tmp_path.rglob('.lock'): p.unlink()
    before = {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert (run(),once())==want and {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}==before

def in_mode(mode):
    @mode
    def inner(x): return x
    return lambda seed: inner(seed)

def with_property(n):
    class Own:
        @cached_property
        def value(self): return n
    return lambda seed: Own().value

def holds(v): return lambda seed: v

@pytest.mark.parametrize('a,b',
                         [(partial(in_mode, torch.no_grad()), partial(in_mode, torch.enable_grad())),
                          (partial(in_mode, torch.inference_mode()), partial(in_mode, torch.inference_mode(False))),
    (partial(with_property, 1), partial(with_property, 2)),
    (partial(holds, re.compile('a')), partial(holds, re.compile('a', re.I))),
    (lambda: holds(namedtuple('P', 'x y')), lambda: holds(namedtuple('P', 'y x'))),
    (partial(holds, logging.getLogger('a')), partial(holds, 1))],
    ids=['no_grad','inference_mode','cached_property','pattern','namedtuple','logger'])
def test_what_code_often_holds_can_be_compared(a, b):
    def told(make): return recipe(make())['function']
    assert told(a)==told(a)!=told(b)

def value_of(v): return recipe(holds(v))['function']['uses']

def instance(cls, *args, **kw):
    o = cls(*args)
    for k,v in kw.items(): setattr(o, k, v)
    return o

def with_method(base, n, **more):
    "A class with a method of its own"
    def rate(self): return n
    return type('Own', (base,), dict(rate=rate, __module__=__name__, **more))

kinds = [(dict,{'lr':.1}), (list,[1]), (tuple,(1,)), (str,'a'), (float,.5), (int,3), (complex,1j), (bytes,b'a'), (bytearray,b'a'), (set,{1}),
         (frozenset,{1}), (L,[1]), (OrderedDict,{'a':1}), (type(Path()),'a'), (partial,max), (torch.Tensor,[1.]), (TensorImage,[1.])]

@pytest.mark.parametrize('kind,value', kinds)
def test_what_a_class_adds_to_a_builtin_is_told(kind, value):
    "Its methods, attributes and slots; of an array, too"
    def own(n=1, **kw): return value_of(instance(with_method(kind, n), value, **kw))
    told = [value_of(kind(value)), own(), own(2), own(scale=1.), own(scale=2.)]
    assert all(told.count(o)==1 for o in told) and own()==told[1] and own(scale=2.)==told[4]

def test_slots_and_the_attributes_of_arrays_are_told():
    def slotted(n): return value_of(instance(with_method(list, 1, __slots__=('n',)), [1], n=n))
    def array(n): return value_of(instance(lambda: np.zeros(2).view(with_method(np.ndarray, 1)), n=n))
    def tensor(n): return value_of(instance(torch.zeros, 2, n=n))
    for f in slotted,array,tensor: assert f(1)==f(1)!=f(2)
    assert value_of(defaultdict(int))!=value_of(defaultdict(list))

class Shade(str, enum.Enum):
    dark = 'dark'

@pytest.mark.parametrize('a,b', [([1],(1,)), (Path('a'),f'{type(Path()).__name__} a'), ({1},dict(set=[1])), ({1},frozenset({1})),
    (range(3),'range(0, 3)'), (torch.float32,'dtype torch.float32'), (float('inf'),'inf'), (float('inf'),'float inf'), (1j,'1j'),
    (slice(1),[None,1,None]), ({1:2},[[1,2]]), ({1:2},[[1,2]]), (b'a',bytearray(b'a')), ([],()), (L(1),[1]),
    (np.zeros(2,'f4'),torch.zeros(2)), (np.float64(1),torch.tensor(1.).double()), (np.float64(1),np.array(1.)), (torch.nn,'torch.nn'),
    (max,'builtins.max'), (torch.zeros(2),torch.zeros(2).requires_grad_()), (torch.zeros(2),torch.zeros(2).to_sparse()),
    (torch.zeros(2),torch.nn.Parameter(torch.zeros(2), False)), (torch.zeros(2),TensorImage(torch.zeros(2))), ((1,),dict(tuple=[1])),
    (Shade.dark,'dark'), ({Shade.dark:1},{'dark':1}), ({1:1},{'1':1}), (partial(max,1),dict(partial=max, args=[1], keywords={}))])
def test_values_of_other_kinds_are_told_apart(a, b): assert value_of(a)==value_of(a)!=value_of(b)

def test_a_text_that_looks_like_a_reference():
    v = [1]
    assert value_of([v,v])!=value_of([v,value_of([v,v])['v'][1]])

def by_alias(seed): return nn.Linear(1, 1)(torch.ones(1))
def inside(seed):
    import torch.nn as inner
    return inner.Linear(1, 1)(torch.ones(1))
def by_path(seed): return torch.nn.Linear(1, 1)(torch.ones(1))
def by_name(seed): return Linear(1, 1)(torch.ones(1))
def enclosed():
    import torch.nn as inner
    return lambda seed: inner.Linear(1, 1)(torch.ones(1))
def on_an_object(seed, learn): return learn.my_lr()

@pytest.mark.parametrize('f', [by_alias, inside, by_path, by_name, enclosed()])
@pytest.mark.parametrize('cls', [nn.Linear, nn.Module], ids=['own','inherited'])
def test_a_method_replaced_in_a_class_of_others(monkeypatch, f, cls):
    "However the class is reached; `forward` is called without its name, and `wraps` hides whose it is"
    def told(): return recipe(f)['function']
    was = told()
    def own(n): return wraps(cls.forward)(lambda self, x: x*n)
    seen = []
    for v in (lambda self, x: x*2), (lambda self, x: x*3), own(4), own(5):
        monkeypatch.setattr(cls, 'forward', v)
        seen.append(told())
    assert all([was,*seen].count(o)==1 for o in [was,*seen])
    monkeypatch.undo()
    assert told()==was

def test_a_method_added_to_a_class_below_an_alias(monkeypatch):
    def told(): return recipe(on_an_object)['function']
    was = told()
    monkeypatch.setattr(fv.Learner, 'my_lr', lambda self: 1., raising=False)
    one = told()
    monkeypatch.setattr(fv.Learner, 'my_lr', lambda self: 2., raising=False)
    assert was!=one!=told()!=was

def with_numpy(seed): return np.CONST*np.pi

@pytest.mark.parametrize('where,name,f', [(np,'CONST',with_numpy), (torch.nn,'Linear',by_alias), (torch.nn,'Linear',by_path)])
@pytest.mark.parametrize('a,b', [(1.,2.), (with_method(object, 1),with_method(object, 2)),
                                 (with_method(object, 1)(),with_method(object, 2)())], ids=['number','class','object'])
def test_what_is_set_in_a_module_of_others(monkeypatch, where, name, f, a, b):
    "A function, a class or a number; also in a module below the one that the code names first"
    def told(v):
        monkeypatch.setattr(where, name, v, raising=False)
        return recipe(f)['function']
    assert told(a)==told(a)!=told(b)

def test_a_metaclass_is_part_of_a_class():
    def told(n):
        class Meta(type):
            def __call__(cls): return n
        class Own(metaclass=Meta): pass
        return value_of(Own)
    assert told(1)==told(1)!=told(2)

def test_a_decorator_that_is_a_class_is_told():
    "Also if it says which function it wraps, or is a kind of `property`"
    class Times:
        def __init__(self, f, n):
            update_wrapper(self, f)
            self.n = n
        def __call__(self, x): return self.__wrapped__(x)*self.n
    def f(x): return x
    assert value_of(Times(f, 1))!=value_of(Times(f, 2))
    def held(n):
        def get(self, o, cls=None): return n
        own = type('Own', (property,), dict(__get__=get, __module__=__name__))
        return value_of(type('Has', (), dict(x=own(f), __module__=__name__)))
    assert held(1)==held(1)!=held(2)

def test_a_run_without_settings_differs_from_one_with_some():
    assert differences({}, dict(lr=.1))==["lr: was 'not there', is 0.1"] and differences({}, {})==[]

def test_what_cannot_be_compared_is_computed_again(tmp_path):
    net,calls = torch.nn.Linear(1,1),tmp_path/'calls'
    def f(a, seed):
        with open(calls, 'a') as o: o.write('x')
        return dict(y=float(net(torch.ones(1)*a)))
    for _ in range(2):
        with pytest.warns(UserWarning,
                          match='all 1 points are computed, whatever the store has.*net is a torch.nn.modules.linear.Linear'):
            sweep(f, dict(a=[1]), store=tmp_path/'s', n_jobs=1, progress=False)
    assert calls.read_text()=='xx'

def test_threads_are_refused(tmp_path):
    with joblib.parallel_config('threading'), pytest.raises(ValueError, match='share one random state'):
        sweep(always_dies, dict(a=[0]), store=tmp_path)

def test_a_run_of_another_program_beside(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'run.json').write_text('{}')
    assert sweep(near_the_top, dict(ratio=[0]), store=tmp_path, n_jobs=1, progress=False).acc.tolist()==[.97]

def test_the_newest_of_several(tmp_path):
    "In whatever order their names and clocks' zones would put them"
    def f(seed): return dict(y=float(net(torch.ones(1))))
    net,store = torch.nn.Linear(1, 1),RunStore(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i in range(11):
            for p in net.parameters(): p.data.fill_(i/2)
            sweep(f, {}, seeds=2, store=tmp_path, n_jobs=1, progress=False)
    for r in store: r.update(created='2026-10-25T02:10:00+0200')
    assert store.sweeps()['f'].y.tolist()==[10.,10.]
    for r in store:
        if r.name.endswith('untold3'): r.update(created='2026-10-25T02:05:00+0100')   # an hour later, in winter time
    assert store.sweeps()['f'].y.min()<10

def near_the_top(ratio, seed): return dict(acc=[.97,.99,1.,1.,1.][seed], zero=0., loss=ratio+seed)

@pytest.mark.parametrize('seeds', [1,2,3,4,5])
def test_a_share_stays_within_0_and_1(tmp_path, seeds):
    s = sweep(near_the_top, dict(ratio=[0,.5]), seeds=seeds, store=tmp_path, n_jobs=1, progress=False).summary()
    vals = [.97,.99,1.,1.,1.][:seeds]
    low,high = s['acc','low'],s['acc','high']
    if seeds==1:
        assert low.isna().all() and high.isna().all()
        return
    assert (low>=min(vals)).all() and (high<=1).all() and (low<np.mean(vals)).all() and (high>=np.mean(vals)).all()
    assert s['zero','low'].eq(0).all() and s['zero','high'].eq(0).all()
    if seeds<4: assert low.eq(min(vals)).all() and high.eq(max(vals)).all()

def test_sweeps_in_a_store(tmp_path, monkeypatch):
    "Of a function that was changed both, of a grid that was extended all points, of a damaged point the rest"
    kw = dict(seeds=2, store=tmp_path, n_jobs=1, progress=False)
    sweep(partial(plus, b=1), dict(a=[1,2]), **kw)
    df = sweep(partial(plus, b=1), dict(a=[1,2,3]), **kw)
    monkeypatch.setattr(sys.modules[__name__], 'offset', 10)
    with pytest.warns(UserWarning, match='computed again'): sweep(partial(plus, b=1), dict(a=[1,2]), **kw)
    by_size = {len(o):o for o in RunStore(tmp_path).sweeps().values()}
    assert sorted(by_size)==[4,6] and sorted(by_size[6].y)==sorted(df.y) and sorted(by_size[4].y)==[12,12,13,13]
    (tmp_path/df.run[0]/'metrics.json').write_text('['*5000)
    (tmp_path/df.run[1]/'run.json').write_text('{')
    six = [o for o in RunStore(tmp_path).sweeps().values() if len(o)==5][0]
    assert sorted(six.status)==['damaged']+['finished']*4 and six.summary()['y','n'].tolist()==[2,2]

class Method(str, enum.Enum):
    sgd = 's'
    adam = 'a'

def is_adam(m, seed): return dict(adam=m=='a')

def test_members_of_a_textual_enum_are_their_text(tmp_path):
    got = sweep(is_adam, dict(m=list(Method)), store=tmp_path, n_jobs=1, progress=False)
    assert got.m.tolist()==['s','a'] and got.adam.tolist()==[False,True]

def one_fails(a, seed):
    if a==3: raise RuntimeError('x')
    return dict(acc=a*.1, converged=a==1, many=2**70*a, note='n', maybe=None if a else .5)

@pytest.mark.filterwarnings('ignore:1 of 4 points failed')
def test_a_point_that_failed_takes_no_column_with_it(tmp_path):
    "`True` and ints of more than 64 bits are numbers beside a missing one, too"
    df = sweep(one_fails, dict(a=[0,1,2,3]), store=tmp_path, n_jobs=1, progress=False)
    for d in df,RunStore(tmp_path).sweeps()['one_fails']:
        s = d.summary()
        assert list(s.columns.unique(0))==['acc','converged','many','maybe']
        assert s.converged['mean'].tolist()==[0,1,0] and s.many['mean'].tolist()==[0,2.**70,2.**71]
        assert s.maybe['n'].tolist()==[1,0,0] and d.plot() and d.plot_means('a', 'converged', 'maybe')

def table(names, **cols):
    n = len(next(iter(cols.values())))
    res = Sweep(dict(cols, seed=[0]*n, status=['finished']*n, run=['r']*n))
    res.attrs.update(names=names)
    return res

def test_rows_with_one_value_of_a_name():
    "What the error advises works; a name whose column is gone is none"
    df = table(['a','b','c'], a=[1,1,2,2], b=[1,2,1,2], c=[[3]]*4, v=[.1,.2,.3,.4])
    with pytest.raises(ValueError, match=r"x='a': this sweep is over a, b, c; select rows so that b has one value, e.g. `df\[df\['b'\]==…\]`"):
        df.plot_means('a', 'v')
    assert df[df['b']==1].plot_means('a', 'v').lines[0].get_ydata().tolist()==[.1,.3]
    with pytest.raises(ValueError, match="x='v': this sweep is over a, b, c; give one of these"): df.plot_means('v', 'a')
    with pytest.raises(ValueError, match="x='v': this sweep has seeds only"): table([], v=[1.,2.]).plot_means('v', 'v')
    left = df[df.b==1].drop(columns='b')
    assert left.summary().v['mean'].to_dict()=={(1,'[3]'):.1, (2,'[3]'):.3}
    assert left.plot().axes[0].get_xlabel()=='a' and left.plot_means('a', 'v')

def test_a_logarithmic_axis_has_a_tick_at_each_setting():
    "Powers of ten say little of values between two of them"
    ax = table(['a'], a=[.02,.03,.05], v=[1.,2.,3.]).plot_means('a', 'v', log=True)
    assert [o.get_text() for o in ax.get_xticklabels()]==['0.02','0.03','0.05'] and not len(ax.get_xticks(minor=True))
    assert len(table(['a'], a=[*range(1,12)], v=[1.]*11).plot_means('a', 'v', log=True).get_xticks(minor=False))<11

@pytest.mark.parametrize('values', [[0,-1], [0,0]])
def test_a_logarithmic_axis_without_positive_values(values):
    before = plt.get_fignums()
    with pytest.raises(ValueError, match="log=True: 'a' has no value above 0"): table(['a'], a=values, v=[1.,2.]).plot_means('a', 'v', log=True)
    assert plt.get_fignums()==before

def test_sweeps_over_other_grids_put_together():
    both = pd.concat([table(['a'], a=[1], v=[1.]), table(['b'], b=[1], v=[1.])])
    for f in both.summary,both.plot,lambda: both.plot_means('a', 'v'):
        with pytest.raises(ValueError, match="what its grid is.*set `df.attrs\\['names'\\] = "): f()
    both.attrs['names'] = ['a','b']
    assert len(both.summary())==2

def test_packages_that_do_not_list_their_modules_are_found(monkeypatch):
    "Python 3.10 finds only those with a `top_level.txt`: an update of numpy would not have changed a key there"
    def listed(): return {k:[d.metadata['Name']] for d in keys.distributions() for k in (d.read_text('top_level.txt') or '').split()}
    monkeypatch.setattr(keys, 'packages_distributions', listed)
    with monkeypatch.context() as m:
        m.setattr(sys, 'version_info', (3,10))
        got = keys._packages.__wrapped__()
    assert {k:set(got[k]) for k in ('torch','numpy','sklearn','plum')}=={
        'torch':{'torch'}, 'numpy':{'numpy'}, 'sklearn':{'scikit-learn'}, 'plum':{'plum-dispatch'}}
