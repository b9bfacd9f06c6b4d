"Numerical rank from `spectrum` against a singular value decomposition; `python tests/bench/rank_rows.py` on two threads"
import torch
from common import alternate, compared
from feature_erosion.measures.rank import spectrum, numerical_rank

def features(n, d, seed=0):
    "Features whose spread falls off like a power of their number"
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, d+1)**-.9

def ours(x): return [numerical_rank(s, r) for s in [spectrum(x)] for r in (1e-2,1e-3)]
def peer(x): return [int((s>r*s[0]).sum()) for s in [torch.linalg.svdvals(x-x.mean(0))] for r in (1e-2,1e-3)]

def rows(repeats=3, n=2000, sizes=((4096,4.),(8192,7.),(16384,12.))):
    "A dict for each number of features; ours and the peer's take turns, after a first call of each on a little data"
    for f in ours,peer: f(features(100, 200))
    for d,target in sizes:
        x,ranks = features(n, d),[]
        t = alternate({k:lambda f=f: ranks.append(f(x)) for k,f in dict(ours=ours, peer=peer).items()}, repeats)
        yield dict(name=f'numerical rank, {d:,} features', peer='torch.linalg.svdvals, float32', ours_s=t['ours'],
                   peer_s=t['peer'], target=target,
                   check=f'same rank at 1e-2 and 1e-3: {all(r==ranks[0] for r in ranks)} ({ranks[0]})')

if __name__=='__main__':
    torch.set_num_threads(2)
    for r in rows():
        print(r['name'], compared(r['ours_s'], r['peer_s']), r['check'], flush=True)
