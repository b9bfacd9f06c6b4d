"Models and batches as people have them: what is measured is right, or refused with a word on what to do."
import io, json, resource, struct, warnings, zipfile
from collections import OrderedDict, namedtuple
from copy import deepcopy
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, timm, torch, torchvision
from fastai.vision.all import (Adam, CrossEntropyLossFlat, DataLoader, DataLoaders, LabelSmoothingCrossEntropyFlat, Lambda, Learner, SGD,
                               accuracy, set_seed)
from torch import nn
from torch.nn import functional as F
from conftest import works
from feature_erosion.measures.attribution import cam_layer, grad_cam
from feature_erosion.batches import TensorAnswer, answer_tensor, evaluating, split_batch
from feature_erosion.measures.cka import cka, layer_cka
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import evaluate
from feature_erosion.mitigations import LwF, _scores, fisher
from feature_erosion.models import create_model, load_weights, restrict_outputs
from feature_erosion.measures.plasticity import dormant_units, grad_norm, hessian_rank, penultimate, plasticity_measures, unit_scores, weight_norm, weight_norms
from feature_erosion.measures.probes import dl_labels, layer_probe
from feature_erosion.measures.rank import effective_rank, layer_rank
from feature_erosion.measures.layers import Features, find_layers, layer_calls, visit
from feature_erosion.recover import _check_last
from feature_erosion.shortcut import find_shortcut
from feature_erosion.unlearning import Scrub
from feature_erosion.watch import WatchErosion, hangs_on

def case(*args, what, how, kind='models'): return pytest.param(*args, marks=works(kind, what, how), id=what)
def features(model, dl, layer, pool=1):
    got = {}
    visit(model, dl, Features(lambda m,l,X: got.update({l:X}), pool=pool), layer, progress=False)
    return next(iter(got.values()))

def watched(m, x, y):
    "What `WatchErosion` saw of a fit that changes nothing"
    learn = Learner(DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=8, num_workers=0), m,
                    loss_func=nn.CrossEntropyLoss())
    w = WatchErosion({'old':[(x,y)]}, budget=1e6, n_layers=8)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(action='ignore'): learn.fit(1, 0., cbs=w)
    return w.history

def close(a, b, tol=1e-4): torch.testing.assert_close(a.detach(), b.detach(), rtol=tol, atol=tol*b.abs().max().item())

# channels

def swin(**kw): return timm.create_model('swin_tiny_patch4_window7_224', img_size=64, window_size=4, num_classes=3, **kw).eval()
def vit(**kw): return timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=3, **kw).eval()

class Recurrent(nn.Module):
    def __init__(self, **kw): super().__init__(); self.rnn,self.lin = nn.GRU(5, 7, batch_first=True),nn.Linear(7, 3)
    def forward(self, x): return self.lin(self.rnn(x)[0][:,-1])

def conv1d(): return nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6*10, 3))
def whole_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm([6,8,8]), nn.ReLU(), nn.Flatten(), nn.Linear(6*64, 3))
def gmlp(): return timm.create_model('gmlp_ti16_224', img_size=64, num_classes=3)
def by_hand_gmlp(m, x):
    got = []
    with m.blocks[0].mlp_channels.fc2.register_forward_pre_hook(lambda _,args: got.append(args[0])): m(x)
    return got[0].mean(1)
def by_hand_rnn(m, x): return m.rnn(x)[0].mean(1)
def by_hand_swin(i): return lambda m,x: m.layers[:i+1](m.patch_embed(x)).mean((1,2))
def by_hand_vit(m, x): return m.forward_intermediates(x, indices=[0], output_fmt='NLC', return_prefix_tokens=True,
    intermediates_only=True)[0]
def tokens_of_vit(m, x):
    maps,prefix = by_hand_vit(m, x)
    return torch.cat([prefix, maps], 1).mean(1)

@pytest.mark.parametrize('make,shape,layer,width,by_hand', [
    case(swin, (3,64,64), 'layers.0', 96, by_hand_swin(0), what='Swin, first stage (timm)',
        how='works: 96 channels, which come last'),
    case(swin, (3,64,64), 'layers.3', 768, by_hand_swin(3), what='Swin, last stage (timm)',
        how='works: 768 channels, which come last'),
    case(lambda: torchvision.models.swin_t(num_classes=3), (3,64,64), 'features.1', 96, lambda m,x: m.features[:2](x).mean((1,
        2)), what='Swin (torchvision)', how='works: channels come last'),
    case(lambda: timm.create_model('convnext_atto', num_classes=3), (3,64,64), 'stages.1', 80, lambda m,
        x: m.stages[:2](m.stem(x)).mean((2,3)),
         what='ConvNeXt', how='works: channels last inside a block, first between blocks'),
    case(vit, (3,64,64), 'blocks.0', 192, tokens_of_vit, what='Vision transformer with class token',
        how='works: tokens are averaged, 192 features'),
    case(lambda: timm.create_model('mixer_s32_224', img_size=64, num_classes=3), (3,64,64), 'blocks.0', 512, lambda m,
        x: m.blocks[0](m.stem(x)).mean(1),
         what='MLP-Mixer', how='works: tokens without class token'),
    case(lambda: timm.create_model('densenet121', num_classes=3), (3,64,64), 'features.denseblock1', 256, lambda m,
        x: m.features[:4](x).mean((2,3)), what='DenseNet, concatenated maps',
         how='works: channels are where the rest of the network has them'),
    case(conv1d, (5,12), '2', 6, lambda m,x: m[:3](x).mean(2), what='Conv1d', how='works: its 6 channels, not the length'),
    case(whole_norm, (3,8,8), '1', 6, lambda m,x: m[:2](x).mean((2,3)), what='LayerNorm over channels, rows and columns',
        how='works: channels are where those of the convolution are'),
    case(gmlp, (3,64,64), 'blocks.0.mlp_channels.norm', 384, by_hand_gmlp, what='gMLP, after its layer that mixes tokens',
        how='works: its 384 channels, not its tokens'),
    case(Recurrent, (12,5), 'rnn', 7, by_hand_rnn, what='Recurrent network, batch first',
        how='works: its output, averaged over time'),
])
def test_channels(make, shape, layer, width, by_hand):
    "Features are averages over places, written down for this network; a probe reads as many, as many units are counted"
    set_seed(0)
    m,x,y = make().eval(),torch.randn(6, *shape),torch.arange(6)%3
    got = features(m, [x], layer)
    with evaluating(m): close(got, by_hand(m, x))
    assert got.shape==(6,width) and len(unit_scores(m, [(x,y)], layer)[layer])==width
    assert layer_probe(m, [(x,y)], [(x,y)], [layer], C=1., progress=False).features.tolist()==[width]

class CReLU(nn.Module):
    def forward(self, x): return torch.relu(torch.cat([x, -x], 1))

class SpaceToDepth(nn.Module):
    def forward(self, x): return F.pixel_unshuffle(x, 2)

class LastAndHalved(nn.Module):
    "A convolution whose output is halved and has channels last"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 8, 3, padding=1)
    def forward(self, x): return F.avg_pool2d(self.conv(x), 2).permute(0, 2, 3, 1)

@pytest.mark.parametrize('make,size,layer,axis', [
    (lambda: torchvision.models.densenet121(num_classes=4), 128, 'features.denseblock1', 1),   # 32 channels grow in maps of 32×32
    (lambda: nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), CReLU(), nn.Conv2d(64, 8, 3)), 32, '1', 1),
    (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), SpaceToDepth(), nn.Conv2d(64, 8, 3)), 32, '1', 1),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), torchvision.ops.Permute([0, 2, 3, 1]), nn.Identity()), 32, '2', 3),
    (lambda: nn.Sequential(LastAndHalved(), nn.Identity()), 32, '1', None),
], ids=['densenet','crelu','space to depth','permuted','permuted and halved'])
def test_maps_as_wide_as_channels_are_many(make, size, layer, axis):
    "A map whose side equals the channels of the layer before has its channels where the rest of the network has them"
    assert layer_calls(make(), torch.randn(2, 3, size, size))[layer].axis==axis

def test_dead_channels_in_maps_as_wide():
    m = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), CReLU(), nn.Conv2d(64, 8, 3), nn.Flatten(), nn.Linear(8*30*30, 4))
    with torch.no_grad():
        for p in m[0].parameters(): p[:16] = 0   # 16 of 32 channels, twice
    d = dormant_units(m, [(torch.randn(8, 3, 32, 32), torch.arange(8)%4)], layers=CReLU).loc['1']
    assert (d.units,d.dormant)==(64,32)

def test_features_in_one_order_whatever_the_layout():
    "An LSTM's last batch of one sample, and grey images that come channels last, lie otherwise in memory"
    set_seed(0)
    m,x = nn.Sequential(nn.LSTM(4, 6, batch_first=True)),torch.randn(9, 5, 4)
    with evaluating(m): want = m(x)[0].transpose(1, 2).flatten(1)
    for bs in (9,8,1): close(features(m, list(x.split(bs)), '0', None), want)
    conv,g = nn.Conv2d(1, 4, 3),torch.randn(8, 1, 8, 8)
    nhwc = g[:,0].clone().unsqueeze(-1).permute(0, 3, 1, 2)
    assert torch.equal(g, nhwc) and g.stride()!=nhwc.stride()
    with evaluating(conv): want = conv(g).flatten(1)
    for o in (g,nhwc,torch.cat([g[:4],nhwc[4:]])): close(features(conv, [o], 'Conv2d', None), want)
    half = layer_rank(conv, [(g[:4],g), (nhwc[4:],g)], 'Conv2d', progress=False)
    assert half['rank_1e-3'].item()==layer_rank(conv, [(g,g)], 'Conv2d', progress=False)['rank_1e-3'].item()

