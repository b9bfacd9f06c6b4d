"Where the time goes in the rows that missed their targets: `make bench only=shares`."
import time
from torch.profiler import ProfilerActivity, profile
import data_rows, probe_rows, rank_rows
from common import quiet
from feature_erosion.data import TensorImages, paper_stats, tensor_dls
from feature_erosion.learner import erosion_learner
from feature_erosion.measures.probes import probe_features
from feature_erosion.patterns import ColorSquare

def cases():
    "A function for each row"
    x,y = data_rows.images()
    dls = tensor_dls(TensorImages(x, y, range(10)), TensorImages(x[:128], y[:128], range(10)), bs=128, stats=paper_stats)
    easy = dls.inject(ColorSquare(4)).train
    learn = erosion_learner(dls, 'resnet20')
    def epoch():
        with learn.no_logging(): learn.fit(1)
    f,(X,y,Xt,yt) = rank_rows.features(2000, 8192),probe_rows.features(4, 4000, 2000)
    return {'loading': lambda: data_rows.run(easy), 'an epoch of ResNet-20': quiet(epoch),
            'ranks of 8,192 features': lambda: rank_rows.ours(f),
            '20 probes, 4×4 pooling': lambda: probe_features(X, y, Xt, yt, C=1., progress=False)}

def parts(f, most=5):
    "Shares of the wall clock on one thread: the operations that take most, all others, and what is spent outside of them"
    f()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        f()
        took = time.perf_counter()-start
    ops = sorted(((o.key,o.self_cpu_time_total/1e6/took) for o in p.key_averages()), key=lambda o: -o[1])
    rest = sum(s for _,s in ops[most:])
    return dict(ops[:most], others=rest, Python=max(0., 1-rest-sum(s for _,s in ops[:most])))

def shares(): return [dict(what=k, parts={a:round(b, 3) for a,b in parts(f).items()}) for k,f in cases().items()]

if __name__=='__main__': print(*shares(), sep='\n')
