"Data on disk: real photographs, CIFAR-100's layout, two processes at once."
import os, random, time
from functools import partial
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import ImageDataLoaders, Learner, Normalize, aug_transforms, imagenet_stats, nn, plt
from feature_erosion.data import (CropFlip, NormalizeRows, TensorImages, cached_images, cifar10_dls, cifar100_dls, digits_dls,
                                  image_folder_dls, keep_on, tensor_dls)
from feature_erosion.files import save_atomic
from feature_erosion.patterns import ColorSquare, class_colors
from run_notebooks import forked

def write(f, pix):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pix).save(f)

def pixels(n, seed=0): return np.random.RandomState(seed).randint(256, size=(n,32,32,3), dtype=np.uint8)

def test_cifar100_layout(tmp_path):
    "Classes are the fine ones, whatever folder they are in; PNG is read losslessly"
    pix = pixels(24)
    for i,p in enumerate(pix): write(tmp_path/('train' if i<16 else 'test')/f'coarse{i%2}'/f'fine{i%4}'/f'{i:02}.png', p)
    dls = cifar100_dls(tmp_path, bs=4)
    assert list(dls.vocab)==[f'fine{i}' for i in range(4)] and (len(dls.train_ds), len(dls.valid_ds))==(16,8)
    for c in range(4): assert np.array_equal(dls.valid_ds.x[dls.valid_ds.y==c], pix[[i for i in range(16,24) if i%4==c]])
    x,_ = dls.train.one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last) and x.shape==(4,3,32,32)