class Merging(nn.Linear):
    "Merges a product into its weights in eval mode, as `loralib` does; the numbers are exact"
    def __init__(self, i, o):
        super().__init__(i, o)
        with torch.no_grad(): self.weight.copy_((self.weight*64).round()/64)
        self.more,self.merged = nn.Parameter(torch.randint(-4, 5, (o,i))/64),False
    def train(self, mode=True):
        super().train(mode)
        if mode==self.merged:
            with torch.no_grad(): self.weight += self.more*(-1 if mode else 1)
            self.merged = not mode
        return self
    def forward(self, x): return super().forward(x)+(0 if self.merged else F.linear(x, self.more))

def test_modules_that_act_on_a_change_of_mode():
    m,x = nn.Sequential(Merging(6, 8), nn.ReLU(), Merging(8, 4)).train(),torch.randn(40, 6)
    m[2].eval()
    want,weight = m(x),m[0].weight.clone()
    layer_rank(m, [(x,torch.arange(40)%4)], progress=False)
    assert (m[0].training,m[0].merged,m[2].training,m[2].merged)==(True,False,False,True)
    close(m[0].weight, weight), close(m(x), want)
    m(x).sum().backward()
    assert m[0].more.grad is not None and m[2].more.grad is None

def test_gradients_where_weights_are_merged():
    "In eval mode the answers would not depend on what was merged, and it would count for nothing"
    x,y = torch.randn(5,6),torch.arange(5)%4
    for make in (nn.Module.train, nn.Module.eval):
        m = make(nn.Sequential(Merging(6, 8), nn.Tanh(), Merging(8, 4)))
        was = {k:v.clone() for k,v in m.state_dict().items()}
        got = fisher(m, [(x,y)])
        assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items()) and {o.merged for o in (m[0],m[2])}=={not m.training}
        plain = deepcopy(m).train()
        each = [torch.autograd.grad(F.cross_entropy(plain(x[[i]]), y[[i]]), list(plain.parameters())) for i in range(5)]
        for f,gs in zip(got.values(), zip(*each)): close(f, torch.stack(gs).square().mean(0))

class Keeping(nn.Linear):
    "Keeps a product of weights in eval mode, until that changes, as LeViT does"
    kept = None
    def train(self, mode=True):
        self.kept = None
        return super().train(mode)
    def forward(self, x):
        if self.training or self.kept is None: self.kept = self.weight*2
        return F.linear(x, self.kept, self.bias)

def test_gradients_where_products_of_weights_are_kept():
    m,x,y = Keeping(6,4).eval(),torch.randn(8,6),torch.arange(8)%4
    g = torch.autograd.grad(F.cross_entropy(F.linear(x, 2*m.weight, m.bias), y), list(m.parameters()))
    close(torch.tensor(grad_norm(m, [(x[:4],y[:4]),(x[4:],y[4:])])), torch.cat([o.flatten() for o in g]).norm())

@pytest.mark.parametrize('make', [lambda: LwF(1.), lambda: Scrub()])
@pytest.mark.parametrize('mode', [True,False])
def test_old_answers_of_merged_weights(make, mode):
    "They are those that the network gives itself, whatever the mode that it was in"
    m,x,cb = nn.Sequential(Merging(6, 4)).train(mode),torch.randn(5,6),make()
    want = m(x).detach()
    cb.learn = SimpleNamespace(model=m, cbs=[], dls=None)
    cb.before_fit() if isinstance(cb, Scrub) else cb.begin()
    close(_scores(m, (x,), cb.old), want)

@pytest.mark.parametrize('mode', [True,False])
def test_good_weights_of_another_mode(mode):
    m,x,cb = nn.Sequential(Merging(6, 4)).train(mode),torch.randn(5,6),WatchErosion(restore=True)
    want = m(x)
    cb.learn = SimpleNamespace(model=m, cbs=[], opt=SimpleNamespace(), create_opt=lambda: None)
    cb._warn(0, {}, None, None, None)
    with torch.no_grad(): m[0].more += 1
    m.train(not mode)
    cb.now,cb._last_look = 1,lambda: None
    cb.after_fit()
    close(m(x), want)

def test_complex_weights_have_a_size():
    "|3+4i| = 5"
    m = nn.ParameterList([nn.Parameter(torch.tensor([3+4j]))])
    assert weight_norm(m)==5 and weight_norms(m).norm.item()==5
    Z = torch.complex(torch.randn(30, 4), torch.randn(30, 4))
    with pytest.raises(ValueError, match='X: dtype torch.complex64; must be real'): cka(Z, Z)

@works('models', 'Sequences with the batch second', 'refused: choose layers with the batch first')
def test_batch_second():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.enc,self.lin = nn.TransformerEncoderLayer(6, 2, 8),nn.Linear(6, 3)
        def forward(self, x): return self.lin(self.enc(x.transpose(0, 1))[0])
    for length in (2,5):    # 2 samples are looked at first: a sequence as long must not pass
        with pytest.raises(ValueError, match='choose layers with the batch first'): layer_rank(Net(), [torch.randn(8, length,
            6)], 'enc', progress=False)

class Padded(nn.Module):
    "PyTorch's transformer on sequences of several lengths"
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True)
        self.emb,self.enc,self.head = nn.Embedding(30, 8, padding_idx=0),nn.TransformerEncoder(layer, 2),nn.Linear(8, 3)
    def forward(self, x):
        pad = x==0
        return self.head((self.enc(self.emb(x), src_key_padding_mask=pad)*~pad[...,None]).sum(1)/(~pad).sum(1, keepdim=True))

@works('models', "Sequences of several lengths in PyTorch's transformer, with `src_key_padding_mask`", 'works')
def test_padded_sequences():
    "In eval mode, PyTorch packs them, and packed sequences have no shape"
    set_seed(0)
    m,x,y = Padded(),torch.randint(1, 30, (24,7)),torch.arange(24)%3
    for i in range(24): x[i,3+i%4:] = 0
    with torch.no_grad(): want = m.enc.layers[0](m.emb(x), src_key_padding_mask=x==0)   # in train mode, without dropout
    for dl in ([(x,y)], [(x[:9],y[:9]),(x[9:],y[9:])]): close(features(m, dl, 'enc.layers.0'), want.mean(1))
    got = penultimate(m, [(x,y)])
    with evaluating(m): close(m.head(got), m(x))
    cka = watched(m, x, y).cka.tolist()
    assert cka==pytest.approx([1.]*len(cka)) and torch.backends.mha.get_fastpath_enabled()

def turned(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), torchvision.ops.Permute([0,2,3,1]), nn.Linear(8, 8),
    nn.Identity(), nn.Flatten(), nn.Linear(512, 3))

@works('models', 'As many channels as rows, channels first and last in one network',
    'refused, and asked for: layers={name: -1}; rank and CKA do not need it')
def test_channels_are_asked_for():
    set_seed(0)
    m,x,y = turned().eval(),torch.randn(9, 3, 8, 8),torch.arange(9)%3
    for f in (lambda layers: features(m, [x], layers), lambda layers: unit_scores(m, [(x,y)], layers),
        lambda layers: layer_probe(m, [(x,y)], [(x,y)], layers, progress=False)):
        with pytest.raises(ValueError, match="layers=\\{'3': 1\\}"): f(['3'])
    with evaluating(m): want = m[:4](x)
    close(features(m, [x], {'3':-1}), want.mean((1,2)))
    close(features(m, [x], {'3':1}), want.mean((2,3)))
    assert len(layer_rank(m, [x], ['3'], progress=False))==1 and layer_cka(m, [x], ['3'], progress=False).shape==(1,1)
    assert cam_layer(m, x, {'3':-1})[2]==(8,8)
    with pytest.raises(ValueError, match='tokens whose rows and columns'): cam_layer(m, x, '3')

class Plain(nn.ReLU): pass

def test_activations_of_ones_own():
    "A subclass of an activation is one"
    set_seed(0)
    m,x = nn.Sequential(nn.Linear(5, 9), Plain(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),torch.randn(8, 5)
    assert dormant_units(m, [x]).units.to_dict()=={'1':9, '3':7}

def test_parametrised_layers():
    "What computes a weight is no layer, even if as many rows come out as there are samples"
    norm = nn.utils.parametrizations
    m = nn.Sequential(norm.spectral_norm(nn.Conv2d(3, 2, 3)), nn.ReLU(), nn.Flatten(), norm.weight_norm(nn.Linear(72, 2)))
    x = torch.randn(2, 3, 8, 8)
    assert list(layer_calls(m, x))==['0','1','2','3']
    assert layer_rank(m, [x], 'leaf', progress=False).index.get_level_values(1).tolist()==['0','1','2','3']

def test_positions_are_no_layer():
    "Some transformers compute them by layers that never see a sample"
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.pos,self.act,self.b = nn.Linear(4, 6),nn.Sequential(nn.Linear(1, 6), nn.ReLU()),nn.ReLU(),nn.Linear(6, 3)
        def forward(self, x): return self.b(self.act(self.a(x)+self.pos(torch.arange(5.).view(1,5,1))).mean(1))
    m,x = Positions(),torch.randn(9,5,4)
    assert find_layers(m, x)==['a','b'] and find_layers(m, x, 'linear')==['a','pos.0','b']
    assert list(unit_scores(m, [x]))==['act'] and len(layer_rank(m, [x], progress=False))==2

def test_attention_is_a_leaf():
    "Its output projection is a module that is never called; without convolutions and linear layers, leaves are the default"
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn,self.norm = nn.MultiheadAttention(8, 2, batch_first=True),nn.Sequential(nn.LayerNorm(8), nn.GELU())
        def forward(self, x): return self.norm(self.attn(x, x, x)[0]).mean(1)
    assert find_layers(Attention(), torch.rand(2,5,8))==['attn','norm.0','norm.1']

@works('models', 'Compiled by torch.jit',
       'refused for layers: give the original module; works as a part of another module, without its layers')
def test_compiled_by_jit():
    set_seed(0)
    m,x = turned().eval(),torch.randn(9, 3, 8, 8)
    for jit in (torch.jit.script(nn.Sequential(m[0], m[2])), torch.jit.trace(m, x)):
        for f in (lambda m: layer_rank(m, [x], progress=False), lambda m: dormant_units(m, [x]), lambda m: grad_cam(m, x)):
            with pytest.raises(ValueError, match='compiled by torch.jit'): f(jit)
        part = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(nn.Sigmoid()), nn.Conv2d(3, 3, 1), jit)
        assert list(layer_calls(part, x))[:2]==['0','2'] and len(layer_rank(part, [x], progress=False))==2

