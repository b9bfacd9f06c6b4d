"Ranks against scipy's decomposition, on data whose rank is known by construction, and layer by layer against a plain forward pass."
import numpy as np, pytest, scipy.linalg, torch
from copy import deepcopy
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.vision.all import plt
from feature_erosion.measures import rank
from feature_erosion.measures.rank import *
from feature_erosion.measures.layers import pick_features

quick = settings(max_examples=60, deadline=None, derandomize=True)
sizes,seeds = st.integers(2, 60),st.integers(0, 10**6)
scales = st.sampled_from([1e-6,1e-3,1.,1e3,1e6])

def exact(x, center=True):
    "Singular values by LAPACK in `float64`"
    x = x.double().numpy()
    return scipy.linalg.svdvals(x-x.mean(0) if center else x)

def known(n, d, r, seed, low=-4):
    "Centred features of rank `r`, singular values from 1 to `10**low`, `float64`"
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, r, generator=g, dtype=torch.float64)
    u,v = (torch.linalg.qr(o)[0] for o in (u-u.mean(0), torch.randn(d, r, generator=g, dtype=torch.float64)))
    return u*torch.logspace(0, low if r>1 else 0, r, dtype=torch.float64) @ v.T

def randn(n, d, seed): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

# Spectrum

@quick
@given(sizes, sizes, scales, st.sampled_from([0.,1.,100.]), st.booleans(), st.sampled_from([torch.float32,torch.float64]), seeds)
def test_spectrum_is_that_of_a_decomposition(n, d, scale, mean, center, dtype, seed):
    x = ((randn(n, d, seed)+mean)*scale).to(dtype)
    s,e = spectrum(x, center),exact(x, center)
    assert s.dtype==torch.float64 and s.shape==(min(n, d),)
    np.testing.assert_allclose(s, e, rtol=1e-6, atol=1.1e-7*e[0])
    if center: np.testing.assert_allclose(s[e>.01*e[0]], e[e>.01*e[0]], rtol=2e-9)     # far better than `float32`

@quick
@given(sizes, sizes, st.integers(1, 12), scales, st.sampled_from([0.,100.]), seeds)
def test_rank_by_construction(n, d, r, scale, mean, seed):
    r = min(r, n-1, d)
    x = (known(n, d, r, seed)+mean*.1)*scale       # a common mean of 100 times the spread of an entry and more
    s = spectrum(x)
    assert int((s>0).sum())==r                      # nothing below: noise is exactly zero
    assert [numerical_rank(x, t) for t in (1e-6,1e-5)]==[r,r]
    np.testing.assert_allclose(s[:r], scale*np.logspace(0, -4 if r>1 else 0, r), rtol=1e-5)

@quick
@given(sizes, st.integers(1, 20), st.integers(1, 4), st.integers(0, 5), scales, st.sampled_from([0.,100.]), seeds)
def test_duplicated_and_constant_columns(n, d, times, const, scale, mean, seed):
    x = (randn(n, d, seed)+mean).float()
    cols = torch.cat([x.repeat(1, times), torch.full((n,const), mean+.1)], 1)[:,
        torch.randperm(d*times+const, generator=torch.Generator().manual_seed(seed))]*scale
    e = exact(x)
    for t in 1e-2,1e-3,1e-4:
        if np.abs(e/e[0]/t-1).min()<1e-3: continue   # a value on the edge
        assert numerical_rank(cols, t)==numerical_rank(x, t)==int((e>t*e[0]).sum())

def test_rank_down_to_a_millionth():
    x = known(300, 200, 13, 0, low=-6)               # 1, 10**-.5, …, 10**-6
    assert [numerical_rank(x, 10**-k*.9) for k in range(7)]==[1,3,5,7,9,11,13]
    assert [numerical_rank(x.T-x.T.mean(0), 10**-k*.9) for k in range(1,6)]==[int((exact(x.T)>10**-k*.9*exact(x.T)[0]).sum()) for k in range(1,6)]

@pytest.mark.parametrize('shape', [(3000,8),(8,3000),(2500,1),(2,2500),(1100,1050),(1050,1100)])
def test_blocks(shape):
    x = (randn(*shape, 1)*3+5).float()
    for c in (True,False): np.testing.assert_allclose(spectrum(x, c), exact(x, c), rtol=1e-7, atol=1e-7*exact(x, c)[0])

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half_precision(dtype):
    x = randn(40, 30, 0).to(dtype)
    np.testing.assert_allclose(spectrum(x), exact(x), rtol=1e-9, atol=1e-7*exact(x)[0])

