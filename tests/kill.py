"""Kill a run at random moments, start it again, and compare with a run that nobody killed: weights, optimiser, random numbers, history and figures, bit by bit.

python tests/kill.py 100 many   a hundred kills of a run with real callbacks; the first ones at chosen moments, so that every kind of moment is among them
python tests/kill.py 100 few    the same of a smaller run without"""
import hashlib, multiprocessing as mp, os, random, signal, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_tools'))
from run_notebooks import forked

moments = 'batch','evaluation','checkpoint begun','checkpoint before rename','checkpoint done','between phases','figure'

def passing(die, n, seen):
    "A function to be called at each moment; this process kills itself the n-th time that it comes by `die`"
    left = [n]
    def pass_by(moment):
        if seen is not None: seen.value = moments.index(moment)
        if moment!=die: return
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    return pass_by

def watch(pass_by):
    "Call it around what is written; a callback that calls it in the training"
    from fastai.vision.all import Callback
    from feature_erosion import evalsets, files
    from feature_erosion.runs import resume, store
    def around(obj, name, before=None, after=None):
        old = getattr(obj, name)
        def f(*args, **kwargs):
            if before: pass_by(before)
            res = old(*args, **kwargs)
            if after: pass_by(after)
            return res
        setattr(obj, name, f)
    around(resume, 'save_folder', 'checkpoint begun', 'checkpoint done')
    around(files, 'sync_folder', 'checkpoint before rename')
    around(store, 'write_figure', 'figure')
    around(evalsets.EvalSets, '_look', 'evaluation')
    class Tell(Callback):
        order,run_valid,passive = 5,False,True
        def after_batch(self): pass_by('batch')
        def after_phase(self): pass_by('between phases')
        def before_phase(self): pass_by('between phases')
    return Tell()

def few(folder):
    "Three phases with a pattern, dropout, batch norm, momentum; a phase that ends inside an epoch"
    from torch import nn
    from fastai.vision.all import Learner, SGD, accuracy
    from feature_erosion.all import ColorSquare, Phase, digits_dls
    dls = digits_dls(n=320, n_valid=100, bs=32)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(.2), nn.Linear(784,10))
    learn = Learner(dls, model, opt_func=lambda p, **kw: SGD(p, mom=.9, **kw), metrics=accuracy, lr=.02, path=folder)
    easy = dls.inject(ColorSquare(4), ratio=.8)
    return learn,[Phase('pretrain', 3, dls), Phase('erode', iters=25, dls=easy),
                  Phase('relearn', 2, dls, until=lambda learn: False)],[]

def many(folder):
    "Real callbacks, layers left out at random, and loaders with worker processes"
    from copy import deepcopy
    from torch import nn
    from fastai.callback.mixup import MixUp
    from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
    from fastai.vision.all import CSVLogger, Callback, DataLoaders, GradientAccumulation, Learner, SGD, accuracy
    from torchvision.ops import StochasticDepth
    from feature_erosion.all import ColorSquare, Phase, digits_dls
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.drop = nn.Linear(32,32),StochasticDepth(.5, 'batch')
        def forward(self, x): return x+self.drop(self.lin(x).relu())
    class Average(Callback):
        "A moving average of the weights (EMA)"
        run_valid = False
        def before_fit(self): self.avg = deepcopy(self.model).requires_grad_(False)
        def after_batch(self):
            for a,p in zip(self.avg.parameters(), self.model.parameters()): a.lerp_(p.detach(), .1)
    images = digits_dls(n=192, n_valid=64)
    items = [[(x.float()/255,y) for x,y in (ds[i] for i in range(len(ds)))] for ds in (images.train_ds,images.valid_ds)]
    dls = DataLoaders.from_dsets(*items, bs=32, num_workers=2, n_inp=1)
    dls.vocab = images.vocab
    model = nn.Sequential(nn.Flatten(), nn.Linear(768,32), Block(), Block(), nn.Linear(32,10))
    learn = Learner(dls, model, loss_func=images.loss_func, opt_func=lambda p, **kw: SGD(p, mom=.9, **kw), metrics=accuracy,
                    lr=.02, path=folder)
    cbs = [SaveModelCallback(), CSVLogger(), Average(), MixUp(.4), GradientAccumulation(64), EarlyStoppingCallback(patience=50),
           ReduceLROnPlateau(patience=1, factor=2.)]
    return learn,[Phase('pretrain', 3, dls), Phase('erode', 2, dls.inject(ColorSquare(4)))],cbs

recipes = dict(few=few, many=many)

