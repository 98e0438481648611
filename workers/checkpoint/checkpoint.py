"""A checkpoint directory: `ckpt-0/tensor00000_000` and on, with an optional `config.json` beside it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re

from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.storage import Location
from workers.checkpoint.tensor_file import TensorFile, read_header
from workers.model.config import ConfigError, GrokConfig
from workers.model.parameters import ParameterInfo, parameter_table

TENSORS_A_LAYER = 12
#: Headers that are read at a time.
THREADS = 16
TENSORS_OUTSIDE_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Headers of all tensors, in checkpoint order, checked against the model's parameters. No payload has been read.

    Attributes:
      directory: the checkpoint's.
      config: of the model, from `config.json` or inferred.
      inferred: whether there was no `config.json`.
      tensors: each parameter with its file.
    """

    directory: Location
    config: GrokConfig
    inferred: bool
    tensors: tuple[tuple[ParameterInfo, TensorFile], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads: values and scales."""
        return sum(file.values.nbytes + (file.scales.nbytes if file.scales else 0) for _, file in self.tensors)


def open_checkpoint(directory: Location) -> Checkpoint:
    """Reads all headers of a checkpoint.

    Raises:
      CheckpointError: a file is missing, truncated or foreign, or a shape is not the configuration's.
      ConfigError: `config.json` does not describe a model.
    """
    files = _tensor_files(directory)
    config_path = directory / "config.json"
    inferred = not config_path.exists()
    config = _infer(directory, files) if inferred else GrokConfig.load(config_path)
    table = parameter_table(config)
    if len(files) != len(table):
        raise CheckpointError(
            directory / "ckpt-0", f"holds {len(files)} tensors; a model of {config.num_layers} layers has {len(table)}"
        )

    def read(info: ParameterInfo, path: Location) -> tuple[ParameterInfo, TensorFile]:
        file = read_header(path, info.path)
        _check(info, file)
        return info, file

    # From an object store each header is two or three requests.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return Checkpoint(directory, config, inferred, tuple(pool.map(read, table, files)))


def _tensor_files(directory: Location) -> list[Location]:
    folder = directory / "ckpt-0"
    if not folder.is_dir():
        raise CheckpointError(folder, "is no directory; a checkpoint is DIR/ckpt-0/tensor00000_000 and on")
    files: list[Location] = sorted(
        # Hidden ones are of file systems and desktops, as lost+found is.
        (path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "lost+found"),
        key=lambda path: path.name,
    )
    for i, path in enumerate(files):
        if not re.fullmatch(r"tensor\d{5}_\d{3}", path.name):
            raise CheckpointError(path, "is no tensor file; expected names such as tensor00000_000")
        if path.name != f"tensor{i:05d}_000":
            raise CheckpointError(folder / f"tensor{i:05d}_000", f"is missing (the next file is {path.name})")
    if not files:
        raise CheckpointError(folder, "holds no tensor files")
    return files


def _infer(directory: Location, files: list[Location]) -> GrokConfig:
    """The configuration that the tensors' shapes imply, with Grok-1's key size and multipliers."""
    layers, rest = divmod(len(files) - TENSORS_OUTSIDE_LAYERS, TENSORS_A_LAYER)
    if layers < 1 or rest:
        raise CheckpointError(
            directory / "ckpt-0",
            f"holds {len(files)} tensors; expected {TENSORS_OUTSIDE_LAYERS} + {TENSORS_A_LAYER} a layer",
        )
    release = GrokConfig()

    def shape(index: int, name: str, rank: int) -> tuple[int, ...]:
        found = read_header(files[index], name).values.shape
        if len(found) != rank:
            raise CheckpointError(files[index], f"has shape {found}; expected {rank} dimensions", tensor=name)
        return found

    vocab, emb = shape(0, "embeddings", 2)
    experts, _, ffn = shape(2, "moe/linear", 3)
    kv = shape(5, "multi_head_attention/key", 2)[1]
    q = shape(7, "multi_head_attention/query", 2)[1]
    if kv % release.key_size or q % release.key_size:
        raise CheckpointError(
            directory / "config.json",
            f"is missing, and heads of Grok-1's key size {release.key_size} do not divide "
            f"{q} query and {kv} key columns; write a config.json with key_size",
        )
    try:
        return dataclasses.replace(
            release,
            emb_size=emb,
            num_layers=layers,
            num_q_heads=q // release.key_size,
            num_kv_heads=kv // release.key_size,
            ffn_size=ffn,
            vocab_size=vocab,
            num_experts=experts,
        )
    except ConfigError as error:
        raise CheckpointError(directory / "ckpt-0", f"implies an impossible model: {error}") from error


def _check(info: ParameterInfo, file: TensorFile) -> None:
    if file.values.shape != info.shape:
        raise CheckpointError(
            file.path, f"has shape {file.values.shape}; the configuration needs {info.shape}", tensor=info.path
        )
    if file.scales is None:
        if file.values.dtype.kind == "i":
            raise CheckpointError(file.path, "holds integers without scales", tensor=info.path)
        return
    if not info.quantized:
        raise CheckpointError(file.path, "is an 8-bit weight; expected a bare array", tensor=info.path)
    *lead, rows, columns = info.shape
    *scale_lead, groups, scale_columns = file.scales.shape if len(file.scales.shape) > 1 else (0, 0)
    if scale_lead != lead or scale_columns != columns or groups == 0 or rows % groups:
        raise CheckpointError(
            file.path, f"scales of shape {file.scales.shape} do not fit values of shape {info.shape}", tensor=info.path
        )
