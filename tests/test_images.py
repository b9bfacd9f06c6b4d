"Images as people have them: kinds of files, numbers of more than 8 bits, folders, damaged caches, hostile archives."
import gzip, io, mimetypes, os, struct, subprocess, sys, tarfile, warnings, zlib
from pathlib import Path
import matplotlib, numpy as np, pytest, scipy.ndimage, sklearn.datasets
from PIL import Image, ImageOps, TiffImagePlugin
from fastai.vision.all import GrandparentSplitter, ImageDataLoaders, PILImage, TensorImage, get_image_files, parent_label
from conftest import works
from feature_erosion import data
from feature_erosion.data import (TensorImages, cached_images, cifar100_dls, cifar10_dls, class_files, decode_images,
                                  digits_dls, extract,
                                  image_folder_dls, tensor_dls, to_uint8)
from feature_erosion.patterns import ColorSquare   # with it, `inject`

def case(*args, id=None, **mark): return pytest.param(*args, id=id, marks=works(**mark))

# Kinds of files

rgb = np.random.RandomState(0).randint(256, size=(6,9,3), dtype=np.uint8)
luma = (rgb @ [.299,.587,.114]).round().astype(int)                  # ITU-R 601-2, which PIL documents for RGB to L
grey,deep = rgb[...,0],np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(6,9)

def three(a): return np.repeat(np.asarray(a)[...,None], 3, -1)
def saved(f, im, **kw):
    Image.fromarray(im).save(f, **kw) if isinstance(im, np.ndarray) else im.save(f, **kw)
    return f

def palette(im): return Image.fromarray(im).quantize(64)
def with_alpha(a): return np.dstack([a, np.full(a.shape[:2], 7, np.uint8)])

def cmyk(f):
    saved(f, Image.fromarray(rgb).convert('CMYK'))
    return f

kept = [case('a.png', rgb, rgb, kind='images', what='RGB: PNG, BMP, TIFF, WebP without loss', how='works: every byte'),
        *[pytest.param(f'a.{e}', rgb, rgb) for e in ('bmp','tif','ppm','tga')],
        case('a.png', grey, three(grey), kind='images', what='grey PNG, 8 bits', how='works: the same in all channels'),
        case('a.gif', palette(rgb), np.asarray(palette(rgb).convert('RGB')), kind='images', what='palette: GIF, PNG',
             how='works: the colours it stands for'),
        pytest.param('a.png', palette(rgb), np.asarray(palette(rgb).convert('RGB'))),
        case('a.png', with_alpha(rgb), rgb, kind='images', what='RGBA', how='works: alpha is dropped'),
        case('a.png', np.dstack([grey,grey])[...,:2], three(grey), kind='images', what='grey with alpha (LA)',
             how='works: alpha is dropped'),
        case('a.png', Image.fromarray(grey>99), three((grey>99)*255), kind='images', what='1-bit',
             how='works: black and white'),
        case('a.tif', Image.fromarray(rgb).convert('CMYK'), rgb, kind='images', what='CMYK', how='works: converted to RGB')]

@pytest.mark.parametrize('name,im,want', kept)
def test_kinds_of_files(tmp_path, name, im, want):
    "What was saved without loss comes back, as three channels, and as their luma"
    f = saved(tmp_path/name, im)
    assert np.array_equal(to_uint8(f), want)
    assert np.abs(to_uint8(f, channels=1)[...,0].astype(int)-(want @ [.299,.587,.114])).max()<=1

@works('images', 'several frames: animated GIF, TIFF of pages', 'works: the first frame')
@pytest.mark.parametrize('ext', ['gif','tif'])
def test_first_frame(tmp_path, ext):
    a,b = (Image.fromarray(np.full((4,5), v, np.uint8)) for v in (40,200))
    a.save(tmp_path/f'a.{ext}', save_all=True, append_images=[b])
    assert (to_uint8(tmp_path/f'a.{ext}')==40).all()

def shipped():
    "Files that other packages ship: sizes and modes as their authors made them"
    mpl = Path(matplotlib.get_data_path())/'sample_data'
    skl,sci = Path(sklearn.datasets.__file__).parent/'images',Path(scipy.ndimage.__file__).parent/'tests'/'dots.png'
    return [mpl/'grace_hopper.jpg', mpl/'Minduka_Present_Blue_Pack.png', mpl/'logo2.png', skl/'china.jpg', skl/'flower.jpg',
            sci]

@works('images', 'photographs and drawings that scikit-learn, matplotlib and SciPy ship',
       'works: as scikit-learn and matplotlib read them')
