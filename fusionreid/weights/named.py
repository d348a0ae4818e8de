"""Pretrained weights by name: timm's of a model, or `auto`, those of the configured backbone.

timm knows where they are, the client of its hub fetches them once and keeps them, and a digest pins them:
`resnet18.a1_in1k@sha256:...` is that very file. Importing this does not import torch.
"""

import difflib
import hashlib
import logging
import re
from pathlib import Path
from typing import NamedTuple

from fusionreid.config import ModelConfig
from fusionreid.weights.pretrained import AUTO, NAME, WeightsError

OF_MODE = {1: "resnet50.tv_in1k", 2: "resnet101.tv_in1k", 3: "resnet152.tv_in1k"}  # torchvision's, as published
OURS = "vit_small_patch16_224"  # published under the name of another model of timm
FILE = "model.safetensors"
TIMEOUT_S = 10  # to ask for a file
SHOWN = 3  # names like the one asked for

log = logging.getLogger(__name__)


class Named(NamedTuple):
    """Weights that a name stands for."""

    name: str  # with its tag, as in resnet18.a1_in1k
    path: Path
    sha256: str

    @property
    def pinned(self) -> str:
        """The name of this very file."""
        return f"{self.name}@sha256:{self.sha256}"


class NotFetchedError(WeightsError):
    """The weights are known and cannot be had here."""


def find_weights(config: ModelConfig, branch: str) -> Named | None:
    """Return the weights that MODEL.PRETRAIN_PATH_<branch>, R or T, names, fetched if need be; None: it names a file.

    WeightsError: no such weights, or their digest is not the pinned one; NotFetchedError: they cannot be fetched.
    """
    key, text = f"MODEL.PRETRAIN_PATH_{branch}", getattr(config, f"PRETRAIN_PATH_{branch}")
    match = NAME.fullmatch(text)
    if match is None or Path(text).is_file():
        return None
    name, repository = _repository(config, branch, match["name"])
    try:
        path = Path(fetch(repository, FILE))
    except Exception as error:  # whatever a network leads its client to
        raise NotFetchedError(
            f"{key}: {name} cannot be fetched: {_reason(error)}; download {_address(repository)} where there is a "
            f"network, and set {key} to the file, or to none for random weights"
        ) from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if match["digest"] not in (None, digest):
        raise WeightsError(
            f"{key}: {name} in {path} has the digest sha256:{digest}, {match['digest']} is wanted: it was published "
            f"anew or is damaged; remove it to fetch it again, or set {key} {name}"
        )
    return Named(name, path, digest)


def pinned(config: ModelConfig) -> ModelConfig:
    """Return the section with the digest of every file that it names by a model, fetched if need be.

    WeightsError as `find_weights`.
    """
    if config.PRETRAIN_CHOICE != "imagenet":
        return config
    used = {"R": config.RES_USE, "T": config.TRANS_USE}
    found = {branch: find_weights(config, branch) for branch in used if used[branch]}
    return config.model_copy(update={f"PRETRAIN_PATH_{b}": named.pinned for b, named in found.items() if named})


def addresses(config: ModelConfig) -> list[str]:
    """Return where the files are that the section names by a model."""
    found = []
    for branch, used in (("R", config.RES_USE), ("T", config.TRANS_USE)):
        text = getattr(config, f"PRETRAIN_PATH_{branch}")
        if used and not Path(text).is_file() and (match := NAME.fullmatch(text)):
            found.append(_address(_repository(config, branch, match["name"])[1]))
    return found


def _repository(config: ModelConfig, branch: str, name: str) -> tuple[str, str]:
    """Return the name with its tag, and its repository on the hub."""
    key = f"MODEL.PRETRAIN_PATH_{branch}"
    return _known(_of_backbone(config, branch, key) if name == AUTO else name, key)


def _of_backbone(config: ModelConfig, branch: str, key: str) -> str:
    """Return timm's name of the configured backbone."""
    if branch == "R":
        name = config.RES_NAME or OF_MODE[config.RES_MODE]
        ours = "_ibn_" in name
    else:
        name = config.TRANSFORMER_TYPE.removesuffix("_TransReID")
        ours = name.startswith("t2t") or name == OURS
    if ours:
        raise WeightsError(f"{key}: timm has no weights of {name}: name a file in place of {AUTO}, or none")
    return name


def _known(name: str, key: str) -> tuple[str, str]:
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if found is None or not found.hf_hub_id:
        known = timm.list_models(pretrained=True)
        close = difflib.get_close_matches(name, known, SHOWN)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise WeightsError(f"{key}: {name!r} is neither a file nor a model of timm with weights{hint}")
    return f"{found.architecture}.{found.tag}" if found.tag else name, found.hf_hub_id


def fetch(repository: str, file: str) -> str:
    """Return the path of a file of the hub in its client's cache; only one that is not there is asked for."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return hf_hub_download(repository, file, local_files_only=True)
    except LocalEntryNotFoundError:
        log.info("downloading the weights %s", repository)
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=TIMEOUT_S)  # without a network: at once, once
        return hf_hub_download(repository, file, etag_timeout=TIMEOUT_S)


def _address(repository: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, FILE)


def _reason(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).partition(". ")[0][:200] or type(error).__name__
