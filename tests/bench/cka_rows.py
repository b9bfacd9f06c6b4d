"CKA of ResNet-20 before and after erosion: 20 layers, 2,000 images."
import warnings
import torch
from common import alternate, batches, networks, peak_mb, timed
from feature_erosion.measures.cka import layer_cka

layers = ['conv','linear']
def names(model): return [n for n,m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]

def forwards(models, data, last=False):
    with torch.inference_mode():
        for m in models:
            for x,_ in data: m(x.contiguous(memory_format=torch.channels_last) if last else x)

def ours(models, data, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return layer_cka(models, data, layers, progress=False, **kw)

def pytorch_cka(a, b, data):
    from cka import compute_cka
    return compute_cka(a, b, data, layers=names(a), progress=False)[0]

def cka_pytorch(a, b, data):
    from cka_pytorch import CKACalculator
    c = CKACalculator(a, b, names(a), names(b), verbose=False, device=torch.device('cpu'))
    res = c.calculate_cka_matrix(data, num_epochs=1).clone()
    c.reset()   # without it, its hooks stay, and slow down all that use these networks afterwards
    return res

def torch_cka(a, b, data):
    from torch_cka import CKA
    from contextlib import redirect_stderr
    import io
    with redirect_stderr(io.StringIO()): c = CKA(a, b, 'a', 'b', names(a), names(b)); c.compare(data, data)
    for m in (*a.modules(), *b.modules()): m._forward_hooks.clear()
    return c.hsic_matrix

def bare(f, models):
    "`f`, checking that it leaves no hooks behind, which would be timed with whatever comes next"
    def g():
        res = f()
        assert not any(o._forward_hooks or o._forward_pre_hooks for m in models for o in m.modules())
        return res
    return g

def loader(data): return torch.utils.data.DataLoader(data, batch_size=None)   # ready batches

def cases(n=2000, bs=128):
    (a,b),data = networks(),batches(n, bs)
    peer,whole = loader(data),loader([tuple(torch.cat(o) for o in zip(*data))])
    fs = {'nothing': lambda: None, 'forwards': lambda: forwards((a,b), data), 'ours': lambda: ours([a,b], data),
          'forwards, channels-last': lambda: forwards((a,b), data, True),
            'pytorch-cka': lambda: pytorch_cka(a, b, peer), 'cka-pytorch': lambda: cka_pytorch(a, b, peer),
            'torch-cka': lambda: torch_cka(a, b, peer),
            'ours, full': lambda: ours([a,b], data, estimator='full'), 'pytorch-cka, one batch': lambda: pytorch_cka(a, b, whole),
            'cka-pytorch, one batch': lambda: cka_pytorch(a, b, whole)}
    return {k:bare(f, (a,b)) for k,f in fs.items()}

def exact(acts, sizes):
    "The same estimator in float64, from the same float32 activations: HSIC₁ over batches"
    from feature_erosion.measures.cka import u_center
    H = 0
    for rows in sizes:
        V = torch.stack([u_center((a:=x[rows].double()-x[rows].double().mean(0))@a.T).flatten() for x in acts])
        H = H+V@V.T
    s = H.diagonal().sqrt()
    return H/s.outer(s)

def error(models, data, **kw):
    "Largest difference to all-float64, on the same activations"
    from feature_erosion.measures.layers import Features, visit
    got = []
    visit(models, data, Features(lambda m,l,X: got.append((m,l,X))), layers, progress=False, max_memory=8)
    res,acts = ours(models, data, **kw),{(m,l):X for m,l,X in got}
    n,bs = sum(len(x) for x,_ in data),len(data[0][0])
    want = exact([acts[k] for k in res.index], [slice(0, n)] if kw else [slice(i, i+bs) for i in range(0, n, bs)])
    return (torch.tensor(res.values)-want).abs().max().item()

def rows(repeats=3):
    fs,((a,b),few) = cases(),(networks(),batches(512))
    quick = {k:fs[k] for k in ('forwards','ours','forwards, channels-last','pytorch-cka','cka-pytorch')}
    for f in quick.values(): f()
    t,mb = alternate(quick, repeats),{k:peak_mb('cka_rows', k) for k in ('forwards','ours','pytorch-cka','cka-pytorch',
        'torch-cka')}
    err = f'error to float64 {error([a,b], few):.0e}'
    def row(name, peer, **kw):
        return dict(name=name, peer=peer, ours_s=t['ours'][:len(t[peer])], peer_s=t[peer], ours_mb=mb['ours']-mb['forwards'],
                    peer_mb=mb[peer]-mb['forwards'] if peer in mb else None, **kw)
    yield row('CKA, streaming', 'forwards', target=.8, check=err)
    yield row('CKA, streaming', 'forwards, channels-last', target=None, check='')
    yield row('CKA, streaming', 'pytorch-cka', target=1, check='')
    yield row('CKA, streaming', 'cka-pytorch', target=1, check='')
    t['torch-cka'] = [timed(fs['torch-cka'])]   # three times as slow: once is enough to tell
    yield row('CKA, streaming', 'torch-cka', target=1, check='one run of the peer')
    yield six(few, a, repeats)
    yield from full(fs, [a,b], few, repeats)

def six(data, a, repeats):
    from copy import deepcopy
    from itertools import combinations
    models = []
    for i in range(6):
        m = deepcopy(a)
        torch.manual_seed(i)
        for p in m.parameters(): p.data.add_(.1*i*p.std()*torch.randn_like(p) if p.ndim>1 else 0)
        models.append(m)
    t = alternate({'ours': lambda: ours(models, data),
                   'peer': lambda: [pytorch_cka(p, q, loader(data)) for p,q in combinations(models, 2)]}, min(repeats, 3))
    return dict(name='CKA of 6 models, streaming, 512 images', peer='pytorch-cka, pair by pair', ours_s=t['ours'],
                peer_s=t['peer'], target=2, check='')

def full(fs, models, few, repeats):
    # cka-pytorch takes three times as long and half as much memory again: 73 s and 5.6 GB in one run
    keys = 'ours, full','pytorch-cka, one batch'
    mb = {k:peak_mb('cka_rows', k) for k in ('nothing',*keys)}
    ok = [k for k in keys if mb[k]]
    t = alternate({k:fs[k] for k in ok}, min(repeats, 3))
    err = f"error to float64 {error(models, few, estimator='full'):.0e}; default max_memory (2 GB)"
    for peer in keys[1:]:
        yield dict(name='CKA, full, 2,000 images', peer=peer, ours_s=t['ours, full'], peer_s=t[peer], target=1.5, check=err,
                   ours_mb=mb['ours, full']-mb['nothing'], peer_mb=mb[peer]-mb['nothing'])
