"Networks against other people's: a public checkpoint on real images, torchvision's layers, its and timm's ImageNet weights"
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from feature_erosion.models import *

mean,std = (torch.tensor(o).view(3,1,1) for o in ([.485,.456,.406], [.229,.224,.225]))
same = lambda a,b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.fixture
def cifar_test(cifar10):
    "Images and labels of all of CIFAR-10's test set, read with PIL, and the accuracy to expect: published, or measured on the re-compressed JPEG copy"
    files = [(f,i) for i,d in enumerate(sorted(o for o in (cifar10/'test').iterdir() if o.is_dir())) for f in sorted(d.iterdir())]
    imgs = np.stack([np.array(Image.open(f).convert('RGB')) for f,_ in files])
    return torch.from_numpy(imgs).permute(0,3,1,2), torch.tensor([i for _,i in files]), .917 if files[0][0].suffix=='.png' else .81

@torch.no_grad()
def accuracy(model, imgs, labels, bs=500):
    preds = [model((b/255-mean)/std).argmax(1) for b in imgs.split(bs)]
    return (torch.cat(preds)==labels).float().mean().item()

@pytest.mark.slow('all 10,000 test images')
def test_public_checkpoint(resnet20, cifar_test):
    "91.7% on the lossless images, 81.0% on the re-compressed ones of fastai's layout that are at hand"
    imgs,labels,expected = cifar_test
    assert len(imgs)==10_000
    model = create_model('resnet20', 10, weights=resnet20).eval()
    acc = accuracy(model, imgs, labels)
    assert abs(acc-expected) <= .001, acc
    few = create_model('resnet20', 3, weights=resnet20, classes=[3,5,8]).eval()
    with torch.no_grad():
        x = (imgs[:100]/255-mean)/std
        same(few(x), model(x)[:,[3,5,8]])

def random_bn(model):
    "Statistics and factors that no two channels share, so a wrong order shows"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for p,(lo,hi) in zip((m.weight.data, m.bias.data, m.running_mean, m.running_var),
                                 ((.1,.6),(-.5,.5),(-.5,.5),(.5,1.5))):
                p.uniform_(lo, hi)
    return model.eval()

def test_resnet18_is_torchvisions_with_a_small_stem():
    torch.manual_seed(0)
    model,ref = random_bn(create_model('resnet18', 10)),torchvision.models.resnet18(num_classes=10).eval()
    ref.conv1,ref.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False),nn.Identity()
    ref.load_state_dict({k.replace('shortcut','downsample').replace('linear','fc'):v for k,v in model.state_dict().items()})
    x = torch.randn(4,3,32,32)
    same(model(x), ref(x))

def test_resnet18_names():
    block = ['conv1','bn1','conv2','bn2']
    want = ['conv1','bn1'] + [f'layer{l}.{b}.{o}' for l in (1,2,3,4) for b in (0,1)
                              for o in block + (['shortcut.0','shortcut.1'] if l>1 and b==0 else [])] + ['linear']
    assert list(dict.fromkeys(k.rpartition('.')[0] for k in create_model('resnet18', 10).state_dict())) == want

