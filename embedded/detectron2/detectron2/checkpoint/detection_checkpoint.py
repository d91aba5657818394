"""The checkpointer of detectors."""

from typing import Any
from urllib.parse import parse_qs

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.checkpoint import _files, _names
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = ["DetectionCheckpointer"]


class DetectionCheckpointer(Checkpointer):
    """A checkpointer that also reads detectron2's model zoo and ImageNet ResNets.

    It reads ``.pth`` files, ``.pkl`` files of detectron2 and Caffe2, and torchvision's ResNet
    weights; never code. In processes other than the main one it does not save.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """Keep the arguments.

        Args:
            model: the model; a DistributedDataParallel around it is removed.
            save_dir: folder of the checkpoints.
            save_to_disk: whether to save at all; by default in the main process only.
            **checkpointables: objects with ``state_dict`` and ``load_state_dict`` to save too.
        """
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager
        self._match_by_suffix = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint and return what is in it beyond the model and the checkpointables.

        Args:
            path: file or URL; ``?matching_heuristics=True`` at its end matches the parameters'
                names by their suffixes. Empty: nothing is loaded.
            *args: see fvcore's Checkpointer.
            **kwargs: see fvcore's Checkpointer.
        """
        path, _, query = (path or "").partition("?")
        options = parse_qs(query)
        self._match_by_suffix = options.pop("matching_heuristics", ["False"]) == ["True"]
        if options:
            raise ValueError(f"checkpoint {path}: unknown option {', '.join(options)} after '?'")
        if path:
            path = self.path_manager.get_local_path(path)
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            content = _files.load_pickle(filename)
            _check_dict(content, filename)
            if "model" not in content:
                content = _caffe2_checkpoint(content)
        else:
            content = self._torch_load(filename)
            _check_dict(content, filename)
            if "model" not in content:
                content = {"model": content}
        _check_dict(content["model"], f"{filename}: 'model'")
        if self._match_by_suffix:
            content["matching_heuristics"] = True
        return content

    def _torch_load(self, f: str) -> Any:
        return _files.load_torch(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights, model_state = checkpoint["model"], self.model.state_dict()
        by_suffix = checkpoint.get("matching_heuristics", False)
        if _names.is_torchvision_resnet(weights) and "conv1.weight" not in model_state:
            if any(key.endswith("res2.0.conv1.weight") for key in model_state):
                weights = {_names.from_torchvision(key): value for key, value in weights.items()}
            by_suffix = True
        if by_suffix:
            self._convert_ndarray_to_tensor(weights)
            weights = _names.match_by_suffix(model_state, weights)
            # counters of live BatchNorm mean nothing to a frozen one
            checkpoint["model"] = {
                key: value
                for key, value in weights.items()
                if key in model_state or not key.endswith("num_batches_tracked")
            }
        incompatible = super()._load_model(checkpoint)
        # normalisation constants come from the config; older checkpoints lack them
        constants = {"pixel_mean", "pixel_std"} & dict(
            self.model.named_buffers(recurse=False)
        ).keys()
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if key not in constants]
        return incompatible


def _check_dict(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint {name} is a {type(value).__name__}, expected a dict")


def _caffe2_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    blobs = content.get("blobs", content)
    weights = {
        _names.from_caffe2(name): value
        for name, value in blobs.items()
        if not name.endswith("_momentum")
    }
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
