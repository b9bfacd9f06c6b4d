"""Damaged files of runs: each is recovered from, to the same numbers, or named. Never is there another number without a word.

python tests/damages.py FILE.csv     all of them, as a table"""
import shutil, sys, tempfile, warnings
from pathlib import Path

def bit(at):
    def f(p):
        b = bytearray(p.read_bytes())
        b[int(at*(len(b)-1))] ^= 1<<(2 if at<1 else 0)
        p.write_bytes(b)
    return f

def digit(p):
    "A digit in the middle of a text is another one"
    s = p.read_text()
    i = next(i for i in range(len(s)//2, len(s)) if s[i].isdigit())
    p.write_text(f'{s[:i]}{(int(s[i])+1)%10}{s[i+1:]}')

def line(n):
    def f(p):
        rows = p.read_text().splitlines(keepends=True)
        p.write_text(''.join(rows[:len(rows)//2]) if n is None else ''.join(rows[:n]+rows[n+1:]))
    return f

ways = {'gone':Path.unlink, 'empty':lambda p: p.write_bytes(b''),
        'cut in half':lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size//2]), 'a bit in the middle':bit(.5),
        'a bit in the first quarter':bit(.25),
        'more at the end':lambda p: p.write_bytes(p.read_bytes()+b'\0garbage'),
        'all zeros':lambda p: p.write_bytes(bytes(p.stat().st_size)),
        "another file's contents":lambda p: p.write_bytes(b'{"a": 1}\n'),
        'a folder in its place':lambda p: (p.unlink(), p.mkdir())}
text_ways = {'a digit':digit, 'its first line gone':line(0), 'its second half of lines gone':line(None)}
texts = '.json','.jsonl','.csv'

def train(folder, stop=None):
    "Two phases on digits, a table of its own; `stop`: an error after so many iterations"
    from torch import nn
    from fastai.vision.all import Callback, Learner, SGD, accuracy, set_seed
    from feature_erosion.all import ColorSquare, KeepRun, Phase, RunStore, digits_dls
    class Stop(Callback):
        run_valid,passive = False,True
        def after_batch(self):
            if self.learn.train_iter==stop: raise RuntimeError('stopped here')
    set_seed(0)
    dls = digits_dls(n=96, n_valid=40, bs=32)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, metrics=accuracy, lr=.05, path=folder)
    run = RunStore(folder).run('a')
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('pretrain', 2, dls), Phase('erode', 2, dls.inject(ColorSquare(4)))],
                         cbs=[KeepRun(run, minutes=0), Stop()])
    run.save_table('numbers', learn.recorder.evals[['clean','pattern']])
    return learn

def square(x, seed): return dict(y=float(x*x))

def sweep_points(folder):
    from feature_erosion.all import sweep
    df = sweep(square, dict(x=[1,2,3]), store=folder/'sweep', n_jobs=1, progress=False)
    if (df.status=='failed').any(): raise RuntimeError(df.error.dropna().iloc[0])   # as the sweep's warning says
    return df.y.tolist()

def images(folder):
    "Decoded images, from their cache"
    from feature_erosion.data import cached_images
    return cached_images(sorted((folder/'images').glob('*.png')), folder/'images').tolist()

def make_images(folder):
    import numpy as np
    from PIL import Image
    (folder/'images').mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.random.RandomState(i).randint(256, size=(8,8,3), dtype=np.uint8)).save(folder/'images'/f'{i}.png')
    return images(folder)

def result(learn):
    "All that a run gave, in numbers"
    return dict(weights=[p.detach().tolist() for p in learn.model.parameters()], history=learn.recorder.history.to_dict('list'),
                evals=learn.recorder.evals.to_dict('list'))

def reads(folder):
    "What a run's folder says, part by part"
    import hashlib
    from feature_erosion.all import RunStore
    run = RunStore(folder)['a']
    return dict(history=lambda: run.history.to_dict('list'), evals=lambda: run.evals.to_dict('list'), metrics=lambda: run.metrics,
                numbers=lambda: run.table('numbers').to_dict('list'),
                weights=lambda: {k:v.tolist() for k,v in sorted(run.weights('pretrain').items())}, status=lambda: run.status,
                figure=lambda: [run.damaged(f) or hashlib.sha256((run.path/f).read_bytes()).hexdigest()
                                for f in ('figures/phases.png','figures/phases.svg') if run.info['files']])

def outcome(f, want, name):
    "What happens: 'the same', 'the same, with a word', 'named'; anything else is a fault"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        try: got = f()
        except Exception as e:
            return 'named' if name in str(e) or Path(name).parent.name in str(e) else f'FAULT: {type(e).__name__}: {e}'
    told = [o for o in w if name in str(o.message) or Path(name).parent.name in str(o.message)]
    same = str(got)==str(want) or name in str(got)
    return ('the same, with a word' if told else 'the same') if same else f'FAULT: {str(got)[:200]}'

def damages(tmp, every=1):
    "For each damage: the file, what was done to it, what reading and going on say"
    import contextlib, io
    stopped,finished = tmp/'stopped',tmp/'finished'
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: train(stopped, stop=8)
        except RuntimeError: pass
        whole = result(train(finished))
        points,pixels = sweep_points(finished),make_images(finished)
    said = {k:f() for k,f in reads(finished).items()}
    point = next((finished/'sweep').glob('square,x=2*')).name
    cache = next(p for p in (finished/'.images.decoded').iterdir() if p.suffix!='.lock').name
    newest = max((stopped/'a'/'last').iterdir(), key=lambda p: int(p.name)).name
    checkpoint = 'about.json','state.pt','model.safetensors'
    cases = [*((stopped, f'a/{o}')
               for o in ('run.json','history.jsonl',
                         *(f'{d}/{f}' for d in (f'last/{newest}','phases/pretrain') for f in checkpoint))),
             *((finished, f'a/{o}')
               for o in ('run.json','history.jsonl','metrics.json','tables/numbers.csv','figures/phases.png','figures/phases.svg',
                         *(f'phases/{p}/{f}' for p in ('pretrain','erode') for f in checkpoint))),
             *((finished, f'sweep/{point}/{o}') for o in ('run.json','metrics.json')), (finished, f'.images.decoded/{cache}')]
    todo = [(home, name, way, f) for home,name in cases
            for way,f in {**ways, **(text_ways if name.endswith(texts) else {})}.items()]
    for i,(home,name,way,f) in enumerate(todo[::every]):
        there = tmp/f'damaged{i}'
        shutil.copytree(home, there, copy_function=shutil.copy2)
        f(there/name)
        with contextlib.redirect_stdout(io.StringIO()):
            yield dict(run=home.name, file=name.replace(point, 'POINT').replace(cache, 'CACHE'), damage=way,
                       **looks(there, name, home==finished, said, whole, points, pixels))
        shutil.rmtree(there)

def looks(there, name, finished, said, whole, points, pixels):
    file = Path(name).name if Path(name).parent.name in ('a','tables','figures') or name.startswith(('sweep','.images')) else str(Path(name))
    if name.startswith('sweep'): return dict(reading='', going_on=outcome(lambda: sweep_points(there), points, file))
    if name.startswith('.images'): return dict(reading='', going_on=outcome(lambda: images(there), pixels, file))
    try: parts = reads(there) if finished else {}
    except Exception as e: parts = {'run':lambda e=e: (_ for _ in ()).throw(e)}
    res = {outcome(f, said.get(k), file) for k,f in parts.items()}
    worst = next((o for o in sorted(res, reverse=True) if o.startswith('FAULT')),
                 None) or next((o for o in ('named','the same, with a word','the same') if o in res), '')
    return dict(reading=worst, going_on=outcome(lambda: result(train(there)), whole, file))

if __name__=='__main__':
    import pandas as pd
    with tempfile.TemporaryDirectory() as tmp: df = pd.DataFrame(damages(Path(tmp)))
    df.to_csv(sys.argv[1], index=False)
    faults = df[df.reading.str.startswith('FAULT') | df.going_on.str.startswith('FAULT')]
    print(f'{len(df)} damages, {len(faults)} neither recovered from nor named'); print(faults.to_string())