def test_no_module_is_called():
    class Functional(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(5, 3)
        def forward(self, x): return F.linear(x, self.lin.weight)
    with pytest.raises(ValueError, match='layers=None: no convolution'):
        layer_rank(Functional(), [torch.randn(8, 5)], progress=False)

# Grad-CAM

def cam_by_hand(acts, rest, x, target=None):
    "Of activations `(batch, rows, columns, channels)`, and the network after them; class tokens go in unchanged"
    A = acts.detach().requires_grad_()
    out = rest(A)
    out.gather(1, out.argmax(1, keepdim=True)).sum().backward()
    maps = (A.grad.mean((1,2), keepdim=True)*A).sum(-1).relu()
    return F.interpolate(maps[:,None], x.shape[2:], mode='bilinear')[:,0].detach()

@works('models', 'Grad-CAM of a Swin', 'works: a 2×2 map of 768 channels')
def test_cam_of_swin():
    set_seed(0)
    m,x = swin(),torch.randn(2, 3, 64, 64)
    acts = m.layers(m.patch_embed(x))
    assert acts.shape==(2,2,2,768) and cam_layer(m, x, 'layers.3')[2]==(2,2)
    close(grad_cam(m, x, layer='layers.3'), cam_by_hand(acts, lambda A: m.forward_head(m.norm(A)), x))
    close(grad_cam(m, x), cam_by_hand(m.norm(acts), m.forward_head, x))

@works('models', 'Grad-CAM of a vision transformer with class token',
    'works: its tokens are a map again, before the last attention')
def test_cam_of_vit():
    set_seed(0)
    m,x = vit(),torch.randn(2, 3, 64, 64)
    tokens = m.blocks[:-1](m.norm_pre(m._pos_embed(m.patch_embed(x)))).detach()
    last = m.blocks[-1]
    normed = last.norm1(tokens).detach()
    def rest(A):
        t = tokens + last.attn(torch.cat([normed[:,:1], A.flatten(1, 2)], 1))
        return m.forward_head(m.norm(t + last.mlp(last.norm2(t))))
    assert cam_layer(m, x)[0]=='blocks.11.norm1'
    close(grad_cam(m, x), cam_by_hand(normed[:,1:].unflatten(1, (4,4)), rest, x))
    close(grad_cam(m, x, layer={'blocks.11.norm1':(4,4)}), grad_cam(m, x))
    with pytest.raises(ValueError, match='only the class token is read'): grad_cam(m, x, layer='blocks.11')

@works('models', 'Gradient checkpoints, `set_grad_checkpointing()` (timm)', 'works: the same map')
def test_cam_with_checkpoints():
    set_seed(0)
    m,x = vit(depth=2),torch.randn(3, 3, 64, 64)
    for layer in (None, 'blocks.0.norm2', 'blocks.0', 'blocks.0.attn.proj'):
        m.set_grad_checkpointing(False)
        want = grad_cam(m, x, layer=layer)
        m.set_grad_checkpointing()
        close(grad_cam(m, x, layer=layer), want)

@works('models', 'Grad-CAM of a vision transformer without class token', 'works: the last tokens before they are averaged')
def test_cam_of_gap_vit():
    set_seed(0)
    m,x = vit(class_token=False, global_pool='avg'),torch.randn(2, 3, 64, 96)   # 4 × 6 patches
    m.set_input_size((64,96))
    tokens = m.forward_features(x)
    assert cam_layer(m, x)[2]==(4,6)
    close(grad_cam(m, x), cam_by_hand(tokens.unflatten(1, (4,6)), lambda A: m.forward_head(A.flatten(1, 2)), x))

def test_cam_of_a_head_of_zeros():
    "torchvision's transformers begin so: nothing is supported yet, which is no fault of the layer"
    set_seed(0)
    m,x = torchvision.models.VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=3).eval(),torch.randn(2, 3, 32, 32)
    assert not grad_cam(m, x).any()
    nn.init.normal_(m.heads.head.weight)
    assert grad_cam(m, x).any()
    late = 'encoder.layers.encoder_layer_1.mlp'
    with pytest.raises(ValueError, match='only the class token is read'): grad_cam(m, x, layer=late)

def test_cam_where_one_token_is_left():
    "It is no map: the last one is before the tokens are joined"
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.join,self.head = nn.Conv2d(3, 4, 8, 8),nn.Linear(16, 6),nn.Linear(6, 3)
        def forward(self, x): return self.head(self.join(self.conv(x).flatten(1)[:,None])).mean(1)
    assert cam_layer(Joined(), torch.randn(2, 3, 16, 16))[::2]==('conv', (2,2))

@works('models', 'Grad-CAM of a TNT, tokens within tokens', 'refused: asks for a layer and its rows and columns; works with them')
def test_cam_of_tnt():
    set_seed(0)
    m,x = timm.create_model('tnt_s_patch16_224', img_size=64, num_classes=3).eval(),torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match='name a `layer` with maps'): grad_cam(m, x)
    acts = {}
    hook = m.blocks[-1].norm_out.register_forward_hook(lambda _,i,o: acts.update(tokens=o.detach()))
    m(x)
    hook.remove()
    def rest(A):
        "The last block again, with other normalised tokens than its own"
        normed = torch.cat([acts['tokens'][:,:1], A.flatten(1, 2)], 1)
        hook = m.blocks[-1].norm_out.register_forward_hook(lambda *_: normed)
        try: return m(x)
        finally: hook.remove()
    close(grad_cam(m, x, layer={'blocks.11.norm_out':(4,4)}), cam_by_hand(acts['tokens'][:,1:].unflatten(1, (4,4)), rest, x))

def test_cam_of_convolutions_is_captums():
    from captum.attr import LayerGradCam
    set_seed(0)
    m,x = torchvision.models.resnet18(num_classes=3).eval(),torch.randn(2, 3, 64, 64)
    maps = LayerGradCam(m, m.layer4).attribute(x, m(x).argmax(1), relu_attributions=True)
    close(grad_cam(m, x), LayerGradCam.interpolate(maps, (64,64), 'bilinear')[:,0].detach())

class Encoder(nn.Module):
    def __init__(self, answer): super().__init__(); self.c,self.answer = nn.Conv2d(3, 8, 3),answer
    def forward(self, x): return self.answer(self.c(x).relu())

class Net(nn.Module):
    "A network whose body answers with more than a tensor"
    def __init__(self, answer, take): super().__init__(); self.e,self.f,self.take = Encoder(answer),nn.Linear(8, 4),take
    def forward(self, x): return self.f(self.take(self.e(x)).mean((2,3)))

Named = __import__('collections').namedtuple('Named', 'maps aux')

@pytest.mark.parametrize('answer,take', [
    case(lambda t: (t, None), lambda o: o[0], what='A layer that answers (tensor, None)', how='works: the tensor'),
    case(lambda t: Named(t, t.mean((2,3))), lambda o: o.maps, what='A layer that answers with a named tuple',
        how='works: its first tensor'),
    case(lambda t: OrderedDict(aux=t.mean((2,3)), out=t), lambda o: o['out'], what='A layer that answers with a dictionary',
        how="works: its 'out' or 'logits', else its first tensor"),
    case(lambda t: [None, [t]], lambda o: o[1][0], what='A layer that answers with a list', how='works: the first tensor in it')])
def test_layers_with_several_outputs(answer, take):
    set_seed(0)
    m,x = Net(answer, take),torch.randn(6, 3, 16, 16)
    close(grad_cam(m, x, layer='e'), cam_by_hand(m.e.c(x).relu().permute(0,2,3,1), lambda A: m.f(A.mean((1,2))), x))
    close(grad_cam(m, x), grad_cam(m, x, layer='e'))
    assert features(m, [x], 'e').shape==(6,8)

# answers

class ModelOutput(OrderedDict):
    "As in transformers: entries are attributes too"
    def __init__(self, **kw): super().__init__(**kw); self.__dict__.update(kw)

class Answers(nn.Module):
    def __init__(self, answer): super().__init__(); self.lin,self.answer = nn.Linear(6, 3),answer
    def forward(self, x): return self.answer(self.lin(x), x)

