"""What DetectionCheckpointer reads from files, and what it refuses to read."""

import codecs
import pickle
from collections import OrderedDict

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

own_reader = pytest.mark.skipif(
    "embedded" not in detectron2.__file__, reason="the installed detectron2 unpickles anything"
)


def small_model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(3, 1)})


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape) + 1


@pytest.fixture
def model():
    return small_model()


def load(model, path):
    return DetectionCheckpointer(model).load(str(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_of_every_protocol(model, tmp_path, protocol):
    weights = OrderedDict({"a.weight": numbers(3, 2).numpy()})
    extra = {"set": {1}, "scalar": np.float64(2.5), "raw": b"\xff\x00"}
    extra["columns"] = np.asfortranarray([[1, 2], [3, 4]])
    with open(tmp_path / "x.pkl", "wb") as file:
        pickle.dump({"model": weights, "__author__": "x", "extra": extra}, file, protocol)
    rest = load(model, tmp_path / "x.pkl")
    assert torch.equal(model["a"].weight, numbers(3, 2))
    assert {key: rest["extra"][key] for key in ("set", "scalar")} == {"set": {1}, "scalar": 2.5}
    assert rest["extra"]["columns"].tolist() == [[1, 2], [3, 4]]
    if protocol >= 3:  # earlier ones cannot tell bytes from text
        assert rest["extra"]["raw"] == b"\xff\x00"


@own_reader
def test_python2_pickle_of_numpy1(model, tmp_path):
    """Byte strings and numpy's old module names, as in detectron2's oldest weights."""
    raw = numbers(3, 2).numpy().tobytes().decode("latin1")
    text = codecs.encode(raw, "unicode_escape").decode().replace("'", "\\x27")
    lines = (
        "(dp0\nS'__author__'\np1\nS'me'\np2\nsS'model'\np3\n(dp4\nS'a.weight'\np5\n"
        "cnumpy.core.multiarray\n_reconstruct\np6\n(cnumpy\nndarray\np7\n(I0\ntp8\nS'b'\np9\ntp10\n"
        "Rp11\n(I1\n(I3\nI2\ntp12\ncnumpy\ndtype\np13\n(S'f4'\np14\nI0\nI1\ntp15\nRp16\n"
        "(I3\nS'<'\np17\nNNNI-1\nI-1\nI0\ntp18\nbI00\n"
        f"S'{text}'\np19\ntp20\nbss."
    )
    (tmp_path / "old.pkl").write_bytes(lines.encode("latin1"))
    load(model, tmp_path / "old.pkl")
    assert torch.equal(model["a"].weight, numbers(3, 2))


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return open, (self.flag, "w")


@own_reader
@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_malicious_file(model, tmp_path, name, wrapped):
    flag = tmp_path / "flag"
    content = {"model": {}, "__author__": "x", "evil": [Evil(flag)] if wrapped else Evil(flag)}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        zipped = name == "x.pth"
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match=rf"{name}.*io\.open") as info:
        load(model, tmp_path / name)
    assert "\n" not in str(info.value)
    assert not flag.exists()


@own_reader
@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n.",
        b"cnumpy.f2py.diagnose\nrun\n.",
        b"cnumpy\nload\n.",
        b"cdetectron2.utils.registry\nlocate\n.",
        b"c_codecs\nencode\n(Vx\nVzlib_codec\ntR.",
        b"ccollections\ndefaultdict\n.",
    ],
)
def test_names_that_a_pickle_may_not_use(model, tmp_path, text):
    (tmp_path / "x.pkl").write_bytes(text)
    with pytest.raises(pickle.UnpicklingError, match=r"x\.pkl"):
        load(model, tmp_path / "x.pkl")


@own_reader
@pytest.mark.parametrize("name", ["x.pkl", "x.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_damaged_file_is_one_line(model, tmp_path, name, keep):
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"a.weight": np.ones((3, 2))}}))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(pickle.UnpicklingError, match=rf"{name}: damaged") as info:
        load(model, tmp_path / name)
    assert "\n" not in str(info.value)


@own_reader
@pytest.mark.parametrize("content", [[1], {"model": 3}])
def test_file_without_a_state_dict(model, tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth.*expected a dict"):
        load(model, tmp_path / "x.pth")


@own_reader
def test_training_state_with_numpy_and_python_values(model, tmp_path):
    np.random.seed(1)
    state = {
        "numpy": np.random.get_state(),
        "scalars": [np.float32(1.5), np.int64(3), np.bool_(True)],
        "plain": {"a": (1, None, "x", b"y", 2.5, {3})},
        "types": [torch.float16, torch.Size([1, 2])],
    }
    saver = DetectionCheckpointer(model, str(tmp_path))
    saver.save("model_0000001", state=state, iteration=1)
    rest = DetectionCheckpointer(small_model(), str(tmp_path)).resume_or_load("")
    assert rest["iteration"] == 1
    assert rest["state"]["plain"] == state["plain"]
    assert rest["state"]["scalars"] == state["scalars"]
    np.random.seed(99)
    np.random.set_state(rest["state"]["numpy"])
    drawn = np.random.rand()
    np.random.seed(1)
    assert drawn == np.random.rand()
