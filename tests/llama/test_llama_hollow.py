"""The model beside llama.cpp has no weights until something asks for them, and is known by its files alone."""

from __future__ import annotations

import gguf as gguf_package
import numpy as np
import pytest
import torch
from conftest import SHAPE
from engine_contract import CONTEXT, SIZES, TEXTS, close
from gguf_files import write_gguf
from tiny import random_rows, saved_folder, scramble, tiny_model, tiny_tokenizer

import ccm
from ccm import Session
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.reader import Reader
from ccm.errors import ConfigError
from ccm.files.fingerprint import model_fingerprint
from ccm.methods import as_method, get_method
from ccm.models.hollow import is_hollow, own_parameters
from ccm.models.options import Loading
from ccm.serving.llama import hollow
from ccm.serving.llama.reader import in_llama
from ccm.serving.weights import Gguf, weights_of

#: Families of GGUF files, and what their tiny models have.
FILES = {"llama": SHAPE, "qwen2": SHAPE, "qwen3": {**SHAPE, "head_dim": 64}}


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ab"])  # what the only merge of these files makes
    return tokenizer


@pytest.fixture
def gguf(tokenizer, tmp_path) -> str:
    return written(tmp_path / "tiny.gguf", tokenizer)


def held(model) -> int:
    """Bytes that the model's own parameters take."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _own(model)}.values())


def _own(model):
    return own_parameters(model).values()


def written(path, tokenizer, family="llama", **changes) -> str:
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **FILES[family], **changes}
    write_gguf(path, tiny_model(family, **shape), tokenizer, family)
    return str(path)


def same(name: str) -> None:
    """A model without weights is the loaded one in all but them, and in them after its first pass."""
    whole, words = ccm.load_model(name)
    model, tokenizer = hollow.load(Loading(name, dtype="auto", device="cpu"))
    assert is_hollow(model) and held(model) <= 8 * len(own_parameters(model))
    assert all(bool(p.isnan().all()) for p in _own(model)), "what reads them by mistake must see it"
    assert model.dtype == whole.dtype and model.device == whole.device and not model.training
    assert model_fingerprint(model) == model_fingerprint(whole)
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert model.config.to_dict() == whole.config.to_dict()
    assert tokenizer.get_vocab() == words.get_vocab() and tokenizer.name_or_path == words.name_or_path
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))
    ids = torch.tensor(random_rows([[9]])[0])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert not is_hollow(model) and held(model) == held(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_models_in_folders(family, dtype, tmp_path):
    same(saved_folder(tmp_path, dtype, family=family))


@pytest.mark.parametrize("family", FILES)
def test_models_in_gguf_files(family, tokenizer, tmp_path):
    same(written(tmp_path / "m.gguf", tokenizer, family))


@pytest.mark.parametrize("family", FILES)
def test_parameters_from_a_gguf_file(family, tokenizer, tmp_path):
    """Whole, and by rows, which some files keep in another order; also quantized ones."""
    path = written(tmp_path / "m.gguf", tokenizer, family)
    whole, _ = ccm.load_model(path)
    weights = Gguf(path, whole)
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights.tensor(name), parameter)
        if parameter.ndim == 2:
            assert torch.equal(weights.rows(name, [1, 5, 30]), parameter[[1, 5, 30]])


def test_the_first_pass_of_any_part_brings_the_weights(tmp_path, caplog):
    name = saved_folder(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    for part in (lambda m: m.get_input_embeddings()(ids), lambda m: m.model(ids), lambda m: m(ids)):
        caplog.clear()
        model, _ = hollow.load(Loading(name))
        part(model)
        assert not is_hollow(model) and "asked for in torch" in caplog.text


def test_files_of_another_kind_are_loaded_whole(tmp_path):
    name = saved_folder(tmp_path)
    weights = torch.nn.Module.state_dict(ccm.load_model(name)[0])
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert not is_hollow(hollow.load(Loading(name))[0])


# ---------------------------------------------------------------------- in llama.cpp


@pytest.fixture
def adapter(gguf, tmp_path):
    model, _ = ccm.load_model(gguf)
    scramble(Compressor(model, CompressorConfig(slots=2))).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.usefixtures("runs")
def test_conversations_need_no_weights(gguf, adapter):
    """Folds and answers are those of the loaded model, and memories go from one to the other."""
    methods = []
    for load in (lambda: ccm.load_model(gguf), lambda: hollow.load(Loading(gguf))):
        model, tokenizer = load()
        method = as_method(Compressor.from_pretrained(model, adapter), tokenizer, **SIZES)
        methods.append(in_llama(method, gguf, kind="f32", threads=1))
    here, there = (Session(method, tokenizer) for method in methods)
    for text in TEXTS:
        one, two = (session.generate(text, max_new_tokens=8, do_sample=False) for session in (here, there))
        assert one == two and close(here.memory, there.memory)
    assert there.memory.slots > 4
    assert methods[0].fingerprint() == methods[1].fingerprint()
    assert is_hollow(methods[1].reader.model)


@pytest.mark.usefixtures("runs")
def test_memories_that_ask_for_queries_bring_the_weights_at_the_start(gguf, tokenizer):
    model, _ = hollow.load(Loading(gguf))
    method = get_method("snapkv", tokens=12, window=12).bind(model, tokenizer)
    in_llama(method, gguf)
    assert not is_hollow(model)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("family", FILES)
def test_both_models_read_alike(family, tokenizer, tmp_path):
    """The first layers tell how a file keeps its heads, and that positions are the same."""
    path = written(tmp_path / "m.gguf", tokenizer, family)
    model, _ = hollow.load(Loading(path))
    method = in_llama(get_method("streaming-llm", window=24).bind(model, tokenizer), path)
    assert method.reader.llama.layout.interleaved == (family == "llama")
    assert is_hollow(model)
    model.config.rope_parameters["rope_theta"] = 3.0
    other = get_method("streaming-llm", window=24).bind(hollow.load(Loading(path))[0], tokenizer)
    other.reader.rotary.module.inv_freq.mul_(0.3)
    with pytest.raises(ConfigError, match="keys and values of one text differ"):
        in_llama(other, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["layers.1.post_attention_layernorm.weight", "norm.weight"])
def test_norms_tell_copies_apart(dtype, part, tokenizer, tmp_path):
    """Those of later layers as well, of which nothing shows in the keys and values that are compared."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **SHAPE}
    folder, whole = tmp_path / "model", tiny_model(**shape)
    for name, weight in whole.named_parameters():
        if weight.ndim == 1:
            weight.data = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5
    write_gguf(tmp_path / "same.gguf", whole, tokenizer)
    tokenizer.save_pretrained(folder)
    whole.to(dtype).save_pretrained(folder)
    whole.float().model.get_parameter(part).data.mul_(1.1)
    write_gguf(tmp_path / "other.gguf", whole, tokenizer)
    model, _ = hollow.load(Loading(str(folder)))
    hollow.read(Reader(model), str(tmp_path / "same.gguf"), [1, 2, 3])
    with pytest.raises(ConfigError, match=f"weights of model.{part.split('.post')[0]} differ"):
        hollow.read(Reader(model), str(tmp_path / "other.gguf"), [1, 2, 3])


