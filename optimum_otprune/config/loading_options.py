"""The options of `OTPruner.from_pretrained`; torch is not imported, so that `otprune --help` is fast."""

import os
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from optimum_otprune.storage.hub.options import About, HubOptions

if TYPE_CHECKING:
    import torch


class PlacementOptions(TypedDict, total=False):
    """The dtype and the devices of the loaded weights."""

    dtype: Annotated[
        "str | torch.dtype | None",
        About("auto", "data type of the weights, such as float32 or bfloat16; auto is the checkpoint's"),
    ]
    device_map: Annotated[
        "str | dict[str, object] | int | torch.device | None", About(None, "where layers go, such as auto or cuda:0")
    ]
    max_memory: Annotated[dict[Any, Any] | None, About(None, "memory that weights may take, by device", is_flag=False)]
    offload_folder: Annotated[
        str | os.PathLike[str] | None, About(None, "folder for layers that are offloaded to disk", "DIR")
    ]


class LoadingOptions(PlacementOptions, HubOptions, total=False):
    """The options of loading a model."""

    trust_remote_code: Annotated[bool, About(False, "run modeling code from the repository")]
    load_in_8bit: Annotated[
        bool,
        About(
            False,
            "load the weights in 8 bits, which needs bitsandbytes: for a dense model that another one is measured "
            "against or trained towards, not for one that is pruned",
            is_flag=False,
        ),
    ]
    verify: Annotated[
        bool,
        About(
            False,
            "first compare every file with the SHA-256 in the manifest that `save_pretrained` wrote; a flipped byte "
            "or a stale file loads without an error otherwise",
            is_flag=False,
        ),
    ]