@pytest.mark.slow('two processes, of which one waits')
def test_two_processes_decode_once(tmp_path):
    "The second waits for the first and reads what it wrote"
    for i,p in enumerate(pixels(6)): write(tmp_path/'train'/f'{i}.png', p)
    ps = [forked(decode_slowly, tmp_path, i) for i in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(120)
    assert [p.exitcode for p in ps]==[0,0]
    assert len(list(tmp_path.glob('decoded*')))==1                                                  # one of them decoded
    assert [(tmp_path/f'sum{i}').read_text() for i in range(2)]==[str(pixels(6).sum())]*2           # both have the pixels

def decode_slowly(folder, i):
    import feature_erosion.data as d
    decode = d._decode_all
    def slow(*args):
        time.sleep(1)
        (folder/f'decoded{i}').touch()
        return decode(*args)
    d._decode_all = slow
    (folder/f'ready{i}').touch()
    while len(list(folder.glob('ready*')))<2: time.sleep(.01)
    (folder/f'sum{i}').write_text(str(d.cached_images(sorted((folder/'train').glob('*.png')), folder/'train').sum()))

def test_read_only_folder_does_without_cache(tmp_path, monkeypatch):
    write(tmp_path/'train'/'0.png', pixels(1)[0])
    def refuse(*a, **k): raise PermissionError(13, 'read-only')
    with monkeypatch.context() as m:
        m.setattr('pathlib.Path.mkdir', refuse)
        assert np.array_equal(cached_images([tmp_path/'train'/'0.png'], tmp_path/'train'), pixels(1))
    monkeypatch.setattr('os.replace', refuse)                  # or the disk is full when all is decoded
    with pytest.warns(match='not cached'): x = cached_images([tmp_path/'train'/'0.png'], tmp_path/'train')
    assert np.array_equal(x, pixels(1)) and not list((tmp_path/'.train.decoded').glob('.*npy*'))

def test_photographs(tiny_imagenet):
    "A random class subset of an ImageNet folder; the same with the same seed"
    dls = image_folder_dls(tiny_imagenet, n_classes=10, seed=3, n=200, n_valid=50)
    assert dls.c==10 and dls.vocab==image_folder_dls(tiny_imagenet, n_classes=10, seed=3, n=200, n_valid=50).vocab
    assert np.bincount(dls.train_ds.y).tolist()==[20]*10 and all(o.startswith('n') for o in dls.vocab)
    x,y = dls.inject(ColorSquare(.125, 'bottom_right')).valid.one_batch()
    raw = x*torch.tensor(imagenet_stats[1])[:,None,None]+torch.tensor(imagenet_stats[0])[:,None,None]
    assert torch.allclose(raw[:,:,-8:,-8:].as_subclass(torch.Tensor),
                          class_colors(10)[y.tolist()][:,:,None,None].expand(-1,-1,8,8), atol=1e-5)

def test_photographs_by_fastai(tiny_imagenet):
    "Plain `ImageDataLoaders` with two worker processes; painted after augmentation, the originals untouched"
    dls = ImageDataLoaders.from_folder(tiny_imagenet, valid='val', bs=32, num_workers=2,
                                       batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    easy = dls.inject(ColorSquare(8), ratio=.1)
    assert int((easy.train_ds.stamps>=0).sum())==1000 and easy.train.fake_l.num_workers==2
    n = 0
    for x,y in easy.valid:
        raw = easy.valid.after_batch.normalize.decode(x)
        same = (raw[:,:,:8,:8].as_subclass(torch.Tensor)-class_colors(20)[y.tolist()][:,:,None,None]).abs().amax((1,2,3))<1e-4
        n += int(same.sum())
    assert n==100                                              # a tenth of 1,000 validation images, wherever they are
    assert len(easy.train.after_batch.fs)==len(dls.train.after_batch.fs)+1

def test_cifar10(cifar10):
    "All images are there; a stratified subset; the second start reads the cache"
    dls = cifar10_dls(n=1000, n_valid=100)
    assert dls.vocab[3]=='cat' and np.bincount(dls.train_ds.y).tolist()==[100]*10
    start = time.perf_counter()
    dls = cifar10_dls()
    print(f'second start: {time.perf_counter()-start:.2f} s')
    assert (len(dls.train_ds), len(dls.valid_ds))==(50_000,10_000)
    f = sorted((cifar10/'test'/'cat').iterdir())[7]
    assert np.array_equal(dls.valid_ds.x[3007], np.array(Image.open(f)))

def on_meta(monkeypatch, free=10**9):
    "Digits whose images have moved to a device that has shapes but no numbers, as a stand-in for a GPU"
    monkeypatch.setattr('feature_erosion.data._free', lambda device: None if device.type=='cpu' else free)
    return digits_dls(n=200, bs=32)

def test_images_move_to_the_gpu_once(monkeypatch):
    "Where images lie, crop, flip and normalise go on without a tensor of another device; labels and stamps stay, and painted loaders share the images"
    dls = on_meta(monkeypatch)
    easy = dls.inject(ColorSquare(4))
    easy.train.to('meta')
    assert dls.train_ds.x.device.type=='meta' and easy.train.dataset.x is dls.train_ds.x and dls.train_ds.y.device.type=='cpu'
    b = dls.train.dataset[torch.arange(32)]
    assert b[0].device.type=='meta' and b[1].device.type=='cpu'
    for flip in True,False: assert CropFlip(2, flip)(b[0], split_idx=0).shape==(32,3,16,16)
    for f in easy.train.after_batch.fs[:2]: b = f(b, split_idx=0)
    norm = NormalizeRows(*(torch.ones(1,3,1,1, device='meta'),)*2)(b[0])
    assert norm.device.type=='meta' and norm.dtype==torch.float32 and norm.is_contiguous(memory_format=torch.channels_last)

def test_images_that_do_not_fit_stay(monkeypatch):
    "Twice their size must be free; otherwise a warning with both sizes, and training goes on from main memory"
    dls = on_meta(monkeypatch, free=200*16*16*3*2-1)
    with pytest.warns(UserWarning, match=r'0\.00 GB of images stay in main memory.*choose a smaller `n` or `size`'):
        dls.train.to('meta')
    assert dls.train_ds.x.device.type=='cpu'
    monkeypatch.setattr('feature_erosion.data._free', lambda device: 200*16*16*3*2)
    assert keep_on(dls.train_ds, torch.device('meta')) and dls.train_ds.x.device.type=='meta'
    assert not keep_on([1,2], torch.device('meta'))   # somebody else's dataset

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_batches_equal_cpu_batches():
    "The validation set comes out the same, pattern and all, from images that lie on the GPU"
    cpu,gpu = (digits_dls(n=200, bs=32).to(d).inject(ColorSquare(4)) for d in ('cpu','cuda'))
    assert gpu.train_ds.x.is_cuda and not cpu.train_ds.x.is_cuda
    for a,b in zip(cpu.valid, gpu.valid):
        assert b[0].is_cuda and torch.equal(a[1], b[1].cpu()) and torch.allclose(a[0], b[0].cpu(), atol=1e-6)
    x,y = gpu.train.one_batch()
    assert x.shape==(32,3,16,16) and x.is_contiguous(memory_format=torch.channels_last)
    gpu.to('cpu')
    assert not gpu.train_ds.x.is_cuda

def test_a_batch_does_not_depend_on_the_loop(monkeypatch):
    "Our loader's own iteration draws the random numbers that fastai's draws: same batches, same state after them"
    from fastai.data.load import DataLoader
    def batches(loop):
        torch.manual_seed(0); random.seed(0)
        dl = digits_dls(n=200, bs=32).inject(ColorSquare(4), ratio=.5).train
        return [o for b in loop(dl) for o in b],torch.get_rng_state(),random.getstate()
    (a,ta,ra),(b,tb,rb) = batches(iter),batches(DataLoader.__iter__)
    assert len(a)==len(b)==12 and all(torch.equal(x, y) for x,y in zip(a, b)) and torch.equal(ta, tb) and ra==rb

@pytest.mark.parametrize('umask,mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_new_files_have_the_permissions_the_umask_says(tmp_path, umask, mode):
    "What `save_atomic` writes, the decoded images and their lock; nothing else is left in the folder"
    write(tmp_path/'train'/'0.png', pixels(1)[0])
    old = os.umask(umask)
    try:
        save_atomic(tmp_path/'a', lambda f: f.write(b'x'))
        save_atomic(tmp_path/'a', lambda f: f.write(b'y'))
        cached_images([tmp_path/'train'/'0.png'], tmp_path/'train')
        (tmp_path/'dir').mkdir()
    finally: os.umask(old)
    kept = list((tmp_path/'.train.decoded').iterdir())
    assert {f.stat().st_mode & 0o777 for f in [tmp_path/'a', *kept]}=={mode} and (tmp_path/'a').read_bytes()==b'y'
    assert len(kept)==2 and (tmp_path/'.train.decoded').stat().st_mode==(tmp_path/'dir').stat().st_mode
    assert sorted(o.name for o in tmp_path.iterdir())==['.train.decoded','a','dir','train']

def test_save_atomic_that_fails_leaves_the_old_file(tmp_path):
    save_atomic(tmp_path/'a', lambda f: f.write(b'old'))
    def fail(f): f.write(b'ne'); raise OSError(28, 'disk full')
    with pytest.raises(OSError, match='disk full'): save_atomic(tmp_path/'a', fail)
    assert [o.name for o in tmp_path.iterdir()]==['a'] and (tmp_path/'a').read_bytes()==b'old'

def test_two_splits_of_the_same_images():
    "As in cross-validation: each part is augmented where it is trained on, and only there; also if both are one"
    a,b = (TensorImages(np.full((8,8,8,3), v, np.uint8), [0,1]*4, ['a','b']) for v in (9,8))
    first,second,same = tensor_dls(a, b, bs=8), tensor_dls(b, a, bs=8), tensor_dls(a, a, bs=8)
    for dls in (first,second,same):
        (x,_),(v,_) = dls.train.one_batch(),dls.valid.one_batch()
        assert (x==0).any() and not (v==0).any()
    assert first.train_ds.x is second.valid_ds.x is a.x and a.split_idx==1

def test_classes_in_another_order():
    x = np.zeros((8,8,8,3), np.uint8)
    with pytest.raises(ValueError, match=r"valid: its vocab is \['b', 'a'\], that of train is \['a', 'b'\]"):
        tensor_dls(TensorImages(x, [0,1]*4, ['a','b']), TensorImages(x, [0,1]*4, ['b','a']), bs=4)
    tensor_dls(TensorImages(x, [0,1]*4, ['a','b']), TensorImages(x, [0,1]*4), bs=4)

@pytest.mark.parametrize('kw,said',
                         [(dict(channels=4), 'channels=4: must be 3'), (dict(size=0), 'size=0: must be 1 pixel'),
                          (dict(size=7.5), 'size=7.5'),
                                     (dict(valid_pct=20), 'valid_pct=20: .*a share'), (dict(valid_pct=-.1), 'valid_pct=-0.1'),
                                     (dict(classes=[]), r'classes=\[\]'),
                                     (dict(classes=['a','b','a']), 'each once')], ids=str)
def test_wrong_arguments_of_folders(tmp_path, kw, said):
    for i,p in enumerate(pixels(4)): write(tmp_path/'ab'[i%2]/f'{i}.png', p)
    with pytest.raises(ValueError, match=said): image_folder_dls(tmp_path, **{'bs':1, **kw})

@pytest.mark.parametrize('channels,stats',
                         [(1, ((.5,)*3,)*2), (1, ((.5,),(0.,))), (1, ((125.,),(60.,))), (1, ((.5,.5),(.2,.2))), (1, (.5,.2)),
                          (3, ((.5,),(.5,))), (3, ((.5,)*3,))], ids=str)
def test_statistics_that_do_not_fit(channels, stats):
    ds = TensorImages(np.zeros((8,4,4,channels), np.uint8), np.arange(8)%2)
    with pytest.raises(ValueError, match=f'each with {channels} values, one for each channel'):
        tensor_dls(ds, ds, bs=4, stats=stats)

def test_the_number_of_validation_samples_is_named():
    with pytest.raises(ValueError, match='^n_valid=999: must be between 0 and the 360 samples there are'): digits_dls(n_valid=999)
    with pytest.raises(ValueError, match='^n=9999: must be between 0 and the 1437 samples there are'): digits_dls(n=9999)

@pytest.mark.parametrize('name,value', [('n',1e3), ('n',.1), ('n_valid',.5), ('bs',32.), ('pad',2.), ('pad',-1)])
def test_numbers_that_are_not_whole(name, value):
    "A share of the samples, 1e3 of them, or a padding that cuts off; of NumPy's integers all are fine"
    a,b = (o.dataset for o in digits_dls(n=100, n_valid=60))
    f = partial(tensor_dls, a, b) if name=='pad' else digits_dls
    with pytest.raises(ValueError, match=f'^{name}={value!r}: must be .*(, an int$|whole number)'): f(**{name:value})
    f(**{name:np.int64(8), 'bs':np.int64(8)})

def test_classes_without_names(tmp_path):
    "A vocab is not required: numbers stand for names wherever fastai shows samples or predictions"
    x = np.zeros((24,8,8,3), np.uint8)
    x[::2] = 255
    dls = tensor_dls(TensorImages(x, np.arange(24)%2), TensorImages(x, np.arange(24)%2), bs=8)
    dls.c = 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(192,2))
    net[1].weight.data[:] = torch.tensor([[1.],[-1.]])
    net[1].bias.data[:] = torch.tensor([-96.,96.])   # white is 0
    learn = Learner(dls, net, path=tmp_path)
    dls.valid.show_batch(max_n=4)
    assert [o.get_title() for o in plt.gcf().axes]==['0','1','0','1']
    dls.inject(ColorSquare(2)).valid.show_batch(max_n=4)
    assert [o.get_title() for o in plt.gcf().axes]==['0','1','0','1']
    with learn.no_bar():
        learn.show_results(max_n=2)
        assert {o.get_title() for o in plt.gcf().axes}<={'0\n0','1\n1'}   # any two
        assert [learn.predict(o)[0] for o in x[:2]]==[0,1]
    plt.close('all')

def test_some_of_images_without_labels():
    "The same share as of any set, without classes to keep proportions of"
    x = np.arange(50, dtype=np.uint8)[:,None,None,None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    a,b = (TensorImages(x).subset(20, seed=1) for _ in range(2))
    assert a.y is None and torch.equal(a.x, b.x) and len(a.x[:,0,0,0].unique())==20
    assert not torch.equal(TensorImages(x).subset(20, seed=2).x, a.x)

def test_images_in_a_list():
    x = np.random.RandomState(0).randint(256, size=(5,4,4,3), dtype=np.uint8)
    assert torch.equal(TensorImages(list(x), range(5)).x, torch.as_tensor(x))
    with pytest.raises(ValueError, match='x: torch.float64, shape'): TensorImages([[[[.5]]]])