def test_resnet20_is_option_a_by_functions():
    "The whole network again, from its state dict, with plain functions"
    torch.manual_seed(0)
    model = random_bn(create_model('resnet20', 10))
    sd = model.state_dict()
    def conv_bn(x, c, b, stride=1):
        return F.batch_norm(F.conv2d(x, sd[f'{c}.weight'], None, stride, 1),
                            *(sd[f'{b}.{o}'] for o in ('running_mean','running_var','weight','bias')))
    x = torch.randn(4,3,32,32)
    y = conv_bn(x, 'conv1', 'bn1').relu()
    for l in (1,2,3):
        for i in range(3):
            p,stride = f'layer{l}.{i}.',2 if l>1 and i==0 else 1
            z = conv_bn(conv_bn(y, p+'conv1', p+'bn1', stride).relu(), p+'conv2', p+'bn2')
            if stride==2:
                zeros = torch.zeros(4, y.shape[1]//2, *z.shape[2:])
                y = torch.cat([zeros, y[:,:,::2,::2], zeros], 1)
            y = (y+z).relu()
    same(model(x), F.linear(F.adaptive_avg_pool2d(y, 1).flatten(1), sd['linear.weight'], sd['linear.bias']))

def test_vgg19_is_torchvisions_without_the_last_pooling():
    torch.manual_seed(0)
    from torchvision.models.vgg import cfgs, make_layers
    model,ref = random_bn(create_model('vgg19', 10)),make_layers(cfgs['E'][:-1], batch_norm=True).eval()
    # torchvision's convolutions have a bias
    zeros = {k:torch.zeros_like(v) for k,v in ref.state_dict().items() if k.endswith('bias')}
    ref.load_state_dict({**zeros, **model.feature.state_dict()})
    x = torch.randn(4,3,32,32)
    same(model(x), model.classifier(F.avg_pool2d(ref(x), 2).flatten(1)))

@pytest.mark.parametrize('name,weights', [('resnet50', torchvision.models.ResNet50_Weights.IMAGENET1K_V2),
    pytest.param('vgg19', torchvision.models.VGG19_Weights.IMAGENET1K_V1, marks=pytest.mark.slow('weights of 550 MB'))])
def test_imagenet_weights_for_ten_classes(hub, name, weights):
    "torchvision finds the file where its download would be; ten classes answer as they do among the thousand"
    torch.manual_seed(0)
    full = torchvision.models.get_model(name).eval()
    torch.save(full.state_dict(), hub/Path(weights.url).name)
    idxs = torch.randperm(1000)[:10].tolist()
    x = torch.randn(2,3,64,64)
    with torch.no_grad():
        want = full(x)[:,idxs]
        assert want.std(1).min()>0
        for classes in (idxs, [weights.meta['categories'][i] for i in idxs]):
            same(create_model(f'torchvision/{name}', 10, weights=weights, classes=classes).eval()(x), want)
    (hub/Path(weights.url).name).unlink()

def test_timm_by_name():
    import timm
    torch.manual_seed(0)
    model = create_model('timm/resnet18', 7, c_in=1).eval()
    assert type(model) is timm.models.ResNet and model.conv1.in_channels==1
    ref = timm.create_model('resnet18', num_classes=7, in_chans=1).eval()
    load = ref.load_state_dict(model.state_dict())
    x = torch.randn(2,1,64,64)
    assert not load.missing_keys and not load.unexpected_keys
    same(model(x), ref(x))

def test_timm_pretrained(tmp_path, monkeypatch):
    "timm finds its weights in the Hugging Face cache; the classes asked for answer as they do among all"
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file
    torch.manual_seed(0)
    full,snap = timm.create_model('resnet18').eval(),tmp_path/'models--timm--resnet18.a1_in1k'
    (snap/'snapshots'/'0').mkdir(parents=True)
    (snap/'refs').mkdir()
    (snap/'refs'/'main').write_text('0')
    save_file(full.state_dict(), snap/'snapshots'/'0'/'model.safetensors')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    x = torch.randn(2,3,64,64)
    same(create_model('timm/resnet18.a1_in1k', 3, weights='DEFAULT', classes=[7,1,99]).eval()(x), full(x)[:,[7,1,99]])
    new = create_model('timm/resnet18.a1_in1k', 3, weights='DEFAULT').eval()
    same(new.forward_features(x), full.forward_features(x))
    assert new(x).shape==(2,3)

class Heads(nn.Module):
    "With an auxiliary head that is defined last and not used, or the head defined first"
    def __init__(self, late):
        super().__init__()
        if not late: self.head = nn.Linear(16,10)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192,16), nn.ReLU())
        if late: self.head,self.aux = nn.Linear(16,10),nn.Linear(16,4)
    def forward(self, x): return self.head(self.body(x))