@quick
@given(sizes, sizes, seeds, st.floats(1e-3, 1e3))
def test_invariance(n, d, seed, a):
    g = torch.Generator().manual_seed(seed)
    x = randn(n, d, seed).double()+1
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    s,w = spectrum(x),spectrum(x, center=False)
    for y,k in (x[torch.randperm(n, generator=g)],1), (x[:,torch.randperm(d, generator=g)],1), (x@q,1), (a*x,a), (-x,1):
        for o,c in (s,True),(w,False): np.testing.assert_allclose(spectrum(y, c)/k, o, rtol=1e-6, atol=1.1e-7*o[0])
    np.testing.assert_allclose(spectrum(x+7.), s, rtol=1e-6, atol=1.1e-7*s[0])
    for f in (effective_rank,stable_rank,rankme): np.testing.assert_allclose(f(a*(x@q)), f(x), rtol=1e-4)

def test_input_is_left_alone():
    x = randn(9, 5, 0).requires_grad_()
    y = x.detach().clone()
    spectrum(x); numerical_rank(x); rankme(x)
    assert torch.equal(x.detach(), y) and x.grad is None

@pytest.mark.parametrize('x,msg',
                         [(torch.ones(3,4,dtype=torch.int64),'dtype torch.int64'),
                          (torch.ones(3,4,dtype=torch.bool),'dtype torch.bool'), (torch.ones(3,4,5),r'shape \(3, 4, 5\)'),
                                   (torch.ones(1,4),'at least 2'), (torch.ones(0,4),'at least 2'),
                                   (torch.ones(4,0),'at least 1 feature'), (torch.tensor(3.),'flatten')])
def test_refused(x, msg):
    for f in (spectrum,numerical_rank,effective_rank,stable_rank,rankme,srank):
        with pytest.raises(ValueError, match=f'^x: .*{msg}'): f(x)

@pytest.mark.parametrize('v', [float('nan'),float('inf'),-float('inf')])
@pytest.mark.parametrize('shape', [(5,9),(9,5)])
@pytest.mark.parametrize('at', [(0,0),(3,2),(4,4)])
def test_not_finite_is_refused(v, shape, at):
    x = randn(*shape, 0); x[at] = v
    for f in (spectrum,numerical_rank,effective_rank,stable_rank,rankme,srank):
        with pytest.raises(ValueError, match='^x: has NaN or infinite'): f(x)

# Ranks

@pytest.mark.parametrize('n,d', [(300,40),(60,200),(500,500)])
def test_default_tolerance_is_torchs_for_a_covariance(n, d):
    x = known(n, d, 30, n+d, low=-4).float()*100+3
    cov = torch.cov(x.T)
    assert 1<numerical_rank(x)<30
    assert numerical_rank(x)==int(torch.linalg.matrix_rank(cov, hermitian=True))==int(torch.linalg.matrix_rank(cov))
    assert numerical_rank(x)==numerical_rank(x, tunnel_rtol(d))==numerical_rank(spectrum(x), tunnel_rtol(d))

@quick
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_definitions(values):
    s = np.array(values)
    t = torch.tensor(values, dtype=torch.float64)
    if s.max()<1e-100: return
    p = s/s.sum(); q = p[p>0]; r = p+1e-7
    np.testing.assert_allclose(effective_rank(t), np.exp(-(q*np.log(q)).sum()))
    np.testing.assert_allclose(stable_rank(t), ((s/s.max())**2).sum())
    np.testing.assert_allclose(rankme(t), np.exp(-(r*np.log(r)).sum()))
    k = srank(t)
    big = np.sort(p)[::-1]
    assert big[:k].sum()>=.99-1e-9 and (k==1 or big[:k-1].sum()<.99+1e-9)
    assert 1<=stable_rank(t)<=len(s)+1e-9 and 1-1e-9<=effective_rank(t)<=len(s)+1e-9

def test_published_centring():
    x = randn(50, 8, 0)+30                            # one direction is most of it, unless it is taken off
    assert rankme(x)<1.5 and srank(x, .2)==1 and rankme(x, center=True)>6 and srank(x, .2, center=True)>5 and effective_rank(x)>6
    assert effective_rank(x, center=False)<1.5
    np.testing.assert_allclose([rankme(x),effective_rank(x)],
                               [rankme(torch.tensor(exact(x, False))),effective_rank(torch.tensor(exact(x)))], rtol=1e-6)

@pytest.mark.parametrize('n,d', [(7,3),(3,7)])
@pytest.mark.parametrize('v', [0.,.1,1e30,-3e-30])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
def test_constant_features_have_rank_zero(n, d, v, dtype):
    x = torch.full((n,d), v, dtype=dtype)
    assert [f(x) for f in (numerical_rank,effective_rank,stable_rank)]==[0,0,0]
    assert srank(x, center=True)==rankme(x, center=True)==0
    np.testing.assert_allclose([srank(x),rankme(x)], [v!=0]*2, rtol=1e-4)

# Layer by layer

