"""Image data: writing it to FFCV's .beton files, and reading it in an order that a seed decides.

    write.py       `python -m data.write SOURCE --out DIR`: train.beton, val.beton, dataset.json
    sources/       the kinds of data that it writes: a file each, of what source.py declares
    digits.py      the embedded data set: 1,797 real handwritten digits
    cifar10.py     CIFAR-10, from the folder where torchvision puts it
    imagefolder.py a tree of image files by class, such as ImageNet
    dataset.py     dataset.json and the checks made before a .beton is read
    order.py       who reads what: permutations, shards, and random draws per sample
    augment.py     crop boxes and flips from draws; the FFCV decoder that applies them
    randaugment.py RandAugment, compiled; for a GPU randaugment_triton.py and randaugment_torch.py,
                   between which randaugment_gpu.py chooses
    ffcv_parts.py  what is used of FFCV, imported without its side effects
    loaders.py     TrainData and ValData, which the training program iterates

Everything random is a function of (seed, epoch, sample index), never of the rank, the worker or the
batch that asked. So a resumed run, or one with other numbers of workers, sees the same images. Only
with skewed shards does the rank decide too: which images are its own, and in which order they come.
"""
