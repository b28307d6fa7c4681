"""Where tensors live: reading and replacing parameters that accelerate may have offloaded. Door to accelerate."""

import ctypes
import logging
import platform
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import (
    align_module_device,
    get_balanced_memory,
    get_max_memory,
    has_offloaded_params,
    infer_auto_device_map,
)
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset, offload_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and ARM, as torch names them


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, whether or not its weights are there now."""
    for submodule in module.modules():
        hook = getattr(submodule, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None and next(submodule.parameters(), None) is not None:
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
        for parameter in submodule.parameters(recurse=False):
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply in bfloat16, several times as fast as in float32.

    Args:
        device: A CPU or an accelerator; of accelerators other than CUDA's it is not known, and False.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # earlier versions of torch do not say
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)


def planned_weights(
    model: nn.Module, device_map: str | Mapping | int | torch.device | None, max_memory: Mapping | None = None
) -> dict[str, int]:
    """Return how many bytes of a model's weights loading would put where: by device, `"cpu"` and `"disk"` included.

    Args:
        model: The model, on any device including the meta device; it is not changed.
        device_map: Where the weights go, as in transformers; None is the CPU.
        max_memory: The memory of each device, as in transformers; default: what is free on this machine.

    Raises:
        RuntimeError: If `device_map` names no device.
        ValueError: If `max_memory` cannot be understood, or `device_map` leaves a weight without a device.
    """
    placement: Mapping = {}
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        placement = _inferred_map(model, device_map, max_memory)
    elif isinstance(device_map, Mapping):
        placement = device_map
    else:
        placement = {"": "cpu" if device_map is None else device_map}
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
        where = next((placement[prefix] for prefix in prefixes if prefix in placement), None)
        if where is None:
            raise ValueError(f"no device is given for {name!r}")
        found[device_label(where)] += parameter.numel() * parameter.element_size()
    return dict(found)


def device_label(device: str | int | torch.device) -> str:
    """Return a device as a string: GPUs with their number.

    Raises:
        RuntimeError: If there is no such kind of device.

    Example:
        >>> device_label(1), device_label("cuda"), device_label("disk")
        ('cuda:1', 'cuda:0', 'disk')
    """
    if device == "disk":
        return "disk"
    named = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return f"{named.type}:{named.index or 0}" if named.type != "cpu" else "cpu"


def _inferred_map(model: nn.Module, kind: str, max_memory: Mapping | None) -> dict:
    """Return the device map that accelerate infers, also for the memory of another machine."""
    whole = list(getattr(model, "_no_split_modules", None) or ())
    accelerate_logger = logging.getLogger("accelerate.utils.modeling")
    level = accelerate_logger.level
    accelerate_logger.setLevel(logging.ERROR)  # it warns of devices that this machine lacks
    try:
        given = None if max_memory is None else dict(max_memory)
        if kind == "sequential":
            memory = get_max_memory(given)
        else:
            memory = get_balanced_memory(
                model, max_memory=given, no_split_module_classes=whole, low_zero=kind == "balanced_low_0"
            )
        return infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    finally:
        accelerate_logger.setLevel(level)


def read_parameter(module: nn.Module, name: str, index: int | None = None) -> Tensor | None:
    """Return a copy of a parameter on the module's execution device, or None if the module has none of that name.

    Args:
        module: The module that holds it directly.
        name: The name in the module, such as `"weight"`.
        index: What is returned of it, along its first dimension; None for all.
    """
    if module._parameters.get(name) is None:
        return None
    with align_module_device(module, execution_device=execution_device(module)):
        aligned = module._parameters[name]
        assert aligned is not None
        return (aligned if index is None else aligned[index]).detach().clone()


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one that may have another shape, in memory or in the store it is offloaded to.

    A plain assignment to an offloaded module would be undone silently by its hook.

    Args:
        module: The module that holds it directly.
        name: The name in the module, such as `"weight"`; the parameter is made if it does not exist.
        value: The new value; it is cast to the dtype, and moved to the device, of the old one, or of the module's
            weight.
    """
    like = module._parameters.get(name)
    like = module._parameters["weight"] if like is None else like
    assert like is not None
    value = value.detach().to(like.dtype)
    if has_offloaded_params(module):
        _store(_offloading(module).weights_map, name, value.cpu().contiguous())
        value = torch.empty_like(value, device="meta")
    else:
        value = value.to(like.device).contiguous()
    module._parameters[name] = nn.Parameter(value, requires_grad=like.requires_grad)


def is_spread(model: PreTrainedModel) -> bool:
    """Return whether a model's weights are on several devices, or partly offloaded to main memory or disk."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or is_offloaded(model)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether weights are loaded each time a module runs."""
    return any(has_offloaded_params(module) for module in model.modules())