def fed(x, batch, **kwargs):
    "The row of a `RankMeter` that sees `x` in batches"
    m = RankMeter(**kwargs)
    m.begin({('net','a'):tuple(x.shape[1:])}, len(x))
    for b in x.split(batch):
        m.see('net', 'a', b := b.clone())
        m.end_batch()
        b.fill_(float('nan'))                           # what happens to activations afterwards
    m.end_layer('net', 'a')
    assert not m.got
    return m.rows['net','a']

counts = ['rank','rank_1e-2','rank_1e-3','srank']
def close(a, b):
    assert {k:a[k] for k in counts}=={k:b[k] for k in counts}
    np.testing.assert_allclose([a[k] for k in ('effective','stable','rankme')], [b[k] for k in ('effective','stable','rankme')],
                               rtol=1e-9)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 80), st.integers(1, 40), st.integers(1, 80), scales, st.sampled_from([0.,100.]), seeds)
def test_any_batch_size_and_path(n, d, batch, scale, mean, seed):
    x = (randn(n, d, seed)*torch.arange(1, d+1)**-1.5+mean)*scale
    row = fed(x, batch)
    close(row, fed(x, n))
    close(row, fed(x.double(), batch))
    e = exact(x)
    if np.abs(e/e[0]/1e-3-1).min()>1e-3: assert row['rank_1e-3']==int((e>1e-3*e[0]).sum())
    np.testing.assert_allclose([row['effective'],row['stable'],row['rankme']], [effective_rank(x),stable_rank(x),rankme(x)],
                               rtol=1e-5)
    assert (row['features'],row['used'],row['n'])==(d,d,n) and row['srank']==srank(x)

@pytest.mark.parametrize('n', [30,60,100])
def test_kept_and_summed_agree(n):
    x = randn(n, 60, 0)*torch.arange(1, 61)**-1.+2
    kept,summed = rank._AllRows(x, n),rank._FeatureMoments(x)
    for m in kept,summed:
        for b in x.split(32): m.add(b)
    (S,whole),(T,other) = kept.moments(),summed.moments()
    assert len(S)==min(n, 60) and len(T)==60             # Gram matrix or covariance against covariance
    for a,b in (S,T),(whole(),other()):
        a,b = rank._sigmas(a),rank._sigmas(b)
        np.testing.assert_allclose(a, b[:len(a)], rtol=1e-6, atol=1.1e-7*b[0])
        assert not b[len(a):].any()

def test_bytes_are_what_is_kept():
    for n,d in (10,30),(60,30),(61,30),(1000,30):
        m = RankMeter()
        m.begin({('net','a'):(d,)}, n)
        m.see('net', 'a', randn(n, d, 0))
        kept = [o for o in vars(m.got['net','a']).values() if isinstance(o, torch.Tensor)]
        assert sum(o.numel()*o.element_size() for o in kept)==m.bytes((d,), n)
    assert RankMeter().bytes((64,32,32), 10**6)==RankMeter().bytes((8000,), 16001)<600e6

class Net(nn.Module):
    "A convolution, a layer that is dead, one of rank 3"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv,self.bn,self.dead,self.low,self.drop = nn.Conv2d(3,6,3),nn.BatchNorm2d(6),nn.ReLU(),nn.Linear(6*36,3,bias=False),nn.Dropout(.5)
        self.wide = nn.Linear(3,50)
    def forward(self, x):
        x = self.bn(self.conv(x))
        self.dead(-1-x.abs())
        return self.wide(self.low(self.drop(x.flatten(1))))

def data(n, bs=16):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(randn(n, 3*64, 1).view(n,3,8,8), torch.zeros(n)), bs,
                                       shuffle=True)
layers = ['conv','dead','low','wide']

def test_layers_against_a_plain_forward_pass():
    net,dl = Net().train(),data(40)
    net.bn.eval()
    before,modes,rng = deepcopy(net.state_dict()),[m.training for m in net.modules()],torch.get_rng_state()
    r = layer_rank({'a':net, 'b':deepcopy(net)}, dl, layers, progress=False)
    assert isinstance(r, LayerRank) and r.index.names==['model','layer']
    assert r.index.tolist()==[(m,l) for m in 'ab' for l in layers]
    assert r.attrs['n']==40 and r.attrs['max_features']==8000 and r.attrs['seed']==0 and r.attrs['rtol'] is None
    assert r.attrs['passes']==1
    assert r.loc['a'].equals(r.loc['b'])
    x = dl.dataset.tensors[0]
    with torch.no_grad():
        conv = net.eval().conv(x)
        wide = net(x)
    net.train(); net.bn.eval()
    for l,out in ('conv',conv.flatten(1)),('wide',wide):
        row = r.loc[('a',l)]
        assert row['rank']==numerical_rank(out) and row['rank_1e-3']==numerical_rank(out, 1e-3) and row['features']==out.shape[1]
        np.testing.assert_allclose([row['effective'],row['rankme']], [effective_rank(out),rankme(out)], rtol=1e-4)
    assert r.loc['a','rank'].tolist()[1:]==[0,3,3] and not r.isna().any(axis=None)
    assert [m.training for m in net.modules()]==modes and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())

