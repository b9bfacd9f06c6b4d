"""Pairs of experiments that differ in one thing: none may be answered with another's numbers.

python tests/pairs.py FILE.csv     all of them, as a table"""
import sys, tempfile, warnings
from pathlib import Path

script = '''
import torch
from dataclasses import dataclass
from torch import nn
from fastai.vision.all import *
from fastai.callback.mixup import MixUp
from feature_erosion.all import *
from feature_erosion.phases import n_epochs
import helper_module
{before}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat,self.one,self.two = nn.Flatten(),nn.Linear(768,16),nn.Linear(16,10)
        self.register_buffer('gain', torch.tensor({buffer}))
    def forward(self, x): return self.two({forward})
def loss_func(pred, y): return F.cross_entropy(pred, y, label_smoothing=smoothing)
class Scale(Callback):
    factor = {factor}
    def after_loss(self): {method}
def enough(learn): return learn.train_iter>={enough}
smoothing,rate,sizes = {globals}
{after}
def point(seed, run{argument}):
    dls = {data}
    {change_data}
    easy = {easy}
    model = {model}
    {change_model}
    learn = Learner(dls, model, loss_func={loss}, opt_func={opt}, lr={lr}, wd={wd}, metrics={metrics}, path=run.path.parent)
    with learn.no_bar(), learn.no_logging(): phases = {phases}; learn.fit(n_epochs(phases, dls), cbs=[PhaseSchedule(phases), KeepRun(run), {cbs}])
    return dict(weights=float(sum((p.detach().double()*(i+1)).sum() for i,p in enumerate(learn.model.parameters()))), **{{k:float(v) for k,v in zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1])}})
'''

base = dict(before='', after='', buffer='1.', forward='(self.one(self.flat(x))*self.gain).relu()', factor='1.',
            method='self.learn.loss_grad *= self.factor', enough='99', globals='0.,.05,(16,)',
            argument='', data='digits_dls(n=64, n_valid=32, bs=16)', change_data='pass',
            easy='dls.inject(ColorSquare(4), ratio=.5)', model='Net()', change_model='pass', loss='loss_func', opt='SGD',
            lr='rate',
            wd='None', metrics='accuracy', phases="[Phase('pretrain', 1, dls), Phase('erode', 1, easy)]", cbs='Scale()')

def P(*ps): return f'[{", ".join(ps)}]'
pre,ero = "Phase('pretrain', 1, dls)","Phase('erode', 1, easy)"