def quantized(path, to) -> str:
    """The same file with its matrices in 4 bits."""
    reader, kind = gguf_package.GGUFReader(path), gguf_package.GGMLQuantizationType.Q4_0
    writer = gguf_package.GGUFWriter(to, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value, types = field.contents(), field.types
            writer.add_key_value(field.name, value, types[0], types[1] if len(types) > 1 else None)
    for part in reader.tensors:
        weight = np.array(part.data)
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(part.name, gguf_package.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(part.name, weight)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return str(to)


@pytest.mark.usefixtures("runs")
def test_another_quantization_and_another_model(gguf, tokenizer, tmp_path):
    """A coarser copy of the model is taken; one whose last layer is another's is refused, as one of another seed."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **SHAPE}
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    tiny_model(**shape).save_pretrained(folder)
    model, _ = hollow.load(Loading(str(folder)))
    method = get_method("streaming-llm", window=24).bind(model, tokenizer)
    in_llama(method, quantized(gguf, tmp_path / "coarse.gguf"))
    mixed = tiny_model(**shape)
    other = tiny_model(seed=1, **shape)
    mixed.model.layers[-1].load_state_dict(other.model.layers[-1].state_dict())
    for number, wrong in enumerate((mixed, other)):
        write_gguf(tmp_path / f"{number}.gguf", wrong, tokenizer)
        with pytest.raises(ConfigError, match="not the model that the memory is for"):
            in_llama(method, str(tmp_path / f"{number}.gguf"))
    assert is_hollow(model) and isinstance(method.reader, Reader)
    assert weights_of(gguf, model).name == gguf