def test_passes_and_batch_sizes():
    net = Net()
    one = layer_rank(net, data(40), layers, progress=False)
    many = layer_rank(net, data(40, 7), layers, max_memory=4e-5, progress=False)
    assert one.attrs['passes']==1<many.attrs['passes'] and one[counts].equals(many[counts]) and one['limit'].equals(many['limit'])
    np.testing.assert_allclose(one[['effective','stable','rankme']], many[['effective','stable','rankme']], rtol=1e-3)

def test_sampled_features_set_the_tolerance():
    x,idx = torch.zeros(100, 2000),pick_features(2000, 20, 3)
    x[:,idx] = known(100, 20, 20, 0).float()
    row = fed(x, 9, max_features=20, seed=3)
    assert (row['used'],row['features'],row['rank'])==(20,2000,
                                                       int((10**(-4*np.arange(20)/19)>(20*2**-23)**.5).sum()))==(20,2000,numerical_rank(x[:,idx]))

@pytest.mark.parametrize('rank_,n,used,features,why',
                         [(95,101,200,200,'images'), (94,101,200,200,''), (95,300,100,200,'features'), (94,300,100,200,''),
                          (100,300,100,100,''), (99,300,100,100,''),
                                                       (99,101,100,100,'images'), (100,101,100,100,''), (19,20,25,40,'images'),
                                                       (0,2,5,5,''), (1,2,5,5,'images')])
def test_limit(rank_, n, used, features, why): assert rank._limit(rank_, n, used, features)==why

def test_ceilings_are_marked():
    full = lambda n,**kw: layer_rank(nn.Identity(), [(randn(n, 40, 0), torch.zeros(n))], 'leaf', progress=False, **kw).iloc[0]
    assert full(20)[['rank','limit']].tolist()==[19,'images']
    assert full(200)[['rank','limit']].tolist()==[40,'']                       # all there is
    assert full(200, max_features=25)[['rank','used','features','limit']].tolist()==[25,25,40,'features']
    assert full(20, max_features=25)['limit']=='images'
    assert full(20, rtol=.9)['limit']==''                                      # its own tolerance leaves fewer

def test_plot():
    df = layer_rank(dict(before=Net(), after=Net()), data(20), layers, progress=False)
    ax = df.plot()
    assert [t.get_text() for t in ax.get_xticklabels()]==layers and ax.get_ylabel()=='numerical rank' and ax.get_xlabel()=='layer'
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['before','after','too few images']
    lines = {l.get_label():l for l in ax.get_lines()}
    assert (lines['before'].get_marker(),lines['after'].get_marker(),lines['too few images'].get_marker())==('x','o','^')
    assert lines['before'].get_ydata().tolist()==df.loc['before','rank'].tolist()==[19,0,3,3]
    assert lines['too few images'].get_xdata().tolist()==[0,0] and lines['too few images'].get_markerfacecolor()=='none'
    assert [t.get_text() for t in df.plot('stable').get_legend().get_texts()]==['before','after']
    assert df.loc['after'].plot(ax=plt.subplots()[1]).get_lines()
    plt.close('all')

def test_sampled_features_are_fixed():
    net = Net()
    a,b,c = (layer_rank(net, data(100), 'conv', max_features=30, seed=s, progress=False) for s in (0,0,1))
    assert a[counts].equals(b[counts])
    assert abs(a.effective.item()-b.effective.item())<1e-3<abs(a.effective.item()-c.effective.item())
    last = layer_rank(deepcopy(net).to(memory_format=torch.channels_last), data(100), 'conv', max_features=30, progress=False)
    assert abs(a.effective.item()-last.effective.item())<1e-3

def test_errors_name_model_and_layer():
    net = Net()
    with torch.no_grad(): net.low.weight[0,0] = float('inf')
    with pytest.raises(ValueError, match="layer 'low' of 'broken': has NaN or infinite"):
        layer_rank({'ok':Net(), 'broken':net}, data(40), layers, progress=False)
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match='n=1: a rank needs'): layer_rank(net, data(40), n=1, progress=False)
    with pytest.raises(ValueError, match='rtol=0:'): layer_rank(net, data(40), rtol=0, progress=False)
    with pytest.raises(ValueError, match='max_features=0'): layer_rank(net, data(40), max_features=0, progress=False)
    with pytest.raises(ValueError, match="column='ranks': must be one of rank, "):
        layer_rank(Net(), data(40), 'low', progress=False).limits('ranks')
    with pytest.raises(ValueError, match="column='features'"): layer_rank(Net(), data(40), 'low', progress=False).plot('features')