pairs = [
    # data
    ('data', 'one image more', dict(data='digits_dls(n=65, n_valid=32, bs=16)')),
    ('data', 'one validation image more', dict(data='digits_dls(n=64, n_valid=33, bs=16)')),
    ('data', 'other images, same number', dict(data='digits_dls(n=64, n_valid=32, bs=16, seed=1)')),
    ('data', 'batch size', dict(data='digits_dls(n=64, n_valid=32, bs=8)')),
    ('data', 'one pixel', dict(change_data='dls.train_ds.x[40,8,8] = 255-dls.train_ds.x[40,8,8]')),
    ('data', 'contents of a named file', 'file'),
    ('labels', 'one label, past the first batch', dict(change_data='dls.train_ds.y[-1] = (dls.train_ds.y[-1]+1)%10')),
    ('labels', 'two labels swapped',
     dict(change_data='y = dls.train_ds.y; k = int((y!=y[20]).nonzero()[0]); y[[20,k]] = y[[k,20]]')),
    ('labels', 'order of the classes', dict(change_data='dls.train_ds.y[:] = 9-dls.train_ds.y')),
    ('order', 'not shuffled', dict(change_data='dls.train.shuffle = False')),
    ('order', 'another state of the loader', dict(change_data='dls.train.rng.random()')),
    ('order', 'the last batch kept', dict(change_data='dls.train.drop_last = False; dls.train.bs = 17')),
    ('order', 'reversed',
     dict(change_data='dls.train_ds.x[:], dls.train_ds.y[:] = dls.train_ds.x.flip(0), dls.train_ds.y.flip(0)')),
    ('transforms', 'random crops', dict(change_data='dls.train.after_batch.fs[0].pad = 1')),
    ('transforms', 'flips', dict(change_data='dls.train.after_batch.fs[0].flip = True')),
    ('transforms', 'one that is added', dict(change_data='dls.train.after_batch.add(RandomErasing(p=.5))')),
    ('transforms', 'its probability', dict(change_data='dls.train.after_batch.add(RandomErasing(p=.9))')),
    ('transforms', 'the mean of Normalize', dict(change_data='dls.train.after_batch.fs[-1].mean += .1')),
    ('pattern', 'size', dict(easy='dls.inject(ColorSquare(5), ratio=.5)')),
    ('pattern', 'corner', dict(easy="dls.inject(ColorSquare(4, 'center'), ratio=.5)")),
    ('pattern', 'margin', dict(easy='dls.inject(ColorSquare(4, margin=1), ratio=.5)')),
    ('pattern', 'opacity', dict(easy='dls.inject(ColorSquare(4, opacity=.9), ratio=.5)')),
    ('pattern', 'palette', dict(easy="dls.inject(ColorSquare(4, palette='tab10'), ratio=.5)")),
    ('pattern', 'kind', dict(easy='dls.inject(Stripes(8), ratio=.5)')),
    ('pattern', 'ratio', dict(easy='dls.inject(ColorSquare(4), ratio=.6)')),
    ('pattern', 'strength', dict(easy='dls.inject(ColorSquare(4), ratio=.5, strength=.5)')),
    ('pattern', 'who wears it', dict(easy='dls.inject(ColorSquare(4), ratio=.5, seed=1)')),
    ('pattern', 'classes', dict(easy='dls.inject(ColorSquare(4), ratio=.5, classes=[1,2])')),
    ('pattern', 'how a class of its own draws',
     dict(before='class Mine(ColorSquare):\n    def draw(self, c, n, shape): return super().draw(n-1-c, n, shape)',
          easy='dls.inject(Mine(4), ratio=.5)')),
    ('model', 'relu changed to tanh in forward', dict(forward='(self.one(self.flat(x))*self.gain).tanh()')),
    ('model', 'a constant in forward', dict(forward='(self.one(self.flat(x))*self.gain*1.01).relu()')),
    ('model', 'a method that is replaced afterwards',
     dict(after='Net.forward = lambda self, x: self.two(self.one(self.flat(x)).sigmoid())')),
    ('model', 'a layer', dict(model='nn.Sequential(Net(), nn.Linear(10,10))')),
    ('model', 'its initial weights', dict(change_model='model.one.weight.data.mul_(1.01)')),
    ('model', 'a global that forward reads',
     dict(before='slope = .1', forward='F.leaky_relu(self.one(self.flat(x))*self.gain, slope)')),
    ('model', 'that global', dict(before='slope = .2', forward='F.leaky_relu(self.one(self.flat(x))*self.gain, slope)')),
    ('buffers', 'the value of a buffer', dict(buffer='1.1')),
    ('buffers', 'one that is set later', dict(change_model='model.gain.fill_(.9)')),
    ('hooks', 'a forward hook', dict(change_model='model.one.register_forward_hook(lambda m, i, o: o*.9)')),
    ('hooks', 'what it does', dict(change_model='model.one.register_forward_hook(lambda m, i, o: o*.8)')),
    ('hooks', 'a hook on a gradient', dict(change_model='model.one.weight.register_hook(lambda g: g*.5)')),
    ('frozen layers', 'one', dict(change_model='model.one.requires_grad_(False)')),
    ('frozen layers', 'another', dict(change_model='model.two.requires_grad_(False)')),
    ('loss', 'a global that it reads', dict(globals='.1,.05,(16,)')),
    ('loss', 'another function', dict(loss='lambda p, y: F.cross_entropy(p, y)*.5')),
    ('loss', 'a class weight', dict(loss='CrossEntropyLossFlat(weight=torch.linspace(.5, 1, 10))')),
    ('loss', 'another class weight', dict(loss='CrossEntropyLossFlat(weight=torch.linspace(.6, 1, 10))')),
    ('metrics', 'one more', dict(metrics='[accuracy, error_rate]')),
    ('metrics', 'another of the same name', dict(before='def accuracy(p, y): return (p.argmax(-1)!=y).float().mean()')),
    ('optimiser', 'Adam', dict(opt='Adam')),
    ('optimiser', 'momentum', dict(opt='partial(SGD, mom=.5)')),
    ('optimiser', 'another momentum', dict(opt='partial(SGD, mom=.6)')),
    ('optimiser', 'weight decay', dict(wd='.1')),
    ('optimiser', 'learning rate', dict(lr='.06')),
    ('optimiser', 'learning rate, in a global', dict(globals='0.,.07,(16,)')),
    ('schedule', 'constant', dict(phases=P(pre, "Phase('erode', 1, easy, sched='constant')"))),
    ('schedule', 'a function of its own', dict(phases=P(pre, "Phase('erode', 1, easy, sched=lambda pct: .05*(1-pct))"))),
    ('schedule', 'a constant in it', dict(phases=P(pre, "Phase('erode', 1, easy, sched=lambda pct: .06*(1-pct))"))),
    ('schedule', "one phase's learning rate", dict(phases=P(pre, "Phase('erode', 1, easy, lr=.01)"))),
    ('callbacks', 'a class attribute', dict(factor='.9')),
    ('callbacks', 'the body of a method', dict(method='self.learn.loss_grad *= self.factor*.8')),
    ('callbacks', 'one that is added', dict(cbs='Scale(), MixUp(.4)', loss='CrossEntropyLossFlat()')),
    ('callbacks', "MixUp's alpha", dict(cbs='Scale(), MixUp(8.)', loss='CrossEntropyLossFlat()')),
    ('callbacks', 'a setting', dict(cbs='Scale(), GradientClip(.1)')),
    ('callbacks', 'another setting', dict(cbs='Scale(), GradientClip(.2)')),
    ('callbacks', 'one that is left out, and a method', dict(method='self.learn.loss_grad *= 2')),
    ('phases', 'epochs', dict(phases=P(pre, "Phase('erode', 2, easy)"))),
    ('phases', 'iterations', dict(phases=P(pre, "Phase('erode', iters=3, dls=easy)"))),
    ('phases', 'their order', dict(phases=P(ero, pre))),
    ('phases', 'another name', dict(phases=P(pre, "Phase('erase', 1, easy)"))),
    ('phases', 'a third', dict(phases=P(pre, ero, "Phase('relearn', 1, dls)"))),
    ('phases', 'the optimiser kept', dict(phases=P(pre, "Phase('erode', 1, easy, opt='keep')"), opt='partial(SGD, mom=.5)')),
    ('phases', 'its weight decay', dict(phases=P(pre, "Phase('erode', 1, easy, wd=.2)"))),
    ('phases', 'until', dict(phases=P(pre, "Phase('erode', 3, easy, until=enough)"))),
    ('phases', 'what until compares with', dict(enough='5', phases=P(pre, "Phase('erode', 3, easy, until=enough)"))),
    ('seeds', 'the seed', dict(seed=1)),
    ('seeds', 'one that the function sets', dict(change_data='set_seed(7)')),
    ('settings', 'a default argument', dict(argument=', extra=.5', lr='rate*extra')),
    ('settings', 'another default', dict(argument=', extra=.6', lr='rate*extra')),
    ('settings', 'a closure', dict(before='def times(a): return lambda x: a*x\ntwice = times(2)', lr='twice(rate)')),
    ('settings', 'what is in it', dict(before='def times(a): return lambda x: a*x\ntwice = times(3)', lr='twice(rate)')),
    ('settings', 'a helper, two functions away', dict(before='def a(x): return b(x)\ndef b(x): return 1.5*x', lr='a(rate)')),
    ('settings', 'a constant in it', dict(before='def a(x): return b(x)\ndef b(x): return 1.6*x', lr='a(rate)')),
    ('settings', 'a dataclass', dict(before='@dataclass\nclass Config: lr:float=.03\nconfig = Config()', lr='config.lr')),
    ('settings', 'a field of it', dict(before='@dataclass\nclass Config: lr:float=.03\nconfig = Config(.04)', lr='config.lr')),
    ('settings', 'a function of a module that is imported', dict(lr='helper_module.rate()')),
    ('settings', 'what that module holds', dict(lr='helper_module.rate()', helper='def rate(): return .011')),
    ('environment', "torch's version", 'version'),
    ('environment', "Python's version", 'python'),
    ('environment', 'the default type', 'dtype'),
    ('environment', 'a GPU', 'gpu')]

