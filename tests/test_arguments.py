"Numbers that are no numbers, and numbers that make no sense, are refused where they are given, by name."
import inspect
import pytest, torch
from fastai.vision.all import Callback
from feature_erosion import callbacks, evalsets, mitigations, patterns, recover, shortcut, unlearning, watch
from feature_erosion.data import digits_dls
from feature_erosion.learner import erosion_learner
from feature_erosion.measures import cka, plasticity, rank
from feature_erosion.paper.nets import Net, perceptron
from feature_erosion.runs import resume, sweep
from feature_erosion.runs.store import RunStore

@pytest.fixture(scope='module')
def dls(): return digits_dls(n=100, n_valid=40)

modules = patterns,mitigations,watch,callbacks,resume
classes = [o for m in modules for k in m.__all__ if inspect.isclass(o := getattr(m, k)) and issubclass(o, (patterns.Pattern,Callback))]
needed = dict(old='dls', dl='loader', run='run', names='0', path='x.png', first=.1, last=.2)

def numbers(f): return [k for k,p in inspect.signature(f).parameters.items() if type(p.default) in (int,float) and k!='seed']

free = [(mitigations.EWC,'n'), (watch.WatchErosion,'n')]   # None stands for all

@pytest.mark.parametrize('cls,arg', [(o,k) for o in classes for k in numbers(o)], ids=lambda o: getattr(o, '__name__', str(o)))
def test_numbers_of_classes(cls, arg, dls, tmp_path):
    "All patterns and callbacks, as their signatures say"
    have = dict(dls=dls, loader=dls.train, run=RunStore(tmp_path).run('a'))
    ps = {k for k,p in inspect.signature(cls).parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    kw = {k:have.get(v, v) for k,v in needed.items() if k in ps}
    cls(**kw)
    for bad in 'x',[1.],float('nan'),-1,*([] if (cls,arg) in free else [None]):
        with pytest.raises(ValueError, match=f'{arg}='): cls(**{**kw, arg:bad})

@pytest.mark.parametrize('f,args', [
    (lambda dls, **k: Net('n', 'perceptron', 'digits', **k),
     dict(width=-1, lr=float('nan'), bs=0, n=1.5, n_valid='x', ratio=[1], lengths=(1,-1,0), pattern_size=-4)),
    (lambda dls, **k: erosion_learner(dls, perceptron, **k), dict(lr=-1, mom=1, wd=float('nan'))),
    (lambda dls, **k: digits_dls(**k), dict(channels='x')),
    (lambda dls, **k: evalsets.log_iters(100, **k), dict(per_decade=-1)),
    (lambda dls, **k: unlearning.distil_loss(torch.zeros(2,3), torch.ones(2,3), **k), dict(T=-1)),
    (lambda dls, **k: unlearning.split_forget(dls, **k), dict(share='x')),
    (lambda dls, **k: unlearning.scrub(None, dls, dls, **k), dict(msteps=1.5)),
    (lambda dls, **k: cka.layer_cka({'a':perceptron(),'b':perceptron()}, dls.valid, progress=False, **k),
     dict(max_memory=float('nan'))),
    (lambda dls, **k: plasticity.dormant_units(perceptron(), dls.valid, **k), dict(tau='x')),
    (lambda dls, **k: rank.srank(torch.rand(9,4), **k), dict(delta='x')),
    (lambda dls, **k: recover.group_accuracy(perceptron(), dls.valid, **k), dict(level='x')),
    (lambda dls, **k: shortcut.find_shortcut(perceptron(), dls, **k), dict(max_share=[.5])),
    (lambda dls, **k: sweep.mean_interval([1.,2.,3.,4.], **k), dict(level=None)),
    (lambda dls, **k: dls.inject(patterns.ColorSquare(4), **k), dict(ratio=[1.], strength='x')),
])
def test_numbers_of_functions(f, args, dls):
    for k,v in args.items():
        with pytest.raises(ValueError, match=f'{k}='): f(dls, **{k:v})
