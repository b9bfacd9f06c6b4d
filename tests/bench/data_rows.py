"Loading: 5,000 CIFAR-10 images through random crop (pad 4), flip, square, normalise, in batches of 128; and what the square costs."
import statistics as st, tempfile, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from fastai.vision.all import CropPad, Flip, ImageDataLoaders, Normalize, PadMode, RandomCrop
from common import alternate, data, networks
from feature_erosion.data import TensorImages, paper_stats, tensor_dls
from feature_erosion.patterns import ColorSquare

n,bs = 5000,128

class Cifar10Style(Dataset):
    "Like `torchvision.datasets.CIFAR10` once it is in memory: an array, an image and its transforms for each item"
    def __init__(self, x, y):
        self.x,self.y,self.tfm = x,y,T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                                                T.Normalize(*paper_stats)])
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.tfm(Image.fromarray(self.x[i])),self.y[i]

def masked_crop(x, pad):
    "Crops by masks, one shift at a time"
    b,_,h,w = x.shape
    top,left = torch.randint(2*pad+1, (2,b), device=x.device)
    x,rows,out = F.pad(x, (pad,)*4),x.new_empty(b, x.shape[1], h, w+2*pad),torch.empty_like(x)
    for s in range(2*pad+1): rows[top==s] = x[top==s,:,s:s+h]
    for s in range(2*pad+1): out[left==s] = rows[left==s,:,:,s:s+w]
    return out

def gathered_crop(x, pad):
    "Crops by one gather"
    b,c,h,w = x.shape
    top,left = torch.randint(2*pad+1, (2,b))
    rows,cols = top[:,None]+torch.arange(h),left[:,None]+torch.arange(w)
    return F.pad(x, (pad,)*4)[torch.arange(b)[:,None,None,None],torch.arange(c)[:,None,None],rows[:,None,:,None],
                              cols[:,None,None,:]]

def batched(x, y, crop):
    "The least there is: index, crop and flip whole batches; no pattern, no classes of fastai"
    mean,std = (torch.tensor(o)[:,None,None] for o in paper_stats)
    order = torch.randperm(len(x))
    for i in range(0, len(x)-bs+1, bs):
        idx = order[i:i+bs]
        xb = crop(x[idx], 4)
        xb = torch.where((torch.rand(bs)<.5)[:,None,None,None], xb.flip(-1), xb)
        yield xb.float().div_(255).sub_(mean).div_(std),y[idx]

def files(folder, x, y):
    "JPEG files, as CIFAR-10 comes from fastai"
    for i,(a,c) in enumerate(zip(x, y)):
        f = Path(folder)/str(c.item())/f'{i}.jpg'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(a).save(f, quality=95)
    return folder

def fastai_dls(folder, valid_pct=bs/n):
    return ImageDataLoaders.from_folder(folder, valid_pct=valid_pct, seed=0, bs=bs,
                                        item_tfms=[CropPad(40, pad_mode=PadMode.Zeros), RandomCrop(32)],
                                        batch_tfms=[Flip(), Normalize.from_stats(*paper_stats, cuda=False)])

def run(dl): return sum(len(b[0]) for b in dl)

def images(n=n): return (ds := data(bs).train.dataset.subset(n)).x.contiguous(),ds.y

def rows(repeats=3):
    x,y = images()
    easy = tensor_dls(TensorImages(x, y, range(10)), TensorImages(x[:bs], y[:bs], range(10)), bs=bs,
                      stats=paper_stats).inject(ColorSquare(4)).train
    plain = x.movedim(-1,1).contiguous()
    tv = Cifar10Style(x.numpy(), y.tolist())
    with tempfile.TemporaryDirectory() as tmp:
        fs = {'ours': lambda: run(easy), 'a minimal loader, gather': lambda: run(batched(plain, y, gathered_crop)),
              'a minimal loader, masks': lambda: run(batched(plain, y, masked_crop))}
        for f in fs.values(): f()
        fs = {k:lambda f=f: [f() for _ in range(5)] for k,f in fs.items()}
        quick = alternate(fs, max(repeats, 7))
        dls = fastai_dls(files(tmp, x.numpy(), y))
        slow = {'ours': lambda: run(easy),
                **{f'torchvision, {w} workers': (lambda w=w: run(DataLoader(tv, bs, shuffle=True, num_workers=w,
                    drop_last=True))) for w in (0,2)},
                'fastai ImageDataLoaders (JPEG files, 2 workers)': lambda: run(dls.train)}
        t = alternate(slow, repeats)
    name = f'{n:,} images through all transforms'
    def rate(s): return f'{n/st.median(s):,.0f} images a second'
    for k in ('torchvision, 0 workers','torchvision, 2 workers'):
        yield dict(name=name, peer=k, ours_s=t['ours'], peer_s=t[k], target=20, check=rate(t['ours']))
    yield dict(name=name, peer=list(slow)[-1], ours_s=t['ours'], peer_s=t[list(slow)[-1]], target=None, check='')
    for k in list(fs)[1:]:
        yield dict(name=f'{name}, 5 times', peer=k+', no pattern', ours_s=quick['ours'], peer_s=quick[k], target=1,
                   check=rate([o/5 for o in quick['ours']]))
    yield painting(easy, repeats)

def painting(dl, repeats):
    "One batch painted, against a training step of ResNet-20"
    (model,_),tfm = networks(),[f for f in dl.after_batch.fs if type(f).__name__=='InjectPattern'][0]
    model,opt = model.train().to(memory_format=torch.channels_last),torch.optim.SGD(model.parameters(), lr=1e-6)
    x,y = dl.one_batch()
    b = torch.rand(bs,3,32,32).as_subclass(type(x)),y,torch.arange(bs)%10
    def step():
        F.cross_entropy(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor)).backward()
        opt.step(); opt.zero_grad()
    fs = {'ours': lambda: [tfm(b) for _ in range(10)], 'step': lambda: [step() for _ in range(10)]}
    for f in fs.values(): f()
    t = alternate(fs, max(repeats, 5))
    return dict(name='painting a 4×4 square on a batch of 128, 10 times', peer='training steps of ResNet-20 without',
                ours_s=t['ours'], peer_s=t['step'], target=100, check='at most 1% of a step')