def point(folder, helper='def rate(): return .012', **parts):
    "The function of a script, as if it had just been started"
    (folder/'helper_module.py').write_text(helper)
    sys.modules.pop('helper_module', None)
    space = dict(__name__='script')
    exec(compile(script.format(**{**base, **parts}), 'script', 'exec'), space)
    return space['point']

def once(store, folder, parts):
    import importlib
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode,old = True,sys.dont_write_bytecode
    parts = dict(parts)
    seed = parts.pop('seed', 0)
    try: return store.once(point(folder, **parts), files=[folder/'labels.csv'], seed=seed)
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = old

def surroundings(change, folder, patch):
    "What is not in the script"
    import torch
    from feature_erosion.runs import keys
    if change=='file': (folder/'labels.csv').write_text('1,2,4')
    if change=='version': patch(keys, '_version', lambda top, old=keys._version: '9.9' if top=='torch' else old(top))
    if change=='python': patch(keys.platform, 'python_version', lambda: '3.99.0')
    if change=='dtype': patch(torch, 'get_default_dtype', lambda: torch.float64)
    if change=='gpu': patch(torch.cuda, 'is_available', lambda: keys_only(True))

def keys_only(value):
    "To the question of a key; training goes on as it is"
    return value if sys._getframe(2).f_code.co_name=='recipe' else False

def compare(tmp, patch):
    "For each pair: the part, what is changed, both results, whether the second was trained by itself"
    from feature_erosion.runs.store import RunStore
    store,folder,runs = RunStore(tmp/'runs'),tmp/'script',{}
    folder.mkdir()
    (folder/'labels.csv').write_text('1,2,3')
    first = once(store, folder, {})
    assert once(store, folder, {}).path==first.path, 'the same script twice is not found'
    for part,what,change in pairs:
        with patch() as p:
            (folder/'labels.csv').write_text('1,2,3')
            if isinstance(change, str): surroundings(change, folder, p.setattr)
            run = once(store, folder, {} if isinstance(change, str) else change)
        yield dict(part=part, changed=what, run=run.path.name, weights=run.metrics['weights'], accuracy=run.metrics['accuracy'],
                   unchanged=first.metrics['weights'], own=run.path not in runs and run.path!=first.path,
                   outside=isinstance(change, str))
        runs[run.path] = what

if __name__=='__main__':
    import pandas as pd, pytest
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as tmp:
        df = pd.DataFrame(compare(Path(tmp), pytest.MonkeyPatch.context))
    df.drop(columns='run').to_csv(sys.argv[1], index=False, float_format='%.9g')
    print(f'{len(df)} pairs, {(~df.own).sum()} answered with the numbers of another')