answers = [
    case(lambda s,x: ModelOutput(logits=s, hidden_states=(x,x)), what="Hugging Face's ModelOutput", how='works: its logits'),
    case(lambda s,x: SimpleNamespace(logits=s, hidden=x), what='An object with logits', how='works: its logits'),
    case(lambda s,x: OrderedDict(out=s, aux=s*0), what="A dictionary with 'out' and 'aux', as torchvision's", how="works: 'out'"),
    case(lambda s,x: torchvision.models.GoogLeNetOutputs(s, s*0, s*0), what="torchvision's auxiliary heads",
        how='works: the logits; auxiliary heads are left out'),
    case(lambda s,x: (s, (x,x)), what='Scores and hidden states in a tuple', how='works: the only tensor')]

@pytest.mark.parametrize('answer', answers)
def test_models_that_answer_with_more(answer):
    "As the same network that answers with the tensor"
    set_seed(0)
    ds = list(zip(torch.randn(24, 6), torch.arange(24)%3))
    dls,m = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu'),Answers(answer)
    plain = m.lin
    assert evaluate(m, dls.valid)==evaluate(plain, dls.valid)
    assert grad_norm(m, dls.valid)==pytest.approx(grad_norm(plain, dls.valid), rel=1e-6)
    close(penultimate(m, dls.valid), torch.stack([x for x,_ in ds]))
    learn = Learner(dls, m, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, metrics=accuracy, cbs=TensorAnswer())
    before = m.lin.weight.clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.values[-1][-1]==pytest.approx(evaluate(m, dls.valid)['accuracy']) and not torch.equal(before,
        m.lin.weight)

@pytest.mark.parametrize('answer', [case(lambda s,x: (s, x), what='A tuple of two tensors',
    how='refused: wrap the model in one that returns one tensor'),
    case(lambda s,x: ModelOutput(last_hidden_state=s, pooler_output=x), what='A dictionary of two tensors without logits',
        how='refused: wrap the model in one that returns one tensor')])
def test_models_whose_answer_is_not_clear(answer):
    dl,m = [(torch.randn(8, 6), torch.arange(8)%3)],Answers(answer)
    for f in (evaluate, grad_norm):
        with pytest.raises(ValueError, match='answers with .* Wrap the model'): f(m, dl)
    assert layer_rank(m, dl, 'lin', progress=False).features.tolist()==[3]    # its layers can be measured

# wrapped and half

def data(n=12, size=32): return [(torch.randn(n, 3, size, size), torch.arange(n)%10)]

@pytest.mark.parametrize('wrap', [case(lambda m: torch.compile(m, backend='eager'),
    what='A model that was compiled by torch.compile', how='works: measured as it is written'),
    case(nn.DataParallel, what='nn.DataParallel', how='works: the module inside'),
    case(lambda m: torch.compile(nn.DataParallel(m), backend='eager'), what='A compiled nn.DataParallel',
        how='works: the module inside'),
    case(lambda m: m.compile(backend='eager') or m, what='model.compile()', how='works: measured as it is written')])
def test_wrapped(wrap):
    "All numbers are those of the model itself, and it stays compiled"
    set_seed(0)
    m,dl = create_model('resnet20', 10, width=.25).eval(),data()
    measures = (lambda m: layer_cka(m, dl, progress=False), lambda m: layer_rank(m, dl, progress=False),
        lambda m: dormant_units(m, dl), lambda m: layer_probe(m, dl, dl, C=1., progress=False))
    want,maps = [f(m) for f in measures],grad_cam(m, dl[0][0][:2])
    w = wrap(m)
    w(dl[0][0])
    for f,t in zip(measures, want): assert f(w).equals(t)
    assert torch.equal(grad_cam(w, dl[0][0][:2]), maps) and evaluate(w, dl)==evaluate(m, dl)

@pytest.mark.filterwarnings('ignore:.*NO_SHARD')
@works('models', 'A model in pieces on several processes (FSDP, `fully_shard`)', 'refused: says how to gather it')
def test_sharded(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh('cpu', (1,))
        for shard in (lambda m: FullyShardedDataParallel(m, device_id=torch.device('cpu')), lambda m: fully_shard(m, mesh=mesh)):
            m = shard(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)))
            for measure in (layer_rank, layer_cka):
                with pytest.raises(ValueError, match='sharded over several processes. Gather them'):
                    measure(m, data(), progress=False)
    finally: dist.destroy_process_group()

@works('models', 'A block inside that was compiled', 'works: its layers are seen')
def test_compiled_inside():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), torch.compile(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3)), backend='eager'),
        nn.Flatten(), nn.LazyLinear(10)).eval()
    dl = data()
    m(dl[0][0])
    assert list(layer_rank(m, dl, 'conv', progress=False).features)==[4*30*30,5*28*28]

@pytest.mark.parametrize('dtype', [case(torch.bfloat16, what='A bfloat16 model', how='works: float images are cast to it'),
    case(torch.float16, what='A float16 model', how='works: float images are cast to it'),
    case(torch.float64, what='A float64 model', how='works: float images are cast to it')])
def test_other_precisions(dtype):
    set_seed(0)
    m,dl = create_model('resnet20', 10, width=.25).eval(),data(24)
    h,tol = create_model(m, 10).to(dtype),{torch.bfloat16:.1, torch.float16:.02, torch.float64:1e-4}[dtype]
    for f in (grad_norm, lambda m,dl: layer_cka(m, dl, ['layer1.0','layer3.2'], progress=False).iloc[0,1], lambda m,
        dl: penultimate(m, dl).norm().item()):
        assert f(h, dl)==pytest.approx(f(m, dl), rel=tol)
    assert evaluate(h, dl)['accuracy']==pytest.approx(evaluate(m, dl)['accuracy'], abs=.1) and grad_cam(h,
        dl[0][0][:2]).isfinite().all()
    assert all(p.dtype==dtype for p in h.parameters())

# penultimate

@pytest.mark.parametrize('make,features', [case(swin, lambda m,x: m.forward_head(m.forward_features(x), pre_logits=True),
    what='Penultimate features of a Swin', how='works: pooled features before the head'),
    case(vit, lambda m,x: m.forward_head(m.forward_features(x), pre_logits=True),
        what='Penultimate features of a vision transformer', how='works: the class token before the head'),
    case(lambda: timm.create_model('convnext_atto', num_classes=3), lambda m,x: m.forward_head(m.forward_features(x),
        pre_logits=True), what='Penultimate features of a ConvNeXt', how='works: pooled features before the head')])
def test_penultimate(make, features):
    set_seed(0)
    m,x = make().eval(),torch.randn(5, 3, 64, 64)
    got = penultimate(m, [(x, torch.arange(5)%3)])
    with evaluating(m): close(got, features(m, x)); close(m.get_classifier()(got), m(x))

class TwoHeads(nn.Module):
    "Two layers of equal width in a row lie before its heads"
    def __init__(self, beside=None):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4))
        self.a,self.b,self.beside = nn.Linear(4, 4),nn.Linear(192, 4),beside
    def forward(self, x):
        z = self.a(self.body(x))+self.b(x.flatten(1)).relu()
        return z if self.beside is None else z+self.beside(x)

def distilled(): return timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, num_classes=3, depth=2)

@pytest.mark.parametrize('make,features', [
    case(distilled, lambda m,x: m.forward_features(x)[:,:2].flatten(1),
         what='Penultimate features of a network with several heads, as a distilled DeiT', how='works: what all its heads read'),
    (TwoHeads, lambda m,x: torch.cat([m.body(x), x.flatten(1)], 1))])
def test_features_of_several_heads(make, features):
    set_seed(0)
    m,x = make().eval(),torch.randn(5, 3, 64, 64) if make is distilled else samples()[0]
    y = torch.arange(len(x))%3
    got = penultimate(m, [(x,y)])
    with evaluating(m): close(got, features(m, x))
    close(penultimate(m, list(zip(x.split(1), y.split(1)))), got)   # one sample at a time shows the heads, too
    rank = watched(m, x, y)['rank'].tolist()
    assert rank==pytest.approx([effective_rank(got)]*len(rank), rel=1e-4)
    with pytest.raises(ValueError, match='with several heads'): _check_last(m, [(x,y)])

@works('models', 'Penultimate features where more than linear layers gives the scores', 'refused: there is no one layer before them')
def test_scores_from_elsewhere():
    m,(x,y,_) = TwoHeads(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), Lambda(lambda x: x[:,:4]))),samples()
    with pytest.raises(ValueError, match="TwoHeads has scores that do not come from 'b', its last linear layer, alone"):
        penultimate(m, [(x,y)])
    with pytest.raises(ValueError, match="do not come from 'b'"): penultimate(m, list(zip(x.split(1), y.split(1))))
    with pytest.raises(ValueError, match="does not know 'old', and has no finite features"): watched(m, x, y)

class ByName(nn.Module):
    def __init__(self): super().__init__(); self.body,self.head = nn.Linear(192, 16),nn.Linear(16, 4)
    def forward(self, x): return self.head(input=self.body(x.flatten(1)).relu())

@works('models', 'A head that is called by keyword, `self.head(input=x)`', 'works')
def test_head_called_by_keyword():
    set_seed(0)
    m,(x,y,_) = ByName().eval(),samples()
    got = penultimate(m, [(x,y)])
    with evaluating(m): close(got, m.body(x.flatten(1)).relu())
    rank = watched(m, x, y)['rank'].tolist()
    assert rank==pytest.approx([effective_rank(got)]*len(rank), rel=1e-4)

def test_autocast_around_a_measure():
    "The network may compute in half precision, the measure does not"
    class Full(nn.Module):
        def __init__(self): super().__init__(); self.net = flat_net()
        def forward(self, x):
            with torch.autocast('cpu', enabled=False): return self.net(x)
    for f in (lambda: layer_cka(Full(), [(x,y)], estimator='full', progress=False),
              lambda: layer_probe(Full(), [(x,y)], [(x,y)], solver='authors', progress=False).accuracy):
        want = f()
        with torch.autocast('cpu', torch.bfloat16): assert f().equals(want)