@pytest.mark.works(kind='models', what='A head that is not the last layer defined',
                   how='works: the layer that the outputs come from, where torch.fx can trace it')
@pytest.mark.parametrize('late', [True,False])
def test_the_head_is_what_the_outputs_come_from(late):
    x,net = torch.rand(2,3,8,8),Heads(late)
    new = create_model(net, 7)
    assert new(x).shape==(2,7) and new.body[1].out_features==16 and getattr(new, 'aux', nn.Linear(16,4)).out_features==4
    same(restrict_outputs(net, [2,0])(x), net(x)[:,[2,0]])

class Cosine(nn.Module):
    "Similarity to a prototype of each class, which no linear layer holds; `as_layer`: in a module of its own"
    def __init__(self, n, as_layer=False):
        super().__init__()
        self.body,self.scale = nn.Sequential(nn.Flatten(), nn.Linear(192,16)),nn.Parameter(torch.tensor(8.))
        self.prototypes = Prototypes(n) if as_layer else nn.Parameter(torch.randn(n,16))
    def forward(self, x):
        f = F.normalize(self.body(x))
        return self.scale*(self.prototypes(f) if isinstance(self.prototypes, nn.Module) else f@F.normalize(self.prototypes).T)

class Prototypes(nn.Module):
    def __init__(self, n): super().__init__(); self.weight = nn.Parameter(torch.randn(16,n))
    def forward(self, x): return x@F.normalize(self.weight, dim=0)

class Prior(nn.Module):
    "Logit adjustment: the logarithm of each class's share is added"
    def __init__(self, n): super().__init__(); self.fc = nn.Sequential(nn.Flatten(), nn.Linear(192,n)); self.register_buffer('prior', torch.randn(n))
    def forward(self, x): return self.fc(x)+self.prior

class Normed(nn.Module):
    def __init__(self, n): super().__init__(); self.fc = weight_norm(nn.Linear(192,n))
    def forward(self, x): return self.fc(x.flatten(1))

@pytest.mark.works(kind='models', what='A head that is no layer, or one of your own, as in a cosine classifier',
                   how='works with the outputs that it has; others are refused')
@pytest.mark.parametrize('make', [Cosine, partial(Cosine, as_layer=True), Prior, Normed], ids=['tensor','layer','prior','weight_norm'])
def test_a_head_that_is_no_linear_layer(make):
    "The body's linear layer was taken for the head, and the model broken"
    x,net = torch.rand(2,3,8,8),make(7)
    same(create_model(net, 7)(x), net(x))
    for f in (lambda: create_model(net, 4), lambda: restrict_outputs(net, [2,0])):
        with pytest.raises(ValueError, match='Create it with the outputs wanted'): f()

def test_a_frozen_head_stays_frozen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4,3)).requires_grad_(False)
    assert [p.requires_grad for p in restrict_outputs(net, [2,0]).parameters()]==[False,False]
    assert [p.requires_grad for p in restrict_outputs(nn.Linear(4,3), [1]).parameters()]==[True,True]

def test_tied_weights_in_safetensors(tmp_path):
    "Their `save_model` keeps what layers share under one name; a weight that is really missing is told"
    from safetensors.torch import save_file, save_model
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.a,self.b = nn.Linear(4,4),nn.Linear(4,4)
            if tied: self.b.weight = self.a.weight
    src,dst = Tied(),Tied()
    save_model(src, tmp_path/'tied.safetensors')
    load_weights(dst, tmp_path/'tied.safetensors')
    assert all(torch.equal(v, dst.state_dict()[k]) for k,v in src.state_dict().items())
    with pytest.raises(ValueError, match=r'1 missing \(b.weight\)'): load_weights(Tied(False), tmp_path/'tied.safetensors')

def test_width_of_any_kind():
    a,b = (create_model('resnet20', 10, width=o) for o in (.5, np.float32(.5)))
    assert n_params(a)==n_params(b)
