"""Checkpoints of a sharded model: each rank writes its part, by torch.distributed.checkpoint, into a folder beside the
checkpoint file, which then holds the digests of these files instead of tensors. Any number of ranks can read them."""

import io
import pickle
import shutil
import warnings
from pathlib import Path

import torch

from core import dist
from core.meta import digest_of
from core.readers import check_regular
from core.runs import save_error


def write_shards(path, parts):
    """Write tensors of which every rank holds a part into a new folder beside `path`; called by all ranks.

    parts: {"model": {name: tensor}, ...}. Returns what `read_shards` needs: {"folder", "files": {name: sha256}, "names"
    of the model's tensors}. Raises SaveError.
    """
    import torch.distributed.checkpoint as dcp

    n = next(n for n in range(10**6) if not path.with_name(f"{path.stem}-{n}.shards").exists())
    folder = path.with_name(f"{path.stem}-{dist.all_gather(n)[0]}.shards")
    try:
        dcp.save(parts, storage_writer=dcp.FileSystemWriter(folder, thread_count=1))
    except dcp.api.CheckpointException as error:
        cause = next((each for each, _ in error.failures.values() if isinstance(each, OSError)), None)
        if dist.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise save_error(folder, cause.strerror if cause else error)
    names = sorted(file.name for file in folder.iterdir())
    files = {name: sha256(folder / name) for name in names[dist.rank :: dist.world]}
    return {"folder": folder.name, "names": sorted(parts["model"]),
            "files": {name: value for of_rank in dist.all_gather(files) for name, value in of_rank.items()}}


def sha256(path):
    check_regular(path)
    return digest_of(path)


def check_shards(path, shards):
    """Raise ValueError unless the files of the folder beside `path` are as written; once on each machine."""
    for name, expected in shards["files"].items() if dist.local_rank == 0 else ():
        file = path.parent / Path(shards["folder"]).name / name
        if sha256(file) != expected:
            raise ValueError(f"{file.parent.name}/{name} is not what was written, by its digest")


def shard_entries(path, shards):
    """{name: metadata of torch.distributed.checkpoint, with the tensor's `size`} of the folder beside `path`."""
    return read_metadata(path.parent / Path(shards["folder"]).name).state_dict_metadata


def read_metadata(folder):
    return MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()


def read_shards(path, shards, parts):
    """Fill tensors, whole or sharded ones, from the folder beside `path`. Raises ValueError."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *arguments, **named):
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta.load_id = self.load_id
            return metadata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one process that reads what several wrote
            dcp.load(parts, storage_reader=Reader(path.parent / Path(shards["folder"]).name), no_dist=True)
    except dcp.api.CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0]))


class MetadataUnpickler(pickle.Unpickler):
    """Reads the one pickle in a folder of shards: names, sizes and places of tensors. It refuses everything else."""

    known = {
        "torch.distributed.checkpoint.metadata": ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float64", "float32", "bfloat16", "float16", "int64"),
        "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module, name):
        if name not in self.known.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def drop_shards(folder, names):
    """Remove the folders of shards in `folder` that none of the checkpoints with these names refers to."""
    folders, used = list(folder.glob("*.shards")), set()
    for name in names if folders else ():
        if (folder / name).is_file():
            used.add(torch.load(folder / name, weights_only=True, mmap=True).get("shards", {}).get("folder"))
    for path in folders:
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