# names

@works('models', 'Models with integers as names', 'works: between(10, 0) means these names')
def test_integer_names():
    set_seed(0)
    def net(): return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    models,x = {10:net(), 0:net(), 5:net()},torch.randn(40, 12)
    C = layer_cka(models, [x], progress=False)
    named = layer_cka({f'm{k}':m for k,m in models.items()}, [x], progress=False)
    for a in (10,0,5):
        for b in (10,0,5): assert np.array_equal(C.between(a, b), named.between(f'm{a}', f'm{b}')) and (C.same_layer(a,
            b)==named.same_layer(f'm{a}', f'm{b}')).all()
    assert np.array_equal(C.between(), C.between(10, 5)) and np.array_equal(C.between(b=0), C.between(10, 0))
    with pytest.raises(ValueError, match='no model 1; there are 10, 0, 5'): C.between(1)
    import matplotlib.pyplot as plt
    assert C.plot(10, 0).get_xlabel()=='layer, 0' and {o.get_text() for o in layer_rank(models, [x],
        progress=False).plot().get_legend().texts}>={'10','0','5'}
    plt.close('all')

@works('models', 'Models with integers as names, and a dead layer', 'works: a warning names the layer')
def test_integer_names_with_a_dead_layer():
    def net(): return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match='1/0, 1/2, 2/0, 2/2'): C = layer_cka({1:net(), 2:net()}, [torch.zeros(8, 12)],
        progress=False)
    assert (C.values==0).all()

# heads

@pytest.mark.parametrize('make', [case(lambda: timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=0),
    what='A headless vision transformer (timm)', how="works: it gets a head by timm's own method"),
    case(lambda: timm.create_model('resnet18', num_classes=0), what='A headless ResNet (timm)',
        how="works: it gets a head by timm's own method"),
    case(lambda: timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, num_classes=5),
        what='A model with two heads (timm)', how='works: both are made anew')])
def test_timm_makes_the_head(make):
    set_seed(0)
    old = make().eval()
    m,x = create_model(old, 7).eval(),torch.randn(2, 3, 64, 64)
    assert m(x).shape==(2,7)
    close(m.forward_features(x), old.forward_features(x))     # nothing else was replaced

@works('models', "A head of one's own on a timm model, or a restricted one", 'works: it stays where it has the outputs wanted')
def test_a_head_given_to_a_timm_model_stays():
    "`num_classes` still says how many outputs it was made with"
    m = timm.create_model('resnet10t', num_classes=1000)
    some = restrict_outputs(m, [1,5,9])
    close(create_model(some, 3).fc.weight, m.fc.weight[[1,5,9]])
    for own in (nn.Linear(512,3), nn.Sequential(nn.Dropout(), nn.Linear(512,3))):
        m.fc = own
        for a,b in zip(create_model(m, 3).fc.parameters(), own.parameters(), strict=True): close(a, b)
        assert create_model(m, 1000).fc.out_features==1000
    m = timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, num_classes=1000, depth=1)
    m.head,m.head_dist = nn.Linear(192,3),nn.Linear(192,3)
    close(create_model(m, 3).head_dist.weight, m.head_dist.weight)

def without(m, name): setattr(m, name, nn.Identity()); return m
def cut_vgg():
    m = torchvision.models.vgg11(num_classes=10)
    m.classifier[-1] = nn.Identity()
    return m

@pytest.mark.parametrize('make', [case(lambda: without(torchvision.models.vit_b_32(image_size=64), 'heads'),
    what='A headless vision transformer (torchvision)', how='refused: put a head on it'),
    case(lambda: without(torchvision.models.resnet18(), 'fc'), what='A headless ResNet (torchvision)',
        how='refused: put a head on it'),
    case(cut_vgg, what='A VGG whose last layer was taken out', how='refused: put a head on it'),
    case(lambda: torchvision.models.squeezenet1_1(num_classes=5), what='A convolution as head, for other classes',
        how='refused: create it with the outputs wanted')])
def test_headless(make):
    m = make()
    with pytest.raises(ValueError, match='arch: .* put a head on it'): create_model(m, 10)

def test_a_head_on_a_backbone():
    back,x = without(torchvision.models.resnet18(), 'fc'),torch.randn(2, 3, 64, 64)
    m = create_model(nn.Sequential(back, nn.Flatten(), nn.Linear(512, 4)), 10)
    assert m(x).shape==(2,10) and m[0].layer4[1].conv2.weight.shape==back.layer4[1].conv2.weight.shape
    for make in (lambda: torchvision.models.squeezenet1_1(num_classes=10), lambda: nn.Sequential(nn.Flatten(),
        nn.Linear(3*64*64, 10), nn.Softmax(1))):
        assert create_model(make, 10)(x).shape==(2,10)
    with pytest.raises(ValueError, match='seems to have no head'): restrict_outputs(timm.create_model('vit_tiny_patch16_224',
        num_classes=0), [0,1])

# weights files