@pytest.mark.parametrize('f', shipped(), ids=lambda f: f.name)
def test_files_of_other_packages(f):
    "An independent reader: scikit-learn's for its photographs, matplotlib's for the others"
    if not f.exists(): pytest.skip(f'{f} is not shipped here')
    if f.parent.name=='images': want = sklearn.datasets.load_sample_image(f.name)
    else:
        want = matplotlib.image.imread(f)
        want = np.rint(want*255).astype(np.uint8) if want.dtype.kind=='f' else want
        want = three(want) if want.ndim==2 else want[...,:3]
    assert np.array_equal(to_uint8(f), want)

# More than 8 bits

wide = [case('a.png', deep, kind='images', what='16-bit grey PNG', how='works: 0…65535 becomes 0…255'),
        case('a.tif', deep, kind='images', what='16-bit grey TIFF', how='works: 0…65535 becomes 0…255'),
        case('a.pgm', deep, kind='images', what='16-bit PGM', how='works: 0…65535 becomes 0…255'),
        case('a.tif', (deep/65535).astype(np.float32), kind='images', what='float TIFF in 0…1', how='works: 0…1 becomes 0…255'),
        case(None, deep, kind='images', what='array of uint16', how='works: 0…65535 becomes 0…255'),
        pytest.param(None, deep.astype('>u2')), pytest.param(None, Image.fromarray(deep)),
        case(None, deep/65535, kind='images', what='array of floats in 0…1, grey or RGB', how='works: 0…1 becomes 0…255'),
        pytest.param(None, (deep/65535).astype(np.float16)), pytest.param(None, three(deep/65535)),
        pytest.param(None, three(deep))]

@pytest.mark.parametrize('name,im', wide)
def test_more_than_8_bits(tmp_path, name, im):
    "Scaled by what the type stands for: 65535/255 = 257 values to a byte, to the nearest"
    got = to_uint8(im if name is None else saved(tmp_path/name, im))
    off = 1 if np.asarray(im).dtype==np.float16 else 0                # half floats have 11 bits
    assert got.shape==(6,9,3) and np.abs(got.astype(int)-three(np.rint(deep/257))).max()<=off

@works('images', 'grey TIFF in which 0 is white (MinIsWhite), 8 or 16 bits', 'works: white is white')
@pytest.mark.parametrize('turned', [1,3])
def test_zero_is_white(tmp_path, turned):
    "The tag says so: 262, PhotometricInterpretation"
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262],tags[274] = 0,turned
    f = saved(tmp_path/'a.tif', deep, tiffinfo=tags)
    assert Image.open(f).tag_v2[262]==0 and (turned!=1 or np.array_equal(np.asarray(Image.open(f)), deep))   # no tool has inverted it
    want = 255-np.rint(deep/257)
    assert np.array_equal(to_uint8(f), three(want if turned==1 else want[::-1,::-1]))
    assert np.array_equal(to_uint8(saved(tmp_path/'b.tif', grey, tiffinfo=tags)), three(grey if turned==1 else grey[::-1,::-1]))

def png16(rgb16):
    "A 16-bit RGB PNG, which PIL does not write"
    h,w,_ = rgb16.shape
    rows = b''.join(b'\0'+r.astype('>u2').tobytes() for r in rgb16)
    def chunk(t, d): return struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    head = struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')

@works('images', '16-bit RGB PNG', 'works: the upper byte, as PIL reads it')
def test_16_bit_rgb(tmp_path):
    (tmp_path/'a.png').write_bytes(png16(rgb.astype(int)*257))
    assert np.array_equal(to_uint8(tmp_path/'a.png'), rgb)

def test_12_bits_in_16_bit_rgb(tmp_path):
    "They come out nearly black: a warning says so, and `value_range`, of which the upper byte knows nothing, is refused"
    for f in (names := [tmp_path/f'{i}.png' for i in range(2)]): f.write_bytes(png16(np.clip(rgb.astype(int)*16, 0, 4095)))
    with pytest.warns(match=r'2 of 2 images have more than 8 bits: 0…65535 became 0…255. Their values lie in 0…3855'):
        assert decode_images(names).max()==15
    with pytest.raises(ValueError, match=r'0.png: has 16 bits a channel .* `value_range`; save it with 8 bits'):
        decode_images(names, value_range=(0,4095))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert decode_images([saved(tmp_path/'a.png', rgb)], value_range=(0,4095)).max()==rgb.max()   # bytes are what they are

