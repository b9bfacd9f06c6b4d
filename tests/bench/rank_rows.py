"Numerical rank from `spectrum` against a singular value decomposition; `python tests/bench/rank_rows.py` on two threads"
import time, torch
from feature_erosion.measures.rank import spectrum, numerical_rank

def features(n, d, seed=0):
    "Features whose spread falls off like a power of their number"
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, d+1)**-.9

def ours(x): return [numerical_rank(s, r) for s in [spectrum(x)] for r in (1e-2,1e-3)]
def peer(x): return [int((s>r*s[0]).sum()) for s in [torch.linalg.svdvals(x-x.mean(0))] for r in (1e-2,1e-3)]

def timed(f, x):
    start = time.perf_counter()
    return f(x),time.perf_counter()-start

def rows(repeats=3, n=2000, sizes=((4096,4.),(8192,7.),(16384,12.))):
    "A dict for each number of features; ours and the peer's take turns, after a first call of each on a little data"
    for f in ours,peer: f(features(100, 200))
    for d,target in sizes:
        x,took,ranks = features(n, d),{ours:[], peer:[]},{ours:[], peer:[]}
        for i in range(repeats):
            for f in (ours,peer)[::1-2*(i%2)]:
                res,t = timed(f, x)
                took[f].append(t); ranks[f].append(res)
        same = all(r==ranks[ours][0] for r in ranks[ours]+ranks[peer])
        yield dict(name=f'numerical rank, {d:,} features', peer='torch.linalg.svdvals, float32', ours_s=took[ours], peer_s=took[peer], target=target, higher_is_better=True,
                   check=f'same rank at 1e-2 and 1e-3: {same} ({ranks[ours][0]})')

if __name__=='__main__':
    torch.set_num_threads(2)
    for r in rows():
        o,p = (sorted(r[k])[len(r[k])//2] for k in ('ours_s','peer_s'))
        print(f"{r['name']}: {o:.2f} s, {r['peer']} {p:.2f} s: {p/o:.1f} times faster (target {r['target']:g}); {r['check']}", flush=True)