def offloaded_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all weights that are loaded each time their module runs."""
    modules = [module for module in model.modules() if has_offloaded_params(module)]
    parts = [part for module in modules for part in module.parameters(recurse=False)]
    return sum(part.numel() * part.element_size() for part in parts)


def restore_ties(model: PreTrainedModel) -> None:
    """Make offloaded weights that are shared one parameter again; a forward pass leaves one for each of its places.

    Otherwise tied parameters are counted, and saved, more than once.
    """
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        path, _, name = target.rpartition(".")
        owner, shared = model.get_submodule(path), model.get_parameter(source)
        own = owner._parameters.get(name)
        if own is not None and own.is_meta and shared.is_meta:
            owner._parameters[name] = shared


def model_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many parameters a model has, and their bytes; shared ones count once, wherever they are."""
    restore_ties(model)
    sizes = [(parameter.numel(), parameter.element_size()) for parameter in model.parameters()]
    return sum(count for count, _ in sizes), sum(count * size for count, size in sizes)


@contextmanager
def savable_if_offloaded(model: PreTrainedModel) -> Iterator[None]:
    """Let a block of code save a model: transformers reads a device map, which `cpu_offload` does not make."""
    own = getattr(model, "hf_device_map", None)
    if own is None and is_offloaded(model):
        model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), large_blocks_returned(is_offloaded(model)):
            # Shards are small by default: one of them is in memory at a time.
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        if own is None and hasattr(model, "hf_device_map"):
            del model.hf_device_map


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Keep all weights of a module on its device for a while: it runs often and is loaded once.

    Args:
        module: The module, offloaded or not, as a whole or in parts; nothing is written back.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part))
                hook = _offloading(part)
                stack.callback(setattr, hook, "offload", True)
                hook.offload = False  # otherwise each forward pass loads and drops them again
        yield


def keep_parameters(module: nn.Module) -> Callable[[], None]:
    """Return a function that undoes every `replace_parameter` from now on: the same values, bit for bit.

    Parameters in memory are put back as the objects that they are now; offloaded ones are copied to the CPU.

    Args:
        module: The module that holds them directly.
    """
    kept = dict(module._parameters)
    if not has_offloaded_params(module):
        return lambda: module._parameters.update(kept)
    values = {name: value.cpu() for name in kept if (value := read_parameter(module, name)) is not None}

    def put_back() -> None:
        for name in kept:
            if name in values:
                replace_parameter(module, name, values[name])
            else:
                module._parameters[name] = None

    return put_back


def _offloading(module: nn.Module) -> AlignDevicesHook:
    """Return accelerate's hook of a module for which `has_offloaded_params` is true."""
    hook = module._hf_hook
    assert isinstance(hook, AlignDevicesHook)
    return hook


def _store(store: object, key: str, value: Tensor) -> None:
    """Write into accelerate's map of offloaded weights; files of the original checkpoint are never touched."""
    while isinstance(store, PrefixedDataset):
        key, store = store.prefix + key, store.dataset
    if not isinstance(store, OffloadedWeightsLoader):
        assert isinstance(store, MutableMapping)
        store[key] = value
        return
    if not {key, f"{key.rpartition('.')[0]}.weight"} & set(store.state_dict):
        if store.save_folder is None:  # weights are read from the checkpoint's own files
            store.save_folder = tempfile.mkdtemp(prefix="otprune-offload-")
            weakref.finalize(store, shutil.rmtree, store.save_folder, ignore_errors=True)
        store.index.pop(key, None)
        offload_weight(value, key, store.save_folder, index=store.index)
    else:
        store.state_dict[key] = value
    if key not in store.all_keys:
        store.all_keys.append(key)


_M_MMAP_THRESHOLD = -3  # from glibc's <malloc.h>


_LARGE = 2**20  # bytes


_USUAL = 2**25  # bytes: where glibc's own adjusting ends, and is in a process that ever freed a block of that size


@contextmanager
def large_blocks_returned(is_wanted: bool = True) -> Iterator[None]:
    """Allocate large blocks of memory one by one, so that the system has each back when it is freed.

    Otherwise glibc keeps freed blocks of up to 32 MB and, since tensors are aligned, often finds none that fits the
    next tensor of the same size, so that a run takes more memory with every layer. The previous behavior is restored
    afterwards. With another C library nothing is done.

    Args:
        is_wanted: Whether to do anything.
    """
    if not is_wanted or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give memory that glibc keeps after it is freed back to the system; do nothing with another C library."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the size of a model's weights, shared ones once."""
    return model_sizes(model)[1]
