"How time and memory grow: with images, layers and classes. Each point is a process of its own, forked before PyTorch has run anything."
import json, os, subprocess, sys
from math import log
from pathlib import Path

sizes = dict(images=(1000,5000,20_000,50_000), layers=(5,10,20,50), classes=(10,30,100,300,1000))
warm = dict(images=150, layers=2, classes=2)   # what runs first, so that no point pays for what is set up once

def loading(n):
    "An epoch of the training set: crop, flip, square, normalise; the images are part of the memory"
    from feature_erosion.data import TensorImages, paper_stats, tensor_dls
    from feature_erosion.patterns import ColorSquare
    x,y = torch.randint(256, (n,32,32,3), dtype=torch.uint8),torch.arange(n)%10
    dl = tensor_dls(TensorImages(x, y, range(10)), TensorImages(x[:10], y[:10], range(10)), bs=128,
                    stats=paper_stats).inject(ColorSquare(4)).train
    for _ in dl: pass

def network(n_layers, d=256):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*8*8, d),
                               *[f() for _ in range(n_layers-1) for f in (torch.nn.ReLU, lambda: torch.nn.Linear(d, d))])

# one batch again and again, so that images take no memory
def noise(n):
    return [(torch.randn(128,3,8,8),torch.zeros(128).long())]*-(-n//128)

def cka(n_layers=10, n=2000):
    from feature_erosion.measures.cka import layer_cka
    layer_cka(network(n_layers), noise(n), ['linear'], progress=False)

def rank(n_layers=10, n=2000):
    from feature_erosion.measures.rank import layer_rank
    layer_rank(network(n_layers), noise(n), ['linear'], progress=False)

def probe(n_classes, n=4000, d=128):
    from feature_erosion.measures.probes import probe_features
    y = torch.arange(n)%n_classes
    X = torch.randn(n_classes, d)[y]*.5+torch.randn(n, d)
    probe_features({('m','x'):X}, y, {('m','x'):X[:500]}, y[:500], C=1., progress=False)

def painting(n_classes):
    "A batch of 128, a hundred times"
    from feature_erosion.patterns import ColorSquare, paint
    pics,x,y = ColorSquare(4).pictures(n_classes, (3,32,32)),torch.rand(128,3,32,32),torch.arange(128)%n_classes
    for _ in range(100): paint(x, y, pics)

whats = dict(images={'an epoch of loading':loading, 'CKA of 10 layers, streaming':lambda n: cka(n=n),
                     'ranks of 10 layers':lambda n: rank(n=n)},
             layers={'CKA, streaming, 2,000 images':cka, 'ranks, 2,000 images':rank},
             classes={'a linear probe, 4,000 images':probe, 'painting a batch, 100 times':painting})

def measured(f, n, small):
    "Seconds and megabytes of `f(n)` in a child, after `f(small)`"
    r,w = os.pipe()
    if not (pid := os.fork()):
        from common import peak_of, timed
        took = []
        f(small)
        mb = peak_of(lambda: took.append(timed(lambda: f(n))))
        os.write(w, json.dumps([took[0],mb]).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as o: res = o.read()
    if os.waitpid(pid, 0)[1] or not res: raise RuntimeError(f'{f}, {n}: the process failed')
    return json.loads(res)

def slope(xs, ys):
    "Of the line through the logarithms, by least squares"
    lx,ly = [log(o) for o in xs],[log(max(o, 1e-9)) for o in ys]
    mx,my = sum(lx)/len(lx),sum(ly)/len(ly)
    return sum((a-mx)*(b-my) for a,b in zip(lx, ly))/sum((a-mx)**2 for a in lx)

def points():
    "One dict for each line: sizes, seconds, megabytes and slopes; measured in a fresh process"
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(o) for o in out.splitlines() if o.startswith('{')]

def table(lines):
    "Markdown"
    head = '| with more | what | sizes | seconds | slope | MB more at most | slope |\n|---|---|---|---|---|---|---|\n'
    def cells(v, f): return ', '.join(f'{o:{f}}' for o in v)
    return head+'\n'.join(f"| {o['axis']} | {o['what']} | {cells(o['sizes'], ',')} | {cells(o['seconds'], '.2f')} | {o['slope']:.2f} | {cells(o['mb'], '.0f')} | {o['slope_mb']:.2f} |" for o in lines)

if __name__=='__main__':
    sys.path.insert(0, str(Path(__file__).parent))
    import torch, common, feature_erosion.all
    for axis,fs in whats.items():
        for what,f in fs.items():
            ns = sizes[axis]
            s,mb = zip(*[measured(f, n, warm[axis]) for n in ns])
            print(json.dumps(dict(axis=axis, what=what, sizes=ns, seconds=s, mb=mb, slope=slope(ns, s),
                                  slope_mb=slope(ns, [max(o, .1) for o in mb]))), flush=True)