def train(what, folder, die=None, n=1, seen=None):
    "`die`: the moment at which this process kills itself, the n-th time it comes by"
    import torch
    from fastai.vision.all import set_seed
    from feature_erosion.all import KeepRun, RunStore
    torch.set_num_threads(1)
    tell = watch(passing(die, n, seen))
    set_seed(3)
    learn,phases,cbs = recipes[what](folder)
    # with progress bars
    learn.fit_phases(phases, cbs=[KeepRun(RunStore(folder).run('digits', seed=3), minutes=.0008), tell, *cbs])
    if 'average' in [o.name for o in cbs]:
        torch.save(next(o for o in cbs if o.name=='average').avg.state_dict(), Path(folder)/'average.pth')

def values(o):
    "State without references to other parts of the fit, which each start makes anew"
    if not isinstance(o, dict): return [values(v) for v in o] if isinstance(o, (list,tuple)) else o
    return {k:values(v) for k,v in o.items() if not (isinstance(v, dict) and v.get('__kept__') in ('ref','code'))}

def fingerprint(folder):
    "Hashes of all that has to be the same"
    import pandas as pd, torch
    from feature_erosion.runs.keys import describe, key_of
    from feature_erosion.runs.store import RunStore, unpack
    run = RunStore(folder)['digits']
    assert run.status=='finished' and not run.damaged(), run.info
    res = {str(f.relative_to(run.path)):hashlib.sha256(f.read_bytes()).hexdigest()
           for f in [run.path/'history.jsonl', run.path/'metrics.json', *sorted((run.path/'figures').iterdir())]}
    for p in ('start', *run.info['phases']):
        weights,state = unpack(run.path/'phases'/p)
        for o in ('csv_logger','_phase_column'): state['callbacks'].pop(o, None)   # a text with times, and who writes it
        # in the folder of this run
        if 'save_model' in state['callbacks']:
            state['callbacks']['save_model']['attrs'].pop('last_saved_path')
        res |= {p:key_of(describe(dict(sorted(weights.items())))),
                **{f'{p}: {k}':key_of(describe(values(v), 20)) for k,v in state.items()}}
    if (f := Path(folder)/'history.csv').exists(): res['history.csv'] = pd.read_csv(f).drop(columns='time').to_csv()
    for f in [*Path(folder).glob('average.pth'), *Path(folder).glob('models/*.pth')]:
        res[f.name] = key_of(describe(dict(torch.load(f, weights_only=True))))
    return res

def start(folder, log, *args):
    p = forked(run_quietly, str(folder), str(log), *args)
    p.start()
    return p

def run_quietly(folder, log, *args):
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    train(args[0], folder, *args[1:])

def main(kills=10, seed=0, folder=None, what='few'):
    rng,tmp = random.Random(seed),Path(folder or tempfile.mkdtemp())
    log,ctx = tmp/'log.txt',mp.get_context('forkserver')
    def whole(name):
        t0 = time.monotonic(); p = start(tmp/name, log, what); p.join()
        assert p.exitcode==0, log.read_text()
        return fingerprint(tmp/name),time.monotonic()-t0
    want,seconds = whole('whole')
    if kills>len(moments):   # the first kills do not go by the clock, and the first run has waited for what is imported
        again,seconds = whole('again')
        assert again==want, f'two runs that nobody killed differ: {[k for k in want if again.get(k)!=want[k]]}'
    done,hits,rounds = 0,dict.fromkeys(moments, 0),0
    while done<kills:
        home = tmp/f'killed{rounds}'
        for i in range(200):
            chosen = moments[done%len(moments)] if done<len(moments) or rng.random()<.3 else None
            seen = ctx.Value('i', 0)
            p = start(home, log, what, chosen, 1 if chosen in ('figure','between phases') else rng.randint(1, 5), seen)
            if chosen is None or done>=kills:
                p.join(rng.uniform(.1, seconds)) if done<kills else p.join()
                if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
            p.join()
            if p.exitcode==0: break
            assert p.exitcode==-signal.SIGKILL, log.read_text()[-5000:]
            done += 1
            hits[moments[seen.value]] += 1
        got = fingerprint(home)
        bad = [k for k in want if got.get(k)!=want[k]]
        assert not bad and len(got)==len(want), f'{home}: not the same: {bad}'
        rounds += 1
        print(f'{done} of {kills} kills', flush=True)
    print(f'{what}: {done} kills in {rounds} runs, all ended like the one that nobody killed; killed at ' + ', '.join(f'{k}: {v}' for k,v in hits.items()))
    return hits

if __name__=='__main__': main(int(sys.argv[1]), what=sys.argv[2] if len(sys.argv)>2 else 'few')