def small(): return create_model('resnet20', 10, width=.2)
def same_weights(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle'])
@pytest.mark.parametrize('opt', [SGD, Adam])
@works('models', 'What learn.save writes, with the optimiser', 'works: the weights are loaded, nothing is unpickled')
def test_saved_by_fastai(tmp_path, opt, fit):
    learn = Learner(digits_dls(n=64, n_valid=32, bs=16), small(), path=tmp_path, opt_func=opt)
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(1)
    assert same_weights(learn.model, load_weights(small(), learn.save('m', with_opt=True)))
    assert same_weights(learn.model, create_model('resnet20', 10, width=.2, weights=learn.save('m')))

def prefixed(p, d): return {p+k:v for k,v in d.items()}

@pytest.mark.parametrize('wrap', [case(lambda d: {'model_state_dict':d, 'epoch':3}, what='Weights in model_state_dict',
    how='works'), case(lambda d: {'net':prefixed('module.', d), 'acc':91.}, what='Weights in net, of DataParallel', how='works'),
    case(lambda d: {'state_dict':prefixed('model.', d)}, what='Weights of a Lightning module (model.)', how='works'),
        case(lambda d: prefixed('module._orig_mod.', d), what='Weights of a compiled, distributed model', how='works'),
    case(lambda d: prefixed('net.', d), what='Weights with the prefix net.', how='works')])
@pytest.mark.parametrize('new', [True,False])
def test_wrappings(tmp_path, wrap, new):
    m = small()
    torch.save(wrap(m.state_dict()), tmp_path/'w.pth', _use_new_zipfile_serialization=new)
    assert same_weights(m, load_weights(small(), tmp_path/'w.pth'))

@works('models', 'Several sets of weights in a file', 'refused: save the one that is meant')
def test_several_sets(tmp_path):
    m = small()
    torch.save({'model':m.state_dict(), 'net':m.state_dict()}, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='several sets, in model and net'): load_weights(small(), tmp_path/'w.pth')
    lin = nn.Sequential(OrderedDict(net=nn.Linear(2, 2)))       # a model whose own names begin like a wrapping
    torch.save(lin.state_dict(), tmp_path/'n.pth')
    assert same_weights(lin, load_weights(nn.Sequential(OrderedDict(net=nn.Linear(2, 2))), tmp_path/'n.pth'))

class Rebuilt:
    "Pickles as a call of `f`"
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f,self.args

def tensor_of(size, stride): return Rebuilt(torch._utils._rebuild_tensor_v2, torch.zeros(4).storage(), 0, size, stride, False,
    OrderedDict())

def saved(o, new=True):
    f = io.BytesIO()
    torch.save(o, f, _use_new_zipfile_serialization=new)
    return f.getvalue()

def many(n): return b'\x8a\x06'+n.to_bytes(6, 'little')
def lying(o, new):
    "`o`, which has a storage of 1,234,567 numbers, claims 10¹³"
    old,claim = b'J'+(1234567).to_bytes(4, 'little'),many(10**13)
    if not new: return saved(o, False).replace(old, claim)
    return repacked(saved(o), lambda name,b: b.replace(old, claim) if name.endswith('data.pkl') else b)

def repacked(raw, change, compress=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as a, zipfile.ZipFile(out, 'w', compress) as b:
        for o in a.namelist(): b.writestr(o, change(o, a.read(o)))
    return out.getvalue()

def safetensors(header, body=b'\0'*16, size=None):
    h = json.dumps(header).encode()
    return struct.pack('<Q', len(h) if size is None else size)+h+body

def tensor(shape, end): return {'a':{'dtype':'F32', 'shape':shape, 'data_offsets':[0,end]}}

ok = {'a':torch.zeros(1234567, dtype=torch.uint8)}
@pytest.mark.parametrize('name,make', [
    case('z.pth', lambda: repacked(saved({'a':torch.zeros(10**7)}), lambda n,b: b, zipfile.ZIP_DEFLATED),
        what='A zip that unpacks to a thousand times its size', how='refused: it claims more than it holds'),
    case('s.pth', lambda: saved({'a':torch.zeros(1).expand(10**12)}),
        what='A tensor of stride 0 that is larger than its storage', how='refused: it claims more than it holds'),
    case('r.pth', lambda: saved({'a':tensor_of((10**12,), (1,))}), what='A tensor that reaches beyond its storage',
        how='refused: it claims more than it holds'),
    case('o.pth', lambda: saved({'a':tensor_of((10**12,), (1,))}, False), what='A tensor that reaches beyond its storage, in the old format',
        how='refused: it claims more than it holds'),
    case('l.pth', lambda: lying(ok, False), what='A storage of terabytes in the old format',
        how='refused: it claims more than it holds'),
    case('n.pth', lambda: lying(ok, True), what='A storage of terabytes in a zip', how='refused: it claims more than it holds'),
    case('b.pth', lambda: saved({'a':Rebuilt(bytearray, 10**13)}), what='A pickle that makes a large object of a number',
        how='refused: it claims more than it holds'),
    case('t.pth', lambda: saved({'a':Rebuilt(torch.FloatTensor, 10**13)}, False),
        what='A pickle that makes a large tensor of a number', how='refused: it claims more than it holds'),
    case('h.safetensors', lambda: safetensors(tensor([10**6,10**6], 4*10**12)),
        what='Safetensors with a header that claims terabytes', how='refused: not a weights file'),
    case('i.safetensors', lambda: safetensors(tensor([10**6,10**6], 16)), what='Safetensors whose shape is not its data',
        how='refused: not a weights file'),
    case('j.safetensors', lambda: safetensors(tensor([4], 16), size=2**50), what='Safetensors with a header of a petabyte',
        how='refused: not a weights file')])
def test_weights_that_claim_too_much(tmp_path, name, make):
    "A clear word, at once, without the memory"
    (tmp_path/name).write_bytes(make())
    m = small()
    before,peak = {k:v.clone() for k,v in m.state_dict().items()},resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='made to exhaust memory|is not a weights file'): load_weights(m, tmp_path/name)
    if name.endswith('.pth'):
        with pytest.raises(ValueError, match='made to exhaust memory'): create_model('resnet20', 10, weights=tmp_path/name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-peak < 200_000 and all(torch.equal(v, before[k]) for k,
        v in m.state_dict().items())

def test_honest_weights_load(tmp_path):
    "Views that share a storage, empty ones, all types, both formats"
    base = torch.arange(24.)
    sd = dict(a=base[:6].view(2,3), b=base[6:18].view(3,4).t(), c=torch.zeros(0,3), d=torch.tensor(3), e=base.bfloat16(),
        f=base.half(), g=base.bool(), h=base.to(torch.complex64), i=nn.Parameter(base.clone()))
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            for k,v in sd.items(): self.register_buffer(k, torch.zeros_like(v.detach()))
    for new in (True,False):
        torch.save(sd, tmp_path/'w.pth', _use_new_zipfile_serialization=new)
        got = load_weights(Holds(), tmp_path/'w.pth')
        assert all(torch.equal(getattr(got, k), v) for k,v in sd.items())

@pytest.mark.parametrize('new', [True,False])
def test_code_in_weights_does_not_run(tmp_path, new):
    import os
    (tmp_path/'evil.pth').write_bytes(saved({'model':Rebuilt(os.mkdir, str(tmp_path/'owned'))}, new))
    with pytest.raises(ValueError, match='was not unpickled'): load_weights(small(), tmp_path/'evil.pth')
    assert not (tmp_path/'owned').exists()

# batches

class WithMeta(torch.utils.data.DataLoader): n_inp = 1
def flat_net(): set_seed(0); return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
def samples(n=24):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=g),torch.arange(n)%4,torch.arange(n)+100

def fastai_dl(*parts, n_inp, **kw):
    dl = DataLoader(list(zip(*parts)), bs=8, **kw)
    dl.n_inp = n_inp
    return dl

def same_ranks(m, a, b):
    "To rounding: on some processors, products of 8 rows are not those of 24 to the last bit"
    a,b = (layer_rank(m, dl, progress=False) for dl in (a, b))
    pd.testing.assert_frame_equal(a, b, rtol=1e-5)

x,y,meta = samples()
batches = [list(o) for o in zip(*(o.split(8) for o in (x,y)))]

@pytest.mark.parametrize('make', [
    case(lambda: batches, what='A list of batches [x, y]', how='works', kind='loaders'),
        case(lambda: [tuple(b) for b in batches], what='A list of batches (x, y)', how='works', kind='loaders'),
    case(lambda: WithMeta(list(zip(x, y, meta)), batch_size=8), what='(x, y, metadata) from PyTorch, n_inp=1',
        how='works: y is the label, metadata are left out', kind='loaders'),
    case(lambda: fastai_dl(x, y, meta, n_inp=1), what='(x, y, metadata) from fastai, n_inp=1',
        how='works: y is the label, metadata are left out', kind='loaders'),
    case(lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8), what='A PyTorch DataLoader',
        how='works', kind='loaders'),
    case(lambda: fastai_dl(x, y, n_inp=1), what='A fastai DataLoader', how='works', kind='loaders')])
def test_batch_forms(make):
    "All measures read the same inputs and labels"
    m,dl,want = flat_net(),make(),[(x,y)]
    same_ranks(m, dl, want)
    assert np.allclose(layer_cka(m, dl, estimator='full', progress=False), layer_cka(m, want, estimator='full',
        progress=False), atol=1e-6)
    assert dl_labels(dl).tolist()==y.tolist() and evaluate(m, dl)['accuracy']==pytest.approx(evaluate(m, want)['accuracy'])
    assert grad_norm(m, dl)==pytest.approx(grad_norm(m, want), rel=1e-5) and dormant_units(m, dl).equals(dormant_units(m, want))
    close(penultimate(m, dl), penultimate(m, want), 1e-5)
    assert layer_probe(m, dl, dl, C=1., progress=False).accuracy.tolist()==pytest.approx(layer_probe(m, want, want, C=1.,
        progress=False).accuracy.tolist())

@pytest.mark.parametrize('make', [case(lambda: list(x.split(8)), what='A list of tensors, without labels',
    how='works where no label is needed', kind='loaders'),
    case(lambda: [(o,) for o in x.split(8)], what='Batches (x,), without labels',
        how='works where no label is needed', kind='loaders'),
    case(lambda: fastai_dl(x, n_inp=1), what='A loader without labels', how='works where no label is needed', kind='loaders')])
def test_batches_without_labels(make):
    m,dl = flat_net(),make()
    same_ranks(m, dl, [x])
    assert layer_cka(m, dl, progress=False).attrs['n']==24
    assert dormant_units(m, dl).equals(dormant_units(m, [x])) and penultimate(m, dl).shape==(24,16)
    for f in (evaluate, grad_norm, lambda m,dl: layer_probe(m, dl, dl)):
        with pytest.raises(ValueError, match='dl: batches have no (labels|targets)'): f(m, dl)

class Image(nn.Module):
    "Takes something else if one likes, as Hugging Face's models do"
    def __init__(self): super().__init__(); self.net = flat_net()
    def forward(self, x, mask=None): return self.net(x if mask is None else x*0)

@pytest.mark.parametrize('dl', [case([(x,y,meta)], what='(x, y, metadata) without n_inp',
    how='refused: set dl.n_inp', kind='loaders'),
    case([dict(image=x, label=y)], what='Batches that are dictionaries', how='refused: give tuples', kind='loaders'),
        case([x, y], what='A single batch [x, y] in place of a list of them', how='refused: give [(x, y)]', kind='loaders'),
    case([()], what='Empty batches', how='refused', kind='loaders')])
def test_batches_that_are_refused(dl):
    for m in (flat_net(), Image()):
        for f in (lambda m: layer_rank(m, dl, progress=False), lambda m: layer_cka(m, dl, progress=False),
            lambda m: dormant_units(m, dl), lambda m: grad_norm(m, dl)):
            with pytest.raises(ValueError, match='^dl: '): f(m)

def without_broken(b): return torch.utils.data.default_collate([o for o in b if o[1]!=1])
def flipped_too(b): return torch.utils.data.default_collate([*b, *((o.flip(-1),k) for o,k in b)])

@pytest.mark.parametrize('collate,count',
                         [case(f, k, what=what, kind='loaders',
                               how='works for sums over samples, refused where each must be kept; '
    'a list of batches works') for f,k,what in [(without_broken, 18, 'A collate_fn that leaves out some samples'),
                                                (flipped_too, 48, 'A collate_fn that adds copies of samples')]])
@pytest.mark.parametrize('targets', [False,True])
def test_loaders_that_leave_out_samples(collate, count, targets):
    "No row of features stays empty, and no label belongs to another sample"
    class Items(torch.utils.data.Dataset):
        def __len__(self): return len(y)
        def __getitem__(self, i): return x[i],int(y[i])
    ds = Items()
    if targets: ds.targets = y
    m,dl = flat_net(),torch.utils.data.DataLoader(ds, 8, collate_fn=collate)
    whole = [tuple(torch.cat(o) for o in zip(*dl))]
    wide = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))   # few features: moments are added up
    for f in (lambda dl: layer_rank(m, dl, progress=False), lambda dl: layer_rank(wide, dl, progress=False),
              lambda dl: layer_cka(m, dl, estimator='full', progress=False),
              lambda dl: layer_probe(m, dl, dl, C=1., progress=False)):
        with pytest.raises(ValueError, match=f'dl: its batches hold {count} samples, its dataset 24'): f(dl)
        assert len(f(list(dl)))==len(f(whole))
    pd.testing.assert_frame_equal(layer_probe(m, list(dl), list(dl), C=1., progress=False),
                                  layer_probe(m, whole, whole, C=1., progress=False), rtol=1e-5)
    assert dormant_units(m, dl).equals(dormant_units(m, whole)) and penultimate(m, dl).shape==(count,16)
    assert layer_cka(m, dl, progress=False).attrs['n']==count

