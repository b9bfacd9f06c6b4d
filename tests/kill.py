"""Kill a run at random moments, start it again, and compare with a run that nobody killed: weights, optimiser, random numbers, history and figures, bit by bit.

python tests/kill.py 100        a hundred kills; the first ones at chosen moments, so that every kind of moment is among them"""
import hashlib, multiprocessing as mp, os, random, signal, sys, tempfile, time
from pathlib import Path

moments = 'batch','evaluation','checkpoint begun','checkpoint before rename','checkpoint done','between phases','figure'

def train(folder, die=None, n=1, seen=None):
    "Three phases on digits; `die`: the moment at which this process kills itself, the n-th time it comes by"
    import torch
    from torch import nn
    from fastai.vision.all import Callback, Learner, SGD, accuracy, set_seed
    from feature_erosion import data, resume, store
    from feature_erosion.all import ColorSquare, EvalSets, KeepRun, Phase, RunStore, digits_dls
    torch.set_num_threads(1)
    left = [n]
    def pass_by(moment):
        if seen is not None: seen.value = moments.index(moment)
        if moment!=die: return
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    def around(obj, name, before=None, after=None):
        old = getattr(obj, name)
        def f(*args, **kwargs):
            if before: pass_by(before)
            res = old(*args, **kwargs)
            if after: pass_by(after)
            return res
        setattr(obj, name, f)
    class Tell(Callback):
        order,run_valid = 5,False
        def after_batch(self): pass_by('batch')
        def after_phase(self): pass_by('between phases')
        def before_phase(self): pass_by('between phases')
    around(store, 'save_folder', 'checkpoint begun'), around(resume, 'save_folder', 'checkpoint begun', 'checkpoint done')
    around(store, 'sync_folder', 'checkpoint before rename')
    around(resume, 'save_figure', 'figure')
    around(EvalSets, '_look', 'evaluation')
    set_seed(3)
    dls = digits_dls(n=320, n_valid=100, bs=32)
    easy = dls.inject(ColorSquare(4), ratio=.8)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(.2), nn.Linear(784,10))
    learn = Learner(dls, model, opt_func=lambda p, **kw: SGD(p, mom=.9, **kw), metrics=accuracy, lr=.02, path=folder)
    keep = KeepRun(RunStore(folder).run('digits', seed=3), minutes=.0008)
    phases = [Phase('pretrain', 3, dls), Phase('erode', iters=25, dls=easy), Phase('relearn', 2, dls, until=lambda learn: False)]
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(phases, cbs=[keep, Tell()])

def fingerprint(folder):
    "Hashes of all that has to be the same"
    from feature_erosion.store import RunStore, key_of, unpack
    run = RunStore(folder)['digits']
    assert run.status=='finished', run.info
    res = {str(f.relative_to(run.path)):hashlib.sha256(f.read_bytes()).hexdigest() for f in [run.path/'history.jsonl', run.path/'metrics.json', *sorted((run.path/'figures').iterdir())]}
    for p in ('start','pretrain','erode','relearn'):
        weights,state = unpack(run.path/'phases'/p)
        res |= {p:key_of(weights), **{f'{p}: {k}':key_of(v) for k,v in state.items()}}
    return res

def start(folder, log, *args):
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(['feature_erosion.all'])
    p = ctx.Process(target=run_quietly, args=(str(folder), str(log), *args))
    p.start()
    return p

def run_quietly(folder, log, *args):
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    train(folder, *args)

def main(kills=10, seed=0, folder=None):
    rng,tmp = random.Random(seed),Path(folder or tempfile.mkdtemp())
    log,ctx = tmp/'log.txt',mp.get_context('forkserver')
    p = start(tmp/'whole', log); p.join()
    t0 = time.monotonic(); p = start(tmp/'again', log); p.join(); seconds = time.monotonic()-t0
    assert p.exitcode==0, log.read_text()
    want = fingerprint(tmp/'whole')
    assert fingerprint(tmp/'again')==want, 'two runs that nobody killed differ'
    done,hits,rounds = 0,dict.fromkeys(moments, 0),0
    while done<kills:
        home = tmp/f'killed{rounds}'
        for i in range(200):
            chosen = moments[done%len(moments)] if done<len(moments) or rng.random()<.3 else None
            seen = ctx.Value('i', 0)
            p = start(home, log, chosen, 1 if chosen in ('figure','between phases') else rng.randint(1, 5), seen)
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
    print(f'{done} kills in {rounds} runs, all ended like the one that nobody killed; killed at ' + ', '.join(f'{k}: {v}' for k,v in hits.items()))
    return hits

if __name__=='__main__': main(*map(int, sys.argv[1:]))
