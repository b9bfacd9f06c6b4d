"On a GPU: epochs of ResNet-18 a minute on CIFAR-10, and memory, against a bare loop that loads like airbench (Jordan 2024): normalised half-precision images on the GPU, cropped and flipped there."
import torch, torch.nn.functional as F
from common import alternate, data, quiet
from data_rows import masked_crop
from fastai.vision.all import AMPMode, MixedPrecision
from feature_erosion.learner import erosion_learner
from feature_erosion.models import create_model
from feature_erosion.phases import Phase

def ready(dls, dtype=torch.half):
    "All images on the device, normalised"
    ds,dev = dls.train.dataset,dls.device
    mean,std = (o.flatten().to(dev) for o in (dls.train.after_batch.fs[-1].mean,dls.train.after_batch.fs[-1].std))
    return ((ds.x.to(dev).float()/255-mean)/std).movedim(-1,1).to(dtype).contiguous(memory_format=torch.channels_last),ds.y.to(dev)

def on_device(x, y, bs):
    "Shuffled, cropped and flipped batches, without leaving the device"
    order = torch.randperm(len(x), device=x.device)
    for idx in order.split(bs):
        if len(idx)<bs: return
        xb = masked_crop(x[idx], 4)
        yield torch.where((torch.rand(bs, device=x.device)<.5)[:,None,None,None], xb.flip(-1), xb),y[idx]

def bare(arch, dls, bs, **kw):
    dev = torch.device(dls.device)
    model,(x,y) = create_model(arch, 10, **kw).to(dev, memory_format=torch.channels_last),ready(dls)
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    def f():
        model.train()
        for xb,yb in on_device(x, y, bs):
            with torch.autocast(dev.type, torch.bfloat16): loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step(); opt.zero_grad()
        if dev.type=='cuda': torch.cuda.synchronize()
    return f

def ours(arch, dls, **kw):
    learn = erosion_learner(dls, arch, cbs=MixedPrecision(AMPMode.BF16), **kw)
    learn._do_epoch_validate = lambda *a, **k: None   # the peer does not validate either
    def f():
        learn.fit_phases(Phase('pretrain', 1, sched='constant'))
        if torch.cuda.is_available(): torch.cuda.synchronize()
    return quiet(f)

def peak(f):
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_allocated()/2**20

def rows(repeats=3, arch='resnet18', bs=512):
    name = f'a training epoch of {arch}, CIFAR-10, bf16, batches of {bs}'
    if not torch.cuda.is_available():
        yield dict(name=name, peer='a bare loop, loading like airbench', skipped='no GPU here')
        return
    dls = data(bs)
    n = len(dls.train)*bs
    fs = {'ours':ours(arch, dls), 'bare':bare(arch, dls, bs)}
    for f in fs.values(): f()
    t,mb = alternate(fs, max(repeats, 5)),{k:peak(f) for k,f in fs.items()}
    yield dict(name=name, peer='a bare loop, loading like airbench', ours_s=t['ours'], peer_s=t['bare'], target=None,
               ours_mb=mb['ours'], peer_mb=mb['bare'],
               check=f"{60/sorted(t['ours'])[len(t['ours'])//2]:.1f} epochs of {n:,} images a minute; the peer {60/sorted(t['bare'])[len(t['bare'])//2]:.1f}")