@pytest.mark.parametrize('make', [
    case(lambda: [(a.numpy(),b.numpy()) for a,b in batches], what='Batches of NumPy arrays', how='works', kind='loaders'),
    case(lambda: [(a,b.tolist()) for a,b in batches], what='Labels as a list of integers', how='works, but for losses',
         kind='loaders')])
def test_batches_that_are_no_tensors(make):
    m,want = flat_net(),[(x,y)]
    assert dl_labels(make()).tolist()==y.tolist()
    assert evaluate(m, make())['accuracy']==pytest.approx(evaluate(m, want)['accuracy'])
    assert hangs_on(m, make(), n=None)==hangs_on(m, want, n=None)
    same_ranks(m, make(), want)
    if isinstance(make()[0][1], np.ndarray): assert grad_norm(m, make())==pytest.approx(grad_norm(m, want), rel=1e-5)

@pytest.mark.parametrize('labels', [case(list('abcd')*6, what='Labels that are strings, as from default_collate',
                                        how='refused: number the classes', kind='loaders'),
                                    case(dict(a=y), what='Labels in a dictionary', how='refused', kind='loaders'),
                                    case(None, what='None in place of labels', how='refused', kind='loaders')])
def test_labels_that_are_no_numbers(labels):
    m = flat_net()
    for f in (lambda m,dl: layer_probe(m, dl, dl), hangs_on, find_shortcut):
        with pytest.raises(ValueError, match='dl: labels are .* must be a tensor'): f(m, [(x,labels)])

@works('loaders', 'No batches, no inputs, or other numbers of labels and images', 'refused')
def test_no_samples():
    m = flat_net()
    for f in (dormant_units, grad_norm, hangs_on, find_shortcut, lambda m,dl: layer_rank(m, dl, progress=False)):
        with pytest.raises(ValueError, match='dl: an empty list'): f(m, [])
        with pytest.raises(ValueError, match='dl: there are no samples'): f(m, torch.utils.data.DataLoader([]))
    with pytest.raises(ValueError, match="dl: there is no tensor in the inputs of a batch, 'abc'"): dormant_units(m, [('abc',y)])
    for f in (hangs_on, find_shortcut):
        with pytest.raises(ValueError, match='a batch has 24 images and 9 labels'): f(m, [(x,y[:9])])

@pytest.mark.parametrize('at', [0,2])
def test_batches_without_samples(at):
    "A list may hold a batch of no samples, such as those of a class that is not there; it has no mean, and changes nothing"
    m,batches = flat_net(),list(zip(x.split(8), y.split(8)))
    more = [*batches[:at], (x[:0],y[:0]), *batches[at:]]
    for f in (lambda dl: layer_rank(m, dl, progress=False), lambda dl: layer_probe(m, dl, dl, progress=False),
              lambda dl: layer_cka(m, dl, estimator='full', progress=False)):
        pd.testing.assert_frame_equal(f(more), f(batches))
    assert torch.equal(penultimate(m, more), penultimate(m, batches))
    with pytest.raises(ValueError, match='dl: an empty list, or one of empty batches'): layer_rank(m, [(x[:0],y[:0])])

@works('loaders', 'Several inputs (x1, x2, y)', 'works if the model needs as many, or n_inp says so')
def test_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(96, 4)
        def forward(self, a, b): return self.lin((a+b).flatten(1))
    m = Two()
    a,b = x[:,:,:4],x[:,:,4:]
    for dl in ([(a,b,y)], fastai_dl(a, b, y, n_inp=2)):
        assert evaluate(m, dl)['accuracy']==pytest.approx((m(a, b).argmax(1)==y).float().mean().item())
        assert layer_rank(m, dl, progress=False).n.tolist()==[24]
    assert [len(o) for o in split_batch(fastai_dl(a, b, y, n_inp=2), (a,b,y))]==[2,1]

class Pair(nn.Module):
    "Takes a pair of images as one input, as fastai's Siamese tutorial has it"
    def __init__(self): super().__init__(); self.a,self.b,self.head = nn.Linear(96, 6),nn.Linear(96, 6),nn.Linear(6, 4)
    def forward(self, p): return self.head(self.a(p[0].flatten(1))*self.b(p[1].flatten(1)))

class Apart(Pair):
    def forward(self, a, b): return super().forward((a,b))

def test_inputs_in_inputs():
    "The same numbers as with two inputs"
    set_seed(0)
    m,apart = Pair().eval(),Apart().eval()
    apart.load_state_dict(m.state_dict())
    a,b = x[:,:,:4].contiguous(),x[:,:,4:].contiguous()
    for n in (None, 11):
        nested,plain = [((a[i:i+8],b[i:i+8]),y[i:i+8]) for i in (0,8,16)],[(a[i:i+8],b[i:i+8],y[i:i+8]) for i in (0,8,16)]
        for f in (lambda m,dl: layer_rank(m, dl, n=n, progress=False), lambda m,dl: layer_cka(m, dl, n=n, progress=False),
                  lambda m,dl: dormant_units(m, dl, n=n, layers='linear')): assert f(m, nested).equals(f(apart, plain))
        assert grad_norm(m, nested, n=n)==grad_norm(apart, plain, n=n) and dl_labels(nested, n).tolist()==y[:n].tolist()
        close(penultimate(m, nested, n), penultimate(apart, plain, n))
    assert evaluate(m, nested)==evaluate(apart, plain)
    Images = namedtuple('Images', 'left right')
    named = [(Images(*p),k) for p,k in nested]
    assert evaluate(m, named)==evaluate(m, nested)
    assert layer_rank(m, named, n=11, progress=False).equals(layer_rank(m, nested, n=11, progress=False))
    sets = DataLoader([((i,j),int(k)) for i,j,k in zip(a, b, y)], bs=8)
    assert layer_rank(m, sets, progress=False).equals(layer_rank(m, nested, progress=False))

def test_samples_of_several_sizes():
    "Flattened features of other sizes are other features; averages over positions are not"
    m = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    dl = [(x[:12],y[:12]),(x[12:,:,:6],y[12:])]
    for f in (layer_rank, layer_cka, lambda m,dl,layers,**kw: layer_probe(m, dl, dl, layers, pool=None, **kw)):
        with pytest.raises(ValueError, match=r"layers: '0' returns \(4, 6, 8\) for a sample, and \(4, 8, 8\) for the first"):
            f(m, dl, '0', progress=False)
        with pytest.raises(ValueError, match="give inputs of one size"): layer_rank(m, dl, '0', max_features=50, progress=False)
    with evaluating(m): want = torch.cat([m[:2](o).transpose(0,1).flatten(1) for o,_ in dl], 1)
    assert unit_scores(m, dl)['1']==pytest.approx((want.mean(1)/want.mean(1).mean()).numpy(), rel=1e-5)
    assert layer_rank(m, dl, '3', progress=False).n.tolist()==[24] and penultimate(m, dl).shape==(24,4)
    assert len(layer_probe(m, dl, dl, '0', C=1., progress=False))==1

def language():
    from fastai.text.all import AWD_LSTM, awd_lstm_lm_config, get_language_model
    set_seed(0)
    return get_language_model(AWD_LSTM, 24, dict(awd_lstm_lm_config, emb_sz=12, n_hid=16, n_layers=2))

def test_recurrent_state_is_left_as_it_was():
    "What a language model remembers of the last batch goes into the next: measuring neither reads on nor forgets"
    m,text = language(),[torch.randint(24, (6,5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with evaluating(m): pass
    m.eval()
    m(text[0])
    def state(): return [o.clone() for h in m[0].hidden for o in h]+[torch.tensor(m[0].bs)]
    before = state()
    a = layer_rank(m, text, progress=False)
    b = layer_rank(m, text, progress=False, max_memory=1e-5)
    assert a.equals(b) and all(map(torch.equal, before, state()))
    want = m(text[1])[0]
    m.reset(); m(text[0])
    with evaluating(m): m(text[2])
    assert torch.equal(m(text[1])[0], want)

def test_probes_of_a_table():
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    r = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=r.randn(200), k=r.choice(list('xyz'), 200)))
    df['y'] = np.where(df.k=='x', 'p', 'q')
    dls = TabularDataLoaders.from_df(df, y_names='y', cat_names=['k'], cont_names=['a'], procs=[Categorify,Normalize],
                                     y_block=CategoryBlock(),
                                     bs=16, valid_idx=list(range(150,200)))
    learn = tabular_learner(dls, layers=[8,8])
    assert dl_labels(dls.valid).tolist()==[int(o!='p') for o in df.y[150:]]
    probe = layer_probe(learn, dls.train, dls.valid, progress=False)
    assert len(probe)==3 and probe.accuracy.iloc[0]>.9 and layer_rank(learn, dls.valid, progress=False).n.tolist()==[50]*3

class ConvHead(nn.Module):
    "Linear layers inside, and a convolution as classifier"
    def __init__(self):
        super().__init__()
        self.conv,self.gate,self.act,self.head,self.out = nn.Conv2d(3, 4, 3),nn.Linear(4, 4),nn.ReLU(),nn.Conv2d(4, 4, 1),nn.ReLU()
    def forward(self, x):
        x = self.conv(x)
        x = self.act(x*self.gate(x.mean((2,3)))[:,:,None,None])
        return self.out(self.head(x)).mean((2,3))

def test_a_convolution_as_head():
    "Its units are the output; the linear layer before is no classifier"
    assert list(unit_scores(ConvHead(), batches))==['act']
    with pytest.raises(ValueError, match="ConvHead ends in the convolution 'head', so no linear layer reads its features"):
        penultimate(ConvHead(), batches)

class Detached(nn.Module):
    def __init__(self): super().__init__(); self.net = flat_net()
    def forward(self, x): return self.net(x).detach()

@pytest.mark.parametrize('make',
                         [Detached, lambda: torch.ao.quantization.quantize_dynamic(flat_net(), {nn.Linear}, dtype=torch.qint8)],
                         ids=['detached','quantised'])
def test_no_gradient_is_not_a_gradient_of_zero(make):
    m = make()
    if not list(m.parameters()): m = nn.Sequential(nn.Conv2d(3, 3, 1), m)
    for f in (grad_norm, lambda m,dl: hessian_rank(m, dl, steps=2)):
        with pytest.raises(ValueError, match='model: no gradient reaches its trainable parameters'): f(m, batches)
    assert 0<=evaluate(m, batches)['accuracy']<=1

# losses and numbers that are not

losses = [case(lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.,5,.2,3])), what='A weighted loss',
    how='works: the gradient of the mean over all samples, whatever the batches', kind='loaders'),
    case(lambda: CrossEntropyLossFlat(weight=torch.tensor([1.,5,.2,3])), what="fastai's weighted loss",
        how='works: the gradient of the mean over all samples, whatever the batches', kind='loaders'),
    case(lambda: nn.CrossEntropyLoss(ignore_index=2, label_smoothing=.1), what='A loss that ignores a class',
        how='works: the gradient of the mean over all samples, whatever the batches', kind='loaders'),
    case(lambda: __import__('functools').partial(F.cross_entropy, weight=torch.tensor([1.,5,.2,3])),
        what='A function as weighted loss',
            how='works: the gradient of the mean over all samples, whatever the batches', kind='loaders'),
    case(lambda: lambda p,t: F.cross_entropy(p, t), what='A loss of one\'s own, a mean over samples',
        how='works', kind='loaders'),
    case(lambda: Unreduced(), what='A loss that has a `reduction` and ignores it', how='works', kind='loaders')]