@works('images', 'booleans, as an array', 'works: black and white')
def test_booleans(): assert np.array_equal(to_uint8(grey>99), three((grey>99)*255))

unclear = [case(lambda f: saved(f/'a.tif', deep.astype(np.int32)), r'int32 says nothing of black and white \(values 0…65535\)',
                kind='images', what='32-bit integers', how='refused: `value_range` is asked for'),
           case(lambda f: deep/257, r'floats outside of 0…1 \(values 0…255\)', kind='images', what='floats outside of 0…1',
                how='refused: `value_range` is asked for'),
           pytest.param(lambda f: grey.astype(int), 'int64 says nothing'),
           pytest.param(lambda f: grey.astype(np.uint32), 'uint32 says nothing'),
           case(lambda f: np.where(grey>99, np.nan, .5), 'NaN or infinite', kind='images', what='NaN or Inf', how='refused'),
           pytest.param(lambda f: np.where(grey>99, np.inf, .5), 'NaN or infinite')]

@pytest.mark.parametrize('make,said', unclear)
def test_what_the_type_does_not_say(tmp_path, make, said):
    "Refused, not called damaged; with `value_range` it works"
    with pytest.raises(ValueError, match=said) as e: to_uint8(make(tmp_path))
    assert 'NaN' in said or 'pass `value_range=(black, white)`' in str(e.value)

@works('images', 'a part of 16 bits, signed or larger integers, floats of any size',
       'works: with `value_range=(black, white)`, the rest is cut off')
