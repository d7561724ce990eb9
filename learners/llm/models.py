"""Language models to train: the embedded one and those of Hugging Face; their weights as bytes and as folders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.llm import ModelSettings
from learners.llm.tokenizers import CharacterTokenizer, PretrainedTokenizer, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 4096  # tokens that the embedded model can read; rotary positions cost no weights
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_PIECE = 2**20  # bytes of weights taken over at once; a multiple of every type's size
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Model:
    """A causal language model (with low-rank additions: peft's wrapper round it) and its tokenizer."""

    network: PreTrainedModel
    tokenizer: Tokenizer


def make_model(
    settings: ModelSettings,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The model that `settings` describe, in evaluation mode (no dropout), with all weights of the type `dtype`.

    `seed` decides the embedded model's weights and the low-rank additions, in every dtype and on every device alike; global
    random state stays as it was. The additions of Hu et al. 2021 (LoRA, arXiv 2106.09685 §4.1) begin as zero.

    Raises ValueError if a package or the folder is missing, or the folder holds no whole model with a tokenizer.
    """
    network: PreTrainedModel
    tokenizer: Tokenizer
    with _seeded(seed):
        if settings.path is None:
            tokenizer = CharacterTokenizer()
            network = _embedded(settings, tokenizer)
            # Not network.to(dtype): the rotary frequencies are buffers, which lose their precision by it.
            for parameter in network.parameters():
                parameter.data = parameter.data.to(dtype)
        else:
            network, tokenizer = _pretrained(settings.path, dtype)
        if settings.lora_rank is not None:
            network = _with_additions(network, settings.lora_rank, settings.lora_alpha)
    return Model(network.to(device).eval(), tokenizer)


def weights_bytes(network: nn.Module) -> bytes:
    """All parameters as one safetensors buffer, tied ones once, under the names they have in the network.

    Low-rank additions are merged into the weights of the model below, whose names these are: who loads them need not know of
    additions. Parameters divided among processes (FSDP2) are gathered, so all processes have to call this.
    """
    # One copy; safetensors.torch.save makes more: 0.13 s instead of 0.05 s for 100 MB on one core.
    tensors = _merged(network)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _dtype_name(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = [tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *numbers])


def load_weights(network: nn.Module, data: bytes | memoryview) -> None:
    """Takes over in place what `weights_bytes` wrote of a model of the same shape, in the network's own type.

    Raises ValueError, changing nothing, if names or shapes differ, or the network has low-rank additions.
    """
    if _has_additions(network):
        raise ValueError(
            "expected a model without low-rank additions: weights are published with them merged; make the model that loads "
            "them with lora_rank None"
        )
    tensors = _stored(data)
    parameters = dict(network.named_parameters())
    misfits = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", sorted(parameters.keys() - tensors.keys())),
            ("unknown", sorted(tensors.keys() - parameters.keys())),
            (
                "of another shape",
                [
                    f"{name} {tensors[name].shape} for {tuple(parameter.shape)}"
                    for name, parameter in parameters.items()
                    if name in tensors and tensors[name].shape != parameter.shape
                ],
            ),
        )
        if names
    ]
    if misfits:
        raise ValueError(
            f"expected weights of the {len(parameters)} parameters of {type(network).__name__}, got {len(tensors)} tensors "
            f"({'; '.join(misfits)}); actors and learners need the same model settings"
        )
    # torch warns of tensors over `bytes`, as it might write there; through a buffer that stays in the cache 100 MB take
    # 0.015 s on one core, through a copy of them 0.075 s.
    buffer = bytearray(_PIECE)
    view = memoryview(data)
    with torch.no_grad():
        for name, parameter in parameters.items():
            stored, flat = tensors[name], parameter.view(-1)
            for begin in range(stored.begin, stored.end, _PIECE):
                size = min(_PIECE, stored.end - begin)
                buffer[:size] = view[begin : begin + size]
                piece = torch.frombuffer(buffer, dtype=stored.dtype, count=size // stored.dtype.itemsize)
                first = (begin - stored.begin) // stored.dtype.itemsize
                flat[first : first + len(piece)].copy_(piece)


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a folder that `AutoModelForCausalLM`, `AutoTokenizer` and `make_model` read; low-rank additions are merged."""
    tokenizer = model.tokenizer
    if isinstance(tokenizer, CharacterTokenizer):
        tokenizer = tokenizer.pretrained()
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError(f"expected a tokenizer of learners.llm.tokenizers, got {type(tokenizer).__name__}")
    with _quiet(_package("transformers")):
        _base(model.network).save_pretrained(folder, state_dict=_merged(model.network))
        tokenizer.tokenizer.save_pretrained(folder)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialisation draws from torch's global generator of the CPU; it is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed GPUs as well.
        torch.default_generator.manual_seed(seed)
        yield


def _embedded(settings: ModelSettings, tokenizer: CharacterTokenizer) -> PreTrainedModel:
    if settings.width % (2 * settings.heads):
        raise ValueError(
            f"expected model.width to be a multiple of twice model.heads, got {settings.width} and {settings.heads}"
        )
    transformers = _package("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad,
        bos_token_id=tokenizer.begin,
        eos_token_id=tokenizer.end,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def _pretrained(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PretrainedTokenizer]:
    transformers = _package("transformers")
    folder = Path(path).expanduser()
    if local := folder.is_dir():
        path = str(folder)
    else:
        _require_on_hub(path)
    only = {"trust_remote_code": False, "local_files_only": local}
    try:
        with _quiet(transformers):
            network, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **only
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **only)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"expected model.path {path!r} to be a causal language model of Hugging Face: config.json, weights as "
            f"safetensors, and a tokenizer; got {type(error).__name__}: {error}"
        ) from error
    if absent := sorted(loaded["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ValueError(
            f"expected model.path {path!r} to hold all weights of {type(network).__name__}; missing are "
            f"{', '.join(absent[:5])}{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}"
        )
    result = PretrainedTokenizer(tokenizer)
    embeddings = network.get_input_embeddings().weight.shape[0]
    if result.vocab_size > embeddings:
        raise ValueError(
            f"expected model.path {path!r} to hold a tokenizer of at most the model's {embeddings} tokens, got "
            f"{result.vocab_size}: tokenizer and weights belong to different models"
        )
    return network, result


def _require_on_hub(path: str) -> None:
    """Raises ValueError unless the hub has `path`, or its cache on this machine; transformers would retry for a minute."""
    where = f"there is no folder {path!r} in {Path.cwd()}"
    if not _HUB_NAME.fullmatch(path):
        raise ValueError(f"expected model.path to be a folder with a Hugging Face model: {where}")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        HfApi().model_info(path, timeout=10.0)
    except Exception as error:  # of the network's many
        raise ValueError(
            f"expected model.path to be a folder with a Hugging Face model, or its name on the hub: {where}, and the hub did "
            f"not answer with such a model ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(f"training language models needs the package {name}: pip install 'millrace[llm]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars: they would run into the output of the run."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _with_additions(network: PreTrainedModel, rank: int, alpha: float) -> PreTrainedModel:
    peft = _package("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(network, config)


def _has_additions(network: nn.Module) -> bool:
    return hasattr(network, "peft_config")


class _Stored(NamedTuple):
    """Where the numbers of one tensor lie in a safetensors buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _stored(data: bytes | memoryview) -> dict[str, _Stored]:
    """The tensors of a safetensors buffer; raises ValueError if it is none, or holds other than floats."""
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else len(data)
    start = 8 + size
    tensors: dict[str, _Stored] = {}
    try:
        if start > len(data):
            raise ValueError(f"it should begin with {start} bytes of header")
        header = json.loads(bytes(data[8:start]))  # of a memory view as well
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not 0 <= begin <= end <= len(data) - start or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} {shape} cannot lie at {begin} to {end} of {len(data) - start} bytes")
            tensors[name] = _Stored(dtype, shape, start + begin, start + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected weights as a safetensors buffer of {', '.join(_DTYPES)}, got {len(data)} bytes: "
            f"{type(error).__name__}: {error}"
        ) from error
    return tensors


def _dtype_name(name: str, tensor: Tensor) -> str:
    for text, dtype in _DTYPES.items():
        if tensor.dtype == dtype:
            return text
    raise ValueError(f"expected parameters of type {', '.join(_DTYPES)}, got {name} of {tensor.dtype}")


def _base(network: Any) -> Any:
    return network.get_base_model() if _has_additions(network) else network


@torch.no_grad()
def _merged(network: Any) -> dict[str, Tensor]:
    """Name and value of every parameter of the model without additions, on the CPU."""
    if not _has_additions(network):
        return {name: _whole(parameter) for name, parameter in network.named_parameters()}
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = network.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    tensors: dict[str, Tensor] = {}
    additions: set[str] = set()
    for name, layer in layers.items():
        for inner, parameter in layer.named_parameters():
            if not inner.startswith("base_layer."):
                additions.add(f"{name}.{inner}")
            elif inner == "base_layer.weight":
                delta = sum((layer.get_delta_weight(adapter) for adapter in layer.active_adapters), torch.zeros(()))
                tensors[f"{name}.weight"] = _whole(parameter + delta.to(parameter))
    for name, parameter in base.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if name not in additions and plain not in tensors:
            tensors[plain] = _whole(parameter)
    return tensors


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()