class Unreduced(nn.CrossEntropyLoss):
    def forward(self, p, t): return F.cross_entropy(p, t)

@pytest.mark.parametrize('make', losses)
def test_gradient_does_not_depend_on_batches(make):
    m,loss = flat_net(),make()
    loss(m(x), y).backward()
    want = sum(p.grad.double().square().sum() for p in m.parameters()).item()**.5
    m.zero_grad()
    for sizes in ([24], [8]*3, [1]*24, [5,5,5,5,4], [23,1]):
        assert grad_norm(m, list(zip(x.split(sizes), y.split(sizes))), loss)==pytest.approx(want, rel=1e-4)

@works('loaders', 'A loss that is no mean over samples', 'works on one batch; refused on several')
def test_a_loss_that_does_not_add_up():
    m,w = flat_net(),torch.tensor([1.,5,.2,3])
    def loss(p, t): return F.cross_entropy(p, t, w)      # nothing shows that it is weighted
    want = grad_norm(m, [(x,y)], nn.CrossEntropyLoss(weight=w))
    assert grad_norm(m, [(x,y)], loss)==pytest.approx(want, rel=1e-5)
    by_class = y.sort(stable=True).indices.split(6)           # each batch of one class
    for parts in (by_class, torch.arange(24).split(5)):
        with pytest.raises(ValueError, match='give one batch'): grad_norm(m, [(x[i],y[i]) for i in parts], loss)

def test_a_loss_of_two_different_means():
    "fastai weights one term of its label smoothing, and not the other; that the scores of an untrained network are alike hides it"
    loss,batches = LabelSmoothingCrossEntropyFlat(weight=torch.tensor([1.,5,.2,3])),list(zip(x.split(5), y.split(5)))
    for scale in (1.,.01):
        m = flat_net()
        m[-1].weight.data *= scale
        loss(m(x), y).backward()
        want = sum(p.grad.double().square().sum() for p in m.parameters()).item()**.5
        assert grad_norm(m, [(x,y)], loss)==pytest.approx(want, rel=1e-4)
        with pytest.raises(ValueError, match='give one batch'): grad_norm(m, batches, loss)

def test_gradient_where_all_is_right():
    "A loss of exactly 0 in a batch does not change what the sum is divided by"
    m = nn.Linear(2, 2, bias=False)
    m.weight.data = torch.tensor([[200.,0],[0,0]])
    a,t,w = torch.tensor([[1.,0],[1,0],[.001,0],[.002,0]]),torch.tensor([0,0,0,
        1]),nn.CrossEntropyLoss(weight=torch.tensor([1.,3]))
    assert w(m(a[:2]), t[:2])==0
    assert grad_norm(m, [(a[:2],t[:2]), (a[2:],t[2:])], w)==pytest.approx(grad_norm(m, [(a,t)], w), rel=1e-5)

@pytest.mark.parametrize('bad', [case(float('nan'), what='A network that puts out NaN',
    how='refused; in the log of a run NaN'), case(float('inf'), what='A network that puts out infinite values',
        how='refused; in the log of a run NaN')])
def test_dormant_units_of_a_diverged_network(bad):
    m = flat_net()
    m[1].weight.data[3,5] = bad
    for f in (dormant_units, unit_scores):
        with pytest.raises(ValueError, match="layer '2': returns NaN or infinite"): f(m, [(x,y)])
    assert np.isnan(plasticity_measures(m, [(x,y)])['dormant'])

@works('models', "activations of timm's own, as in ConvNeXt", 'works: their units are counted')
def test_activations_of_timm():
    "A unit whose activation is zero for all images is dormant; a block's output, the sum of two branches, never is"
    m = timm.create_model('convnext_atto', num_classes=3).eval()
    fc = m.stages[0].blocks[0].mlp.fc1
    with torch.no_grad(): fc.weight[:7],fc.bias[:7] = 0,0
    d = dormant_units(m, [torch.randn(4, 3, 64, 64)])
    assert all(type(m.get_submodule(n)).__name__=='GELU' for n in d.index) and d.dormant['stages.0.blocks.0.mlp.act']==7
    assert d.dormant.sum()==7

@pytest.mark.parametrize('to', [lambda v: v.to(torch.int8), torch.Tensor.bool, lambda v: v+0j])
def test_weights_of_another_kind(tmp_path, to):
    "Integers stand for weights only with a scale, which a plain module does not have"
    net = nn.Sequential(nn.Linear(3,2), nn.BatchNorm1d(2))
    old,f = {k:v.clone() for k,v in net.state_dict().items()},tmp_path/'a.pth'
    torch.save({**old, '0.weight':to(old['0.weight']+1)}, f)
    with pytest.raises(ValueError, match='1 of another kind .0.weight: (int8|bool|complex64) in the file'): load_weights(net, f)
    with pytest.warns(UserWarning, match='0.weight'): load_weights(net, f, strict=False)
    assert all(torch.equal(v, old[k]) for k,v in net.state_dict().items())
    torch.save({k:v.half() if v.is_floating_point() else v for k,v in old.items()}, f)
    assert torch.allclose(load_weights(net, f)[0].weight, old['0.weight'], atol=1e-3)

@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel])
def test_names_of_a_wrapped_model_are_those_that_measures_take(wrap):
    net,x = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3)),torch.rand(8,3,8,8)
    names = find_layers(wrap(net), x)
    assert names==find_layers(net, x)==['0','4'] and cam_layer(wrap(net), x)[0]==cam_layer(net, x)[0]
    assert layer_rank(wrap(net), [(x,)], names, progress=False).index.get_level_values(1).tolist()==names

# Models that change what they are given, or themselves

class InPlace(nn.Module):
    "The same function, with the input changed in place or not"
    def __init__(self, at_home):
        super().__init__()
        torch.manual_seed(1)
        self.at_home,self.a,self.b = at_home,nn.Linear(6,8),nn.Linear(8,3)
    def forward(self, x): return self.b(self.a(x.sub_(.5).mul_(2) if self.at_home else (x-.5)*2).tanh())

@works('models', 'a model that changes its input in place', 'works: it gets copies')
def test_an_input_that_is_changed_in_place():
    "Numbers as without, also of several networks together; the user's own batches stay"
    batches = [(torch.rand(12,6),torch.arange(12)%3) for _ in range(3)]
    was = [x.clone() for x,_ in batches]
    home,away = InPlace(True),InPlace(False)
    def all_measures(m):
        return [hessian_rank(m, batches, nn.CrossEntropyLoss(), n=None, eps=1e-3), grad_norm(m, batches), evaluate(m, batches)['accuracy'],
                layer_rank(m, batches, progress=False).values.ravel().tolist(),
                dormant_units(m, batches, layers=['a']).share.tolist()]
    assert str(all_measures(home))==str(all_measures(away))
    np.testing.assert_allclose(np.diag(layer_cka({'a':home,'b':away}, batches, 'b', progress=False).values), 1., rtol=1e-6)
    assert all(torch.equal(a, x) for a,(x,_) in zip(was, batches))

@works('models', 'a model whose buffers change in eval mode, as in quantisation-aware training', 'works: they are put back')
def test_buffers_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6,3)
            self.register_buffer('calls', torch.zeros(1)), self.register_buffer('largest', torch.zeros(3))
        def forward(self, x):
            self.calls += 1
            self.largest = torch.maximum(self.largest, x.abs().amax().expand(3))
            return self.f(x)
    m,batches = Counts(),[(9*torch.randn(40,6),torch.arange(40)%3)]
    layer_rank(m, batches, progress=False), grad_norm(m, batches), evaluate(m, batches)
    assert m.calls.item()==0 and not m.largest.any()