@pytest.mark.parametrize('im,r',
                         [(deep//16, (0,4095)), (deep.astype(np.int32)-1000, (-1000,64535)), (deep*2., (0,131070)),
                          (deep.astype(np.uint32)*2, (0,131070))])
def test_value_range(tmp_path, im, r):
    want = three(np.rint((im-r[0])/(r[1]-r[0])*255))
    assert np.array_equal(to_uint8(im, value_range=r), want)
    if im.dtype in (np.uint16,np.int32): assert np.array_equal(to_uint8(saved(tmp_path/'a.tif', im), value_range=r), want)
    assert (to_uint8(np.array([[-2.,9]]), value_range=(0,1))[0,:,0]==[0,255]).all()
    assert np.array_equal(to_uint8(rgb, value_range=(0,4095)), rgb)                # bytes stay bytes
    for bad in ((1,1), (5,0), 7, (0,float('nan')), (0,)):
        with pytest.raises(ValueError, match='value_range=.*want two numbers'): to_uint8(im, value_range=bad)

def sixteen(root, n=6, most=4000):
    "16-bit images of two classes, each of one value, in `train` and `val`; the values"
    vals = {}
    for split in 'train','val':
        for c in 'ab':
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                vals[f := root/split/c/f'{i}.png'] = v = (len(vals)+1)*most//(4*n)
                saved(f, np.full((8,8), v, np.uint16))
    return vals

@works('images', 'a data set of 16-bit images, its test images with it',
       'works: one range for all, and a warning that says which')
def test_one_range_for_a_data_set(tmp_path):
    "Two images that differ by a factor do so afterwards, in training, validation and test set, from the cache as well"
    vals = sixteen(tmp_path)
    for again in range(2):
        with pytest.warns(match=r'12 of 12 images have more than 8 bits: 0…65535 became 0…255. '
                                r'Their values lie in 166…2000; `value_range=\(166, 2000\)`'):
            dls = image_folder_dls(tmp_path, None, size=None, bs=4, stats=None)
        assert [int(o) for o in dls.train_ds.x[:,0,0,0]]==[round(v/257) for f,v in vals.items() if 'train' in f.parts]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        dls = image_folder_dls(tmp_path, None, size=None, bs=4, stats=None, value_range=(0,4000))
        files = list(vals)[::5]
        test = dls.inject(ColorSquare(2)).test_dl(files)
    assert len(seen)==3 and all('0…4000 became 0…255' in str(o.message) for o in seen)
    want = [round(v/4000*255) for v in vals.values()]
    assert [int(o) for ds in (dls.train_ds,dls.valid_ds) for o in ds.x[:,0,0,0]]==want
    assert [int(o) for o in test.dataset.x[:,0,0,0]]==want[::5]==[round(float(o)*255) for o in test.one_batch()[0][:,0,0,0]]
    assert dls.train_ds.subset(4).value_range==dls.train_ds.new_empty().value_range==(0,4000)

def test_bytes_say_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        decode_images([saved(tmp_path/'a.png', rgb)])
        digits_dls(n=100).test_dl([np.zeros((16,16,3), np.uint8)])
    for f in (digits_dls(n=100).test_dl, decode_images):
        with pytest.raises(ValueError, match='images: none given'): f([])
    for channels in (2,4):
        with pytest.raises(ValueError, match=rf'channels={channels}: must be 3 \(RGB\) or 1'): to_uint8(rgb, channels=channels)

@works('images', 'arrays that are no image, plain tensors with channels first', 'refused: the shape, and what is wanted')
@pytest.mark.parametrize('shape', [(3,8,9), (4,), (2,8,9,3), (8,9,2), (0,4)])
def test_shapes(shape):
    with pytest.raises(ValueError, match=r'want (numbers, )?\(height, width\[, channels\]\)'):
        to_uint8(np.zeros(shape, np.uint8 if 0 not in shape else float))
    assert to_uint8(np.zeros((1,8,3), np.uint8)).shape==(1,8,3) and to_uint8(np.zeros((8,9,1))).shape==(8,9,3)

@works('images', "fastai's `TensorImage`, such as an item of the validation set", 'works: with channels first, also in `predict`')
def test_fastais_images_have_channels_first():
    a = np.random.RandomState(0).randint(0, 256, (8,9,3), np.uint8)
    first = TensorImage(a).permute(2, 0, 1)
    for o in (first, first.float()/255, TensorImage(a)): assert (to_uint8(o)==a).all()
    assert (to_uint8(TensorImage(a[...,0])[None], channels=1)==a[...,:1]).all()
    dls = digits_dls(n=100, n_valid=20)
    dl = dls.test_dl([o for o,_ in dls.valid_ds])
    assert (dl.dataset.x==dls.valid_ds.x).all()

# EXIF

photo = np.zeros((8,12,3), np.uint8); photo[:4,:6] = 200,30,30; photo[4:,6:] = 30,30,200     # red top left, blue bottom right

def turned(f, orientation):
    "A file whose pixels are stored so that `orientation` makes the photograph of them"
    back = {1:lambda a: a, 2:lambda a: a[:,::-1], 3:lambda a: a[::-1,::-1], 4:lambda a: a[::-1], 5:lambda a: a.swapaxes(0,1),
            6:lambda a: np.rot90(a), 7:lambda a: np.rot90(a, 2).swapaxes(0,1), 8:lambda a: np.rot90(a, -1)}[orientation](photo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(f, np.ascontiguousarray(back), exif=exif,
                 **{'.jpg':dict(quality=95, subsampling=0), '.webp':dict(lossless=True)}.get(f.suffix, {}))

@works('images', 'EXIF orientation 1 to 8: JPEG, PNG, TIFF, WebP', 'works: turned upright')
@pytest.mark.parametrize('ext', ['jpg','png','tif','webp'])
def test_exif_orientation(tmp_path, ext):
    "By the definition of the tag (EXIF 2.32, 4.6.4): the stored rows and columns turned by hand for each of the eight"
    for o in range(1, 9):
        f = turned(tmp_path/f'{o}.{ext}', o)
        for im in (to_uint8(f), to_uint8(Image.open(f))):
            assert im.shape==photo.shape and np.abs(im.astype(int)-photo).mean()<4, (ext, o)
    plain = Image.open(f)
    to_uint8(plain)
    assert plain.size==(8,12) if ext!='tif' else True                                         # somebody's image stays as it was

@works('images', 'EXIF data that are damaged', 'works: as stored')
def test_damaged_exif(tmp_path):
    f = saved(tmp_path/'a.jpg', photo, exif=b'Exif\0\0MM\0*\0\0\xff\xff', quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert to_uint8(f).shape==(8,12,3)

@works('images', 'files that are no image, or cut off', 'refused: the file is named')
def test_damaged_files(tmp_path):
    (tmp_path/'a.png').write_bytes(b'no image')
    whole = saved(tmp_path/'b.png', np.random.RandomState(0).randint(256, size=(64,64,3), dtype=np.uint8)).read_bytes()
    (tmp_path/'b.png').write_bytes(whole[:len(whole)//2])
    for f in 'ab':
        with pytest.raises(ValueError, match=f'{f}.png: not a readable image'): to_uint8(tmp_path/f'{f}.png')

# Folders

def tree(root, *files):
    "Small images, each of a colour of its own"
    for f in files:
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        saved(root/f, np.full((4,4,3), zlib.crc32(f.encode())%256, np.uint8))
    return root

def full(split, classes='cat dog', n=4): return [f'{split}/{c}/{i}.png' for c in classes.split() for i in range(n)]
def load(root, **kw): return image_folder_dls(root, None, size=None, bs=2, stats=None, **kw)
def counts(dls):
    return list(dls.vocab),*(np.bincount(ds.y, minlength=dls.c).tolist() for ds in (dls.train_ds,dls.valid_ds))
two = ['cat','dog']

layouts = [case(full('train')+full('val', n=2), (two,[4,4],[2,2]), kind='folders',
                what='train/CLASS and val/CLASS (or valid, test)', how='works'),
           pytest.param(full('train')+full('valid', n=2), (two,[4,4],[2,2])),
           pytest.param(full('train')+full('test', n=2), (two,[4,4],[2,2])),
           case(full('cat', '.')+full('dog', '.'), (two,[3,3],[1,1]), kind='folders', what='CLASS alone',
                how='works: a share is held out'),
           case(full('train')+['test1/1.png','test1/2.png','unlabeled/3.png'], (two,[3,3],[1,1]), kind='folders',
                what='train beside test1 or unlabeled',
                how='works: these are no classes'),
           case(full('train')+full('val', n=2)+['.git/x/1.png','train/.thumbs/1.png'], (two,[4,4],[2,2]), kind='folders',
                what='hidden folders', how='works: left out'),
           case(full('train')+full('val', n=2)+['train/cat/black/5.png','train/cat/black/old/6.png'], (two,[6,4],[2,2]),
                kind='folders', what='sub-folders of a class',
                how='works: they belong to the class'),
           case([f'train/{c}/images/{i}.png' for c in two for i in range(4)]+[f'val/{c}/images/0.png' for c in two],
                (two,[4,4],[1,1]), kind='folders',
                what="CLASS/images/… (Tiny ImageNet's train)", how='works: classes are the folders in train'),
           case(full('train', 'a b c')+full('val', 'a b c'), (['a','b','c'],[4]*3,[4]*3), kind='folders',
                what='folders without images', how='works: no classes')]

@pytest.mark.parametrize('files,want', layouts)
def test_layouts(tmp_path, files, want):
    (tree(tmp_path, *files)/'train'/'empty').mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert counts(load(tmp_path))==want

@works('folders', 'files that a machine does not list as images (WebP, TGA, JPEG 2000)', 'work: on any machine')
def test_extensions_that_a_machine_does_not_list(tmp_path, monkeypatch):
    "Python knows .webp as an image where /etc/mime.types does, as it is not in small containers"
    monkeypatch.setattr(data, 'image_extensions', {k for k,v in mimetypes.MimeTypes(()).types_map[1].items() if v.startswith('image/')})
    exts = 'png','webp','WEBP','tga','jp2','dib'
    for c in two:
        (tmp_path/c).mkdir()
        for i,e in enumerate(exts): saved(tmp_path/c/f'{i}.{e}', rgb)
        for k in 'txt','pdf','h5','csv': (tmp_path/c/f'0.{k}').write_text('no image')
    assert {k:len(v) for k,v in class_files(tmp_path).items()}==dict.fromkeys(two, len(exts))
    assert image_folder_dls(tmp_path, size=None, bs=2, valid_pct=.5).train_ds.x.shape==(6,*rgb.shape)

said = [case(full('train')+full('val')+['train/stray.png','train/more.jpg'], (two,[4,4],[4,4]),
             '2 images lie beside the folders of the classes', kind='folders',
             what='images beside the folders of the classes', how='works: left out, with a warning'),
        case(full('train')+['test/1.png','test/2.png'], (two,[3,3],[1,1]),
             'test: no folders of classes, so no validation set; a share', kind='folders',
             what='train/CLASS and a flat test (Kaggle)', how='works: a share of train is held out, with a warning'),
        pytest.param(full('.', 'cat', n=12)+full('.', 'dog', n=1), (two,[9,1],[3,0]), 'no images of dog held out for validation'),
        case(full('train', 'ant cat dog')+full('val'), (['ant','cat','dog'],[4]*3,[0,4,4]),
             'val: no images of ant; accuracy there says nothing', kind='folders',
             what='val without one of the classes', how='works, with a warning'),
        case(full('train')+full('val', 'cat dog emu'), (two,[4,4],[4,4]), 'val: emu: not in the training set, left out',
             kind='folders',
             what='val with a class that train does not have', how='works: left out, with a warning')]

@pytest.mark.parametrize('files,want,note', said)
def test_layouts_that_are_said(tmp_path, files, want, note):
    with pytest.warns(match=note): assert counts(load(tree(tmp_path, *files)))==want

def test_a_class_on_one_side_of_a_split_is_said(tmp_path):
    "Of two images, one of each class, one is held out"
    with pytest.warns(UserWarning) as told:
        image_folder_dls(tree(tmp_path, 'cat/1.png', 'dog/1.png'), size=None, bs=1, valid_pct=.5)
    assert [what in str(o.message) for o,what in zip(told, ('left to train on','held out'), strict=True)]==[True,True]

refused = [case(full('train')+['val/1.png'], 'val: images without folders of classes; sort them', kind='folders',
                what='train/CLASS and a flat val', how='refused'),
           case(full('train')+['val/images/1.png'], 'val: none of the classes of the training set .cat, dog., but images',
                kind='folders',
                what="val/images/… (Tiny ImageNet's val)", how='refused: none of the classes is there'),
           case([*full('cat', '.'), *full('dog', '.'), 'test/1.png'], 'test: named like a part of a data set', kind='folders',
                what='CLASS beside a flat test or unlabeled, without train', how='refused: `classes` says which are classes'),
           pytest.param(full('Training')+full('Testing'), 'Testing, Training: named like'),
           case(['train/1.png','train/2.png'], 'train: named like a part', kind='folders',
                what='images in train, without folders', how='refused'),
           case(['1.png'], 'no images in folders of classes here', kind='folders', what='images in one folder', how='refused')]

@pytest.mark.filterwarnings('ignore:.*lie beside')
@pytest.mark.parametrize('files,why', refused)
def test_layouts_that_are_refused(tmp_path, files, why):
    with pytest.raises((ValueError,FileNotFoundError), match=why): load(tree(tmp_path, *files))

def test_classes_say_which_folders_count(tmp_path):
    "A class may be called like a part of a data set: CIFAR-100 has one called train"
    tree(tmp_path, *[f'{c}/{i}.png' for c in ('bus','train','test') for i in range(4)])
    assert counts(load(tmp_path, classes=['bus','train']))==(['bus','train'],[3,3],[1,1])

@pytest.mark.parametrize('classes,want', [('10',['10']), (10,['10']), ([2,'10'],['2','10']), (np.array([2]),['2'])], ids=str)
def test_classes_are_names_of_folders(tmp_path, classes, want):
    "A text is one name, not its letters, and folders may be named by numbers"
    tree(tmp_path, *full('.', '0 1 2 10'))
    assert counts(load(tmp_path, classes=classes))[0]==want

@works('folders', "what fastai's GrandparentSplitter takes", 'works: the same files in the same classes')
def test_as_grandparent_splitter(tmp_path):
    files = full('train')+full('valid', n=3)+['train/stray.png','stray.png','unlabeled/1.png','test/2.png','test/3.png']
    items = get_image_files(tree(tmp_path, *files))
    want = [sorted((str(items[i]), parent_label(items[i])) for i in idxs) for idxs in GrandparentSplitter()(items)]
    with pytest.warns(match='lie beside'):
        got = [[(f,c) for c,fs in class_files(tmp_path/o).items() for f in fs] for o in ('train','valid')]
    assert got==want

@works('folders', 'links: to folders, to files, in a loop', 'works: followed, each folder once')
def test_links(tmp_path):
    root = tree(tmp_path/'data', *full('train'), *full('val', n=1))
    tree(tmp_path/'elsewhere', '7.png', '8.png')
    for link,to in (('train/cat/up', root/'train'), ('train/cat/self', root/'train'/'cat'), ('train/dog/top', tmp_path),
                    ('train/loop', root),
                    ('train/emu', tmp_path/'elsewhere'), ('val/emu', tmp_path/'elsewhere'),
                    ('train/cat/9.png', root/'train'/'cat'/'0.png')):
        (root/link).symlink_to(to)
    assert {k:len(v) for k,v in class_files(root/'train').items()}=={'cat':5, 'dog':4,
                                                                     'emu':2}      # 9.png is somebody's second copy
    assert counts(load(root))==(['cat','dog','emu'],[5,4,2],[1,1,2])

@works('folders', 'a file that two classes share by links', 'refused: both are named')
def test_a_file_in_two_classes(tmp_path):
    root = tree(tmp_path, *full('train'))
    (root/'train'/'dog'/'x.png').symlink_to(root/'train'/'cat'/'0.png')
    with pytest.raises(ValueError, match='the same file is in the classes cat and dog; a sample can have only one'): load(root)

@works('folders', "groups of classes (CIFAR-100's coarse ones)", 'works: `level=2` takes the inner folders')
def test_levels(tmp_path):
    inner = 'fish/ray','fish/cod','tree/oak','tree/fir'
    root = tree(tmp_path, *[f'{s}/{c}/{i}.png' for s in ('train','test') for c in inner for i in range(2)])
    assert list(load(root).vocab)==['fish','tree']
    assert list(load(root, level=2).vocab)==list(cifar100_dls(root, bs=2).vocab)==['cod','fir','oak','ray']
    assert list(cifar100_dls(tree(tmp_path/'flat', *full('train'), *full('test')), bs=2).vocab)==two

# First start

@pytest.mark.slow('a process that imports everything')
def test_first_start_finds_the_data(tmp_path):
    "On a machine where fastai never ran, and never wrote its config"
    tree(tmp_path/'.fastai'/'data'/'cifar10', *full('train'), *full('test'))
    env = {k:v for k,v in os.environ.items() if k!='FASTAI_HOME'} | dict(HOME=str(tmp_path))
    src = 'from feature_erosion.data import *; print(list(cifar10_dls(bs=2).vocab))'
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', src], env=env, capture_output=True, text=True)
    assert out.stdout.strip().endswith("['cat', 'dog']"), out.stderr

def test_no_data_and_no_network(tmp_path, monkeypatch):
    "Where to put them is said"
    import feature_erosion.data as d
    from fastcore.xtras import Config
    monkeypatch.setattr(d, 'fastai_cfg', lambda: Config(tmp_path, 'config.ini', create=dict(data='data', archive='archive')))
    def offline(self, url): raise OSError('no network')
    monkeypatch.setattr(d.FastDownload, 'download', offline)
    with pytest.raises(FileNotFoundError,
                       match=r'data/cifar10: not there, and could not download .*no network.*; unpack it there'):
        cifar10_dls()

# Decoded images

def test_every_changed_byte_is_found(tmp_path):
    "Each byte of a small cache in turn: never other pixels; a changed pixel is said, and the file is whole again afterwards"
    files = [saved(tmp_path/f'{i}.png', rgb[:3,:4]//(i+1)) for i in range(2)]
    want = cached_images(files, tmp_path)
    f, = (tmp_path.parent/f'.{tmp_path.name}.decoded').glob('*.npy')
    whole = f.read_bytes()
    for i in range(len(whole)):
        f.write_bytes(whole[:i]+bytes([whole[i]^(1<<i%8)])+whole[i+1:])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            assert np.array_equal(cached_images(files, tmp_path), want)
        if seen: assert 'damaged' in str(seen[0].message) and 'decoded again' in str(seen[0].message) and f.read_bytes()==whole
        else: assert not 128<=i<128+want.size    # pixels begin after a header of 128 bytes, whose padding makes no difference
    for cut in (0, 1, 100, len(whole)//2, len(whole)-1):
        f.write_bytes(whole[:cut])
        with pytest.warns(match='damaged'): assert np.array_equal(cached_images(files, tmp_path), want)

# Archives

def archive(f, *members, mode='w:gz'):
    with tarfile.open(f, mode) as t:
        for name,data in members:
            m = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            m.size = len(data) if data is not None else m.size
            t.addfile(m, io.BytesIO(data) if data is not None else None)
    return f

class Zeros(io.RawIOBase):
    def __init__(self, n): self.n = n
    def readinto(self, b):
        k = min(len(b), self.n)
        b[:k],self.n = bytes(k),self.n-k
        return k

def bomb(f, mb, kind=gzip.open):
    "A few kB that unpack to zeros"
    with kind(f, 'wb') as out:
        m = tarfile.TarInfo('d/zeros')
        m.size = mb*10**6
        out.write(m.tobuf())
        for _ in range(mb): out.write(bytes(10**6))
        out.write(bytes(512*2+(-m.size)%512))
    return f

def refuse(f, dest, why, **kw):
    with pytest.raises(ValueError, match=why): extract(f, dest, **kw)
    assert not dest.exists()

@pytest.mark.parametrize('mode', ['w','w:gz','w:bz2','w:xz'])
def test_honest_archives(tmp_path, mode):
    f = archive(tmp_path/'a.tar', ('d/a.txt', b'hello'), ('d/b.txt', bytes(10**5)), mode=mode)
    assert (extract(f,
                    tmp_path/'out')/'d'/'a.txt').read_bytes()==b'hello' and (tmp_path/'out'/'d'/'b.txt').stat().st_size==10**5
    refuse(f, tmp_path/'no', 'unpacks to more than 0 MB; refused, nothing was unpacked. If that is right, `max_bytes`',
           max_bytes=10**5)

def test_bombs_are_not_decompressed(tmp_path, monkeypatch):
    "120 MB in 120 kB is refused at its header; a small member with a long tail is cut off at the limit"
    import feature_erosion.data as d
    read = []
    class Counting(d._Metered):
        def read(self, n):
            read.append(len(b := super().read(n)))
            return b
    monkeypatch.setattr(d, '_Metered', Counting)
    f = bomb(tmp_path/'a.tgz', 120)
    assert f.stat().st_size<200_000
    refuse(f, tmp_path/'out', 'unpacks to more than 100 MB')
    assert sum(read)<10**6
    with gzip.open(tmp_path/'tail.tgz', 'wb') as out:
        out.write(archive(tmp_path/'b.tar', ('d/a', b'x'), mode='w').read_bytes())
        for _ in range(9): out.write(bytes(10**6))
    read.clear()
    refuse(tmp_path/'tail.tgz', tmp_path/'out', 'unpacks to more than 5 MB', max_bytes=5*10**6)
    assert sum(read)<=5*10**6
    assert (extract(f, tmp_path/'big', max_bytes=10**9)/'d'/'zeros').stat().st_size==120*10**6

def test_headers_that_are_bombs(tmp_path):
    "A name of 9 MB, in an extended header that tarfile reads whole; a thousand empty files count with what they take on a disk"
    archive(tmp_path/'a.tgz', (tarfile.TarInfo('x'*9_000_000), b''))
    refuse(tmp_path/'a.tgz', tmp_path/'out', 'unpacks to more than 5 MB', max_bytes=5*10**6)
    archive(tmp_path/'b.tgz', *[(f'd/{i}', b'') for i in range(1000)])
    refuse(tmp_path/'b.tgz', tmp_path/'out', 'unpacks to more than 4 MB', max_bytes=4*10**6)

def test_sparse_members(tmp_path):
    "A GNU sparse file of 1 TB in one block, made by hand as tar(5) describes it"
    h = bytearray(tarfile.TarInfo('d/sparse').tobuf(tarfile.GNU_FORMAT))
    h[156:157] = b'S'
    h[386:398],h[398:410] = b'%011o\0'%0,b'%011o\0'%0                  # offset and size of the only part
    h[483:495] = b'\x80'+(10**12).to_bytes(11, 'big')                 # the real size
    h[148:156] = b' '*8
    h[148:156] = b'%06o\0 '%sum(h)
    (tmp_path/'a.tar').write_bytes(bytes(h)+bytes(1024))
    refuse(tmp_path/'a.tar', tmp_path/'out', "'d/sparse' is a sparse file; refused, nothing was unpacked")

def test_hostile_names(tmp_path):
    for name in ('../x','/x','a/../../x','a\\..\\..\\x'):
        refuse(archive(tmp_path/'a.tgz', ('ok', b'1'), (name, b'2')), tmp_path/'out', 'lies outside of the folder')
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        m = tarfile.TarInfo('x')
        m.type,m.linkname = kind,'ok'
        refuse(archive(tmp_path/'a.tgz', ('ok', b'1'), (m, None)), tmp_path/'out', 'is a link or a device')

def test_damaged_archives(tmp_path):
    "Cut off, a wrong checksum at the very end, no archive at all: nothing is unpacked"
    whole = archive(tmp_path/'a.tgz', ('d/a', np.random.RandomState(0).bytes(10**5))).read_bytes()
    for data in (whole[:len(whole)//2], whole[:-8]+bytes(4)+whole[-4:], b'', b'no archive'*100, b'BZh9'+bytes(100),
                 b'\xfd7zXZ'+bytes(100)):
        (tmp_path/'b.tgz').write_bytes(data)
        refuse(tmp_path/'b.tgz', tmp_path/'out', 'not a whole tar archive .*; nothing was unpacked, download it again')
    with pytest.raises(FileNotFoundError): extract(tmp_path/'none.tgz', tmp_path/'out')

def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda p: type('U', (), dict(free=10**4)))
    refuse(archive(tmp_path/'a.tgz', ('d/a', bytes(10**6))), tmp_path/'out',
           'needs 1 MB, .* has 0 MB left; nothing was unpacked')
