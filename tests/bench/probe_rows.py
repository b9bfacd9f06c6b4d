"Linear probes of ResNet-20's 20 layers, 8,000 training (4,000 with 4×4 pooling) and 2,000 test images, against scikit-learn layer by layer on one thread."
import torch
from fastai.vision.all import imagenet_stats
from functools import partial
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from common import alternate, data, networks
from feature_erosion.measures.probes import dl_labels, probe_features
from feature_erosion.measures.layers import Features, visit

def features(pool, n, n_test):
    (net,_),dls,res = networks(),data(),[]
    for dl,k in ((dls.train,n),(dls.valid,n_test)):
        got = {}
        visit(net, dl, Features(lambda m,l,X: got.update({(m,l):X}), pool=pool), ['conv','linear'], n=k, max_memory=8,
              progress=False)
        res += [got,dl_labels(dl, k)]
    return res

def scikit_learn(X, y, Xt, yt):
    "Accuracy by layer: C=1, converged"
    res = {}
    with threadpool_limits(1):
        for k,x in X.items():
            fit = LogisticRegression(tol=1e-4, max_iter=10_000).fit(x.numpy(), y.numpy())
            res[k] = fit.score(Xt[k].numpy(), yt.numpy()),fit.n_iter_.max()
    return res

def rows(repeats=3):
    for pool in (1,4):
        X,y,Xt,yt = features(pool, 8000 if pool==1 else 4000, 2000)
        acc = {}
        def probe(k, C): acc[k] = probe_features(X, y, Xt, yt, C=C, progress=False).accuracy.to_dict()
        def peer(): acc['peer'] = {a:b[0] for a,b in scikit_learn(X, y, Xt, yt).items()}
        took = alternate({'C=1':partial(probe, 'C=1', 1.), 'C chosen':partial(probe, 'C chosen', None), 'peer':peer}, repeats)
        for k in ('C=1','C chosen'):
            worst = max(acc['peer'][l]-a for l,a in acc[k].items())
            mean = sum(a-acc['peer'][l] for l,a in acc[k].items())/len(acc[k])
            yield dict(name=f'20 probes, {pool}×{pool} pooling, {k}', peer='LogisticRegression, C=1, one thread', ours_s=took[k],
                       peer_s=took['peer'], target=5 if k=='C=1' else None,
                       check=f'at worst {100*worst:+.1f} points below it, on average {100*mean:+.1f} above')
